"""What a worker with nothing to do costs: its CPU, and what it asks of Redis for each of its shards."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import anyio
from redis.asyncio.cluster import RedisCluster

import shardq
from benchmarks import harness
from benchmarks.harness import Curve, Goal, Options, Result, Say
from benchmarks.programs.process import running
from shardq.runtime.client import Client

SHARDS, WINDOW_S = (12, 256, 1024), {12: 4.0, 256: 8.0, 1024: 4.0}
GOAL_SHARDS, CPU_BOUND, CALLS_BOUND = 256, 1.0, 1.0
GROUP, OWNED_WITHIN_S, SETTLE_S = "bench", 60.0, 4.0
# What a client sends itself; the rest of the commands that a server counts are those inside its functions.
SENT = frozenset({"fcall", "fcall_ro", "ssubscribe", "psubscribe", "cluster", "ping", "wait", "function", "hgetall"})


@dataclass(frozen=True, slots=True)
class Window:
    """One measurement: `cpu` of the worker in percent of one core, `servers_cpu` of all masters; a second: `calls` that
    the worker sent, `commands` that the masters carried out, those inside functions too."""

    cpu: float
    calls: float
    commands: float
    servers_cpu: float


async def measure(options: Options, say: Say) -> Result:
    windows: dict[int, list[Window]] = {}
    with harness.cluster(options) as servers:
        async with RedisCluster.from_url(servers.url) as redis, shardq.connect(servers.url) as client:
            for shards in SHARDS:
                windows[shards] = await idle_worker(redis, client, servers.url, shards, options, say)
    return result(windows, options)


async def idle_worker(
    redis: RedisCluster, client: Client, url: str, shards: int, options: Options, say: Say
) -> list[Window]:
    name, found = f"idle-{shards}", []
    queue = await client.queue(name, shards=shards)
    await queue.open_group(GROUP)
    with tempfile.TemporaryDirectory() as folder:
        async with running("worker", url, name, GROUP, Path(folder, "notes")) as worker:
            await all_owned(redis, [keys.group(GROUP) for keys in queue.shards.values()])
            await anyio.sleep(SETTLE_S * min(1, options.scale))  # the first poll of each shard is behind it
            for number in range(options.rounds):
                found.append(await window(redis, worker.pid, WINDOW_S[shards] * options.scale))
                say(f"  round {number + 1}: {shards} shards: {found[-1].cpu:.2f} % CPU, {found[-1].calls:.1f} calls/s")
            await worker.end()
    return found


async def all_owned(redis: RedisCluster, groups: list[str]) -> None:
    """Waits until every lease is held."""
    with anyio.fail_after(OWNED_WITHIN_S):
        for group in groups:
            while not await redis.hget(group, "token"):  # noqa: ASYNC110 - another process sets it
                await anyio.sleep(0.2)


async def window(redis: RedisCluster, pid: int, seconds: float) -> Window:
    commands, servers, cpu, started = await commands_of(redis), await servers_cpu_s(redis), cpu_s(pid), perf_counter()
    await anyio.sleep(seconds)
    wall, cpu = perf_counter() - started, cpu_s(pid) - cpu
    servers = await servers_cpu_s(redis) - servers
    ran = {name: count - commands.get(name, 0) for name, count in (await commands_of(redis)).items()}
    sent = sum(count for name, count in ran.items() if name in SENT)
    return Window(100 * cpu / wall, sent / wall, sum(ran.values()) / wall, 100 * servers / wall)


def cpu_s(pid: int) -> float:
    """CPU seconds of all threads of a process so far, to the nanosecond (/proc/PID/stat has but ticks of 10 ms)."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


async def servers_cpu_s(redis: RedisCluster) -> float:
    infos = await redis.info("cpu", target_nodes=RedisCluster.PRIMARIES)
    return sum(float(cpu["used_cpu_user"] + cpu["used_cpu_sys"]) for cpu in infos.values())


async def commands_of(redis: RedisCluster) -> Mapping[str, int]:
    """How often every command ran so far, on all masters; the INFO that asks is left out."""
    infos = await redis.info("commandstats", target_nodes=RedisCluster.PRIMARIES)
    counts: dict[str, int] = {}
    for info in infos.values():
        for name, stats in info.items():
            command = name.removeprefix("cmdstat_").partition("|")[0]
            if command != "info":
                counts[command] = counts.get(command, 0) + int(stats["calls"])
    return counts


# -- the result ----------------------------------------------------------------------------------------------


def result(windows: dict[int, list[Window]], options: Options) -> Result:
    chosen = windows[GOAL_SHARDS]
    calls = median(one.calls for one in chosen) / GOAL_SHARDS
    figures: dict[str, float] = {}
    for shards, ones in windows.items():
        figures[f"calls a shard and second, {shards} shards"] = round(median(one.calls for one in ones) / shards, 3)
        figures[f"commands a shard and second, {shards} shards"] = round(
            median(one.commands for one in ones) / shards, 3
        )
        figures[f"CPU % of all masters, {shards} shards"] = round(median(one.servers_cpu for one in ones), 2)
    points = [(float(shards), median(one.cpu for one in ones)) for shards, ones in windows.items()]
    return Result(
        title="A worker with nothing to do",
        unit="% of one core",
        samples={f"{shards} shards": [one.cpu for one in ones] for shards, ones in windows.items()},
        commands={f"{shards} shards": "shardq.Worker, @worker.handler; no message" for shards in windows},
        goals=[
            Goal(f"CPU % of one core with {GOAL_SHARDS} shards", median(one.cpu for one in chosen), "<=", CPU_BOUND),
            Goal(f"calls a shard and second with {GOAL_SHARDS} shards", calls, "<=", CALLS_BOUND),
        ],
        curves=[Curve("CPU of an idle worker by its shards", "shards", "% of one core", {"shardq": points})],
        sizes={"seconds a round": {str(shards): seconds * options.scale for shards, seconds in WINDOW_S.items()}},
        notes=[
            "One worker holds all shards and leads its group. Calls are what it sends: heartbeats and polls; commands "
            "are also those that the called functions run inside the server.",
        ],
        figures=figures,
    )
