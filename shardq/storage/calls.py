"""The functions library as Python calls: arguments in, checked replies out. One call here is one atomic step there.

Decides nothing about what to call when (core/ and runtime/ do). Replies are untrusted: what does not have the shape
that the .lua file's header states raises CorruptData.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shardq.core.session import Entry, Step
from shardq.errors import CorruptData, LeaseLost, UnknownQueue
from shardq.storage.cluster import Confirm, Packed, pack_call, pack_command
from shardq.storage.keys import Keys, ShardKeys
from shardq.storage.pipes import Pipes


@contextmanager
def _shape(function: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, IndexError, AttributeError, KeyError, UnicodeDecodeError) as error:
        msg = f"the reply of {function} does not have its shape: do all nodes run the same shardq functions?"
        raise CorruptData(msg) from error


# -- queues --------------------------------------------------------------------------------------------------


async def declare(pipes: Pipes, keys: Keys, version: int, table: bytes) -> tuple[int, bytes]:
    """Publishes a routing table unless the queue has one; returns the one that stands, with its version."""
    reply = await pipes.call(keys.control_slot, "declare", [keys.routing], [version, table])
    with _shape("declare"):
        _, stored, data = reply
        return int(stored), bytes(data)


async def open_shard(pipes: Pipes, shard: ShardKeys) -> bool:
    """Makes a shard's keys; true when they were not there."""
    reply = await pipes.call(shard.slot, "open_shard", [shard.stream, shard.meta])
    with _shape("open_shard"):
        return bool(reply[0] == b"CREATED")


async def open_group(pipes: Pipes, shard: ShardKeys, group: str) -> None:
    """Registers a group on a shard. Raises UnknownQueue when the shard's keys are gone."""
    keys = [shard.stream, shard.meta, shard.group(group), shard.dead(group)]
    reply = await pipes.call(shard.slot, "open_group", keys, [group])
    with _shape("open_group"):
        missing = reply[0] == b"MISSING"
    if missing:
        raise UnknownQueue(missing_shard(shard))


def missing_shard(shard: ShardKeys) -> str:
    return (
        f"{shard.meta} is gone: the queue was deleted, or a master lost its data. "
        "Declare the queue again with client.queue(name, shards=N) to start it empty"
    )


# -- append --------------------------------------------------------------------------------------------------


def pack_append(
    shard: ShardKeys, producer: str, sequence: int, count: int, batch: bytes, confirm: Confirm | None
) -> Packed:
    keys, args = (shard.stream, shard.meta), (producer, sequence, count, batch, shard.bell)
    return Packed(pack_call("append", keys, args), False, confirm)


@dataclass(frozen=True, slots=True)
class Appended:
    """`status` is OK, SEALED, MISSING or STALE; `entry` the entry id and `first` the batch's first number when OK."""

    status: str
    entry: str = ""
    first: int = 0


def read_append(reply: Any) -> Appended:
    with _shape("append"):
        status = reply[0].decode()
        return Appended(status, reply[1].decode(), int(reply[2])) if status == "OK" else Appended(status)


# -- step ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stepped:
    """`repeated`: the step was applied before and fetched nothing now. `heir` is the nonce of an heir that is ready."""

    repeated: bool
    heir: str
    entries: Sequence[Entry]
    progress: Sequence[bytes]


