"""shardq's side of the benchmark: sending with `send_many`, handling with `handler` and with `batch_handler`.

It uses what a user uses and nothing else. It deletes no key: whoever runs the rounds does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from time import perf_counter

import anyio

from shardq.errors import CorruptData
from shardq.ops.bench_peers import GROUP, Counted
from shardq.runtime.client import Client
from shardq.runtime.queue import Queue
from shardq.runtime.worker import Worker

VALUE_BYTES, KEYS = 100, 10_000
ACKED_WITHIN_S = 60.0

Pairs = Sequence[tuple[str, bytes]]


class Shardq:
    """shardq's side. A new queue for each round: its predecessor's keys were deleted."""

    def __init__(self, client: Client, shards: int, pairs: Pairs) -> None:
        self._client, self._shards, self._pairs = client, shards, pairs
        self._rounds = 0
        self._queue: Queue | None = None

    async def declare(self) -> Queue:
        self._rounds += 1
        self._queue = await self._client.queue(f"bench-{self._rounds}", shards=self._shards)
        return self._queue

    async def send(self) -> Counted:
        queue = self._queue or await self.declare()
        async with queue.producer() as producer:
            started = perf_counter()
            await producer.send_many(self._pairs)
            seconds = perf_counter() - started
        counters = await queue.counters(())
        return Counted(sum(shard.appended for shard in counters.values()), seconds)

    async def fill(self) -> None:
        await self.declare()
        check_count("filling the queue", (await self.send()).messages, len(self._pairs))

    async def handle_each(self) -> Counted:
        worker = Worker(f"bench-{self._rounds}", group=GROUP)
        tally = _Tally(len(self._pairs))

        @worker.handler
        async def handle(_message: object) -> None:
            tally.add(1)

        return await self._work(worker, tally)

    async def handle_lists(self) -> Counted:
        worker = Worker(f"bench-{self._rounds}", group=GROUP)
        tally = _Tally(len(self._pairs))

        @worker.batch_handler
        async def handle(messages: Sequence[object]) -> None:
            tally.add(len(messages))

        return await self._work(worker, tally)

    async def _work(self, worker: Worker, tally: _Tally) -> Counted:
        """From the first delivery until Redis has counted every message as acknowledged."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run, self._client)
            await tally.complete.wait()
            acked, seconds = await self._acked(tally)
            worker.stop()
        check_count("shardq's handler was called", tally.handled, len(self._pairs))
        return Counted(acked, seconds)

    async def _acked(self, tally: _Tally) -> tuple[int, float]:
        assert self._queue is not None
        acked, seconds = 0, 0.0
        with anyio.move_on_after(ACKED_WITHIN_S):
            while acked < len(self._pairs):
                counters = await self._queue.counters([GROUP])
                seconds = perf_counter() - tally.started
                acked = sum(group.acked for shard in counters.values() for group in shard.groups.values())
        return acked, seconds


class _Tally:
    """Handler calls: when the first one came, and when all did."""

    def __init__(self, expected: int) -> None:
        self.started, self.handled, self.complete = 0.0, 0, anyio.Event()
        self._expected = expected

    def add(self, count: int) -> None:
        if not self.handled:
            self.started = perf_counter()
        self.handled += count
        if self.handled >= self._expected:
            self.complete.set()


def make_pairs(count: int) -> list[tuple[str, bytes]]:
    """The messages: the same ones in every run."""
    chance = random.Random(1)
    keys = [f"user:{number}" for number in range(KEYS)]
    values = [chance.randbytes(VALUE_BYTES) for _ in range(KEYS)]
    return list(zip(chance.choices(keys, k=count), chance.choices(values, k=count), strict=True))


def check_count(what: str, found: int, expected: int) -> None:
    if found != expected:
        msg = f"{what}: {found} messages counted, not {expected}: its rate would mean nothing; run the benchmark again"
        raise CorruptData(msg)
