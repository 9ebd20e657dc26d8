"""What is called of the functions library for one shard, but for what producers call (appends.py): it is opened, its
lease is taken and handed on, its owner steps and tidies up. Arguments in, checked replies out; one call here is one
atomic step there.

Decides nothing about what to call when (core/ and runtime/ do). Replies are untrusted: what does not have the shape
that the .lua file's header states raises CorruptData.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from shardq.core.step import LEFT_NEW, LEFT_NOTHING, LEFT_PENDING, NEW, Fetched, Step
from shardq.errors import LeaseLost, UnknownQueue
from shardq.storage.commands import EMPTY, Confirm, pack_call
from shardq.storage.keys import ShardKeys
from shardq.storage.pipes import Pipes
from shardq.storage.reply import checked_entries, shape, text, texts

# -- queues --------------------------------------------------------------------------------------------------


async def open_shard(
    pipes: Pipes, shard: ShardKeys, settings_version: int = 0, settings: Mapping[str, str | int] | None = None
) -> bool:
    """Makes a shard's keys; true when they were not there. The settings are as for `tune` in queues.py."""
    keys = [shard.stream, shard.meta, shard.delayed, shard.expiring, shard.timed]
    args: list[str | bytes | int] = [settings_version]
    for pair in (settings or {}).items():
        args += pair
    reply = await pipes.call(shard.slot, "open_shard", keys, args)
    with shape("open_shard"):
        return bool(reply[0] == b"CREATED")


def missing_shard(shard: ShardKeys) -> str:
    return (
        f"{shard.meta} is gone: the queue was deleted, or a master lost its data. "
        "Declare the queue again with client.queue(name, shards=N) to start it empty"
    )


# -- step ----------------------------------------------------------------------------------------------------


NOTHING = Fetched()
_LEFT = {left.encode(): left for left in (LEFT_PENDING, LEFT_NEW, LEFT_NOTHING)}


class Stepped(NamedTuple):
    """`status` OK, REPEAT (applied before, nothing fetched now), EFFECT (effect number `effect` was refused for `why`,
    nothing else was done) or FULL (the queue that effect sends to is full, nothing was done). `heir` is the nonce of
    one that is ready."""

    status: str
    heir: str = ""
    fetched: Fetched = NOTHING
    effect: int = 0
    why: str = ""


def _step_extras(shard: ShardKeys, group: str, content: Step, keys: list[str], args: list[str | bytes | int]) -> None:
    """The keys and sections of a step that does more than finish and fetch entries."""
    keys += [shard.dead(group), shard.later(group), shard.kept(group), shard.expiring, shard.timed]
    for name, size, items in (
        ("dead", len(content.dead), (part for letter in content.dead for part in letter)),
        (
            "put",
            len(content.puts),
            (part for p in content.puts for part in (p.item, p.wait_ms, p.gets, p.tag, p.record)),
        ),
        ("drop", len(content.drops), iter(content.drops)),
        ("get", len(content.gets), iter(content.gets)),
        ("unget", len(content.ungets), iter(content.ungets)),
        ("job", len(content.jobs), (part for job in content.jobs for part in job)),
    ):
        if size:
            args += [name, size, *items]
    if content.effects:
        args += ["effect", len(content.effects)]
        places: dict[tuple[str, str], int] = {}
        for _, effect in content.effects:
            named = (effect.key, effect.meta)
            if named not in places:
                keys.append(effect.key)
                places[named] = len(keys)
                if effect.meta:
                    keys.append(effect.meta)
            args += [places[named], effect.command, len(effect.args), *effect.args]


def _pack_step(
    shard: ShardKeys, group: str, token: str, content: Step, number: int | str, *, renew: bool, wait: bool
) -> bytes:
    keys = [shard.stream, shard.meta, shard.group(group)]
    args: list[str | bytes | int] = [
        group,
        token,
        number,
        int(renew),
        content.cursor if content.cursor == NEW or content.room is None else content.cursor + NEW,
        content.entries_max,
        int(wait),
        content.acked,
        content.retried,
        content.known,
    ]
    if content.finished:
        args += ["done", len(content.finished), *(batch.entry for batch in content.finished)]
    if content.partial:
        args += ["part", len(content.partial)]
        for batch, progress in content.partial:
            args += [batch.entry, progress]
    if content.untouched:
        args += ["untouched", len(content.untouched), *content.untouched]
    if content.seen is not None:
        args += ["seen", 1, content.seen]
    if content.room is not None:
        args += ["room", 1, *content.room]
    if content.full:
        _step_extras(shard, group, content, keys, args)
    return pack_call("step", keys, args)


def step(
    pipes: Pipes,
    shard: ShardKeys,
    group: str,
    token: str,
    content: Step,
    *,
    renew: bool,
    wait: bool,
    timeout_s: float,
    heard: Callable[[Stepped], None] | None = None,
) -> Awaitable[Stepped]:
    """Commits and fetches. Raises LeaseLost when the token is not the lease's any more. `heard` is given the answer in
    the turn of the event loop in which it comes, unless the caller waits no longer then."""
    data = _pack_step(shard, group, token, content, content.number, renew=renew, wait=wait)

    def take(reply: Any) -> Stepped:
        stepped = read_step(shard, group, content, reply)
        if heard is not None:
            heard(stepped)
        return stepped

    return pipes.taken(shard.slot, data, take, timeout_s=timeout_s)


