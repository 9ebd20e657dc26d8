"""Sending and handling on a queue that is empty, and on one with a backlog of ten million messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import anyio
from redis.cluster import RedisCluster

from benchmarks import harness
from benchmarks.harness import Options, Result, Say, Side
from benchmarks.rig import SHARDS, Rig, acked, at_least, curve, rig, send_all
from shardq.ops.bench_peers import GROUP, Counted
from shardq.ops.bench_shardq import KEYS, Pairs, check_count, make_pairs
from shardq.runtime.queue import Queue
from shardq.runtime.worker import Worker

BACKLOG, MESSAGES = 10_000_000, 1_000_000
HANDLED = 0.8  # of what was sent: the end of an emptied queue is not among what is compared
VALUE_BYTES = 20  # so that ten million of them fit anywhere
STATES = ("empty", "backlog")


async def measure(options: Options, say: Say) -> Result:
    backlog, count = options.count(BACKLOG, 1000), options.count(MESSAGES, 1000)
    pairs = [(key, value[:VALUE_BYTES]) for key, value in make_pairs(count)]
    with harness.cluster(options) as cluster:
        async with rig(cluster.url, options, say) as one:
            full = await one.client.queue("full", shards=SHARDS)
            await full.open_group(GROUP)
            await fill(full, pairs, backlog)
            memory = used_memory_bytes(one)
            say(f"  a backlog of {backlog:,} takes {memory / 1e6:,.0f} MB")
            sides = [on_empty(one, pairs), on_backlog(one, full, pairs)]
            await harness.alternate(sides, options.rounds, say)
            samples, cpu = one.samples(), one.cpu_figures()
    result = Result(
        "An empty queue and a backlog, messages a second",
        "messages/s",
        samples,
        {"send": "await producer.send_many(pairs)", "handle": "shardq.Worker, @worker.batch_handler"},
        sizes={"backlog": backlog, "messages": count, "value_bytes": VALUE_BYTES, "keys": KEYS, "shards": SHARDS},
        figures={"cpu_us_per_message": cpu, "memory_bytes": memory},
    )
    sizes = {"empty": 0.0, "backlog": float(backlog)}
    lines = {kind: [(sizes[state], f"{kind}, {state}") for state in STATES] for kind in ("send", "handle")}
    result.curves.append(curve("By backlog", "backlog, messages", "messages/s", result, lines, log_x=False))
    result.goals += [at_least(result, f"{kind}, backlog", 0.9, f"{kind}, empty") for kind in lines]
    result.notes += [
        f"Values of {VALUE_BYTES} bytes throughout, so that ten million of them fit easily.",
        "Each round sends, then handles the first four fifths of as many and stops the worker; both queues are in the "
        "same cluster, so both meet the same memory and the same append-only file.",
        "Handling is timed from the first call of the batch handler to the last one needed; that what it handled was "
        "acknowledged, no more and no less, is checked when the worker has stopped. The CPU of handling is up to that "
        "last call, the worker's start included: while it stops it goes on handling, and on a backlog there is more.",
    ]
    return result


async def fill(queue: Queue, pairs: Pairs, backlog: int) -> None:
    left = backlog
    while left > 0:
        some = pairs[:left]
        check_count("filling the queue", (await send_all(queue, some)).messages, len(some))
        left -= len(some)


def used_memory_bytes(one: Rig) -> int:
    found: dict[str, dict[str, int]] = one.peers.redis.info("memory", target_nodes=RedisCluster.PRIMARIES)
    return sum(memory["used_memory"] for memory in found.values())


def on_empty(one: Rig, pairs: Pairs) -> Side:
    rounds = 0

    async def run() -> float:
        nonlocal rounds
        rounds += 1
        queue = await one.client.queue(f"empty-{rounds}", shards=SHARDS)
        await queue.open_group(GROUP)
        rate = await send_and_handle(one, queue, pairs, "empty")
        await queue.delete(force=True)
        return rate

    return Side("send, empty", "", run)


def on_backlog(one: Rig, full: Queue, pairs: Pairs) -> Side:
    async def run() -> float:
        return await send_and_handle(one, full, pairs, "backlog")

    return Side("send, backlog", "", run)


async def send_and_handle(one: Rig, queue: Queue, pairs: Pairs, state: str) -> float:
    async def send() -> Counted:
        return await send_all(queue, pairs)

    sent = await one.timed(f"send, {state}", len(pairs), send)
    wanted = max(1, round(HANDLED * len(pairs)))

    async def handle() -> Counted:
        return Counted(wanted, await handle_some(one, queue, wanted))

    handled = await one.timed(f"handle, {state}", wanted, handle)
    one.say(f"  {state}: handled {handled:,.0f}/s")
    return sent


@dataclass(slots=True)
class Tally:
    handled: int = 0
    started: float = 0.0
    seconds: float = 0.0
    """For one message, times `wanted`."""


async def handle_some(one: Rig, queue: Queue, wanted: int) -> float:
    """The seconds that handling `wanted` messages took; the worker stops then, a little later."""
    worker, tally = Worker(queue.name, group=GROUP), Tally()
    before = await acked(queue)

    @worker.batch_handler
    async def handle(messages: Sequence[object]) -> None:
        if not tally.handled:
            tally.started = perf_counter()
        tally.handled += len(messages)
        if tally.handled >= wanted and not tally.seconds:
            tally.seconds = (perf_counter() - tally.started) * wanted / tally.handled
            one.end_cpu()
            worker.stop()

    with anyio.fail_after(600):
        await worker.run(queue.client)
    check_count("acknowledged of what was handled", await acked(queue) - before, tally.handled)
    return tally.seconds
