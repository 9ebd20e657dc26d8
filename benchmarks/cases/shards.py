"""From 12 to 1,024 shards: sending and handling with one producer and one worker.

All counts of shards share the same messages, two million: some 2,000 for each of 1,024 shards. That is as many as a
worker holds of a shard at most (`buffer_messages`), and seven times what a producer's 32 MiB hold for each (some 250
of these messages). With fewer, say 500 a shard, a run is over before it is steady: the first and the last call of each
shard, which carry little, are then most of its calls. Nothing is made larger for this case: producer and worker have
their defaults, so a message may wait in the producer for as long as that buffer takes to be sent (half a second at
600,000/s), and the worker may hold all of a run's messages at once (about 300 MB with 1,024 shards).
"""

from __future__ import annotations

from anyio import to_thread

from benchmarks import harness
from benchmarks.harness import Options, Result, Say, Side
from benchmarks.rig import NO_REDIS_BENCHMARK, Rig, at_least, curve, rig
from benchmarks.steady import steady
from shardq.ops import bench_peers
from shardq.ops.bench_peers import Setting
from shardq.ops.bench_shardq import KEYS, VALUE_BYTES, Pairs, make_pairs

SHARDS = (12, 48, 192, 1024)
MESSAGES, MASTERS = 2_000_000, 3
BENCHMARK_MESSAGES = 500_000
KINDS = ("produce", "batch_handler", "handler")
AT_LEAST = 0.75


async def measure(options: Options, say: Say) -> Result:
    pairs = make_pairs(options.count(MESSAGES, 1000))
    with harness.cluster(options, MASTERS) as cluster:
        async with rig(cluster.url, options, say) as one:
            sides = [visit(one, shards, pairs) for shards in SHARDS]
            benchmarks = await benchmark_sides(one, options.count(BENCHMARK_MESSAGES, 10_000))
            await harness.alternate([*sides, *benchmarks], options.rounds, say)
            samples, cpu = one.samples(), one.cpu_figures()
    commands = {
        "produce": "async with queue.producer() as p: await p.send_many(pairs)",
        "batch_handler": "shardq.Worker, @worker.batch_handler",
        "handler": "shardq.Worker, @worker.handler",
        **{side.name: side.command for side in benchmarks},
    }
    result = Result(
        "12 to 1,024 shards, messages a second",
        "messages/s",
        samples,
        commands,
        sizes={"messages": len(pairs), "value_bytes": VALUE_BYTES, "keys": KEYS, "shards": list(SHARDS)},
        figures={"cpu_us_per_message": cpu},
    )
    judge(result, bool(benchmarks))
    return result


def judge(result: Result, compared: bool) -> None:
    kinds = [*KINDS, "redis-benchmark"] if compared else list(KINDS)
    lines = {kind: [(float(shards), name_of(kind, shards)) for shards in SHARDS] for kind in kinds}
    result.curves.append(curve("By shards", "shards", "messages/s", result, lines))
    few, many = SHARDS[0], SHARDS[-1]
    for kind in KINDS:
        result.goals.append(at_least(result, name_of(kind, many), AT_LEAST, name_of(kind, few)))
    result.notes.append(
        "A worker holds all its shards before the messages are there, and its time ends when Redis has counted all as "
        "acknowledged: how long it takes to start is not in its rate. All counts of shards share the same "
        f"{result.sizes['messages']:,} messages. Before there were 500,000, which are 488 for each of 1,024 shards: "
        "the first and the last call of each, which carry few messages, were a large part of all."
    )
    if compared:
        result.goals.append(at_least(result, name_of("produce", many), 1.0, name_of("redis-benchmark", many)))
        result.notes.append(
            f"redis-benchmark sends {BENCHMARK_MESSAGES:,} messages and writes to as many streams, to within two, "
            "taken at random (-r); its clients and threads are those that were fastest with 1,024 streams."
        )
    else:
        result.notes.append(NO_REDIS_BENCHMARK)


def name_of(kind: str, shards: int) -> str:
    return f"{kind} {shards}"


def visit(one: Rig, shards: int, pairs: Pairs) -> Side:
    """Sends, then has two workers handle as much again, one after the other; what it returns is the rate of sending."""
    shardq = one.shardq(pairs, shards)

    async def run() -> float:
        queue = await shardq.declare()
        rate = await one.timed(name_of("produce", shards), len(pairs), shardq.send)
        for kind in ("batch_handler", "handler"):
            async with steady(one, queue, pairs, lists=kind == "batch_handler") as handle:
                handled = await one.timed(name_of(kind, shards), len(pairs), handle)
            one.say(f"  {shards} shards: {kind} {handled:,.0f}")
        await queue.delete(force=True)
        return rate

    return Side(name_of("produce", shards), "", run)


async def benchmark_sides(one: Rig, messages: int) -> list[Side]:
    """redis-benchmark over as many streams; none where it is not installed."""
    if not bench_peers.has_redis_benchmark():
        return []

    def choose() -> Setting:
        many = -(-SHARDS[-1] // MASTERS)
        return one.peers.best_setting(messages, VALUE_BYTES, lambda line: one.say(f"  {line}"), many)

    best = await to_thread.run_sync(choose)
    settings = {shards: Setting(best.clients, best.threads, -(-shards // MASTERS)) for shards in SHARDS}
    return [
        one.benchmark_side(name_of("redis-benchmark", shards), setting, messages)
        for shards, setting in settings.items()
    ]
