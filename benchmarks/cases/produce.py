"""Sending: send_many beside redis-py's cluster pipelines and redis-benchmark."""

from __future__ import annotations

from typing import Any

from anyio import to_thread

from benchmarks import harness
from benchmarks.harness import Goal, Options, Result, Say
from benchmarks.rig import NO_REDIS_BENCHMARK, SHARDS, at_least
from shardq.ops import bench
from shardq.ops.bench import Sizes

MESSAGES = 500_000


async def measure(options: Options, say: Say) -> Result:
    sizes = Sizes(options.count(MESSAGES, 1000), options.rounds, SHARDS)
    with harness.cluster(options) as cluster:
        found = await to_thread.run_sync(bench.produce, cluster.url, sizes, lambda line: say(f"  {line}"))
    result = to_result("Sending, messages a second", found)
    result.goals = goals(result)
    result.notes += [
        "Every side sends 100-byte values; shardq sends a key beside each, the others do not.",
        "redis-py's pipelines send a tenth of the messages: their rate is steady and much lower.",
    ]
    if "redis-benchmark" not in result.samples:
        result.notes.append(NO_REDIS_BENCHMARK)
    return result


def goals(result: Result) -> list[Goal]:
    wanted = {"redis-benchmark": 1.5, "redis-py": 40.0, "redis-py-asyncio": 40.0}
    return [at_least(result, "shardq", times, name) for name, times in wanted.items() if name in result.samples]


def to_result(title: str, found: dict[str, Any]) -> Result:
    """What shardq.ops.bench found, as a Result; its rates are rounded to whole messages."""
    return Result(
        title,
        "messages/s",
        {name: [float(rate) for rate in rates] for name, rates in found["rounds"].items()},
        found["commands"],
        sizes={**found["sizes"], "messages": found["messages"]},
        versions={name: version for name, version in found["versions"].items() if name != "server"},
        figures={"cpu_us_per_message": found["cpu_us_per_message"]},
    )
