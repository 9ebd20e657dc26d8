"""One run from its cluster to its verdict: `run(settings)`. Decides the order of things; each is done elsewhere."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import anyio
import msgspec

import shardq
from shardq.errors import ShardqError, UsageError
from shardq.runtime.queue import Durability
from shardq.runtime.reshard import delete_leaving
from shardq.storage.reshard import leaving
from tests.faults import final, machine
from tests.faults.checker import Promises, Verdict, judge
from tests.faults.clients import GROUP
from tests.faults.crowd import Crowd
from tests.faults.faults import FAULTS, Fault, Heal
from tests.faults.faults_cluster import IN_TURN
from tests.faults.history import SUFFIX, Journal, Send, Strike, latest, now_ns, read_history
from tests.faults.lab import Lab, open_lab, until
from tests.faults.network import why_no_network
from tests.faults.schedule import GAP_S, LASTS_S, Planned, make_schedule
from tests.faults.story import NS, FinalState
from tests.runtime.harness import drained

_LATE_S, _POLL_S, _BEGINS_WITHIN_S, _HEALS_WITHIN_S, _ANSWERS_WITHIN_S = 5.0, 0.2, 60.0, 180.0, 60.0
_PRODUCERS_END_WITHIN_S, _WORKERS_END_WITHIN_S = 40.0, 45.0
_TIDY_WITHIN_S = 40.0  # what has had its time is given back every half minute

STATE = "state.json"  # what Redis had at the end, beside the histories

QUEUE = "faults"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """
    length_s    how long faults strike
    faults      their names; None: all that can be carried out here
    server      the server binary; None: what is found
    durability  of the producers; None: their default
    pause_s     between two messages of a key and producer, on average
    gap_s       at least and at most between two strikes; `lasts_s`: of one
    folder      where the histories and logs stay; None: a folder that goes at the end if nothing was found
    samples     called all the time while faults strike
    at_drain    called when all is drained and the workers have stopped, before Redis is read: for tests of the lab
    """

    length_s: float
    seed: int
    faults: tuple[str, ...] | None = None
    server: Path | None = None
    durability: Durability | None = None
    masters: int = 3
    replicas: int = 1
    shards: int = 6
    keys: int = 24
    producers: int = 2
    workers: int = 3
    coordinators: int = 1
    lease_s: float = 2.0
    gap_s: tuple[float, float] = GAP_S
    lasts_s: tuple[float, float] = LASTS_S
    handler_s: float = 0.02
    pause_s: float = 0.15
    delivery_timeout_s: float = 10.0
    resume_within_s: float = 60.0
    drain_within_s: float = 60.0
    folder: Path | None = None
    samples: Callable[[Lab], None] | None = None
    at_drain: Callable[[Lab, shardq.Queue], None] | None = None

    def arguments(self) -> list[str]:
        """Those of the client processes."""
        named = {
            "--keys": self.keys,
            "--lease": self.lease_s,
            "--handler": self.handler_s,
            "--pause": self.pause_s,
            "--delivery-timeout": self.delivery_timeout_s,
            **({"--durability": self.durability} if self.durability else {}),
        }
        return [str(word) for pair in named.items() for word in pair]


@dataclass(frozen=True)
class Report:
    """`skipped`: faults that can't be carried out here, and why. `durability` is what was meant by the default."""

    settings: Settings
    schedule: list[Planned]
    skipped: Mapping[str, str]
    verdict: Verdict
    state: FinalState
    durability: str
    server: Path
    folder: Path


def run(settings: Settings, tell: Callable[[str], None] = lambda _: None) -> Report:
    """`tell` is given lines for a person while it runs. Raises UsageError for what can't be run, AssertionError when
    the lab itself does not come up."""
    folder = settings.folder or Path(tempfile.mkdtemp(prefix="shardq-run-"))
    if settings.folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob(f"*{SUFFIX}")):
            raise UsageError(f"{folder} holds the history of another run: name an empty folder.")
    if unknown := set(settings.faults or ()) - FAULTS.keys():
        raise UsageError(f"No such fault: {', '.join(sorted(unknown))}. There are {', '.join(sorted(FAULTS))}.")
    with ExitStack() as stack:
        lab = stack.enter_context(open_lab_for(settings))
        journal = Journal(folder / f"run{SUFFIX}")
        stack.callback(journal.close)
        report = _Run(settings, lab, journal, folder, tell).run()
        (folder / STATE).write_bytes(msgspec.json.encode(report.state))
    if settings.folder is None and not report.verdict.findings:
        shutil.rmtree(folder)
    return report


