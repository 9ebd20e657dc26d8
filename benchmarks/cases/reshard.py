"""How long a send of a key waits when its shard is split or merged, and what sending costs before and after."""

from __future__ import annotations

import random
import resource
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import median
from time import monotonic

import anyio

import shardq
from benchmarks import harness
from benchmarks.cases.latency import summary
from benchmarks.harness import Goal, Options, Result, Say

SHARDS, KEYS, PER_S = 2, 64, 5000
BOUND_MS = 20.0
CHANGES = 4  # splits, and as many merges, in a round
STEADY_S, AFTER_S = 0.3, 0.1
BULK = 100_000
QUEUE = "reshard"


@dataclass(slots=True)
class Load:
    """Messages of every key at times fixed beforehand; a key's next one is sent when the one before it is stored.

    waits   of each message: its key, when it was due (s), ms from then until it was stored
    """

    producer: shardq.Producer
    waits: list[tuple[int, float, float]] = field(default_factory=list)
    stopped: bool = False

    async def run(self) -> None:
        started = monotonic()
        async with anyio.create_task_group() as tasks:
            for key in range(KEYS):
                tasks.start_soon(self._send, key, started + key / PER_S)

    async def _send(self, key: int, due: float) -> None:
        while not self.stopped:
            await anyio.sleep(max(due - monotonic(), 0))
            await self.producer.send(b"v" * 100, key=f"key-{key}")
            self.waits.append((key, due, (monotonic() - due) * 1000))
            due += KEYS / PER_S

    def longest(self, since: float, until: float) -> list[float]:
        """Of each key the longest wait, in ms, of what was due then."""
        found = dict.fromkeys(range(KEYS), 0.0)
        for key, due, wait in self.waits:
            if since <= due < until:
                found[key] = max(found[key], wait)
        return list(found.values())


async def measure(options: Options, say: Say) -> Result:
    waits: dict[str, list[list[float]]] = {"steady": [], "split": [], "merge": []}
    costs: dict[str, list[tuple[float, float]]] = {"before": [], "after": []}
    with harness.cluster(options) as servers:
        async with shardq.connect(servers.url) as client, shardq.connect(servers.url) as operator:
            for number in range(options.rounds):
                queue = await client.queue(f"{QUEUE}-{number}", shards=SHARDS)
                changing = await operator.queue(queue.name)
                await rounds(queue, changing, options.count(CHANGES), waits)
                said = {name: f"{max(ones[-1]):.1f} ms" for name, ones in waits.items()}
                say(f"  round {number + 1}: the longest waits of the last change {said}")
            for number in range(options.rounds + 1):  # the first one warms up
                both = await bulk(client, operator, f"{QUEUE}-bulk-{number}", options.count(BULK, 1000))
                for name, cost in both.items() if number else ():
                    costs[name].append(cost)
    return result(waits, costs, options)


async def rounds(queue: shardq.Queue, changing: shardq.Queue, count: int, waits: dict[str, list[list[float]]]) -> None:
    async with loaded(queue) as load:
        for _ in range(count):
            for name, change in (("split", changing.split_all), ("merge", lambda: changing.scale(SHARDS))):
                steady, changed = await around(load, change)
                waits[name].append(changed)
                if name == "split":
                    waits["steady"].append(steady)


@asynccontextmanager
async def loaded(queue: shardq.Queue) -> AsyncIterator[Load]:
    async with queue.producer() as producer, anyio.create_task_group() as tasks:
        load = Load(producer)
        tasks.start_soon(load.run)
        yield load
        load.stopped = True


async def around(load: Load, change: Callable[[], Awaitable[object]]) -> tuple[list[float], list[float]]:
    """Each key's longest wait in a while before a change, and in one as long around it."""
    await anyio.sleep(STEADY_S + random.random() * KEYS / PER_S)
    load.waits.clear()
    began = monotonic()
    await anyio.sleep(STEADY_S)
    at = monotonic()
    await change()
    done = monotonic()
    await anyio.sleep(max(STEADY_S - (done - at), AFTER_S))
    return load.longest(began, at), load.longest(at, monotonic())


async def bulk(client: shardq.Client, operator: shardq.Client, name: str, count: int) -> dict[str, tuple[float, float]]:
    """Messages a second and CPU us a message of send_many, over shards that are an equal cut and after a split of one:
    of a queue of one size each, as a long one costs the server the same."""
    queue = await client.queue(name, shards=SHARDS * 3)
    changing = await operator.queue(name)
    pairs = [(f"key-{number % 10_000}", b"v" * 100) for number in range(count)]
    found = {}
    async with queue.producer() as producer:
        found["before"] = await sent(producer, pairs)
        await changing.split(0)
        await producer.send_many(pairs[:1000])  # so that it knows
        found["after"] = await sent(producer, pairs)
    await changing.delete()
    return found


async def sent(producer: shardq.Producer, pairs: Sequence[tuple[str, bytes]]) -> tuple[float, float]:
    started, cpu = monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    assert await producer.send_many(pairs) == len(pairs)
    seconds, after = monotonic() - started, resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
    return len(pairs) / seconds, used * 1e6 / len(pairs)


def result(
    waits: dict[str, list[list[float]]], costs: dict[str, list[tuple[float, float]]], options: Options
) -> Result:
    pooled = {name: summary(sorted(flat(ones))) for name, ones in waits.items()}
    p99 = pooled["split"]["p99"]
    return Result(
        title="Changing the number of shards while messages are sent",
        unit="ms",
        samples={f"{name}, longest of a change": [max(ones) for ones in of_name] for name, of_name in waits.items()},
        commands={
            "steady": f"{KEYS} tasks, each await producer.send(value, key=its own); {PER_S:,} messages/s together",
            "split": "the same, while another client does await queue.split_all()",
            "merge": f"the same, while another client does await queue.scale({SHARDS})",
        },
        goals=[Goal("p99 over keys of the longest wait at a split, ms", p99, "<=", BOUND_MS)],
        sizes={"shards": SHARDS, "keys": KEYS, "splits": options.count(CHANGES) * options.rounds},
        notes=[
            "A wait is from when a message was due to when its send returned; of each key the longest around a change "
            "counts. Every key's shard is split, or merged, in every change.",
            "Whoever changes the shards does so in the process, and the event loop, that sends.",
        ],
        figures={
            **{f"longest wait of a key, {name}, ms": ones for name, ones in pooled.items()},
            "send_many, messages/s": {name: round(median(rate for rate, _ in ones)) for name, ones in costs.items()},
            "send_many, CPU us a message": {
                name: round(median(cpu for _, cpu in ones), 3) for name, ones in costs.items()
            },
        },
    )


def flat(lists: Iterable[Iterable[float]]) -> list[float]:
    return [one for each in lists for one in each]
