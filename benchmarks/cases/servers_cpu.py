"""The servers' own CPU for each message: shardq's functions beside plain XADD, XREADGROUP and XACK."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

from anyio import to_thread
from redis.cluster import RedisCluster

from benchmarks import harness
from benchmarks.harness import Goal, Options, Result, Say, Side
from benchmarks.rig import SHARDS, Rig, rig
from shardq.ops.bench import PIPELINE_SHARE
from shardq.ops.bench_peers import DEPTH, Counted
from shardq.ops.bench_shardq import KEYS, VALUE_BYTES, make_pairs

MESSAGES = 500_000
# What the clients call themselves; a function's own commands are in its time already.
CALLS = {"shardq": ("fcall", "fcall_ro"), "redis-py": ("xadd", "xreadgroup", "xack")}
SENDING, HANDLING = ("shardq send_many", "redis-py XADD"), ("shardq batch_handler", "redis-py XREADGROUP+XACK")

Stats = dict[str, tuple[float, float]]
"""By command: calls, and microseconds in them."""


async def measure(options: Options, say: Say) -> Result:
    count = options.count(MESSAGES, 1000)
    seen: dict[str, list[Stats]] = {}
    with harness.cluster(options) as cluster:
        async with rig(cluster.url, options, say) as one:
            sides = make_sides(one, count, seen)
            samples = await harness.alternate(sides, options.rounds, say)
            rates = {name: round(median(ones)) for name, ones in one.samples().items()}
    result = Result(
        "CPU of the masters, microseconds a message",
        "us/message",
        samples,
        {side.name: side.command for side in sides},
        sizes={"messages": count, "value_bytes": VALUE_BYTES, "keys": KEYS, "shards": SHARDS},
        figures={"rates": rates, "commands": {name: summed(name, ones) for name, ones in seen.items()}},
    )
    for own, plain in (SENDING, HANDLING):
        result.goals.append(Goal(f"{own} over {plain}", result.median(own) / result.median(plain), "<=", 1.0, plain))
    result.notes += [
        "A sample is what INFO cpu counts on all masters, idle time between calls included.",
        "The figures named commands are what INFO commandstats counts of the calls that a client makes, a message: "
        "parsing, network and the append-only file are not in them.",
        "redis-py's pipelines send a tenth of the messages.",
    ]
    return result


def make_sides(one: Rig, count: int, seen: dict[str, list[Stats]]) -> list[Side]:
    pairs = make_pairs(count)
    few = [value for _, value in pairs][: max(1, count // PIPELINE_SHARE)]
    shardq = one.shardq(pairs)

    async def declare() -> None:
        await shardq.declare()

    async def fill_streams() -> None:
        await to_thread.run_sync(one.peers.fill, count, pairs[0][1])

    async def add() -> Counted:
        return await to_thread.run_sync(one.peers.produce, few)

    async def read() -> Counted:
        return await to_thread.run_sync(one.peers.consume)

    def side(name: str, command: str, messages: int, run: Callable[[], Awaitable[Counted]], prepare: Any) -> Side:
        async def sample() -> float:
            before = command_stats(one)
            await one.timed(name, messages, run)
            seen.setdefault(name, []).append(a_message(before, command_stats(one), messages))
            await one.clean()
            return one.cpu[name][-1][1]

        return Side(name, command, sample, prepare)

    return [
        side(SENDING[0], "await producer.send_many(pairs)", count, shardq.send, declare),
        side(SENDING[1], f"RedisCluster.pipeline(), {DEPTH} XADDs in each", len(few), add, None),
        side(HANDLING[0], "@worker.batch_handler", count, shardq.handle_lists, shardq.fill),
        side(HANDLING[1], f"xreadgroup(count={DEPTH}) and xack of those", count, read, fill_streams),
    ]


def command_stats(one: Rig) -> Stats:
    """INFO commandstats, summed over the masters."""
    found: dict[str, dict[str, dict[str, float]]] = one.peers.redis.info(
        "commandstats", target_nodes=RedisCluster.PRIMARIES
    )
    total: Stats = {}
    for node in found.values():
        for command, stats in node.items():
            calls, usec = total.get(command.removeprefix("cmdstat_"), (0.0, 0.0))
            total[command.removeprefix("cmdstat_")] = calls + stats["calls"], usec + stats["usec"]
    return total


def a_message(before: Stats, after: Stats, messages: int) -> Stats:
    nothing = (0.0, 0.0)
    return {
        command: tuple((now - was) / messages for was, now in zip(before.get(command, nothing), counts, strict=True))  # type: ignore[misc]  # a pair
        for command, counts in after.items()
    }


def summed(side: str, rounds: list[Stats]) -> dict[str, dict[str, float]]:
    """Of the commands that the side's client calls: calls and microseconds a message, medians of the rounds."""
    wanted = CALLS[side.split()[0]]
    rounds = rounds[1:] if len(rounds) > 1 else rounds  # the first was for warming up
    return {
        command: {
            "calls": round(median(one.get(command, (0.0, 0.0))[0] for one in rounds), 6),
            "usec": round(median(one.get(command, (0.0, 0.0))[1] for one in rounds), 4),
        }
        for command in wanted
        if any(one.get(command, (0.0, 0.0))[0] > 0 for one in rounds)
    }
