"""From when a message was to be sent to its handler's start, beside redis-py's XADD and blocked XREADGROUP."""

from __future__ import annotations

import math
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import anyio

import shardq
from benchmarks import harness
from benchmarks.harness import Goal, Options, Result, Say
from benchmarks.programs.handled import Handled, read_notes
from benchmarks.programs.process import Program, running
from shardq.core.slots import tag_for_slot

SHARDS, GROUP, QUEUE = 12, "bench", "latency"
BUSY_PER_S, BUSY_MESSAGES = 1000, 4000
IDLE_PER_S, IDLE_MESSAGES = 12, 60
ALL_WITHIN_S = 30.0
TIMES = 2.0
COMMANDS = {
    "shardq": "await producer.send(value, key=key) in one process; shardq.Worker, @worker.handler in another",
    "redis-py": f"redis.asyncio.RedisCluster in two processes: await xadd(stream, fields); {SHARDS} tasks, each with "
    "await xreadgroup(count=100, block=2000) on its stream, await handle(...) for each entry, await xack(...)",
}


@dataclass(frozen=True, slots=True)
class Pair:
    """The two processes of one side, and where its messages' times are noted."""

    name: str
    sender: Program
    notes: Path

    async def send(self, rate: float, count: int) -> list[float]:
        """Sends `count` messages and returns the latency of each in ms, sorted, once all were handled."""
        known = len(read_notes(self.notes))
        await self.sender.tell(f"load {rate} {count}")
        await self.sender.hear(count / rate + ALL_WITHIN_S)
        handled: list[Handled] = []
        with anyio.fail_after(ALL_WITHIN_S):
            while len(handled) < count:
                await anyio.sleep(0.05)
                handled = read_notes(self.notes)[known:]
        # A latency of what was lost or handled twice would mean nothing.
        assert len({one.number for one in handled}) == len(handled) == count, f"{self.name}: {len(handled)} handled"
        return sorted(one.latency_ms for one in handled)


async def measure(options: Options, say: Say) -> Result:
    busy, idle = options.count(BUSY_MESSAGES, 50), options.count(IDLE_MESSAGES, 5)
    rounds: dict[str, dict[str, list[list[float]]]] = {name: {"busy": [], "idle": []} for name in COMMANDS}
    with harness.cluster(options) as servers:
        async with pairs(servers.url) as sides:
            for number in range(options.rounds + 1):  # the first one warms up
                for side in sides if number % 2 else reversed(sides):
                    for load, rate, count in (("busy", BUSY_PER_S, busy), ("idle", IDLE_PER_S, idle)):
                        times = await side.send(rate, count)
                        if number:
                            rounds[side.name][load].append(times)
                        say(f"  round {number or 'for warming up'}: {side.name} {load}: {in_words(times)}")
    return result(rounds, busy, idle)


@asynccontextmanager
async def pairs(url: str) -> AsyncIterator[tuple[Pair, Pair]]:
    streams = ",".join(f"peer:{{{tag_for_slot(slot)}}}:{at}" for at, slot in enumerate(slots()))
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "shardq"), Path(folder, "redis")
        async with shardq.connect(url) as client:
            await client.queue(QUEUE, shards=SHARDS)
        async with (
            running("worker", url, QUEUE, GROUP, ours),
            running("reader", url, streams, GROUP, theirs),
            running("sender", "shardq", url, QUEUE, SHARDS) as shardq_sender,
            running("sender", "redis", url, streams, SHARDS) as redis_sender,
        ):
            yield Pair("shardq", shardq_sender, ours), Pair("redis-py", redis_sender, theirs)


def slots() -> list[int]:
    """Of the middles of equal ranges: as shardq's shards, the streams lie evenly on the nodes."""
    return [(2 * at + 1) * 16384 // (2 * SHARDS) for at in range(SHARDS)]


# -- the result ----------------------------------------------------------------------------------------------


def percentile(times: Sequence[float], share: float) -> float:
    """The smallest of the sorted `times` that `share` of them do not exceed."""
    return times[max(0, math.ceil(share * len(times)) - 1)]


def summary(times: Sequence[float]) -> dict[str, float]:
    shares = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    return {name: round(percentile(times, share), 4) for name, share in shares.items()}


def in_words(times: Sequence[float]) -> str:
    return ", ".join(f"{name} {value:.2f} ms" for name, value in summary(times).items())


def result(rounds: dict[str, dict[str, list[list[float]]]], busy: int, idle: int) -> Result:
    samples: dict[str, list[float]] = {}
    pooled: dict[str, Any] = {}
    goals: list[Goal] = []
    what = {"busy": f"at {BUSY_PER_S:,} messages/s", "idle": "of a message to an idle queue"}
    for load, words in what.items():
        for name in COMMANDS:
            pooled[f"{name} {load}, ms"] = summary(sorted(time for times in rounds[name][load] for time in times))
            for part, share in (("p50", 0.5), ("p99", 0.99)):
                samples[f"{name} {load} {part}"] = [percentile(times, share) for times in rounds[name][load]]
        for part in ("p50", "p99"):
            ours, theirs = (figure(samples, pooled, name, load, part) for name in COMMANDS)
            goals.append(Goal(f"{part} {words}, times redis-py's", ours / theirs, "<=", TIMES, "redis-py"))
    return Result(
        title="Latency from one process to another",
        unit="ms",
        samples=samples,
        commands=COMMANDS,
        goals=goals,
        sizes={"shards": SHARDS, "busy messages a round": busy, "idle messages a round": idle},
        notes=[
            "Messages are sent at times fixed beforehand, and latency counts from those: a side that falls behind is "
            "not spared what waits meanwhile.",
            f"Idle: {IDLE_PER_S} messages/s, so each of {SHARDS} shards gets one a second. Of so few the percentiles "
            "that the goals compare are those of all rounds together; at the higher rate the medians of the rounds.",
            "redis-py's side stores no key, keeps no order by key and fences nothing.",
        ],
        figures=pooled,
    )


def figure(samples: dict[str, list[float]], pooled: dict[str, Any], name: str, load: str, part: str) -> float:
    if load == "busy":
        return median(samples[f"{name} {load} {part}"])
    return float(pooled[f"{name} {load}, ms"][part])
