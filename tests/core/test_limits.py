"""Rate limits: their form, and the bound on what workers begin with the leave they took, whatever the network and the
scheduler do to them. `Bucket` says in Python what scripts/limit.lua does; tests/storage/test_functions_limit.py holds
that to the same bound.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core.limits import AHEAD_S, Grant, Limit, Tokens, parse_limit
from shardq.errors import UsageError


@dataclass
class Bucket:
    """A limit as Redis keeps it; times in us."""

    limit: Limit
    full: int = 0

    def take(self, now: int, wanted: int) -> Grant:
        limit, ahead = self.limit, int(AHEAD_S * 1e6)
        step = limit.period_us / limit.count
        depth = (limit.capacity - 1) * step
        base = max(self.full, now)
        free = max(0, math.floor((now + ahead + depth - base) * limit.count / limit.period_us) + 1)
        count = min(wanted, math.ceil(free / 2))
        if count:
            self.full = base + math.ceil(count * step)
        return Grant(count, math.ceil(base - depth - now), step, limit.hold_us, 0)


def most_above(begun_us: list[float], limit: Limit) -> float:
    """How far the fullest window lies above count / period * t: at most the burst."""
    begun_us = sorted(begun_us)
    worst = 0.0
    for first in range(len(begun_us)):
        for last in range(first, len(begun_us)):
            allowed = (begun_us[last] - begun_us[first]) * limit.count / limit.period_us
            worst = max(worst, last - first + 1 - allowed)
    return worst


LIMITS = st.builds(
    parse_limit, st.just("limit"), st.sampled_from(["5/s", "100/s", "100/s burst 40", "90/m", "1000/h", "7/s burst 3"])
)


@given(LIMITS, st.integers(0, 1 << 32))
def test_no_window_has_more_than_the_limit_allows(limit: Limit, seed: int) -> None:
    """Workers ask at any time, the call takes any time each way, and they use what they got at once, a while later, or
    all together at a full second, when processes that were stopped go on."""
    chance, bucket, asked, begun = random.Random(seed), Bucket(limit), 0, list[float]()

    def some(most: int) -> int:
        return chance.choice([0, chance.randrange(most)])

    for _ in range(60):
        asked += some(100_000)
        tokens = Tokens()
        tokens.add(bucket.take(asked, chance.randint(1, 30)), (asked - some(200_000)) / 1e6, asked / 1e6)
        now = asked + some(400_000)
        if chance.random() < 0.5:
            now = math.ceil(now / 1e6) * 1_000_000
        while (following := tokens.next_s(now / 1e6)) < math.inf:
            now = max(now, math.ceil(following * 1e6))
            begun += [float(now)] * tokens.spend((now + 0.01) / 1e6)
    assert most_above(begun, limit) <= limit.burst + 1e-3


@given(LIMITS, st.integers(1, 50))
def test_one_that_asks_in_time_gets_the_whole_rate(limit: Limit, wanted: int) -> None:
    """Nothing of the rate is lost on the way, if the worker asks again as soon as it has used its leave."""
    bucket, now, begun = Bucket(limit), 0, 0
    until = 30 * limit.period_us // limit.count + 30 * 250_000
    while now < until:
        grant = bucket.take(now, wanted)
        begun += grant.given
        now += max(1000, math.ceil(grant.first_us + max(grant.given - 1, 0) * grant.step_us))
    assert begun >= until * limit.count / limit.period_us * 0.9 - 2


def test_leave_begins_when_the_answer_came_and_ends_by_the_time_of_the_question() -> None:
    tokens = Tokens()
    tokens.add(Grant(2, 100_000, 500_000.0, 200_000, 0), sent_s=10.0, received_s=10.15)
    assert not tokens.usable(10.24)
    assert tokens.next_s(10.24) == pytest.approx(10.25)
    assert tokens.usable(10.26)
    assert tokens.spend(10.31) == 0, "the first has lapsed, 200 ms after its moment"
    assert tokens.spend(10.76, most=5) == 1
    assert len(tokens) == 0
    assert tokens.next_s(10.76) == math.inf


def test_a_call_that_took_longer_than_leave_is_good_for_brings_none() -> None:
    tokens = Tokens()
    tokens.add(Grant(5, 0, 1000.0, 150_000, 0), sent_s=1.0, received_s=2.0)
    assert tokens.spend(2.0, most=5) == 0


@pytest.mark.parametrize(
    ("text", "count", "period_us", "burst"),
    [
        ("100/s", 100, 1_000_000, 20),
        ("5/s", 5, 1_000_000, 2),
        ("90/m", 90, 60_000_000, 2),
        ("1000/h", 1000, 3_600_000_000, 2),
        ("1/h burst 10", 1, 3_600_000_000, 10),
        ("100/s burst 10", 100, 1_000_000, 10),
        ("1000000/s", 1_000_000, 1_000_000, 200_000),
    ],
)
def test_a_limit_is_read(text: str, count: int, period_us: int, burst: int) -> None:
    limit = parse_limit("limit", text)
    assert limit == Limit(count, period_us, burst)
    assert limit.capacity + limit.hold_us * limit.count / limit.period_us <= limit.burst


@pytest.mark.parametrize(
    "text",
    ["", "100", "100/d", "0/s", "-1/s", "1.5/s", "100 /s", "1000001/s", "100/s burst 0", "٣/s", "5/s burst", 5, None],
)
def test_another_form_is_refused_with_those_allowed(text: object) -> None:
    with pytest.raises(UsageError, match='key_limit is "N/s", "N/m" or "N/h"'):
        parse_limit("key_limit", text)


@pytest.mark.parametrize("text", ["100/s burst 9", "5/s burst 1", "1000000/s burst 50000", "5/s burst 1000001"])
def test_a_burst_that_could_not_be_kept_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"the burst of .* is"):
        parse_limit("limit", text)
