"""How fast shardq sends and handles, beside what people use instead: one cluster, one run, the sides in turn.

Each round every side starts on streams of its own and deletes them afterwards; the order turns round from one round to
the next; a rate is the median of its rounds. Each side's messages are counted in Redis when it is done, and a count
that is not the one expected is an error: a rate never stands for messages that were not stored or not finished.
It never leaves a key behind and never touches one outside its own prefix.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import resource
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import anyio
from anyio import to_thread

from shardq.errors import StoreRefused
from shardq.ops import bench_peers
from shardq.ops.bench_peers import DEPTH, Counted, Peers
from shardq.ops.bench_shardq import KEYS, VALUE_BYTES, Shardq, check_count, make_pairs
from shardq.runtime.client import Client, connect

BENCHMARK_SHARE = 2  # redis-benchmark sends so many times more: with threads it looks at the clock every 250 ms
PIPELINE_SHARE = 10  # redis-py's pipelines send this much less: they are so much slower, and their rate is steady
READ_SHARE = 4  # and its readers so much less: still their rounds are the longer ones

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sizes:
    """`messages` of each side in each round, and over how many shards or streams."""

    messages: int
    rounds: int
    shards: int


@dataclass(frozen=True, slots=True)
class Side:
    """One of those compared. `prepare` is not timed and comes before each `run`; `messages` is what must be counted."""

    name: str
    command: str
    messages: int
    run: Callable[[], Awaitable[Counted]]
    prepare: Callable[[], Awaitable[None]] | None = None


@dataclass(frozen=True, slots=True)
class Timed:
    """One round of one side; CPU microseconds a message, of this side's client and of all masters together."""

    rate: float
    client_cpu_us: float
    servers_cpu_us: float


def produce(url: str, sizes: Sizes, say: Say) -> dict[str, Any]:
    """Sending: redis-benchmark where it is installed, redis-py's pipelines, shardq's `send_many`."""
    return _run(url, sizes, say, "produce", _produce_sides)


def consume(url: str, sizes: Sizes, say: Say) -> dict[str, Any]:
    """Handling what was sent before: redis-py's XREADGROUP and XACK, shardq's `handler` and `batch_handler`."""
    return _run(url, sizes, say, "consume", _consume_sides)


# -- the sides -----------------------------------------------------------------------------------------------


