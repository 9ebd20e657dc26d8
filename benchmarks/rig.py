"""What the cases that send and handle share: a client and peers on one cluster, and each run timed, counted, its CPU
kept. A count that is not the one expected is an error (CorruptData): no rate stands for messages that are not there.

It never leaves a key of its prefix behind. Which sides there are and what is a goal, the cases say.
"""

from __future__ import annotations

import gc
import resource
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

from anyio import to_thread

from benchmarks import harness
from benchmarks.harness import Curve, Goal, Options, Result, Say, Side
from shardq.ops import bench_peers
from shardq.ops.bench_peers import GROUP, Counted, Peers, Setting
from shardq.ops.bench_shardq import KEYS, VALUE_BYTES, Pairs, Shardq, check_count
from shardq.runtime.client import Client, connect
from shardq.runtime.queue import Queue

SHARDS = 12
NO_REDIS_BENCHMARK = "redis-benchmark is not installed here: nothing is compared with it."


@dataclass(slots=True)
class Rig:
    """`rates` (messages a second) and `cpu` (microseconds a message: client, servers) by the name of the side."""

    url: str
    prefix: str
    client: Client
    peers: Peers
    options: Options
    say: Say
    rates: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    _cpu_at_end: tuple[float, float] | None = None

    def _cpu_s(self) -> tuple[float, float]:
        return client_cpu_s(), self.peers.servers_cpu_s()

    def _begin_cpu(self) -> tuple[float, float]:
        self._cpu_at_end = None
        return self._cpu_s()

    def end_cpu(self) -> None:
        """What is used from now on is not the run's: it has done what it is timed for, and only ends still."""
        self._cpu_at_end = self._cpu_s()

    async def timed(self, name: str, messages: int, run: Callable[[], Awaitable[Counted]]) -> float:
        """The rate of one run, whose count has to be `messages`."""
        gc.collect()  # not the garbage of the run before
        client_s, servers_s = self._begin_cpu()
        counted = await run()
        client_end_s, servers_end_s = self._cpu_at_end or self._cpu_s()
        client_s, servers_s = client_end_s - client_s, servers_end_s - servers_s
        check_count(name, counted.messages, messages)
        rate = messages / counted.seconds
        self.rates.setdefault(name, []).append(rate)
        self.cpu.setdefault(name, []).append((client_s * 1e6 / messages, servers_s * 1e6 / messages))
        return rate

    async def clean(self) -> None:
        await to_thread.run_sync(self.peers.clean)

    def side(
        self,
        name: str,
        command: str,
        messages: int,
        run: Callable[[], Awaitable[Counted]],
        prepare: Callable[[], Awaitable[None]] | None = None,
    ) -> Side:
        """A side for harness.alternate that is timed and counted here and leaves nothing behind."""

        async def sample() -> float:
            rate = await self.timed(name, messages, run)
            await self.clean()
            return rate

        return Side(name, command, sample, prepare)

    async def redis_benchmark(self, messages: int, *, streams: int = 1, name: str = "redis-benchmark") -> Side | None:
        """redis-benchmark with its fastest setting for so many streams on each master; none where it is missing."""
        if not bench_peers.has_redis_benchmark():
            return None

        def choose() -> Setting:
            return self.peers.best_setting(messages, VALUE_BYTES, lambda line: self.say(f"  {line}"), streams)

        return self.benchmark_side(name, await to_thread.run_sync(choose), messages)

    def benchmark_side(self, name: str, setting: Setting, messages: int) -> Side:
        async def run() -> Counted:
            return await to_thread.run_sync(self.peers.benchmark, setting, messages, VALUE_BYTES)

        command = self.peers.benchmark_command(setting, messages, VALUE_BYTES, shown=True)
        return self.side(name, " ".join(command), messages, run)

    def shardq(self, pairs: Pairs, shards: int = SHARDS) -> Shardq:
        return Shardq(self.client, shards, pairs)

    # -- what was measured -----------------------------------------------------------------------------------

    def samples(self) -> dict[str, list[float]]:
        """The rates of the rounds that count, without the one to warm up."""
        return {name: ones[-self.options.rounds :] for name, ones in self.rates.items()}

    def cpu_figures(self) -> dict[str, dict[str, float]]:
        """CPU microseconds a message, of the client's process (and children) and of all masters; medians."""
        counting = {name: ones[-self.options.rounds :] for name, ones in self.cpu.items()}
        return {
            name: {
                "client": round(median(client for client, _ in ones), 3),
                "servers": round(median(servers for _, servers in ones), 3),
            }
            for name, ones in counting.items()
        }


@asynccontextmanager
async def rig(url: str, options: Options, say: Say, shards: int = SHARDS) -> AsyncIterator[Rig]:
    """A rig with a prefix of its own on the cluster at `url`; its peers use as many streams as there are `shards`."""
    prefix = f"shardq-bench-{secrets.token_hex(4)}"
    peers = Peers(url, prefix, shards)
    try:
        async with connect(url, prefix=prefix) as client:
            yield Rig(url, prefix, client, peers, options, say)
    finally:
        peers.close()


async def sending(
    title: str,
    options: Options,
    say: Say,
    make_sides: Callable[[Rig], Awaitable[list[Side]]],
    sizes: Mapping[str, Any],
    *,
    replicas: int = 0,
) -> Result:
    """Rates, and the CPU a message took, of sides that send in turn to one cluster with so many replicas a master."""
    with harness.cluster(options, replicas=replicas) as cluster:
        async with rig(cluster.url, options, say) as one:
            sides = await make_sides(one)
            samples = await harness.alternate(sides, options.rounds, say)
            figures = {"cpu_us_per_message": one.cpu_figures()}
    commands = {side.name: side.command for side in sides}
    common = {"value_bytes": VALUE_BYTES, "keys": KEYS, "shards": SHARDS}
    return Result(title, "messages/s", samples, commands, sizes={**sizes, **common}, figures=figures)


async def send_all(queue: Queue, pairs: Pairs, **producer: Any) -> Counted:
    """`send_many` on a queue, counted by its counters; keywords as for `Queue.producer`."""
    before = await appended(queue)
    async with queue.producer(**producer) as sender:
        started = perf_counter()
        await sender.send_many(pairs)
        seconds = perf_counter() - started
    return Counted(await appended(queue) - before, seconds)


async def appended(queue: Queue) -> int:
    return sum(shard.appended for shard in (await queue.counters(())).values())


async def acked(queue: Queue, groups: Sequence[str] = (GROUP,)) -> int:
    """Acknowledged messages of these groups together."""
    counters = await queue.counters(groups)
    return sum(group.acked for shard in counters.values() for group in shard.groups.values())


def client_cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def curve(
    title: str, x: str, y: str, result: Result, lines: Mapping[str, Iterable[tuple[float, str]]], *, log_x: bool = True
) -> Curve:
    """For each line its points as (x, side): the height is the side's median."""
    heights = {line: [(at, result.median(side)) for at, side in points] for line, points in lines.items()}
    return Curve(title, x, y, heights, log_x)


def at_least(result: Result, side: str, times: float, against: str) -> Goal:
    """The goal that `side` reaches `times` the median of `against`."""
    ratio = result.median(side) / result.median(against)
    return Goal(f"{side} over {against}", ratio, ">=", times, against)
