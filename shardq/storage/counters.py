"""The counters of shards and groups as they are kept in Redis (scripts/inspect.lua). Reads only; computes no rates,
ages or sums (ops/inspect.py does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardq.core.load import Counts
from shardq.errors import UnknownQueue
from shardq.storage.calls import missing_shard
from shardq.storage.commands import pack_call, pack_command
from shardq.storage.keys import ShardKeys
from shardq.storage.pipes import Pipes
from shardq.storage.reply import shape

_META = ("state", "appended", "bytes", "groups", "delayed", "dropped")
_GROUP = (
    "owner",
    "epoch",
    "token",
    "renewals",
    "heir",
    "plan",
    "base",
    "acked",
    "retried",
    "dead",
    "delivered",
    "foreign",
    "last",
    "replayed",
    "lost",
    "given_up",
)
_COUNTS = ("base", "acked", "retried", "dead", "replayed", "delivered", "foreign", "lost", "given_up")


@dataclass(frozen=True, slots=True)
class GroupCounters:
    """One group on one shard, as its hash and the stream say. Counts are messages unless named otherwise.

    `waiting` are retries and what they hold back; `dead` is all that ever became dead letters, `dead_letters` what is
    kept of them now; `lost` was dropped by a full queue before the group got it, `skip` of it not yet passed by;
    `given_up` was delivered and left behind by a reset, `delivered` is without it. `oldest_waiting` is the entry of the
    message that was put off first and still waits.
    """

    owner: str
    epoch: int
    held: bool
    renewals: str
    heir: str
    base: int
    acked: int
    retried: int
    dead: int
    replayed: int
    delivered: int
    foreign: int
    lost: int
    given_up: int
    pending_entries: int
    oldest_pending: str
    oldest_unread: str
    oldest_waiting: str
    waiting: int
    dead_letters: int
    skip: int


@dataclass(frozen=True, slots=True)
class ShardCounters:
    """One shard. `groups` holds only groups that were asked for and exist; `registered` names all there are."""

    time_ms: int
    entries: int
    first_entry: str
    state: str
    appended: int
    bytes: int
    delayed: int
    dropped: int
    registered: tuple[str, ...]
    groups: dict[str, GroupCounters]


async def inspect(pipes: Pipes, shard: ShardKeys, groups: Sequence[str], *, timeout_s: float = 5.0) -> ShardCounters:
    """The counters of a shard and of the groups named. Raises UnknownQueue when its keys are gone."""
    (counters,) = await inspect_all(pipes, [shard], groups, timeout_s=timeout_s)
    if counters is None:
        raise UnknownQueue(missing_shard(shard))
    return counters


async def inspect_all(
    pipes: Pipes, shards: Sequence[ShardKeys], groups: Sequence[str], *, timeout_s: float = 5.0
) -> list[ShardCounters | None]:
    """The same of many shards, side by side; None for one whose keys are gone."""
    calls = [(shard.slot, pack_call("inspect", _keys(shard, groups), groups)) for shard in shards]
    replies = await pipes.commands(calls, timeout_s=timeout_s)
    return [_read(shard, groups, reply) for shard, reply in zip(shards, replies, strict=True)]


def _keys(shard: ShardKeys, groups: Sequence[str]) -> list[str]:
    keys = [shard.stream, shard.meta]
    for group in groups:
        keys += [shard.group(group), shard.dead(group), shard.later(group), shard.kept(group)]
    return keys


def _read(shard: ShardKeys, groups: Sequence[str], reply: Any) -> ShardCounters | None:
    with shape("inspect"):
        missing = reply[0] == b"MISSING"
        if not missing:
            meta = dict(zip(_META, (value.decode() for value in reply[4]), strict=True))
            found = {group: _group_counters(part) for group, part in zip(groups, reply[5:], strict=True) if part[0][1]}
            return ShardCounters(
                int(reply[1]),
                int(reply[2]),
                reply[3].decode(),
                meta["state"],
                int(meta["appended"]),
                int(meta["bytes"]),
                int(meta["delayed"] or 0),
                int(meta["dropped"] or 0),
                tuple(meta["groups"].split()),
                found,
            )
    return None


async def work_counts(pipes: Pipes, shard: ShardKeys, group: str, *, timeout_s: float = 5.0) -> Counts:
    """What of a shard's counters its load is reckoned from: two small reads, which a coordinator may do, too. The
    group's messages in a full queue's dropped part count as backlog until it has passed them."""
    asked = pack_command("HMGET", shard.meta, "appended", "bytes")
    meta = await pipes.command(shard.slot, asked, timeout_s=timeout_s)
    fields = ("foreign", "base", "acked", "dead", "replayed")
    values = await pipes.command(shard.slot, pack_command("HMGET", shard.group(group), *fields), timeout_s=timeout_s)
    with shape("HMGET"):
        appended, size = (int(value or 0) for value in meta)
        foreign, base, acked, dead, replayed = (int(value or 0) for value in values)
        return Counts(appended, size, appended + foreign - base - acked - dead + replayed)


def _group_counters(part: Any) -> GroupCounters:
    values, pending, oldest_pending, oldest_unread, waiting, dead_letters, skip, oldest_waiting = part
    field = dict(zip(_GROUP, (value.decode() for value in values), strict=True))
    counts = {name: int(field[name] or 0) for name in _COUNTS}
    return GroupCounters(
        owner=field["owner"],
        epoch=int(field["epoch"]),
        held=bool(field["token"]),
        renewals=field["renewals"],
        heir=field["heir"],
        pending_entries=int(pending),
        oldest_pending=oldest_pending.decode(),
        oldest_unread=oldest_unread.decode(),
        oldest_waiting=oldest_waiting.decode(),
        waiting=int(waiting),
        dead_letters=int(dead_letters),
        skip=int(skip),
        **counts,
    )