def _produce_sides(client: Client, peers: Peers, sizes: Sizes, say: Say) -> list[Side]:
    pairs = make_pairs(sizes.messages)
    few = [value for _, value in pairs][: max(1, sizes.messages // PIPELINE_SHARE)]
    shardq = Shardq(client, sizes.shards, pairs)

    async def declare() -> None:
        await shardq.declare()

    async def pipeline() -> Counted:
        return await to_thread.run_sync(peers.produce, few)

    async def pipeline_asyncio() -> Counted:
        return await peers.produce_asyncio(few)

    what = f"{DEPTH} XADDs in each pipeline, over {sizes.shards} streams"
    sides = [
        Side("shardq", "async with queue.producer() as p: await p.send_many(pairs)", len(pairs), shardq.send, declare),
        Side("redis-py", f"redis.cluster.RedisCluster.pipeline(), {what}", len(few), pipeline),
        Side("redis-py-asyncio", f"redis.asyncio.RedisCluster.pipeline(), {what}", len(few), pipeline_asyncio),
    ]
    if bench_peers.has_redis_benchmark():
        many = sizes.messages * BENCHMARK_SHARE
        setting = peers.best_setting(many, VALUE_BYTES, say)

        async def benchmark() -> Counted:
            return await to_thread.run_sync(peers.benchmark, setting, many, VALUE_BYTES)

        shown = " ".join(peers.benchmark_command(setting, many, VALUE_BYTES, shown=True))
        sides.append(Side("redis-benchmark", shown, many, benchmark))
    return sides


def _consume_sides(client: Client, peers: Peers, sizes: Sizes, _say: Say) -> list[Side]:
    pairs = make_pairs(sizes.messages)
    shardq = Shardq(client, sizes.shards, pairs)

    async def fill_streams() -> None:
        await to_thread.run_sync(peers.fill, few, pairs[0][1])

    async def read() -> Counted:
        return await to_thread.run_sync(peers.consume)

    what = f"xreadgroup(count={DEPTH}) and xack of those, {sizes.shards} streams"
    count, few = sizes.messages, max(1, sizes.messages // READ_SHARE)
    return [
        Side("shardq", "shardq.Worker, @worker.batch_handler", count, shardq.handle_lists, shardq.fill),
        Side("shardq-handler", "shardq.Worker, @worker.handler", count, shardq.handle_each, shardq.fill),
        Side("redis-py", f"redis.cluster.RedisCluster: {what} one after the other", few, read, fill_streams),
        Side(
            "redis-py-asyncio",
            f"redis.asyncio.RedisCluster: {what} {bench_peers.READERS} side by side",
            few,
            peers.consume_asyncio,
            fill_streams,
        ),
    ]


# -- the rounds ----------------------------------------------------------------------------------------------


def _run(
    url: str, sizes: Sizes, say: Say, kind: str, make_sides: Callable[[Client, Peers, Sizes, Say], list[Side]]
) -> dict[str, Any]:
    prefix = f"shardq-bench-{secrets.token_hex(4)}"
    peers = Peers(url, prefix, sizes.shards)
    load = os.getloadavg()[0]

    async def rounds() -> tuple[list[Side], dict[str, list[Timed]]]:
        async with connect(url, prefix=prefix) as client:
            sides = make_sides(client, peers, sizes, say)
            return sides, await alternate(sides, peers, sizes.rounds, say)

    try:
        sides, timed = anyio.run(rounds)
        return {"bench": kind, **_result(sides, timed), **_circumstances(peers, sizes, load)}
    except bench_peers.PEER_ERRORS as error:
        msg = f"redis-py gave up ({type(error).__name__}: {error}): check the cluster and run the benchmark again"
        raise StoreRefused(msg) from error
    finally:
        peers.close()


async def alternate(sides: Sequence[Side], peers: Peers, rounds: int, say: Say) -> dict[str, list[Timed]]:
    """One round to warm up, not counted, then the rounds, the order reversed in every other one."""
    timed: dict[str, list[Timed]] = {side.name: [] for side in sides}
    for number in range(rounds + 1):
        for side in sides if number % 2 else reversed(sides):
            one = await _one(side, peers)
            if number:
                timed[side.name].append(one)
            say(f"round {number or 'for warming up'}: {side.name} {one.rate:,.0f}/s")
    return timed


async def _one(side: Side, peers: Peers) -> Timed:
    if side.prepare is not None:
        await side.prepare()
    gc.collect()  # not the garbage of the side before
    client_s, servers_s = _client_cpu_s(), peers.servers_cpu_s()
    counted = await side.run()
    client_s, servers_s = _client_cpu_s() - client_s, peers.servers_cpu_s() - servers_s
    check_count(side.name, counted.messages, side.messages)
    await to_thread.run_sync(peers.clean)
    scale = 1e6 / counted.messages
    return Timed(counted.messages / counted.seconds, client_s * scale, servers_s * scale)


def _client_cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# -- the result ----------------------------------------------------------------------------------------------


def _result(sides: Sequence[Side], timed: dict[str, list[Timed]]) -> dict[str, Any]:
    rates: dict[str, float | None] = {name: round(median(one.rate for one in ones)) for name, ones in timed.items()}
    rates.setdefault("redis-benchmark", None)  # not installed, or nothing it can do
    return {
        "rates": rates,
        "ratios": ratios(rates),
        "rounds": {name: [round(one.rate) for one in ones] for name, ones in timed.items()},
        "cpu_us_per_message": {
            name: {
                "client": round(median(one.client_cpu_us for one in ones), 2),
                "servers": round(median(one.servers_cpu_us for one in ones), 2),
            }
            for name, ones in timed.items()
        },
        "messages": {side.name: side.messages for side in sides},
        "commands": {side.name: side.command for side in sides},
    }


def ratios(rates: dict[str, float | None]) -> dict[str, float | None]:
    """`shardq` over each other; what handles one message at a time also over redis-py."""
    found: dict[str, float | None] = {}
    for name, rate in rates.items():
        if name != "shardq":
            found[name] = round(rates["shardq"] / rate, 2) if rate and rates["shardq"] else None
    each, peer = rates.get("shardq-handler"), rates.get("redis-py")
    if each and peer:
        found["shardq-handler/redis-py"] = round(each / peer, 2)
    return found


def _circumstances(peers: Peers, sizes: Sizes, load: float) -> dict[str, Any]:
    return {
        "sizes": {
            "messages": sizes.messages,
            "rounds": sizes.rounds,
            "shards": sizes.shards,
            "value_bytes": VALUE_BYTES,
            "keys": KEYS,
        },
        "machine": {
            "cpus": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "load": round(load, 2),
        },
        "versions": {
            "server": peers.server_version(),
            "python": platform.python_version(),
            "shardq": importlib.metadata.version("shardq"),
            **bench_peers.versions(),
        },
    }
