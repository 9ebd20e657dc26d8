"""The meters: what a histogram says is what was observed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardq.core.meters import BOUNDS_S, Histogram, Meters

SECONDS = st.floats(min_value=-10, max_value=1e6)


@given(st.lists(SECONDS))
def test_each_bucket_has_what_is_at_most_its_bound(values: list[float]) -> None:
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    counted = [max(value, 0.0) for value in values]
    expected = [(str(bound), sum(value <= bound for value in counted)) for bound in BOUNDS_S]
    assert histogram.buckets() == [*expected, ("+Inf", len(values))]
    assert histogram.count == len(values)
    assert abs(histogram.sum - sum(counted)) <= 1e-6 * max(1.0, sum(counted))


@given(SECONDS, st.integers(min_value=0, max_value=100))
def test_one_observation_may_stand_for_many(value: float, times: int) -> None:
    at_once, one_by_one = Histogram(), Histogram()
    at_once.observe(value, times)
    for _ in range(times):
        one_by_one.observe(value)
    assert at_once.buckets() == one_by_one.buckets()


def test_a_group_and_a_queue_are_counted_in_one_place() -> None:
    meters = Meters()
    assert meters.group("q", "g") is meters.group("q", "g")
    assert meters.group("q", "g") is not meters.group("q", "h")
    assert meters.send("q") is meters.send("q")
    meters.retried("moved")
    meters.retried("moved")
    meters.retried("no such word")
    assert meters.retries == {"moved": 2, "ask": 0, "again": 0, "refresh": 0, "load": 0, "update": 0}
