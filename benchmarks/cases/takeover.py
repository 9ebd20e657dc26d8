"""How long shards rest when their worker is killed, and when it hands them over: SIGTERM, or a worker that joins."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import monotonic_ns

import anyio

import shardq
from benchmarks import harness
from benchmarks.cases.latency import percentile
from benchmarks.harness import Goal, Options, Result, Say
from benchmarks.programs.handled import Handled, read_notes
from benchmarks.programs.process import Program, running
from shardq.runtime.settings import WorkerSettings

SHARDS, PER_SHARD_PER_S = 12, 80
QUEUE, GROUP = "takeover", "bench"
LEASE_S = WorkerSettings().lease_s
CRASH_BOUND_S, PAUSE_BOUND_MS = LEASE_S + 1.0, 50.0
HANDOVERS = 2  # in a round: a worker leaves and another joins, so many times
STEADY_S, WITHIN_S = 0.8, 60.0
EVER = 10**9


@dataclass(slots=True)
class Worker:
    """One worker process. `name` is the order in which they came; the oldest leads."""

    name: int
    program: Program
    notes: Path
    killed: bool = False

    def since(self, when_ns: int) -> list[Handled]:
        return [one for one in read_notes(self.notes) if one.started_ns >= when_ns]


Owners = Mapping[int, Worker]


@dataclass(slots=True)
class Fleet:
    """The workers, oldest first, under a load that goes on."""

    stack: AsyncExitStack
    url: str
    folder: Path
    workers: list[Worker] = field(default_factory=list)
    gone: list[Worker] = field(default_factory=list)
    started: int = 0

    async def join(self) -> None:
        self.started += 1
        notes = self.folder / str(self.started)
        program = await self.stack.enter_async_context(running("worker", self.url, QUEUE, GROUP, notes))
        self.workers.append(Worker(self.started, program, notes))

    async def remove(self, worker: Worker, number: signal.Signals) -> None:
        self.workers.remove(worker)
        self.gone.append(worker)
        worker.killed = number is signal.SIGKILL
        await worker.program.end(number)

    def owners(self, since_ns: int) -> Owners:
        """Who handled each shard's latest message since then."""
        latest: dict[int, tuple[int, Worker]] = {}
        for worker in self.workers:
            for one in worker.since(since_ns):
                if one.shard not in latest or latest[one.shard][0] < one.started_ns:
                    latest[one.shard] = (one.started_ns, worker)
        return {shard: worker for shard, (_, worker) in latest.items()}

    async def settled(self) -> Owners:
        """Waits until every shard is handled, evenly, and by the same worker for a while."""
        with anyio.fail_after(WITHIN_S):
            while True:
                before = self.owners(monotonic_ns() - int(STEADY_S * 5e8))
                await anyio.sleep(STEADY_S)
                after = self.owners(monotonic_ns() - int(STEADY_S * 5e8))
                counts = [sum(owner is worker for owner in after.values()) for worker in self.workers]
                if before == after and len(after) == SHARDS and max(counts) - min(counts) <= 1:
                    return after

    def numbers(self, *, killed: bool) -> list[int]:
        """Of every message handled so far, by all workers that were killed or by all others."""
        workers = [worker for worker in (*self.gone, *self.workers) if worker.killed is killed]
        return [one.number for worker in workers for one in read_notes(worker.notes)]


async def measure(options: Options, say: Say) -> Result:
    crashes: dict[str, list[float]] = {"leader killed": [], "other killed": []}
    pauses: dict[str, list[float]] = {"SIGTERM": [], "joined": []}
    with harness.cluster(options) as servers:
        async with fleet(servers.url) as (workers, sender):
            for number in range(options.rounds):
                kind = ("other killed", "leader killed")[number % 2]
                crashes[kind].append(await crash(workers, leader=number % 2 == 1))
                say(f"  round {number + 1}: {kind}: {crashes[kind][-1]:,.0f} ms")
                owners = await workers.settled()
                for _ in range(options.count(HANDOVERS)):
                    for how in pauses:
                        owners, moved = await handover(workers, owners, leave=how == "SIGTERM")
                        pauses[how] += moved
                said = {name: f"{max(ones):.1f} ms" for name, ones in pauses.items()}
                say(f"  round {number + 1}: longest pauses so far {said}")
            await sender.tell("stop")
            sent = int((await sender.hear()).split()[1])
            counts = await counted(workers, sent)
    return result(crashes, pauses, counts)