async def step(
    pipes: Pipes,
    shard: ShardKeys,
    group: str,
    token: str,
    content: Step,
    *,
    renew: bool,
    wait: bool,
    timeout_s: float,
    confirm: Confirm | None = None,
) -> Stepped:
    """Commits and fetches. Raises LeaseLost when the token is not the lease's any more."""
    keys = [shard.stream, shard.meta, shard.group(group)]
    if content.dead:
        keys.append(shard.dead(group))
    args: list[str | bytes | int] = [
        group,
        token,
        content.number,
        int(renew),
        content.cursor,
        content.entries_max,
        int(wait),
        content.acked,
        content.retried,
    ]
    args += [len(content.finished), *(batch.entry for batch in content.finished)]
    args.append(len(content.partial))
    for batch, progress in content.partial:
        args += [batch.entry, progress]
    args.append(len(content.dead))
    for count, record in content.dead:
        args += [count, record]
    reply = await pipes.call(shard.slot, "step", keys, args, timeout_s=timeout_s, confirm=confirm)
    with _shape("step"):
        status = reply[0]
        if status == b"OK":
            return Stepped(False, reply[1].decode(), reply[2], reply[3])
        if status == b"REPEAT":
            return Stepped(True, reply[1].decode(), (), ())
        newer = reply[1].decode()
    msg = f"{shard.stream}: the lease of group {group} moved on (epoch {newer}); this commit was refused"
    raise LeaseLost(msg)


# -- lease ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Acquired:
    """`status` OK: `epoch` and `step` are yours. HELD: (`epoch`, `renewals`) is what a taker has to watch."""

    status: str
    epoch: int = 0
    step: int = 0
    renewals: str = ""
    owner: str = ""
    heir: str = ""


async def acquire(
    pipes: Pipes,
    shard: ShardKeys,
    group: str,
    worker: str,
    nonce: str,
    plan: int,
    seen: tuple[int, str] | None,
    *,
    timeout_s: float,
    confirm: Confirm | None,
) -> Acquired:
    """Takes the lease when it is free or stands at `seen` (epoch, renewals)."""
    epoch, renewals = (str(seen[0]), seen[1]) if seen is not None else ("", "")
    args: list[str | bytes | int] = [worker, nonce, plan, epoch, renewals, shard.bell]
    reply = await pipes.call(shard.slot, "acquire", [shard.group(group)], args, timeout_s=timeout_s, confirm=confirm)
    with _shape("acquire"):
        status = reply[0].decode()
        if status == "OK":
            return Acquired(status, int(reply[1]), int(reply[2]))
        if status == "HELD":
            return Acquired(status, int(reply[1]), 0, reply[2].decode(), reply[3].decode(), reply[4].decode())
        return Acquired(status)


async def lease_call(
    pipes: Pipes,
    shard: ShardKeys,
    group: str,
    function: str,
    args: Sequence[str | int],
    *,
    timeout_s: float,
    confirm: Confirm | None = None,
) -> str:
    """release, offer, ready or transfer: returns the status word."""
    reply = await pipes.call(
        shard.slot, function, [shard.group(group)], [*args, shard.bell], timeout_s=timeout_s, confirm=confirm
    )
    with _shape(function):
        return str(reply[0].decode())


# -- control -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Member:
    """A worker as its heartbeats show it; `value` is what was stored, for comparing."""

    nonce: str
    beats: int
    leaving: bool
    value: str

    @classmethod
    def parse(cls, value: bytes) -> Member:
        text = value.decode()
        nonce, beats, state = text.split(":")
        return cls(nonce, int(beats), state == "leaving", text)


@dataclass(frozen=True, slots=True)
class Beat:
    """The control hash as one heartbeat saw it; `plan` is None when the caller knew that version."""

    term: int
    leader_nonce: str
    leader_beats: int
    plan_version: int
    plan: bytes | None
    members: dict[str, Member]


async def beat(
    pipes: Pipes,
    keys: Keys,
    group: str,
    *,
    worker: str,
    nonce: str,
    beats: int,
    leaving: bool,
    term: int,
    plan_version: int,
    watch: Sequence[str],
    timeout_s: float,
) -> Beat | None:
    """One heartbeat; None when another incarnation goes under this worker's name."""
    state = "leaving" if leaving else "active"
    args: list[str | bytes | int] = [worker, nonce, beats, state, term, plan_version, *watch]
    reply = await pipes.call(keys.control_slot, "beat", [keys.control(group)], args, timeout_s=timeout_s)
    with _shape("beat"):
        if reply[0] == b"REPLACED":
            return None
        _, now_term, leader, leader_beats, version, plan, flat = reply
        members = {
            name.decode(): Member.parse(value) for name, value in zip(flat[::2], flat[1::2], strict=True) if value
        }
        return Beat(int(now_term), leader.decode(), int(leader_beats), int(version), plan or None, members)


