"""One `await send()` at a time from 10, 100 and 1,000 tasks, beside redis-benchmark."""

from __future__ import annotations

from time import perf_counter

import anyio

from benchmarks.harness import Options, Result, Say, Side
from benchmarks.rig import NO_REDIS_BENCHMARK, Rig, appended, at_least, curve, sending
from shardq.ops.bench import BENCHMARK_SHARE
from shardq.ops.bench_peers import Counted
from shardq.ops.bench_shardq import Pairs, make_pairs
from shardq.runtime.producer import Producer

MESSAGES = {10: 50_000, 100: 150_000, 1000: 300_000}  # about a second and a half each
BENCHMARK_MESSAGES = 500_000 * BENCHMARK_SHARE


async def measure(options: Options, say: Say) -> Result:
    counts = {tasks: options.count(full, tasks) for tasks, full in MESSAGES.items()}

    async def sides(one: Rig) -> list[Side]:
        benchmark = await one.redis_benchmark(options.count(BENCHMARK_MESSAGES, 10_000))
        own = [send_side(one, tasks, make_pairs(count)) for tasks, count in counts.items()]
        return own + ([benchmark] if benchmark is not None else [])

    title = "`await send()` from many tasks, messages a second"
    result = await sending(title, options, say, sides, {"messages": counts})
    lines = {"send": [(float(tasks), name_of(tasks)) for tasks in counts]}
    result.curves.append(curve("`await send()` by tasks", "tasks", "messages/s", result, lines))
    if "redis-benchmark" in result.samples:
        result.goals.append(at_least(result, name_of(1000), 0.3, "redis-benchmark"))
    else:
        result.notes.append(NO_REDIS_BENCHMARK)
    result.notes.append(
        "One producer in one process; each task waits for its message to be stored, then sends another."
    )
    return result


def name_of(tasks: int) -> str:
    return f"{tasks} tasks"


def send_side(one: Rig, tasks: int, pairs: Pairs) -> Side:
    shardq = one.shardq(pairs)

    async def run() -> Counted:
        queue = await shardq.declare()
        async with queue.producer() as producer:
            started = perf_counter()
            async with anyio.create_task_group() as group:
                for first in range(tasks):
                    group.start_soon(send_each, producer, pairs[first::tasks])
            seconds = perf_counter() - started
        return Counted(await appended(queue), seconds)

    command = f"{tasks} tasks: for key, value in pairs: await producer.send(value, key=key)"
    return one.side(name_of(tasks), command, len(pairs), run)


async def send_each(producer: Producer, pairs: Pairs) -> None:
    for key, value in pairs:
        await producer.send(value, key=key)
