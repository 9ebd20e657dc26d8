"""What Redis holds of a run's queue: before the traffic, while it flows, and at the end. Reads only; judges nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import shardq
from shardq.errors import StoreError
from shardq.storage.commands import pack_command
from shardq.storage.counters import ShardCounters
from shardq.storage.keys import ShardKeys
from tests.faults.clients import GROUP, effects_key, key_name
from tests.faults.lab import Lab
from tests.faults.story import Dead, Effect, ShardState
from tests.runtime.harness import backlog

Memory = Mapping[int, Mapping[str, int]]
_PAGE = 5000


async def memory(queue: shardq.Queue) -> Memory:
    """Bytes of each shard's own keys, by what they are."""
    return {shard: await _memory_of(queue, keys) for shard, keys in queue.shards.items()}


async def _memory_of(queue: shardq.Queue, keys: ShardKeys) -> dict[str, int]:
    names = {
        "stream": keys.stream,
        "meta": keys.meta,
        "group": keys.group(GROUP),
        "later": keys.later(GROUP),
        "kept": keys.kept(GROUP),
        "dead": keys.dead(GROUP),
        "delayed": keys.delayed,
        "expiring": keys.expiring,
        "timed": keys.timed,
    }
    found = {what: await command(queue, keys, "MEMORY", "USAGE", key, "SAMPLES", 0) for what, key in names.items()}
    return {what: int(size or 0) for what, size in found.items()}


async def command(queue: shardq.Queue, keys: ShardKeys, *words: str | int) -> Any:
    """One command where a shard's keys are."""
    return await queue.client.pipes.command(keys.slot, pack_command(*words))


async def effects(queue: shardq.Queue, keys: int) -> dict[str, list[Effect]]:
    """Of every key, in the order of its list."""
    return {name: await _effects_of(queue, name) for name in map(key_name, range(keys))}


async def _effects_of(queue: shardq.Queue, key: str) -> list[Effect]:
    shard, name = queue.place_of(key), queue.local_key(effects_key(key), key)
    found: list[Effect] = []
    while True:
        page = await command(queue, shard, "LRANGE", name, len(found), len(found) + _PAGE - 1)
        found += map(parse_effect, page)
        if len(page) < _PAGE:
            return found


def parse_effect(item: bytes) -> Effect:
    producer, number, epoch, process, id_ = item.decode().split(":")
    return Effect((producer, int(number)), int(epoch), process, id_)


async def dead(queue: shardq.Queue) -> list[Dead]:
    letters = [letter async for letter in queue.dead_letters(GROUP)]
    return [Dead((x.value[0], x.value[1]), str(x.key), x.message_id, x.error) for x in letters]


async def shards(queue: shardq.Queue, before: Memory) -> list[ShardState]:
    after = await memory(queue)
    counters = await queue.counters([GROUP])
    return [state_of(shard, found, before.get(shard, {}), after[shard]) for shard, found in counters.items()]


def state_of(shard: int, found: ShardCounters, before: Mapping[str, int], after: Mapping[str, int]) -> ShardState:
    group = found.groups[GROUP]
    return ShardState(
        shard,
        appended=found.appended,
        acked=group.acked,
        dead=group.dead,
        delivered=group.delivered,
        backlog=backlog(found, GROUP),
        pending=group.pending_entries,
        waiting=group.waiting,
        dead_letters=group.dead_letters,
        memory_before=before,
        memory_after=after,
    )


def strays(lab: Lab, queue: shardq.Queue) -> list[str]:
    """Keys of the queue that are neither those a queue has, nor effects."""
    known = {queue.keys.routing, queue.keys.control(GROUP), queue.keys.schedules}
    for keys in queue.shards.values():
        known |= {keys.stream, keys.meta, keys.delayed, keys.expiring, keys.timed, *keys.of_group(GROUP)}
    found: set[str] = set()
    for server in lab.masters():
        for pattern in queue.keys.whole_queue:
            found |= set(_scan(lab, server, pattern))
    return sorted(key for key in found - known if ":data:seen:" not in key)


def _scan(lab: Lab, server: Any, pattern: str) -> Sequence[str]:
    cursor = "0"
    found: list[str] = []
    while True:
        try:
            cursor, page = lab.command(server, "SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
        except StoreError:
            return found  # it went away: the cluster is judged elsewhere
        found += page
        if str(cursor) == "0":
            return found