def open_lab_for(settings: Settings) -> Any:
    """With whatever this machine lends that the faults may want."""
    server = settings.server
    return open_lab(
        server,
        masters=settings.masters,
        replicas=settings.replicas,
        clocks=_wanted(settings, "clock-stepped") and server is not None and machine.why_no_clocks(server) is None,
        small_disk=_wanted(settings, "disk-full") and machine.why_no_disks() is None,
        network=_wanted(settings, *_of_the_network()) and why_no_network() is None,
    )


def _wanted(settings: Settings, *names: str) -> bool:
    return settings.faults is None or not set(names).isdisjoint(settings.faults)


def _of_the_network() -> list[str]:
    return [name for name, fault in FAULTS.items() if fault.strike.__module__.endswith("faults_network")]


def lanes_of(schedule: list[Planned]) -> list[list[Planned]]:
    """Faults that go one after the other: all of those that take turns; each other one has its own time."""
    in_turn = [planned for planned in schedule if FAULTS[planned.name].strike in IN_TURN]
    return [lane for lane in (in_turn, *([planned] for planned in schedule if planned not in in_turn)) if lane]


def ask(make: Callable[[shardq.Client], Coroutine[Any, Any, Result]], url: str) -> Result:
    """One question to the cluster; asked again for a while when it does not answer."""

    async def once() -> Result:
        async with shardq.connect(url) as client:
            return await make(client)

    deadline = time.monotonic() + _ANSWERS_WITHIN_S
    while True:
        try:
            return anyio.run(once)
        except ShardqError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_S)


