"""What one process counts of its own work, for its metrics: how long handlers and sends take, what is in flight. Pure
counting: the times are arguments, and nothing here knows who reads the counts or in what form.

What lies in Redis is not counted here: the store's own counters are exact and outlive every process.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# Upper bounds in seconds: below 1 ms a handler that only computes, 10 s a call to a slow service, 300 s a backlog.
BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

# Why a call is sent again (storage/trouble.py). All are there from the start: a rate needs the 0 before the first 1.
RETRIES = ("moved", "ask", "again", "refresh", "load", "update")


class Histogram:
    """How many observations lie at or below each bound, and their sum."""

    __slots__ = ("_bounds", "_counts", "sum")

    def __init__(self, bounds: Sequence[float] = BOUNDS_S) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """A value below 0 (two machines' clocks) counts as 0."""
        value = max(value, 0.0)
        self._counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        return sum(self._counts)

    def buckets(self) -> list[tuple[str, int]]:
        """Bound ("+Inf" the last) and how many observations are at most that, as Prometheus has them."""
        total, found = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            found.append((bound, total))
        return found


@dataclass(slots=True)
class GroupMeters:
    """One group's handling in this process.

    done, failed   seconds a handler took that returned, that raised or was cancelled; a list counts once
    end_to_end     seconds from a message's send (its producer's clock) to its handler's return (this machine's clock)
    steps          seconds that a call to Redis took which fetches and commits
    in_flight      messages whose handler runs now
    fenced         steps that were refused because another worker had taken the lease
    shards         leases held now
    limited_s      seconds in which messages could have been begun but for the group's limit
    limited        tells the messages that wait for a rate limit now, by limit
    beaten_...     when Redis last answered a heartbeat, on the process's monotonic clock
    """

    done: Histogram = field(default_factory=Histogram)
    failed: Histogram = field(default_factory=Histogram)
    end_to_end: Histogram = field(default_factory=Histogram)
    steps: Histogram = field(default_factory=Histogram)
    in_flight: int = 0
    fenced: int = 0
    shards: int = 0
    limited_s: float = 0.0
    limited: Callable[[], dict[str, int]] = dict
    beaten_monotonic_s: float = float("-inf")


@dataclass(slots=True)
class SendMeters:
    """One queue's sends from this process.

    batches         seconds from a record batch's first message to the batch's being stored; one observation a batch
    stored, failed  messages
    buffered        tell the bytes of messages not stored yet, one for each open producer
    """

    batches: Histogram = field(default_factory=Histogram)
    stored: int = 0
    failed: int = 0
    buffered: list[Callable[[], int]] = field(default_factory=list)

    def buffered_bytes(self) -> int:
        return sum(read() for read in list(self.buffered))


class Meters:
    """Everything that one process counts: give it to `shardq.connect(url, meters=...)`."""

    def __init__(self) -> None:
        self.groups: dict[tuple[str, str], GroupMeters] = {}
        self.sends: dict[str, SendMeters] = {}
        self.retries = dict.fromkeys(RETRIES, 0)

    def group(self, queue: str, group: str) -> GroupMeters:
        return self.groups.setdefault((queue, group), GroupMeters())

    def send(self, queue: str) -> SendMeters:
        return self.sends.setdefault(queue, SendMeters())

    def retried(self, why: str) -> None:
        """A call to Redis is sent again because of `why`."""
        if why in self.retries:
            self.retries[why] += 1
