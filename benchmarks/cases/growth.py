"""How the rates grow and shrink with the size of values, the number of keys and the number of groups."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import anyio

from benchmarks import harness
from benchmarks.harness import Curve, Options, Result, Say, Side
from benchmarks.rig import SHARDS, Rig, acked, curve, rig, send_all
from shardq.ops.bench_peers import Counted
from shardq.ops.bench_shardq import VALUE_BYTES, Pairs, check_count, make_pairs
from shardq.runtime.queue import Queue
from shardq.runtime.worker import Worker

ROUNDS = 3  # at most: there are many points
MESSAGES, GROUP_MESSAGES = 300_000, 200_000
ROUND_BYTES = 128_000_000  # of large values as many messages as make this
SIZES = (10, 100, 1024, 10_240, 65_536)
KEYS = (1, 100, 10_000, 1_000_000)
GROUPS = (1, 2, 4, 8)


async def measure(options: Options, say: Say) -> Result:
    options = replace(options, rounds=min(options.rounds, ROUNDS))
    with harness.cluster(options) as cluster:
        async with rig(cluster.url, options, say) as one:
            sides = [of_size(one, size) for size in SIZES]
            sides += [of_keys(one, keys) for keys in KEYS]
            sides += [of_groups(one, groups) for groups in GROUPS]
            await harness.alternate(sides, options.rounds, say)
            samples, cpu = one.samples(), one.cpu_figures()
    result = Result(
        "By the size of values, keys and groups, messages a second",
        "messages/s",
        samples,
        {
            "send_many": "await producer.send_many(pairs)",
            "batch_handler": "shardq.Worker, @worker.batch_handler",
            "handler": "shardq.Worker, @worker.handler",
            "groups": "a shardq.Worker with a batch_handler for each group, all in one process",
        },
        sizes={
            "messages": {
                "sizes": {size: messages_of(options, size) for size in SIZES},
                "keys": {keys: messages_for(options, keys) for keys in KEYS},
                "groups": options.count(GROUP_MESSAGES, 1000),
            },
            "rounds": options.rounds,
            "shards": SHARDS,
        },
        figures={"cpu_us_per_message": cpu},
    )
    result.curves = curves(result)
    result.notes += [
        f"{options.rounds} rounds count here.",
        f"Large values: as many messages as make {ROUND_BYTES / 1e6:,.0f} MB. Random bytes, not compressed.",
        "One key is one shard and so one master; every key is used, in turn.",
        "The groups' workers share one process and one event loop; a delivery is one message handled by one group.",
    ]
    return result


# -- the points ----------------------------------------------------------------------------------------------


def messages_of(options: Options, size: int) -> int:
    return options.count(min(MESSAGES, ROUND_BYTES // size), 100)


def messages_for(options: Options, keys: int) -> int:
    """At least one for each key."""
    return options.count(max(MESSAGES, keys), 1000)


def of_size(one: Rig, size: int) -> Side:
    value = random.Random(1).randbytes(size)
    pairs = [(key, value) for key, _ in make_pairs(messages_of(one.options, size))]
    return visit(one, f"{size} B", pairs, each=False)


def of_keys(one: Rig, keys: int) -> Side:
    count, value = messages_for(one.options, keys), random.Random(1).randbytes(VALUE_BYTES)
    pairs = [(f"user:{at % keys}", value) for at in range(count)]
    return visit(one, f"{keys} keys", pairs, each=True)


def visit(one: Rig, label: str, pairs: Pairs, *, each: bool) -> Side:
    """Sends and handles that in lists; with `each` also sends again and handles it one by one."""
    shardq = one.shardq(pairs)

    async def run() -> float:
        await shardq.declare()
        rate = await one.timed(f"send_many, {label}", len(pairs), shardq.send)
        await one.timed(f"batch_handler, {label}", len(pairs), shardq.handle_lists)
        await one.clean()
        if each:
            await shardq.fill()
            await one.timed(f"handler, {label}", len(pairs), shardq.handle_each)
            await one.clean()
        return rate

    return Side(f"send_many, {label}", "", run)


# -- groups --------------------------------------------------------------------------------------------------


def of_groups(one: Rig, count: int) -> Side:
    pairs = make_pairs(one.options.count(GROUP_MESSAGES, 1000))
    shardq = one.shardq(pairs)
    names = [f"group-{at}" for at in range(count)]
    label = f"batch_handler, {count} groups"

    async def run() -> float:
        queue = await shardq.declare()
        for name in names:
            await queue.open_group(name)
        check_count("filling the queue", (await send_all(queue, pairs)).messages, len(pairs))

        async def handle() -> Counted:
            return await handle_in_groups(queue, names, len(pairs))

        rate = await one.timed(label, len(pairs) * count, handle)
        await one.clean()
        return rate

    return Side(label, "", run)


@dataclass(slots=True)
class Tally:
    expected: int
    complete: anyio.Event
    handled: int = 0
    started: float = 0.0

    def add(self, count: int) -> None:
        if not self.handled:
            self.started = perf_counter()
        self.handled += count
        if self.handled >= self.expected:
            self.complete.set()


async def handle_in_groups(queue: Queue, names: Sequence[str], messages: int) -> Counted:
    """Every group handles all messages: from the first call until Redis has counted all as acknowledged."""
    tally = Tally(messages * len(names), anyio.Event())
    workers = [group_worker(queue, name, tally) for name in names]
    with anyio.fail_after(600):
        async with anyio.create_task_group() as tasks:
            for worker in workers:
                tasks.start_soon(worker.run, queue.client)
            await tally.complete.wait()
            done = await acked(queue, names)
            while done < tally.expected:
                done = await acked(queue, names)
            seconds = perf_counter() - tally.started
            for worker in workers:
                worker.stop()
    check_count("the groups' handlers were called", tally.handled, tally.expected)
    return Counted(done, seconds)


def group_worker(queue: Queue, name: str, tally: Tally) -> Worker:
    worker = Worker(queue.name, group=name)

    @worker.batch_handler
    async def handle(messages: Sequence[object]) -> None:
        tally.add(len(messages))

    return worker


# -- the curves ----------------------------------------------------------------------------------------------


def curves(result: Result) -> list[Curve]:
    kinds = ("send_many", "batch_handler")
    sizes = {kind: [(float(size), f"{kind}, {size} B") for size in SIZES] for kind in kinds}
    keys = {kind: [(float(count), f"{kind}, {count} keys") for count in KEYS] for kind in (*kinds, "handler")}
    groups = {"batch_handler": [(float(count), f"batch_handler, {count} groups") for count in GROUPS]}
    by_size = curve("By the size of values", "bytes", "messages/s", result, sizes)
    megabytes = {line: [(size, rate * size / 1e6) for size, rate in points] for line, points in by_size.lines.items()}
    return [
        replace(by_size, log_y=True),
        Curve("By the size of values", "bytes", "MB/s", megabytes),
        curve("By keys", "keys", "messages/s", result, keys),
        curve("By groups, each with a worker", "groups", "deliveries/s", result, groups),
    ]
