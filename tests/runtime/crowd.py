"""What the tests that kill share: traffic with failures in it, workers that die and are replaced, what remains of both.

A message's value is that of tests/runtime/effects_app.py.
"""

from __future__ import annotations

import functools
import random
import signal
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio

import shardq
from shardq.storage.commands import pack_command
from tests.runtime.harness import GROUP, WorkerProcess, until

APP = "tests.runtime.effects_app:worker"
LEASE_S = 1.0

Value = tuple[int, int, str]
Sent = dict[str, list[Value]]


def make_traffic(seed: int, messages: int, keys: int, *, rejected: float = 0.02) -> Sent:
    """By key, in order; one in ten fails once or twice, some are rejected."""
    chance = random.Random(seed)
    sent: Sent = defaultdict(list)
    for number in range(messages):
        fails = chance.choices((0, 1, 2), (90, 6, 4))[0]
        end = chance.choices(("ok", "reject"), (1 - rejected, rejected))[0]
        sent[f"key-{chance.randrange(keys)}"].append((number, fails, end))
    return sent


async def send_slowly(producer: shardq.Producer, sent: Sent, pause_s: float = 0.05) -> None:
    """All keys side by side."""

    async def send_key(key: str, values: list[Value]) -> None:
        for value in values:
            await producer.send(list(value), key=key)
            await anyio.sleep(pause_s)

    async with anyio.create_task_group() as senders:
        for key, values in sent.items():
            senders.start_soon(send_key, key, values)


@dataclass
class Crowd:
    """Workers; `thin_out` kills one after another, the oldest first, each replaced by one of its kind, until
    `stopped`."""

    starts: Sequence[Callable[[], WorkerProcess]]
    seed: int
    every_s: tuple[float, float] = (0.3, 1.2)
    kills: int = 0
    stopped: anyio.Event = field(default_factory=anyio.Event)
    running: list[tuple[Callable[[], WorkerProcess], WorkerProcess]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.running = [(start, start()) for start in self.starts]

    async def thin_out(self) -> None:
        chance = random.Random(self.seed)
        while not self.stopped.is_set():
            # It has begun to handle messages, or on a slow machine nothing would ever be handled.
            begun = functools.partial(self.running[0][1].says, "handles")
            await until(begun, 60, "the oldest worker to begin")
            with anyio.move_on_after(chance.uniform(*self.every_s)):
                await self.stopped.wait()
                return
            self.kill_oldest()

    async def deaths(self, count: int) -> None:
        """Waits until so many were killed."""
        await until(lambda: self.kills >= count, 60, f"{count} deaths")

    def kill_oldest(self) -> None:
        start, worker = self.running.pop(0)
        self.running.append((start, start()))
        worker.send(signal.SIGKILL)
        self.kills += 1


async def done(queue: shardq.Queue, key: str, group: str = GROUP) -> list[tuple[int, int]]:
    """The messages whose effects are there, in the order they came to be: number, Unix ms."""
    packed = pack_command("LRANGE", queue.local_key(f"done:{group}:{key}", key), 0, -1)
    found = await queue.client.pipes.command(queue.place_of(key).slot, packed)
    pairs = (item.split(b":") for item in found)
    return [(int(number), int(ms)) for number, ms in pairs]


async def numbers(queue: shardq.Queue, key: str, group: str = GROUP) -> list[int]:
    return [number for number, _ in await done(queue, key, group)]


async def history(queue: shardq.Queue, key: str) -> list[Any]:
    """What is stored in a queue for a key, in order."""
    return [record.value async for record in queue.history(key=key)]


async def dead(queue: shardq.Queue, group: str = GROUP) -> list[int]:
    """The numbers of the dead letters."""
    return sorted([letter.value[0] async for letter in queue.dead_letters(group)])


def to_be_done(values: Iterable[Value]) -> list[int]:
    return [number for number, _, end in values if end == "ok"]


def to_be_dead(sent: Sent) -> list[int]:
    return sorted(number for values in sent.values() for number, _, end in values if end != "ok")
