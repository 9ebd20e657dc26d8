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
from shardq.core.message import Batch, Ownership
from shardq.core.session import NEW, Step, unpack_progress
from shardq.core.slots import tag_for_slot
from shardq.storage import calls, counters
from shardq.storage.calls import Acquired, Appended, Stepped
from shardq.storage.cluster import Packed, pack_command
from shardq.storage.counters import GroupCounters
from shardq.storage.keys import Keys
from shardq.storage.pipes import Call, Pipes

TIMEOUT_S = 10.0


def batch_of(*values: str, count: int | None = None) -> bytes:
    """A record batch of these values, or of `count` equal ones."""
    own = list(values) or ["v"] * (count or 1)
    return records.encode(records.RecordBatch(7, None, [None] * len(own), own, None))


class Rig:
    """Shard 0 of a queue of its own in `slot`, opened; and group "g", opened by `open_group`."""

    def __init__(self, client: shardq.Client, queue: str, slot: int = 0) -> None:
        self.client = client
        self.pipes: Pipes = client.pipes
        self.keys = Keys("shardq", queue)
        self.shard = self.keys.shard(0, tag_for_slot(slot))
        self.owner = Ownership(queue, "g", 0, 0, "")
        self.numbers: dict[str, int] = {}

    async def command(self, *args: str | bytes | int) -> Any:
        return await self.pipes.command(self.shard.slot, pack_command(*args))

    async def call(self, function: str, keys: Sequence[str], *args: str | bytes | int) -> Any:
        """A function with whatever arguments, its reply as it is."""
        return await self.pipes.call(self.shard.slot, function, keys, args)

    async def open_group(self, group: str = "g") -> None:
        await calls.open_group(self.pipes, self.shard, group)

    async def append(self, producer: str, sequence: int, *values: str) -> Appended:
        raw = batch_of(*values)
        packed = calls.pack_append(self.shard, producer, sequence, max(len(values), 1), raw, None)
        return await self.send(packed)

    async def send(self, packed: Packed) -> Appended:
        call = Call(self.shard.slot, packed, anyio.current_time() + TIMEOUT_S)
        self.pipes.submit(call)
        return calls.read_append(await call.result())

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
        renew: bool = False,
        wait: bool = False,
        group: str = "g",
    ) -> Stepped:
        """One step; the next number of this token unless one is given."""
        if not number:
            number = self.numbers[token] = self.numbers.get(token, 0) + 1
        done = [Batch(self.owner, entry, 1) for entry in finished]
        some = [(Batch(self.owner, entry, 1), progress) for entry, progress in partial]
        content = Step(number, cursor, limit, acked, retried, done, some, list(dead))
        return await calls.step(
            self.pipes, self.shard, group, token, content, renew=renew, wait=wait, timeout_s=TIMEOUT_S
        )

    async def fetch(self, token: str, limit: int = 100, *, cursor: str = NEW, group: str = "g") -> list[str]:
        """The ids that a step without content brings."""
        return ids(await self.step(token, limit=limit, cursor=cursor, group=group))

    async def counters(self, group: str = "g") -> GroupCounters:
        return (await counters.inspect(self.pipes, self.shard, [group])).groups[group]

    async def entries(self) -> list[str]:
        return [entry.decode() for entry, _ in await self.command("XRANGE", self.shard.stream, "-", "+")]

    async def backlog(self, group: str = "g") -> int:
        """appended + foreign - base - acked - dead, checked against what the stream really holds unfinished."""
        shard = await counters.inspect(self.pipes, self.shard, [group])
        own = shard.groups[group]
        backlog = shard.appended + own.foreign - own.base - own.acked - own.dead
        assert backlog >= 0
        assert backlog == await self._unfinished(group), f"the counters are wrong: {shard}"
        return backlog

    async def _unfinished(self, group: str) -> int:
        """Messages that are pending without progress, and messages of ours that are not delivered, all counted."""
        stream = dict(await self.command("XRANGE", self.shard.stream, "-", "+"))
        pending = await self.command("XPENDING", self.shard.stream, group, "-", "+", 10000)
        left = 0
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
    return [entry.decode() for entry, _ in stepped.entries]


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