@asynccontextmanager
async def fleet(url: str) -> AsyncIterator[tuple[Fleet, Program]]:
    async with shardq.connect(url) as client:
        await client.queue(QUEUE, shards=SHARDS)
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            sender = await stack.enter_async_context(running("sender", "shardq", url, QUEUE, SHARDS))
            await sender.tell(f"load {SHARDS * PER_SHARD_PER_S} {EVER}")
            workers = Fleet(stack, url, Path(folder))
            await workers.join()
            await workers.settled()
            await workers.join()
            yield workers, sender


async def crash(fleet: Fleet, *, leader: bool) -> float:
    """Kills a worker; ms until the last of its shards is handled again. Then another takes its place."""
    owners = await fleet.settled()
    victim = fleet.workers[0 if leader else -1]
    lost = {shard for shard, owner in owners.items() if owner is victim}
    killed_ns = monotonic_ns()
    await fleet.remove(victim, signal.SIGKILL)
    first: Mapping[int, int] = {}
    with anyio.fail_after(WITHIN_S):
        while not lost <= first.keys():
            await anyio.sleep(0.1)
            first = firsts(one for worker in fleet.workers for one in worker.since(killed_ns))
    await fleet.join()
    return (max(first[shard] for shard in lost) - killed_ns) / 1e6


async def handover(fleet: Fleet, before: Owners, *, leave: bool) -> tuple[Owners, list[float]]:
    """Has the oldest worker leave or one join. Returns the owners then, and for every shard that moved the ms between
    its old owner's last message and its new owner's first, less what usually lies between two messages of it."""
    began_ns = monotonic_ns()
    if leave:
        await fleet.remove(fleet.workers[0], signal.SIGTERM)
    else:
        await fleet.join()
    after = await fleet.settled()
    moved = [shard for shard, old in before.items() if after[shard] is not old]
    return after, [pause_ms(shard, before[shard], after[shard], began_ns) for shard in moved]


def pause_ms(shard: int, old: Worker, new: Worker, began_ns: int) -> float:
    handled = [one for one in read_notes(old.notes) if one.shard == shard]
    pause_ns = firsts(new.since(began_ns))[shard] - handled[-1].started_ns
    return max(0.0, (pause_ns - usual_gap_ns(handled)) / 1e6)


def firsts(handled: Iterable[Handled]) -> dict[int, int]:
    """When each shard's first message was handled."""
    first: dict[int, int] = {}
    for one in handled:
        first[one.shard] = min(one.started_ns, first.get(one.shard, one.started_ns))
    return first


def usual_gap_ns(handled: Iterable[Handled]) -> float:
    times = [one.started_ns for one in handled]
    return median(later - earlier for earlier, later in pairwise(times)) if len(times) > 1 else 0.0


async def counted(fleet: Fleet, sent: int) -> dict[str, int]:
    """How many messages were never handled, once all had time to be, and how many more than once, and why."""
    dead, others = fleet.numbers(killed=True), fleet.numbers(killed=False)
    with anyio.move_on_after(LEASE_S * 2):
        while len({*dead, *others}) < sent:
            await anyio.sleep(0.2)
            others = fleet.numbers(killed=False)
    return {
        "messages sent": sent,
        "messages never handled": sent - len({*dead, *others}),
        "messages handled again after a crash": len(set(dead) & set(others)),
        "messages handled again after a handover": len(others) - len(set(others)),
    }


# -- the result ----------------------------------------------------------------------------------------------


def result(crashes: dict[str, list[float]], pauses: dict[str, list[float]], counts: dict[str, int]) -> Result:
    every = sorted(pause for ones in pauses.values() for pause in ones)
    slowest_s = max(one for ones in crashes.values() for one in ones) / 1000
    return Result(
        title="Shards that change their worker",
        unit="ms",
        samples=crashes | pauses,
        commands={
            "leader killed": "SIGKILL to the one of two workers that leads; to the last of its shards handled again",
            "other killed": "SIGKILL to the other; to the last of its shards handled again",
            "SIGTERM": "SIGTERM to one of two workers; for each of its shards the pause",
            "joined": "a second worker starts; for each shard that it gets the pause",
        },
        goals=[
            Goal("crash: the slowest round, in s", slowest_s, "<=", CRASH_BOUND_S, "the lease time and 1 s"),
            Goal("handover: p99 of the pauses, in ms", percentile(every, 0.99), "<=", PAUSE_BOUND_MS),
        ],
        sizes={"shards": SHARDS, "messages/s": SHARDS * PER_SHARD_PER_S, "lease s": LEASE_S, "handovers": len(every)},
        notes=[
            "A pause is the time between the old owner's last message of a shard and the new owner's first, less the "
            "median time between two messages of that shard.",
            "A killed worker's messages that it had handled but not committed are handled again, by design.",
        ],
        figures={
            **counts,
            "median pause, ms": round(percentile(every, 0.5), 2),
            "longest pause, ms": round(every[-1], 2),
        },
    )
