"""The functions library as Python calls: arguments in, checked replies out. One call here is one atomic step there.

Decides nothing about what to call when (core/ and runtime/ do). Replies are untrusted: what does not have the shape
that the .lua file's header states raises CorruptData.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardq.core.session import Entry, Step
from shardq.errors import LeaseLost, UnknownQueue
from shardq.storage.cluster import Confirm, Packed, pack_call
from shardq.storage.keys import Keys, ShardKeys
from shardq.storage.pipes import Pipes
from shardq.storage.reply import shape

# -- queues --------------------------------------------------------------------------------------------------


async def declare(pipes: Pipes, keys: Keys, version: int, table: bytes) -> tuple[int, bytes]:
    """Publishes a routing table unless the queue has one; returns the one that stands, with its version."""
    reply = await pipes.call(keys.control_slot, "declare", [keys.routing], [version, table])
    with shape("declare"):
        _, stored, data = reply
        return int(stored), bytes(data)


async def open_shard(pipes: Pipes, shard: ShardKeys) -> bool:
    """Makes a shard's keys; true when they were not there."""
    reply = await pipes.call(shard.slot, "open_shard", [shard.stream, shard.meta])
    with shape("open_shard"):
        return bool(reply[0] == b"CREATED")


async def open_group(pipes: Pipes, shard: ShardKeys, group: str) -> None:
    """Registers a group on a shard. Raises UnknownQueue when the shard's keys are gone."""
    keys = [shard.stream, shard.meta, shard.group(group), shard.dead(group)]
    reply = await pipes.call(shard.slot, "open_group", keys, [group])
    with shape("open_group"):
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
    with shape("append"):
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
    with shape("step"):
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
    """`status` OK: `epoch` and `step` are yours. HELD: `seen` is what a taker has to watch."""

    status: str
    epoch: int = 0
    step: int = 0
    renewals: str = ""
    owner: str = ""
    heir: str = ""
    history: str = ""

    @property
    def seen(self) -> tuple[str, str, str]:
        """What to watch, and to hand to the acquire that takes the lease over."""
        return str(self.epoch), self.renewals, self.history


async def acquire(
    pipes: Pipes,
    shard: ShardKeys,
    group: str,
    worker: str,
    nonce: str,
    plan: int,
    seen: tuple[str, str, str] | None,
    *,
    timeout_s: float,
    confirm: Confirm | None,
) -> Acquired:
    """Takes the lease when it is free or stands at `seen` (see `Acquired.seen`)."""
    args: list[str | bytes | int] = [worker, nonce, plan, *(seen or ("", "", "")), shard.bell]
    reply = await pipes.call(shard.slot, "acquire", [shard.group(group)], args, timeout_s=timeout_s, confirm=confirm)
    with shape("acquire"):
        status = reply[0].decode()
        if status == "OK":
            return Acquired(status, int(reply[1]), int(reply[2]))
        if status == "HELD":
            return Acquired(status, int(reply[1]), 0, *(part.decode() for part in reply[2:6]))
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
    with shape(function):
        return str(reply[0].decode())
