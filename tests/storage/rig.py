"""What the storage tests share: one shard of a queue to call functions on, and what its counters must add up to."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio

import shardq
from shardq.core import records
from shardq.core.effects import Effect
from shardq.core.intake import unpack_progress
from shardq.core.message import Batch, Message, Ownership
from shardq.core.slots import tag_for_slot
from shardq.core.step import NEW, Put, Step
from shardq.storage import appends, calls, counters, dead, groups
from shardq.storage.appends import Appended, Item
from shardq.storage.calls import Acquired, Stepped
from shardq.storage.commands import Packed, pack_command
from shardq.storage.counters import GroupCounters, ShardCounters
from shardq.storage.keys import Keys
from shardq.storage.pipes import Pipes
from shardq.storage.requests import Call

TIMEOUT_S = 10.0


def batch_of(*values: str, count: int | None = None) -> bytes:
    """A record batch of these values, or of `count` equal ones."""
    own = list(values) or ["v"] * (count or 1)
    return records.encode(records.RecordBatch(7, None, [None] * len(own), own, None))


def one(value: str, **how: Any) -> Item:
    """A message of append_each; `how` as the fields of Item."""
    return Item(batch_of(value), **how)


class Rig:
    """Shard 0 of a queue of its own in `slot`, opened; and group "g", opened by `open_group`."""

    def __init__(self, client: shardq.Client, queue: str, slot: int = 0) -> None:
        self.client = client
        self.pipes: Pipes = client.pipes
        self.keys = Keys("shardq", queue)
        self.shard = self.keys.shard(0, tag_for_slot(slot))
        self.owner = Ownership(queue, "g", 0, 0, "", slot)
        self.message = Message(None, b"", None, 0, 0, Batch(self.owner, "0-1", 1))
        self.numbers: dict[str, int] = {}

    async def command(self, *args: str | bytes | int) -> Any:
        return await self.pipes.command(self.shard.slot, pack_command(*args))

    async def call(self, function: str, keys: Sequence[str], *args: str | bytes | int) -> Any:
        """A function with whatever arguments, its reply as it is."""
        return await self.pipes.call(self.shard.slot, function, keys, args)

    async def open_group(self, group: str = "g") -> None:
        await groups.open_group(self.pipes, self.shard, group, groups.Start())

    # -- appending -------------------------------------------------------------------------------------------

    async def append(self, producer: str, sequence: int, *values: str) -> Appended:
        raw = batch_of(*values)
        return await self.send(appends.pack_append(self.shard, producer, sequence, max(len(values), 1), raw, None))

    async def stored(self, producer: str, sequence: int, *values: str) -> str:
        """Appends; returns the id of the entry."""
        appended = await self.append(producer, sequence, *values)
        assert appended.status == "OK"
        return appended.entries[0]

    async def append_each(self, producer: str, sequence: int, *items: Item) -> Appended:
        return await self.send(appends.pack_append_each(self.shard, producer, sequence, items, None), each=len(items))

    async def promote(self, most: int = 1000) -> tuple[int, int | None]:
        return await calls.promote(self.pipes, self.shard, most=most, timeout_s=TIMEOUT_S)

    async def tidy(self) -> bool:
        return await calls.tidy(self.pipes, self.shard, timeout_s=TIMEOUT_S)

    async def send(self, packed: Packed, *, each: int = 0) -> Appended:
        """An append, or an append_each of `each` messages."""
        call = Call(self.shard.slot, packed, anyio.current_time() + TIMEOUT_S)
        self.pipes.submit(call)
        await call.wait()
        return appends.read_append(call.outcome(), each=each)

    async def tune(self, **settings: str | int) -> None:
        """Sets what the shard knows of its queue's settings."""
        await self.command("HSET", self.shard.meta, *(part for pair in settings.items() for part in pair))

    # -- leases ----------------------------------------------------------------------------------------------

    async def acquire(
        self, nonce: str, seen: tuple[int, str] | None = None, *, plan: int = 0, group: str = "g", history: str = ""
    ) -> Acquired:
        """`seen` is (epoch, renewals); the replication history seen with them is today's unless one is given."""
        whole = (str(seen[0]), seen[1], history or await self.history()) if seen is not None else None
        return await calls.acquire(
            self.pipes, self.shard, group, f"worker-{nonce}", nonce, plan, whole, timeout_s=TIMEOUT_S, confirm=None
        )

    async def history(self) -> str:
        info = await self.pipes.command(self.shard.slot, pack_command("INFO", "replication"))
        found = re.search(r"master_replid:(\w+)", info.decode())
        assert found is not None
        return found.group(1)

    async def own(self, nonce: str = "n", group: str = "g") -> str:
        """Takes the free lease; returns its token."""
        acquired = await self.acquire(nonce, group=group)
        assert acquired.status == "OK"
        return f"{acquired.epoch}:{nonce}"

    async def lease(self, function: str, *args: str | int) -> str:
        return await calls.lease_call(self.pipes, self.shard, "g", function, args, timeout_s=TIMEOUT_S)

    # -- steps -----------------------------------------------------------------------------------------------

    async def step(
        self,
        token: str,
        *,
        number: int = 0,
        cursor: str = NEW,
        limit: int = 0,
        acked: int = 0,
        retried: int = 0,
        finished: Sequence[str] = (),
        partial: Sequence[tuple[str, bytes]] = (),
        dead: Sequence[tuple[int, bytes]] = (),
        puts: Sequence[Put] = (),
        drops: Sequence[int] = (),
        gets: Sequence[int] = (),
        jobs: Sequence[tuple[str, int, bytes]] = (),
        effects: Sequence[Effect] = (),
        known: int | None = None,
        renew: bool = False,
        wait: bool = False,
        room: tuple[int, int, int] | None = None,
        group: str = "g",
    ) -> Stepped:
        """One step; the next number of this token unless one is given. The index of what is handled later is asked for
        when `known` says up to which item it is known."""
        if not number:
            number = self.numbers[token] = self.numbers.get(token, 0) + 1
        content = Step(
            number=number,
            cursor=cursor,
            entries_max=limit,
            known=known or 0,
            full=bool(dead or puts or drops or gets or jobs or effects or known is not None),
            acked=acked,
            retried=retried,
            finished=[Batch(self.owner, entry, 1) for entry in finished],
            partial=[(Batch(self.owner, entry, 1), progress) for entry, progress in partial],
            dead=list(dead),
            puts=list(puts),
            drops=list(drops),
            gets=list(gets),
            jobs=list(jobs),
            effects=[(self.message, effect) for effect in effects],
            room=room,
        )
        return await calls.step(
            self.pipes, self.shard, group, token, content, renew=renew, wait=wait, timeout_s=TIMEOUT_S
        )

    async def fetch(self, token: str, limit: int = 100, *, cursor: str = NEW, group: str = "g") -> list[str]:
        """The ids that a step without content brings."""
        return ids(await self.step(token, limit=limit, cursor=cursor, group=group))

    async def raw_step(self, token: str, number: int, *sections: str | bytes | int, more: Sequence[str] = ()) -> Any:
        """A step of group "g" with these sections as they are, and `more` keys; its reply as it is."""
        keys = [self.shard.stream, self.shard.meta, *self.shard.of_group("g"), self.shard.expiring, self.shard.timed]
        return await self.call("step", [*keys, *more], "g", token, number, 0, NEW, 0, 0, 0, 0, 0, *sections)

    async def replay(self, *letters: tuple[str, int, Sequence[tuple[bytes, bytes]]], group: str = "g") -> int:
        """Hands back dead letters, each as entry id, messages it stood for, items."""
        return await dead.replay(self.pipes, self.shard, group, letters)

    # -- what is there ---------------------------------------------------------------------------------------

    async def counters(self, group: str = "g") -> GroupCounters:
        return (await self.inspect(group)).groups[group]

    async def inspect(self, *groups: str) -> ShardCounters:
        return await counters.inspect(self.pipes, self.shard, groups)

    async def entries(self) -> list[str]:
        return [entry.decode() for entry, _ in await self.command("XRANGE", self.shard.stream, "-", "+")]

    async def values(self) -> list[Any]:
        """The values of all messages of ours in the stream."""
        found = await self.command("XRANGE", self.shard.stream, "-", "+")
        return [value for _, fields in found for value in records.decode(fields[3]).values]

    async def time_ms(self) -> int:
        """By the clock of the shard's server."""
        seconds, micros = await self.command("TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    async def dumps(self, *more: str) -> dict[str, bytes | None]:
        """Each of the shard's keys, and `more`, as Redis stores it."""
        own = self.shard
        keys = [own.stream, own.meta, own.delayed, own.expiring, own.timed, *own.of_group("g"), *more]
        return {key: await self.command("DUMP", key) for key in keys}

    async def meta(self, field: str) -> str | None:
        value = await self.command("HGET", self.shard.meta, field)
        return None if value is None else str(value.decode())

    async def backlog(self, group: str = "g") -> int:
        """appended + foreign - base - acked - dead + replayed - skip, checked against what is really unfinished."""
        shard = await self.inspect(group)
        own = shard.groups[group]
        backlog = shard.appended + own.foreign - own.base - own.acked - own.dead + own.replayed - own.skip
        assert backlog == await self._unfinished(group), f"the counters are wrong: {shard}"
        return backlog

    async def _unfinished(self, group: str) -> int:
        """Messages that are pending without progress, those that are handled later, and messages of ours that are not
        delivered, all counted."""
        stream = dict(await self.command("XRANGE", self.shard.stream, "-", "+"))
        pending = await self.command("XPENDING", self.shard.stream, group, "-", "+", 10000)
        left: int = await self.command("ZCARD", self.shard.later(group)) - 1
        for entry, *_ in pending:
            count = messages_of_ours(stream[entry]) or 1
            progress = await self.command("HGET", self.shard.group(group), b"x:" + entry) or b""
            left += unpack_progress(progress, count).count(0)
        groups = await self.command("XINFO", "GROUPS", self.shard.stream)
        infos = [dict(zip(item[::2], item[1::2], strict=True)) for item in groups]
        (last,) = [info[b"last-delivered-id"].decode() for info in infos if info[b"name"] == group.encode()]
        unread = await self.command("XRANGE", self.shard.stream, f"({last}", "+")
        return left + sum(messages_of_ours(fields) for _, fields in unread)


def messages_of_ours(fields: Sequence[bytes]) -> int:
    """Messages of an entry that shardq wrote; 0 for another client's."""
    return records.count_of(fields[3]) if len(fields) == 4 and fields[::2] == [b"at", b"batch"] else 0


def ids(stepped: Stepped) -> list[str]:
    return [entry.decode() for entry, _ in stepped.fetched.entries]


def progress_of(stepped: Stepped) -> list[bytes]:
    """The progress of each pending entry, without the times it was delivered."""
    return [pending.partition(b":")[2] for pending in stepped.fetched.progress]


@asynccontextmanager
async def rig(url: str, queue: str, slot: int = 0) -> AsyncIterator[Rig]:
    """A client, and an opened shard of its own."""
    async with shardq.connect(url) as client:
        made = Rig(client, queue, slot)
        assert await calls.open_shard(made.pipes, made.shard)
        yield made


async def until(condition: Callable[[], Awaitable[bool]], what: str, deadline_s: float = 30.0) -> None:
    """Polls; fails the test when `condition` does not hold before the deadline."""
    deadline = time.monotonic() + deadline_s
    while not await condition():
        assert time.monotonic() < deadline, f"never came true: {what}"
        await anyio.sleep(0.02)
