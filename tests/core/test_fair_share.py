"""Handler slots shared out by weight: no share is more than one of its turns from its part, and none starves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core.fair_share import MAX_WEIGHT, FairShare
from shardq.errors import UsageError

WEIGHTS = st.lists(st.integers(1, MAX_WEIGHT), min_size=1, max_size=5)


@given(WEIGHTS, st.data())
def test_shares_that_always_want_are_within_one_turn_of_their_part(weights: list[int], data: st.DataObject) -> None:
    """Over any run of decisions: also one that begins in the middle, while other shares come and go."""
    share = FairShare(weights)
    steady = data.draw(st.sets(st.integers(0, len(weights) - 1), min_size=1))
    for _ in range(data.draw(st.integers(0, 30))):
        share.next(data.draw(st.sets(st.integers(0, len(weights) - 1), min_size=1)))
    share.next(steady)  # from here on they want all the time
    given_to = dict.fromkeys(steady, 0)
    for _ in range(200):
        others = data.draw(st.sets(st.integers(0, len(weights) - 1), max_size=1)) if len(weights) > 1 else set()
        chosen = share.next(steady | others)
        if chosen in given_to:
            given_to[chosen] += 1
    # A run in the middle begins where one may be ahead by a turn: two turns apart at the most at its end.
    for one in steady:
        for other in steady:
            apart = abs(given_to[one] * weights[other] - given_to[other] * weights[one])
            assert apart <= 2 * max(weights[one], weights[other])


@given(WEIGHTS)
def test_from_the_start_the_bound_is_one_turn(weights: list[int]) -> None:
    share, given_to = FairShare(weights), [0] * len(weights)
    everyone = range(len(weights))
    for _ in range(300):
        given_to[share.next(everyone)] += 1
        for one in everyone:
            for other in everyone:
                apart = abs(given_to[one] * weights[other] - given_to[other] * weights[one])
                assert apart <= max(weights[one], weights[other])


@given(WEIGHTS)
def test_a_whole_round_gives_each_its_weight(weights: list[int]) -> None:
    share, given_to = FairShare(weights), [0] * len(weights)
    for _ in range(sum(weights)):
        given_to[share.next(range(len(weights)))] += 1
    assert given_to == weights


def test_one_against_a_thousand_is_given_one_in_a_thousand_and_one() -> None:
    share = FairShare([1000, 1])
    assert sum(share.next([0, 1]) for _ in range(10 * 1001)) == 10


def test_a_share_that_was_idle_gains_no_credit() -> None:
    share = FairShare([1, 1])
    for _ in range(1000):
        assert share.next([0]) == 0
    assert sorted(share.next([0, 1]) for _ in range(10)) == [0] * 5 + [1] * 5


def test_a_share_that_goes_idle_keeps_its_debt() -> None:
    """One that comes with a single message at a time must not get more than its part by it."""
    share, given_to = FairShare([9, 1]), [0, 0]
    for turn in range(1000):
        given_to[share.next([0, 1] if turn % 2 else [0])] += 1
    assert given_to[1] <= 101


def test_a_turn_that_was_given_back_does_not_count() -> None:
    share = FairShare([1, 1])
    assert share.next([0, 1]) == 0
    share.give_back(0)
    assert share.next([0, 1]) == 0


@pytest.mark.parametrize("weight", [0, -1, 1.5, "3", True, None, MAX_WEIGHT + 1])
def test_what_is_no_weight_is_refused(weight: object) -> None:
    with pytest.raises(UsageError, match="whole number from 1 to 1000"):
        FairShare([1, weight])  # type: ignore[list-item]  # the mistake under test
