"""Loads from counters: smoothing, what makes a shard heavy, counters that fall back, shards that come and go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core.load import BACKLOG_IN_S, BYTES_OF_A_MESSAGE, Counts, Ewma, Load, LoadMeter


def test_a_mean_forgets_half_in_a_half_life() -> None:
    mean = Ewma(10)
    assert mean.value is None
    assert mean.see(100, 1) == 100, "the first value is all there is"
    assert mean.see(0, 10) == pytest.approx(50)
    assert mean.see(0, 10) == pytest.approx(25)


@given(st.lists(st.floats(0, 1e9), min_size=1), st.floats(0.1, 100))
def test_a_mean_is_between_what_was_seen(values: list[float], over_s: float) -> None:
    mean = Ewma(30)
    for value in values:
        mean.see(value, over_s)
    assert mean.value is not None
    assert min(values) * (1 - 1e-9) <= mean.value <= max(values) * (1 + 1e-9)


@given(st.floats(0.5, 20), st.floats(0.5, 20))
def test_a_mean_does_not_depend_on_how_often_it_is_fed(first_s: float, second_s: float) -> None:
    once, twice = Ewma(30), Ewma(30)
    once.see(8, 1)
    twice.see(8, 1)
    once.see(2, first_s + second_s)
    twice.see(2, first_s)
    twice.see(2, second_s)
    assert once.value == pytest.approx(twice.value)


def metered(*samples: tuple[float, Counts]) -> LoadMeter:
    meter = LoadMeter(10)
    for at_s, counts in samples:
        meter.see(0, at_s, counts)
    return meter


def test_one_sample_is_no_rate() -> None:
    meter = metered((5.0, Counts(1000, 1000, 1000)))
    assert meter.loads() == {}
    assert meter.details() == {}
    assert meter.observed_s() == 0


def test_messages_bytes_and_backlog_add_up() -> None:
    counts = Counts(appended=20, bytes=3 * BYTES_OF_A_MESSAGE * 2, backlog=int(5 * BACKLOG_IN_S))
    meter = metered((0.0, Counts(0, 0)), (2.0, counts))
    assert meter.loads() == {0: pytest.approx(10 + 3 + 5)}
    assert meter.details() == {0: Load(18.0, 10.0, 30720.0, 300.0)}


def test_counters_that_fall_back_keep_the_rate_and_start_anew() -> None:
    samples = [(0.0, Counts(0, 0)), (1.0, Counts(100, 0)), (2.0, Counts(40, 0))]
    assert metered(*samples).loads() == {0: pytest.approx(100)}
    assert metered(*samples, (3.0, Counts(140, 0))).loads() == {0: pytest.approx(100)}


def test_a_sample_that_is_not_later_is_left_out() -> None:
    assert metered((1.0, Counts(0, 0)), (1.0, Counts(50, 0)), (2.0, Counts(10, 0))).loads() == {0: pytest.approx(10)}


def test_a_backlog_below_zero_weighs_nothing() -> None:
    assert metered((0.0, Counts(0, 0)), (1.0, Counts(0, 0, -50))).loads() == {0: 0}


def test_it_is_observed_as_long_as_half_of_the_shards_are() -> None:
    meter = LoadMeter()
    for shard, seconds in enumerate((30.0, 20.0, 10.0, 0.0)):
        meter.see(shard, 100.0 - seconds, Counts(0, 0))
        meter.see(shard, 100.0, Counts(0, 0))
    assert meter.observed_s() == 20
    meter.keep({2, 3})
    assert meter.observed_s() == 10
    assert list(meter.loads()) == [2]
