"""Slots as we count them and as real servers count them."""

from __future__ import annotations

import random

from redis import Redis

from shardq.core.slots import SLOTS, key_slot, tag_for_slot
from shardq.ops.local_cluster import LocalCluster

CHUNK = 2000


def server_slots(cluster: LocalCluster, keys: list[bytes]) -> list[int]:
    """CLUSTER KEYSLOT of every key, over one connection."""
    slots: list[int] = []
    with Redis(port=cluster.ports[0], protocol=2) as node:
        for first in range(0, len(keys), CHUNK):
            pipeline = node.pipeline(transaction=False)
            for key in keys[first : first + CHUNK]:
                pipeline.execute_command("CLUSTER KEYSLOT", key)
            slots += pipeline.execute()
    return slots


def random_keys(count: int) -> list[bytes]:
    """Keys of any bytes, half of them of mostly braces."""
    chance = random.Random(7)
    alphabets = [bytes(range(256)), b"{}{}{}ab\xff\0"]
    return [bytes(chance.choices(alphabets[turn % 2], k=chance.randrange(24))) for turn in range(count)]


def test_the_slot_of_any_key(cluster: LocalCluster) -> None:
    keys = random_keys(10_000)
    assert sum(b"{" in key and b"}" in key[key.find(b"{") :] for key in keys) > 1000
    assert server_slots(cluster, keys) == [key_slot(key) for key in keys]


def test_the_slot_of_every_tag(cluster: LocalCluster) -> None:
    tags = [tag_for_slot(slot) for slot in range(SLOTS)]
    keys = [f"shardq:orders:{{{tag}}}:3:stream".encode() for tag in tags]
    assert server_slots(cluster, keys) == list(range(SLOTS))
