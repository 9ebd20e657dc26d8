"""What the leader of a group calls of the functions library: it offers shards, many in one go. Decides nothing: to whom
is for the coordinator to say. Replies are untrusted, as in calls.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardq.errors import CorruptData, StoreError
from shardq.storage.commands import pack_call
from shardq.storage.keys import ShardKeys
from shardq.storage.pipes import Pipes
from shardq.storage.reply import shape


async def offer_all(
    pipes: Pipes, group: str, offers: Sequence[tuple[ShardKeys, int, str, str]], *, timeout_s: float
) -> list[str | StoreError | CorruptData]:
    """Offers many shards, each for (its keys, plan version, heir, the heir's nonce): of each the status word, or what
    it failed with."""
    commands = [
        (shard.slot, pack_call("offer", [shard.group(group)], [version, heir, nonce, shard.bell]))
        for shard, version, heir, nonce in offers
    ]
    return [_status("offer", reply) for reply in await pipes.each(commands, timeout_s=timeout_s)]


def _status(function: str, reply: Any) -> str | StoreError | CorruptData:
    if isinstance(reply, StoreError | CorruptData):
        return reply
    try:
        with shape(function):
            return str(reply[0].decode())
    except CorruptData as error:
        return error