async def control_call(
    pipes: Pipes, keys: Keys, group: str, function: str, args: Sequence[str | bytes | int], *, timeout_s: float
) -> tuple[str, int]:
    """lead, resign, plan or leave: the status word and, where there is one, the term or version behind it."""
    reply = await pipes.call(keys.control_slot, function, [keys.control(group)], args, timeout_s=timeout_s)
    with _shape(function):
        return reply[0].decode(), int(reply[1]) if len(reply) > 1 else 0


@dataclass(frozen=True, slots=True)
class ControlState:
    """A group's control hash at one moment. A member listed may be dead: only watching its beats tells."""

    leader: str
    term: int
    plan_version: int
    rebalances: int
    members: dict[str, Member]


async def control_state(pipes: Pipes, keys: Keys, group: str, *, timeout_s: float = 5.0) -> ControlState:
    """Reads a group's control hash; writes nothing. A group that nobody ever joined is all zeros."""
    packed = pack_command("HGETALL", keys.control(group))
    flat = await pipes.command(keys.control_slot, packed, timeout_s=timeout_s)
    with _shape("HGETALL"):
        fields = {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}
        term, version, rebalances = (int(fields.get(name, 0)) for name in ("term", "plan_version", "rebalances"))
        members = {name[2:]: Member.parse(value) for name, value in fields.items() if name.startswith("m:")}
        return ControlState(fields.get("leader", b"").decode(), term, version, rebalances, members)


# -- inspect -------------------------------------------------------------------------------------------------

_META = ("state", "appended", "bytes", "groups")
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
)


@dataclass(frozen=True, slots=True)
class GroupCounters:
    """One group on one shard, as its hash and the stream say. Counts are messages unless named otherwise."""

    owner: str
    epoch: int
    held: bool
    renewals: str
    heir: str
    base: int
    acked: int
    retried: int
    dead: int
    delivered: int
    foreign: int
    pending_entries: int
    oldest_pending: str
    oldest_unread: str


@dataclass(frozen=True, slots=True)
class ShardCounters:
    """One shard. `groups` holds only groups that were asked for and exist; `registered` names all there are."""

    time_ms: int
    entries: int
    first_entry: str
    state: str
    appended: int
    bytes: int
    registered: tuple[str, ...]
    groups: dict[str, GroupCounters]


async def inspect(pipes: Pipes, shard: ShardKeys, groups: Sequence[str], *, timeout_s: float = 5.0) -> ShardCounters:
    """The counters of a shard and of the groups named. Raises UnknownQueue when its keys are gone."""
    keys = [shard.stream, shard.meta, *(shard.group(group) for group in groups)]
    reply = await pipes.call(shard.slot, "inspect", keys, list(groups), timeout_s=timeout_s)
    with _shape("inspect"):
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
                tuple(meta["groups"].split()),
                found,
            )
    raise UnknownQueue(missing_shard(shard))


def _group_counters(part: Any) -> GroupCounters:
    values, pending, oldest_pending, oldest_unread = part
    field = dict(zip(_GROUP, (value.decode() for value in values), strict=True))
    counts = {name: int(field[name] or 0) for name in ("base", "acked", "retried", "dead", "delivered", "foreign")}
    return GroupCounters(
        owner=field["owner"],
        epoch=int(field["epoch"]),
        held=bool(field["token"]),
        renewals=field["renewals"],
        heir=field["heir"],
        pending_entries=int(pending),
        oldest_pending=oldest_pending.decode(),
        oldest_unread=oldest_unread.decode(),
        **counts,
    )