@dataclass
class _Run:
    settings: Settings
    lab: Lab
    journal: Journal
    folder: Path
    tell: Callable[[str], None]
    queue: str = QUEUE
    before: final.Memory = field(default_factory=dict)

    def run(self) -> Report:
        settings, lab = self.settings, self.lab
        self.before, durability = ask(self._declare, lab.url)
        sizes = {"producer": settings.producers, "worker": settings.workers, "coordinator": settings.coordinators}
        crowd = Crowd(lab.url, self.queue, self.folder, self.journal, sizes, settings.arguments())  # type: ignore[arg-type] # roles
        lab.crowd = crowd
        try:
            crowd.start_all()
            until(lambda: self._all_sent_since(0), "the first message of every producer", _BEGINS_WITHIN_S)
            skipped = {name: why for name in self._names() if (why := FAULTS[name].needs(lab))}
            names = [name for name in self._names() if name not in skipped]
            lengths = {"gap_s": settings.gap_s, "lasts_s": settings.lasts_s}
            schedule = make_schedule(settings.seed, settings.length_s, names, **lengths)
            self._strike_all(schedule, crowd)
            state = self._finish(crowd)
        finally:
            crowd.end()
            lab.crowd = None
        losing = frozenset(name for name, fault in FAULTS.items() if durability in fault.loses)
        repeating = frozenset(name for name, fault in FAULTS.items() if fault.repeats)
        verdict = judge(read_history(self.folder), state, Promises(losing, repeating, settings.drain_within_s))
        return Report(settings, schedule, skipped, verdict, state, durability, self.server(), self.folder)

    def server(self) -> Path:
        assert self.lab.cluster.server is not None
        return self.lab.cluster.server

    def _names(self) -> list[str]:
        return sorted(self.settings.faults if self.settings.faults is not None else FAULTS)

    async def _declare(self, client: shardq.Client) -> tuple[final.Memory, str]:
        queue = await client.queue(self.queue, shards=self.settings.shards)
        await queue.open_group(GROUP)
        default = "leader" if client.confirm(None) is None else "replica"
        return await final.memory(queue), self.settings.durability or default

    # -- while faults strike -----------------------------------------------------------------------------------------

    def _strike_all(self, schedule: list[Planned], crowd: Crowd) -> None:
        began = time.monotonic()
        lanes = lanes_of(schedule)
        threads = [threading.Thread(target=self._strike_each, args=(lane, began), daemon=True) for lane in lanes]
        for thread in threads:
            thread.start()
        while time.monotonic() < began + self.settings.length_s:
            crowd.look()
            if self.settings.samples is not None:
                self.settings.samples(self.lab)
            time.sleep(_POLL_S)
        deadline = time.monotonic() + _HEALS_WITHIN_S
        for lane, thread in zip(lanes, threads, strict=True):
            while thread.is_alive() and time.monotonic() < deadline:
                crowd.look()
                thread.join(_POLL_S)
            if thread.is_alive():
                self._write("failed", lane[-1], f"not healed {_HEALS_WITHIN_S:g} s after the last fault")

    def _strike_each(self, lane: list[Planned], began: float) -> None:
        """In a thread of its own, one after the other; what the time is too short for is left out."""
        for planned in lane:
            time.sleep(max(0.0, began + planned.at_s - time.monotonic()))
            if time.monotonic() - began + planned.length_s > self.settings.length_s + _LATE_S:
                return
            self._strike(planned)

    def _strike(self, planned: Planned) -> None:
        fault = FAULTS[planned.name]
        try:
            heal = self._carry_out(planned, fault)
            time.sleep(planned.length_s)
            self._write("heal", planned)
            heal()
            self._write("healed", planned)
        except Exception as error:  # whatever it is, the run can't be trusted to have had this fault
            self._write("failed", planned, f"{type(error).__name__}: {error}")

    def _carry_out(self, planned: Planned, fault: Fault) -> Heal:
        self._write("strike", planned)
        heal = fault.strike(self.lab, Random(planned.seed))
        self._write("struck", planned)
        return heal

    def _write(self, what: Any, planned: Planned, text: str = "") -> None:
        self.journal.write(Strike(what, now_ns(), planned.number, planned.name, text))
        self.tell(f"{what} {planned.name}{': ' if text else ''}{text}")

    # -- afterwards --------------------------------------------------------------------------------------------------

    def _finish(self, crowd: Crowd) -> FinalState:
        settings = self.settings
        trouble = self._whole()
        for role in crowd.sizes:
            crowd.fill_up(role)
        since = now_ns()
        resumed = self._takes(crowd, lambda: self._all_sent_since(since), settings.resume_within_s)
        crowd.replacing = False
        crowd.stop("producer", _PRODUCERS_END_WITHIN_S)
        drains = self._takes(crowd, lambda: ask(self._drained, self._url()), settings.drain_within_s)
        self._takes(crowd, lambda: ask(self._tidied, self._url()), _TIDY_WITHIN_S if drains is not None else 0.0)
        crowd.stop("worker", _WORKERS_END_WITHIN_S)
        crowd.stop("coordinator", _WORKERS_END_WITHIN_S)
        return ask(partial(self._read, resumed, drains, trouble), self._url())

    def _url(self) -> str:
        """Of a node that is up: one that did not come back must not hide what became of the rest."""
        up = next(server for server in self.lab.servers if server.alive)
        return f"redis://{up.host}:{up.port}"

    def _whole(self) -> str:
        try:
            self.lab.wait_until_whole()
        except AssertionError as error:
            return str(error)
        return ""

    def _takes(self, crowd: Crowd, condition: Callable[[], bool], within_s: float) -> float | None:
        """Seconds until the condition holds; None when it does not in time."""
        began = time.monotonic()
        while not condition():
            crowd.look()
            if time.monotonic() - began > within_s:
                return None
            time.sleep(_POLL_S)
        return time.monotonic() - began

    def _all_sent_since(self, since_ns: int) -> bool:
        """Whether every producer that there is had a message stored."""
        crowd = self.lab.crowd
        assert crowd is not None
        crowd.look()
        producers = crowd.of("producer")
        paths = [self.folder / f"{member.name}{SUFFIX}" for member in producers]
        return len(producers) == self.settings.producers and all(
            path.exists() and _stored_since(path, since_ns) for path in paths
        )

    async def _drained(self, client: shardq.Client) -> bool:
        return await drained(await client.queue(self.queue), GROUP)

    async def _tidied(self, client: shardq.Client) -> bool:
        """Whether nothing is left of what was handled, nor of shards that were removed."""
        queue = await client.queue(self.queue)
        if await leaving(client.pipes, queue.keys):
            return False
        left = await queue.reshard()
        if left is not None and left.phase != "retired":
            return False
        found = await queue.counters([GROUP])
        return all(shard.entries == 0 and shard.groups[GROUP].pending_entries == 0 for shard in found.values())

    async def _read(
        self, resumed: float | None, drains: float | None, trouble: str, client: shardq.Client
    ) -> FinalState:
        queue = await client.queue(self.queue)
        # Who led may have been told to end between forgetting a shard and deleting its keys: the next leader does that.
        await delete_leaving(client.pipes, queue.keys)
        if self.settings.at_drain is not None:
            await anyio.to_thread.run_sync(self.settings.at_drain, self.lab, queue)
        left = await queue.reshard()
        return FinalState(
            effects=await final.effects(queue, self.settings.keys),
            dead=await final.dead(queue),
            shards=await final.shards(queue, self.before),
            strays=await anyio.to_thread.run_sync(final.strays, self.lab, queue),
            resumed_s=resumed,
            drained_s=drains,
            lab=trouble,
            phase=left.phase if left is not None else "",
            stay=left.stay if left is not None else {},
            unmoved=sum(left.delayed.values()) if left is not None else 0,
        )


def _stored_since(path: Path, since_ns: int) -> bool:
    return any(isinstance(e, Send) and e.what == "ok" and e.at_ns > since_ns for e in latest(path))


def ran_for_s(report: Report) -> float:
    story = report.verdict.story
    return (story.ended_ns - story.began_ns) / NS