def read_step(shard: ShardKeys, group: str, content: Step, reply: Any) -> Stepped:
    """The reply of a step. Raises LeaseLost as `step` does."""
    with shape("step"):
        if reply[0] == b"OK":
            return Stepped("OK", reply[1].decode(), _fetched(reply, content))
        status = reply[0].decode()
        if status == "REPEAT":
            return Stepped(status, reply[1].decode())
        if status in ("EFFECT", "FULL"):
            why = reply[2].decode(errors="replace")[:500] if len(reply) > 2 else ""
            return Stepped(status, effect=int(reply[1]), why=why)
        newer = reply[1].decode()
    msg = f"{shard.stream}: the lease of group {group} moved on (epoch {newer}); this commit was refused"
    raise LeaseLost(msg)


def pack_idle_step(shard: ShardKeys, group: str, token: str, content: Step) -> tuple[bytes, bytes]:
    """A step that commits nothing, renews the lease and asks to be rung: what is before its number, and behind."""
    before, after = _pack_step(shard, group, token, content, "", renew=True, wait=True).split(EMPTY)
    return before, after


def idle_reply(next_item: int, marks: bytes) -> list[Any]:
    """What such a step answers where nothing came, no heir is ready and no message is delayed."""
    return [b"OK", b"", [], [], b"%d" % next_item, b"", marks, b"0", [], [], b""]


def _fetched(reply: Any, content: Step) -> Fetched:
    _, _, entries, progress, next_item, due, marks, now, items, records, *left = reply
    if len(texts(records)) != len(content.gets):
        raise ValueError
    return Fetched(
        checked_entries(entries),
        texts(progress),
        int(next_item),
        int(due) if due else None,
        text(marks),
        int(now),
        texts(items) if content.full else None,
        records,
        _LEFT[left[0]] if content.room is not None else LEFT_NEW,
    )


async def promote(pipes: Pipes, shard: ShardKeys, *, most: int, timeout_s: float) -> tuple[int, int | None]:
    """Moves due delayed messages into the stream: how many, and ms until the next is due (None: none waits)."""
    keys = [shard.stream, shard.meta, shard.delayed, shard.timed]
    reply = await pipes.call(shard.slot, "promote", keys, [shard.bell, most], timeout_s=timeout_s)
    with shape("promote"):
        if reply[0] == b"MISSING":
            return 0, None
        return int(reply[1]), int(reply[2]) if reply[2] else None


async def trim(pipes: Pipes, shard: ShardKeys, before: str) -> int:
    """Gives up finished entries before this one; returns how many went."""
    reply = await pipes.call(shard.slot, "trim", [shard.stream, shard.meta], [before])
    with shape("trim"):
        if reply[0] == b"OK":
            return int(reply[1])
    raise UnknownQueue(missing_shard(shard))


async def tidy(pipes: Pipes, shard: ShardKeys, *, timeout_s: float) -> bool:
    """Forgets what has had its time; true when there is more to do."""
    keys = [shard.stream, shard.meta, shard.expiring, shard.timed]
    reply = await pipes.call(shard.slot, "tidy", keys, timeout_s=timeout_s)
    with shape("tidy"):
        return bool(len(reply) > 1 and reply[1] == b"1")


# -- lease ---------------------------------------------------------------------------------------------------

NO_PARENTS: Mapping[int, ShardKeys] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Acquired:
    """`status` OK: `epoch` and `step` are yours. HELD: `seen` is what a taker has to watch. GATED: the group has `left`
    messages to do on shard `parent` first; 0 where the caller's routing table is old, and None when it named none."""

    status: str
    epoch: int = 0
    step: int = 0
    renewals: str = ""
    owner: str = ""
    heir: str = ""
    history: str = ""
    parent: int | None = None
    left: int = 0

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
    parents: Mapping[int, ShardKeys] = NO_PARENTS,
) -> Acquired:
    """Takes the lease when it is free or stands at `seen` (see `Acquired.seen`), and the group is through with
    `parents`: the retired shards that held keys of this one (RoutingTable.ancestors)."""
    args: list[str | bytes | int] = [worker, nonce, plan, *(seen or ("", "", "")), shard.bell]
    keys = [shard.group(group)]
    if parents or shard.is_child:
        keys.append(shard.meta)
        args += [group, *parents]
        for parent in parents.values():
            keys += [parent.meta, parent.group(group), parent.later(group)]
    reply = await pipes.call(shard.slot, "acquire", keys, args, timeout_s=timeout_s, confirm=confirm)
    with shape("acquire"):
        status = reply[0].decode()
        if status == "OK":
            return Acquired(status, int(reply[1]), int(reply[2]))
        if status == "HELD":
            return Acquired(status, int(reply[1]), 0, *(part.decode() for part in reply[2:6]))
        if status == "GATED":
            return Acquired(status, parent=int(reply[1]) if reply[1] else None, left=int(reply[2]))
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
