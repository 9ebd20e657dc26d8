"""Real producers and workers of one queue while a fault goes on: sent all the time, then judged by what Redis holds."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio

import shardq
from tests.faults.faults import FAULTS
from tests.faults.lab import Lab
from tests.runtime.crowd import APP, LEASE_S, Sent, Value, dead, numbers, to_be_dead, to_be_done
from tests.runtime.harness import GROUP, WorkerProcess, check_equation, drained, until, workers

SHARDS, KEYS, PAUSE_S = 6, 12, 0.02
_FLOWS_WITHIN_S, _DRAINS_WITHIN_S, _STUCK_S = 60, 60, 0.5


@dataclass
class Survival:
    """
    sent     by key, in order: what was acknowledged
    waiting  the sends that have not returned, by key
    wanted   set while something new is to be sent
    """

    lab: Lab
    queue: shardq.Queue
    seed: int
    start: Callable[..., WorkerProcess]
    crew: list[WorkerProcess]
    sent: Sent = field(default_factory=lambda: defaultdict(list))
    waiting: dict[str, Value] = field(default_factory=dict)
    wanted: anyio.Event = field(default_factory=anyio.Event)
    stopping: bool = False

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._number = 0
        self.wanted.set()

    def acknowledged(self) -> int:
        return sum(map(len, self.sent.values()))

    async def finished(self) -> int:
        found = await self.queue.counters([GROUP])
        return sum(counters.groups[GROUP].acked for counters in found.values() if GROUP in counters.groups)

    async def keep_sending(self, producer: shardq.Producer) -> None:
        async with anyio.create_task_group() as senders:
            for key in range(KEYS):
                senders.start_soon(self._send_key, producer, f"key-{key}")

    async def _send_key(self, producer: shardq.Producer, key: str) -> None:
        while not self.stopping:
            value = self._next_value()
            self.waiting[key] = value
            await producer.send(list(value), key=key)
            del self.waiting[key]
            self.sent[key].append(value)
            await anyio.sleep(PAUSE_S)
            await self.wanted.wait()

    def _next_value(self) -> Value:
        self._number += 1
        fails = self._chance.choices((0, 1, 2), (92, 5, 3))[0]
        return self._number, fails, self._chance.choices(("ok", "reject"), (99, 1))[0]

    async def flows(self, messages: int = 60) -> None:
        """So many more are acknowledged, and so many more finished, as when nothing is wrong."""
        wanted = self.acknowledged() + messages, await self.finished() + messages

        async def flowed() -> bool:
            return self.acknowledged() >= wanted[0] and await self.finished() >= wanted[1]

        await until(flowed, _FLOWS_WITHIN_S, f"{messages} messages more sent and handled")

    async def under(self, name: str, during: Callable[[], object] | None = None) -> None:
        """Strikes, does `during` (awaited where it is a coroutine), heals; messages flow before and after."""
        fault = FAULTS[name]
        assert fault.needs(self.lab) is None
        await self.flows()
        heal = await anyio.to_thread.run_sync(fault.strike, self.lab, random.Random(self.seed))
        try:
            if during is not None:
                done = during()
                if hasattr(done, "__await__"):
                    await done
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(heal)
        await self.flows()

    async def ready(self) -> None:
        """All of the crew are at work: nobody connects any more."""
        await until(lambda: all(worker.says("handles") for worker in self.crew), _FLOWS_WITHIN_S, "the crew")

    async def sends_wait(self) -> None:
        """A send does not return for a while."""
        seen: dict[Value, float] = {}

        def stuck() -> bool:
            now = anyio.current_time()
            for value in self.waiting.values():
                seen.setdefault(value, now)
            return any(now - seen[value] > _STUCK_S for value in self.waiting.values())

        await until(stuck, _FLOWS_WITHIN_S, "a send that waits")

    async def drains(self) -> None:
        """All that is stored is handled; nothing new is sent meanwhile."""
        self.wanted = anyio.Event()
        await until(lambda: drained(self.queue), _DRAINS_WITHIN_S, "an empty backlog")
        self.wanted.set()

    async def judge(self) -> None:
        """Nothing lost, nothing twice, in order, nothing left, the counters true."""
        await until(lambda: drained(self.queue), _DRAINS_WITHIN_S, "an empty backlog")
        for key, values in self.sent.items():
            assert await numbers(self.queue, key) == to_be_done(values), key
        assert await dead(self.queue) == to_be_dead(self.sent)
        await check_equation(self.queue)


@asynccontextmanager
async def survival(lab: Lab, queue_name: str, folder: Path, crew: int = 2) -> AsyncIterator[Survival]:
    """Traffic while the block runs, judged at its end."""
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    async with shardq.connect(lab.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        await queue.open_group(GROUP)
        with workers(lab.url, queue_name, folder, lease=LEASE_S, handler_s=0.01, target=APP) as start:
            made = Survival(lab, queue, seed, start, [start() for _ in range(crew)])
            async with queue.producer() as producer, anyio.create_task_group() as tasks:
                tasks.start_soon(made.keep_sending, producer)
                yield made
                made.stopping = True
            await made.judge()
