"""The demo's verdict: what the journals say was handled, held against the file that was sent. Pure: no I/O, no clock.

lost          rows of the file that no handler came to the end of
duplicates    handlings of a row beyond its first: after a crash, what was handled but not yet committed
out_of_order  first handlings of a row that began before the first handling of an earlier row of the same tail number,
              and handlings that began while another of the same tail number was running; over all workers
totals_match  flights and minutes of departure delay of each carrier, summed over first handlings as the workers got
              them, equal those summed over the file
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from shardq.ops.demo.flights import Flight
from shardq.ops.demo.journal import Handling

_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Observed:
    """What only who ran the demo can know."""

    server: str
    masters: int
    shards: int
    sent: int
    first_send_ns: int
    workers: tuple[str, ...] = ()
    killed_worker: str | None = None
    killed_ns: int = 0
    killed_shards: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class CarrierTotal:
    """One carrier's flights, and their minutes of departure delay where it is known."""

    flights: int
    delay_minutes: int


@dataclass(frozen=True, slots=True)
class Report:
    """Times are seconds; None where there was nothing to measure."""

    ok: bool
    server: str
    masters: int
    shards: int
    sent: int
    handled: int
    lost: int
    out_of_order: int
    duplicates: int
    duplicates_not_by_the_kill: int
    totals_match: bool
    killed_worker: str | None
    killed_shards: int
    takeover_seconds: float | None
    takeover_seconds_last_shard: float | None
    seconds: float
    messages_per_second: float
    peak_messages_per_second: int
    workers: dict[str, int]
    carriers: dict[str, CarrierTotal]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def judge(flights: Sequence[Flight], handlings: Iterable[Handling], observed: Observed) -> Report:
    """The report on one run."""
    in_time = sorted(handlings, key=lambda handling: (handling.start_ns, handling.end_ns))
    first: dict[int, Handling] = {}
    again = [handling for handling in in_time if first.setdefault(handling.row, handling) is not handling]
    lost = sum(flight.row not in first for flight in flights)
    out_of_order = count_overtaking(flights, first) + count_overlapping(in_time)
    carriers = carrier_totals((handling.carrier, handling.dep_delay) for handling in first.values())
    totals_match = carriers == carrier_totals((flight.carrier, flight.dep_delay) for flight in flights)
    takeovers = takeover_seconds(in_time, observed)
    shares = Counter(handling.worker for handling in first.values())
    ended_ns = max((handling.end_ns for handling in first.values()), default=observed.first_send_ns)
    seconds = (ended_ns - observed.first_send_ns) / _NS
    return Report(
        ok=not lost and not out_of_order and totals_match,
        server=observed.server,
        masters=observed.masters,
        shards=observed.shards,
        sent=observed.sent,
        handled=len(first),
        lost=lost,
        out_of_order=out_of_order,
        duplicates=len(again),
        duplicates_not_by_the_kill=sum(not _by_the_kill(handling, observed) for handling in again),
        totals_match=totals_match,
        killed_worker=observed.killed_worker,
        killed_shards=len(observed.killed_shards),
        takeover_seconds=round(takeovers[0], 3) if takeovers else None,
        takeover_seconds_last_shard=round(takeovers[-1], 3) if takeovers else None,
        seconds=round(seconds, 3),
        messages_per_second=round(len(first) / seconds, 1) if seconds > 0 else 0.0,
        peak_messages_per_second=best_second(first.values(), observed.first_send_ns),
        workers=dict(sorted({**dict.fromkeys(observed.workers, 0), **shares}.items())),
        carriers=carriers,
    )


def count_overtaking(flights: Sequence[Flight], first: dict[int, Handling]) -> int:
    """Rows handled before an earlier row of their tail number was."""
    latest: dict[str, int] = {}  # by tail number: when the last of its rows so far was begun
    overtaking = 0
    for flight in flights:
        handling = first.get(flight.row)
        if handling is not None and flight.tail is not None:
            before_ns = latest.get(flight.tail, handling.start_ns)
            overtaking += handling.start_ns < before_ns
            latest[flight.tail] = max(before_ns, handling.start_ns)
    return overtaking


def count_overlapping(in_time: Iterable[Handling]) -> int:
    """Handlings that began while another one of their tail number ran; `in_time` is in order of start."""
    busy_until: dict[str, int] = {}
    overlapping = 0
    for handling in in_time:
        if handling.tail is not None:
            until_ns = busy_until.get(handling.tail, handling.start_ns)
            overlapping += handling.start_ns < until_ns
            busy_until[handling.tail] = max(until_ns, handling.end_ns)
    return overlapping


def carrier_totals(flights: Iterable[tuple[str, int | None]]) -> dict[str, CarrierTotal]:
    """By carrier, out of (carrier, departure delay) pairs."""
    counts: Counter[str] = Counter()
    minutes: Counter[str] = Counter()
    for carrier, delay in flights:
        counts[carrier] += 1
        minutes[carrier] += delay or 0
    return {carrier: CarrierTotal(counts[carrier], minutes[carrier]) for carrier in sorted(counts)}


def takeover_seconds(in_time: Iterable[Handling], observed: Observed) -> list[float]:
    """For each shard of the killed worker where anything was left to do: from the kill to the first message that
    another one handled; shortest first."""
    begun: dict[int, int] = {}
    for handling in in_time:
        if is_takeover(handling, observed):
            begun.setdefault(handling.shard, handling.start_ns)
    return sorted((start_ns - observed.killed_ns) / _NS for start_ns in begun.values())


def is_takeover(handling: Handling, observed: Observed) -> bool:
    """Whether a shard of the killed worker is served by another one here."""
    orphaned = handling.shard in observed.killed_shards and handling.start_ns > observed.killed_ns
    return orphaned and handling.worker != observed.killed_worker


def best_second(first: Iterable[Handling], began_ns: int) -> int:
    """Messages handled in the best whole second since the first send."""
    seconds: dict[int, int] = defaultdict(int)
    for handling in first:
        seconds[(handling.end_ns - began_ns) // _NS] += 1
    return max(seconds.values(), default=0)


def _by_the_kill(handling: Handling, observed: Observed) -> bool:
    return handling.shard in observed.killed_shards and handling.start_ns > observed.killed_ns
