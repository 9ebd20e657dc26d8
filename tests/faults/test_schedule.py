"""Schedules of faults."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.faults.schedule import AT_ONCE, FIRST_AT_S, make_schedule

NAMES = ["a", "b", "c", "d"]
seeds, lengths = st.integers(0, 10**9), st.floats(1, 600)
names = st.lists(st.sampled_from("abcdefgh"), unique=True)


@given(seeds, lengths, names)
def test_a_seed_repeats_its_schedule(seed: int, length_s: float, names: list[str]) -> None:
    assert make_schedule(seed, length_s, names) == make_schedule(seed, length_s, names[::-1])


def test_another_seed_is_another_schedule() -> None:
    assert make_schedule(1, 60, NAMES) != make_schedule(2, 60, NAMES)


@given(seeds, lengths, names)
def test_faults_end_in_time_and_come_few_at_once(seed: int, length_s: float, names: list[str]) -> None:
    planned = make_schedule(seed, length_s, names)
    assert [one.number for one in planned] == list(range(len(planned)))
    for one in planned:
        assert one.at_s >= FIRST_AT_S
        assert one.until_s <= length_s
        assert sum(other.at_s <= one.at_s < other.until_s for other in planned) <= AT_ONCE


@given(seeds, lengths, names)
def test_every_fault_comes_once_before_any_comes_again(seed: int, length_s: float, names: list[str]) -> None:
    struck = [one.name for one in make_schedule(seed, length_s, names)]
    for first in range(0, len(struck), max(1, len(names))):
        once = struck[first : first + len(names)]
        assert len(set(once)) == len(once)


def test_all_come_when_there_is_time() -> None:
    assert {one.name for one in make_schedule(3, 60, NAMES)} == set(NAMES)
    assert make_schedule(3, 60, []) == []
