"""Dead letters as Python calls (scripts/dead.lua). Decides nothing about which: runtime/dead.py does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardq.errors import UnknownGroup
from shardq.storage.commands import pack_command
from shardq.storage.keys import ShardKeys
from shardq.storage.pipes import Pipes
from shardq.storage.reply import entries_of, shape

Item = tuple[bytes, bytes]
JobRecord = tuple[str, int, bytes]  # its id, for how many ms it is kept, the record


async def read_dead(
    pipes: Pipes, shard: ShardKeys, group: str, after: str, count: int
) -> list[tuple[str, list[bytes]]]:
    """Dead letters behind the entry id `after` ('-': from the first), as entry id and fields."""
    start = "-" if after == "-" else f"({after}"
    packed = pack_command("XRANGE", shard.dead(group), start, "+", "COUNT", count)
    reply = await pipes.command(shard.slot, packed)
    with shape("XRANGE"):
        return entries_of(reply)


async def read_one(pipes: Pipes, shard: ShardKeys, group: str, entry: str) -> list[tuple[str, list[bytes]]]:
    """The dead letter of this entry id, as `read_dead` gives it; empty where there is none."""
    reply = await pipes.command(shard.slot, pack_command("XRANGE", shard.dead(group), entry, entry))
    with shape("XRANGE"):
        return entries_of(reply)


async def replay(
    pipes: Pipes,
    shard: ShardKeys,
    group: str,
    letters: Sequence[tuple[str, int, Sequence[Item]]],
    jobs: Mapping[str, JobRecord] | None = None,
) -> int:
    """Hands back (entry id, messages it stood for, its items); returns how many were there still. `jobs` has by entry
    id what the record of its job says from now on."""
    keys = [shard.meta, *shard.of_group(group)]
    if jobs:
        keys += [shard.expiring, shard.timed]
    args: list[str | bytes | int] = [group, shard.bell]
    for entry, count, items in letters:
        job = jobs.get(entry, ("", 0, b"")) if jobs else ()
        args += [entry, count, len(items), *job, *(part for item in items for part in item)]
    reply: Any = await pipes.call(shard.slot, "replay", keys, args)
    with shape("replay"):
        missing = reply[0] == b"MISSING"
        handed = 0 if missing else int(reply[1])
    if missing:
        msg = f"group {group!r} is not there any more on {shard.meta}"
        raise UnknownGroup(msg)
    return handed


async def purge(pipes: Pipes, shard: ShardKeys, group: str, entries: Sequence[str]) -> int:
    """Forgets dead letters; returns how many were there still."""
    reply = await pipes.call(shard.slot, "purge", [shard.dead(group)], list(entries))
    with shape("purge"):
        return int(reply[1])
