"""What is known of the run at a moment, for whoever shows it (view.py, or plain lines). Takes in counters and journal
lines; prints nothing, asks nobody.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from shardq.ops.demo.journal import Handling
from shardq.ops.demo.report import Observed, is_takeover
from shardq.ops.demo.worker import GROUP
from shardq.storage.counters import ShardCounters

RATE_OVER_S = 1.0


class ShardLine(NamedTuple):
    """One row of the table. `rate` is messages handled a second, `backlog` messages, `pel` pending entries."""

    shard: int
    node: str
    owner: str
    rate: float
    backlog: int
    pel: int


class Event(NamedTuple):
    """Something worth telling; `grave` when it is bad news."""

    seconds: float
    text: str
    grave: bool


@dataclass
class WorkerLine:
    """One worker process."""

    pid: int
    state: str = "runs"
    handled: int = 0


@dataclass
class Board:
    """Filled by run.py, read by the views. Times are monotonic seconds; `began` is the start of the demo."""

    server: str
    total: int
    began: float
    now: float = 0.0
    metrics_url: str = ""
    sent: int = 0
    handled: int = 0
    rate: float = 0.0
    lines: list[ShardLine] = field(default_factory=list)
    workers: dict[str, WorkerLine] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    flights_by_carrier: Counter[str] = field(default_factory=Counter)
    minutes_by_carrier: Counter[str] = field(default_factory=Counter)
    handlings: list[Handling] = field(default_factory=list)
    observed: Observed | None = None
    _seen_rows: set[int] = field(default_factory=set)
    _orphans: set[int] = field(default_factory=set)
    _history: deque[tuple[float, dict[int, int]]] = field(default_factory=deque)

    def tell(self, now: float, text: str, *, grave: bool = False) -> None:
        """Adds an event."""
        self.events.append(Event(now - self.began, text, grave))

    def killed(self, observed: Observed) -> None:
        """From now on handlings tell who takes over."""
        self.observed, self._orphans = observed, set(observed.killed_shards)

    def owned_by(self, worker: str) -> int:
        return sum(line.owner == worker for line in self.lines)

    @property
    def backlog(self) -> int:
        return sum(line.backlog for line in self.lines)

    def see_counters(self, now: float, counters: Mapping[int, ShardCounters], nodes: Mapping[int, str]) -> None:
        """The counters as just read, and each shard's node."""
        self.now = now
        finished = {shard: _finished(counter) for shard, counter in counters.items()}
        self._history.append((now, finished))
        while len(self._history) > 2 and self._history[1][0] <= now - RATE_OVER_S:
            self._history.popleft()
        then, before = self._history[0]
        elapsed = max(now - then, 1e-9)
        self.lines = [
            ShardLine(
                shard,
                nodes.get(shard, ""),
                _owner(counter),
                (finished[shard] - before.get(shard, 0)) / elapsed,
                counter.appended - finished[shard],
                counter.groups[GROUP].pending_entries if GROUP in counter.groups else 0,
            )
            for shard, counter in counters.items()
        ]
        self.sent = sum(counter.appended for counter in counters.values())
        self.handled = sum(finished.values())
        self.rate = sum(line.rate for line in self.lines)

    def see_handlings(self, now: float, handlings: Iterable[Handling]) -> None:
        """New lines of the journals."""
        for handling in handlings:
            self.handlings.append(handling)
            if handling.worker in self.workers:
                self.workers[handling.worker].handled += 1
            if handling.row not in self._seen_rows:
                self._seen_rows.add(handling.row)
                self.flights_by_carrier[handling.carrier] += 1
                self.minutes_by_carrier[handling.carrier] += handling.dep_delay or 0
            if self._orphans and handling.shard in self._orphans:
                self._see_takeover(now, handling)

    def _see_takeover(self, now: float, handling: Handling) -> None:
        if self.observed is None or not is_takeover(handling, self.observed):
            return
        first = len(self._orphans) == len(self.observed.killed_shards)
        self._orphans.discard(handling.shard)
        after_s = (handling.start_ns - self.observed.killed_ns) / 1e9
        if first:
            self.tell(now, f"{handling.worker} took over shard {handling.shard} after {after_s:.1f} s")
        if not self._orphans:
            count = len(self.observed.killed_shards)
            self.tell(
                now, f"all {count} shards of {self.observed.killed_worker} are served again after {after_s:.1f} s"
            )


def _finished(counter: ShardCounters) -> int:
    group = counter.groups.get(GROUP)
    return group.acked + group.dead if group is not None else 0


def _owner(counter: ShardCounters) -> str:
    group = counter.groups.get(GROUP)
    return group.owner if group is not None and group.held else ""
