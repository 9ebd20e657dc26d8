"""The clocks of a lease: no schedule of renewals and looks lets a taker in before the owner's trust has ended."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from hypothesis import event, given, settings
from hypothesis import strategies as st

from shardq.core.lease import MARGIN, Trust, Watch

LEASE_S = 5.0
SECONDS = st.floats(0, 100, allow_nan=False)
# A clock of its own for each process: any origin, up to 5 % fast or slow.
RATES = st.sampled_from([0.95, 1.05]) | st.floats(0.95, 1.05)
CLOCKS = st.tuples(RATES, st.just(0.0) | st.floats(-1e6, 1e6))
Calls = list[tuple[float, float, float]]


@st.composite
def calls(draw: st.DrawFn) -> Calls:
    """(pause since the last call, time until the store carries it out, time until the reply arrives) for each call.

    Often without delays: where trust and taking come closest.
    """
    pauses = st.sampled_from([0.0, LEASE_S / 3, LEASE_S]) | st.floats(0, LEASE_S)
    delays = st.floats(0, 1) if draw(st.booleans()) else st.just(0.0)
    return draw(st.lists(st.tuples(pauses, delays, delays), max_size=8))


@dataclass
class _World:
    """One store, one owner that renews, one taker that looks; `agenda` holds what happens at which true time."""

    owner_clock: tuple[float, float]
    taker_clock: tuple[float, float]
    looks: Calls
    agenda: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)
    order: Iterator[int] = field(default_factory=count)
    renewals: int = 0
    taken_true_s: float | None = None

    def __post_init__(self) -> None:
        self.trust = Trust(LEASE_S, self.owner_s(0.0))
        self.watch = Watch()
        self.looks = self.looks[::-1]
        self.look_again(0.0, LEASE_S)

    def owner_s(self, true_s: float) -> float:
        return true_s * self.owner_clock[0] + self.owner_clock[1]

    def taker_s(self, true_s: float) -> float:
        return true_s * self.taker_clock[0] + self.taker_clock[1]

    def at(self, true_s: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self.agenda, (true_s, next(self.order), happen))

    def run(self, renewals: Calls) -> None:
        sent = 0.0
        for pause, carried_out_after, _ in renewals:
            sent += pause
            self.at(sent + carried_out_after, partial(self.renew, sent))
        while self.agenda and self.taken_true_s is None:
            true_s, _, happen = heapq.heappop(self.agenda)
            happen(true_s)

    def renew(self, sent: float, _: float) -> None:
        # The worst case: the owner counts every renewal that was carried out, from when it was sent.
        self.renewals += 1
        self.trust.renewed(self.owner_s(sent))

    def look_again(self, now: float, at_most_s: float) -> None:
        """Like a worker that wants the lease: after a pause, but no later than when the lease may be taken."""
        if self.looks:
            pause, carried_out_after, reply_after = self.looks.pop()
            sent = now + min(pause, max(at_most_s, 0.0) / self.taker_clock[0])
            self.at(sent + carried_out_after, partial(self.look, reply_after))

    def look(self, reply_after: float, now: float) -> None:
        self.at(now + reply_after, partial(self.seen, self.renewals))

    def seen(self, renewals: int, now: float) -> None:
        still = self.watch.see(self.taker_s(now), "epoch", renewals)
        if still >= LEASE_S and renewals == self.renewals:  # the store compares the pair, the taker its clock
            self.taken_true_s = now
        self.look_again(now, LEASE_S - still)


@settings(max_examples=500)
@given(CLOCKS, CLOCKS, calls(), calls())
def test_nobody_takes_a_trusted_lease(
    owner: tuple[float, float], taker: tuple[float, float], renewals: Calls, looks: Calls
) -> None:
    world = _World(owner, taker, looks)
    world.run(renewals)
    event(f"taken: {world.taken_true_s is not None}")
    if world.taken_true_s is not None:
        assert not world.trust.trusted(world.owner_s(world.taken_true_s))


@given(CLOCKS, CLOCKS, calls())
def test_a_dead_owners_lease_is_taken(owner: tuple[float, float], taker: tuple[float, float], renewals: Calls) -> None:
    world = _World(owner, taker, [(1.0, 0.01, 0.01)] * 100)
    world.run(renewals)
    assert world.taken_true_s is not None


def test_the_margin_is_what_holds_them_apart() -> None:
    """Without a margin two clocks, one 5 % slow and one 5 % fast, would break the promise."""
    world = _World((0.95, 0.0), (1.05, 0.0), [(0.0, 0.0, 0.0), (LEASE_S, 0.0, 0.0), (LEASE_S, 0.0, 0.0)])
    world.run([])
    assert world.taken_true_s is not None
    assert world.owner_s(world.taken_true_s) < LEASE_S
    assert not world.trust.trusted(world.owner_s(world.taken_true_s))


@given(SECONDS, st.lists(SECONDS), SECONDS)
def test_trust_runs_from_the_latest_renewal_sent(start: float, renewals: list[float], now: float) -> None:
    trust = Trust(LEASE_S, start)
    for sent in renewals:
        trust.renewed(sent)
    latest = max([start, *renewals])
    assert trust.trusted(now) == (now < latest + LEASE_S * (1 - MARGIN))
    assert trust.trusted(latest)
    assert latest < trust.renew_at_monotonic_s < trust.until_monotonic_s


def test_a_late_answer_to_an_old_renewal_changes_nothing() -> None:
    trust = Trust(LEASE_S, 10.0)
    trust.renewed(20.0)
    trust.renewed(15.0)
    assert trust.until_monotonic_s == 20.0 + LEASE_S * (1 - MARGIN)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 2)), min_size=1), st.floats(0, 10))
def test_watch_counts_from_the_first_sight_of_the_last_state(looks: list[tuple[float, int]], later: float) -> None:
    watch = Watch()
    now, since, last = 0.0, 0.0, None
    for pause, state in looks:
        now += pause
        if state != last:
            last, since = state, now
        assert watch.see(now, "lease", state) == now - since
    assert watch.still_for(now + later) == now + later - since


def test_what_was_never_seen_does_not_stand_still() -> None:
    assert Watch().still_for(1e9) == 0.0
    assert Watch().see(1e9, "first sight") == 0.0


def test_every_part_of_the_state_counts() -> None:
    watch = Watch()
    watch.see(0.0, "1", "7")
    assert watch.see(9.0, "2", "7") == 0.0
    assert watch.see(18.0, "2", "8") == 0.0
    assert watch.see(27.0, "2", "8") == 9.0
