"""Handling: batch_handler and handler beside redis-py's XREADGROUP and XACK."""

from __future__ import annotations

from anyio import to_thread

from benchmarks import harness
from benchmarks.cases.produce import to_result
from benchmarks.harness import Options, Result, Say
from benchmarks.rig import SHARDS, at_least
from shardq.ops import bench
from shardq.ops.bench import Sizes

MESSAGES = 2_000_000


async def measure(options: Options, say: Say) -> Result:
    sizes = Sizes(options.count(MESSAGES, 1000), options.rounds, SHARDS)
    with harness.cluster(options) as cluster:
        found = await to_thread.run_sync(bench.consume, cluster.url, sizes, lambda line: say(f"  {line}"))
    result = to_result("Handling, messages a second", found)
    peers = ("redis-py", "redis-py-asyncio")
    result.goals = [at_least(result, "shardq", 10.0, peer) for peer in peers]
    result.goals += [at_least(result, "shardq-handler", 2.5, peer) for peer in peers]
    result.notes += [
        "shardq is the batch handler, shardq-handler an async function called for each message; both do nothing.",
        "redis-py reads and acknowledges 500 entries at a time; redis-py-asyncio does so on 12 streams side by side.",
        "redis-py reads a quarter of the messages: its rounds are still longer than shardq's, which with as few would "
        "be over in a third of a second.",
        "shardq's time ends when Redis has counted every message as acknowledged.",
    ]
    return result
