"""Sending at each durability, on masters that have a replica each."""

from __future__ import annotations

import re

from benchmarks import harness
from benchmarks.harness import Options, Result, Say, Side
from benchmarks.rig import Rig, at_least, send_all, sending
from shardq.ops.bench_peers import Counted
from shardq.ops.bench_shardq import make_pairs

MESSAGES = {"leader": 500_000, "replica": 500_000, "fsync": 48_000}


async def measure(options: Options, say: Say) -> Result:
    kinds = [kind for kind in MESSAGES if kind != "fsync" or has_fsync(harness.server_version(options.server))]
    counts = {kind: options.count(MESSAGES[kind], 1000) for kind in kinds}

    async def sides(one: Rig) -> list[Side]:
        return [send_side(one, kind, count) for kind, count in counts.items()]

    sizes = {"messages": counts, "masters": 3, "replicas": 3}
    title = "Sending by durability, messages a second"
    result = await sending(title, options, say, sides, sizes, replicas=1)
    result.goals.append(at_least(result, "replica", 0.7, "leader"))
    result.notes.append("The CPU of servers is that of the masters alone, without their replicas.")
    result.notes.append(
        "fsync waits for the disks of a master and its replica, with appendfsync everysec: it has no goal."
        if "fsync" in result.samples
        else "This server has no WAITAOF (Redis 7.2 and Valkey have): no fsync."
    )
    return result


def has_fsync(version: str) -> bool:
    """Whether a server such as 'Redis 7.0.15' knows WAITAOF."""
    found = re.match(r"(Redis|Valkey) (\d+)\.(\d+)", version)
    return found is not None and (found[1] == "Valkey" or (int(found[2]), int(found[3])) >= (7, 2))


def send_side(one: Rig, kind: str, count: int) -> Side:
    pairs = make_pairs(count)
    shardq = one.shardq(pairs)

    async def run() -> Counted:
        return await send_all(await shardq.declare(), pairs, durability=kind)

    return one.side(kind, f'queue.producer(durability="{kind}"), send_many(pairs)', count, run)
