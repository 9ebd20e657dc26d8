"""Several producer processes and several worker processes, on 3 and 6 masters: the rates together, and what is full."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import anyio

from benchmarks import harness
from benchmarks.harness import Goal, Options, Result, Say, Side
from benchmarks.programs.process import Program, running
from benchmarks.rig import SHARDS, Rig, acked, appended, curve, rig, send_all
from benchmarks.steady import all_held
from shardq.ops.bench_peers import GROUP
from shardq.ops.bench_shardq import KEYS, VALUE_BYTES, Pairs, check_count, make_pairs
from shardq.runtime.queue import Queue

MASTERS, PROCESSES = (3, 6), (1, 2, 4)
MESSAGES = 600_000
NEAR = 0.8  # "near-linear": so much of what the CPU left over allows
ACKED_WITHIN_S = 60.0
LOOK_EVERY_S = 0.005  # how often Redis is asked what is acknowledged: asking without pause took half of its CPU


@dataclass(slots=True)
class Use:
    """Seconds of CPU in one round, beside those that went by."""

    seconds: float
    clients_s: float
    servers_s: float

    def share_of_machine(self) -> float:
        return (self.clients_s + self.servers_s) / self.seconds / (os.cpu_count() or 1)


@dataclass(slots=True)
class Site:
    """One cluster with its producers and, by their number, its groups of workers."""

    masters: int
    one: Rig
    producers: list[Program]
    workers: dict[int, list[Program]]
    uses: dict[str, list[Use]]
    queues: dict[int, Queue] = field(default_factory=dict)
    rounds: int = 0


async def measure(options: Options, say: Say) -> Result:
    pairs = make_pairs(options.count(MESSAGES, 1000))
    uses: dict[str, list[Use]] = {}
    async with AsyncExitStack() as stack:
        sites = [await site(stack, options, say, masters, uses) for masters in MASTERS]
        sides = [produce_side(one, count, len(pairs)) for one in sites for count in PROCESSES]
        sides += [work_side(one, count, pairs) for one in sites for count in PROCESSES]
        samples = await harness.alternate(sides, options.rounds, say)
    counting = {name: ones[-options.rounds :] for name, ones in uses.items()}
    result = Result(
        "Several processes, messages a second together",
        "messages/s",
        samples,
        {side.name: side.command for side in sides},
        sizes={"messages": len(pairs), "value_bytes": VALUE_BYTES, "keys": KEYS, "shards": SHARDS, "masters": MASTERS},
        figures={"use": {name: use_of(ones, len(pairs)) for name, ones in counting.items()}},
    )
    judge(result, {name: median(use.share_of_machine() for use in ones) for name, ones in counting.items()})
    return result


async def site(stack: AsyncExitStack, options: Options, say: Say, masters: int, uses: dict[str, list[Use]]) -> Site:
    cluster = stack.enter_context(harness.cluster(options, masters))
    one = await stack.enter_async_context(rig(cluster.url, options, say))
    address = (one.url, one.prefix)
    producers = [await stack.enter_async_context(running("bulk", "send", *address)) for _ in range(max(PROCESSES))]
    here = Site(masters, one, producers, {}, uses)
    for count in PROCESSES:
        name = f"work-{count}"
        here.queues[count] = await one.client.queue(name, shards=SHARDS)
        await here.queues[count].open_group(GROUP)
        here.workers[count] = [
            await stack.enter_async_context(running("bulk", "work", *address, name)) for _ in range(count)
        ]
    return here


def name_of(kind: str, masters: int, processes: int) -> str:
    return f"{kind}, {masters} masters, {processes} processes"


def produce_side(here: Site, count: int, messages: int) -> Side:
    name = name_of("send_many", here.masters, count)
    shares = [messages // count + (at < messages % count) for at in range(count)]

    async def run() -> float:
        here.rounds += 1
        queue = await here.one.client.queue(f"sent-{here.rounds}", shards=SHARDS)
        programs = here.producers[:count]
        for program, share in zip(programs, shares, strict=True):
            await program.tell(f"send {queue.name} {share}")
        for program in programs:
            await program.hear()
        servers_s = here.one.peers.servers_cpu_s()
        said = await ask(programs, "go")
        servers_s = here.one.peers.servers_cpu_s() - servers_s
        seconds = max(one["ended"] for one in said) - min(one["started"] for one in said)
        check_count(name, await appended(queue), messages)
        here.uses.setdefault(name, []).append(Use(seconds, sum(one["cpu_s"] for one in said), servers_s))
        await queue.delete(force=True)
        return messages / seconds

    return Side(name, f"{count} processes, each await producer.send_many(pairs)", run)


def work_side(here: Site, count: int, pairs: Pairs) -> Side:
    name = name_of("batch_handler", here.masters, count)
    programs, queue = here.workers[count], here.queues[count]

    async def run() -> float:
        await all_held(queue, count)
        await ask_for(programs, "hold", "held")
        before = await acked(queue)
        check_count("filling the queue", (await send_all(queue, pairs)).messages, len(pairs))
        servers_s, started = here.one.peers.servers_cpu_s(), perf_counter()
        for program in programs:
            await program.tell("go")
        with anyio.fail_after(ACKED_WITHIN_S):
            done = 0
            while done < len(pairs):
                await anyio.sleep(LOOK_EVERY_S)
                done = await acked(queue) - before
        seconds = perf_counter() - started
        said = await ask(programs, "report")
        servers_s = here.one.peers.servers_cpu_s() - servers_s
        check_count(name, done, len(pairs))
        check_count(f"{name}: handled", round(sum(one["handled"] for one in said)), len(pairs))
        here.uses.setdefault(name, []).append(Use(seconds, sum(one["cpu_s"] for one in said), servers_s))
        return len(pairs) / seconds

    return Side(name, f"{count} processes, each a shardq.Worker with a batch_handler", run)


async def ask(programs: Sequence[Program], line: str) -> list[dict[str, float]]:
    for program in programs:
        await program.tell(line)
    return [json.loads(await program.hear()) for program in programs]


async def ask_for(programs: Sequence[Program], line: str, answer: str) -> None:
    for program in programs:
        await program.tell(line)
    for program in programs:
        said = await program.hear()
        assert said == answer, said


# -- what it means -------------------------------------------------------------------------------------------


def use_of(uses: Sequence[Use], messages: int) -> dict[str, float]:
    """Medians: CPU a message, and what share of all cores clients and servers used."""
    cores = os.cpu_count() or 1
    return {
        "client_cpu_us": round(median(use.clients_s for use in uses) * 1e6 / messages, 3),
        "servers_cpu_us": round(median(use.servers_s for use in uses) * 1e6 / messages, 3),
        "clients_share": round(median(use.clients_s / use.seconds / cores for use in uses), 3),
        "servers_share": round(median(use.servers_s / use.seconds / cores for use in uses), 3),
        "machine_share": round(median(use.share_of_machine() for use in uses), 3),
    }


def judge(result: Result, shares: Mapping[str, float]) -> None:
    """Near-linear until the cores are full: where one process uses a third of the machine, three could make thrice."""
    for kind in ("send_many", "batch_handler"):
        lines = {
            f"{masters} masters": [(float(count), name_of(kind, masters, count)) for count in PROCESSES]
            for masters in MASTERS
        }
        result.curves.append(curve(f"{kind} by processes", "processes", "messages/s", result, lines))
        for masters in MASTERS:
            alone = name_of(kind, masters, 1)
            for count in PROCESSES[1:]:
                name = name_of(kind, masters, count)
                possible = max(1.0, min(count, 1 / shares[alone]))
                value = result.median(name) / result.median(alone) / possible
                result.goals.append(Goal(f"{name} over what the CPU leaves possible", value, ">=", NEAR, alone))
    result.notes += [
        "What the CPU leaves possible: as many times the rate of one process as there are processes, but no more than "
        "the machine's cores over the CPU that one process and its servers used (the figure machine_share).",
        "Shares are of all cores, servers and clients together; the rest is idle, or the machine's other work.",
        "Workers hold their shards, spread evenly, before the messages are there; they start together, and the time "
        "ends when Redis has counted all as acknowledged.",
    ]
