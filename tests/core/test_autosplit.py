"""Whether a shard is split by itself: every bound, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from shardq.core.autosplit import AutoSplit, HotWatch, candidate, why_not
from shardq.core.hot import KeySample
from shardq.errors import UsageError

BOUNDS = AutoSplit(max_shards=8, every_s=600, hot_for_s=300)
READY: dict[str, Any] = {"shards": 4, "hot": {2: 50.0}, "since_s": {2: 100.0}, "last_s": None}


@pytest.mark.parametrize(
    ("now_s", "changed", "found"),
    [
        (400, {}, 2),
        (399.9, {}, None),
        (400, {"shards": 8}, None),
        (400, {"shards": 9}, None),
        (400, {"shards": 7}, 2),
        (700, {"last_s": 100}, 2),
        (699.9, {"last_s": 100}, None),
        (400, {"hot": {}}, None),
        (400, {"hot": {2: 50.0, 3: 60.0}, "since_s": {2: 0.0, 3: 0.0}}, 3),
        (400, {"hot": {2: 50.0, 3: 60.0}, "since_s": {2: 0.0, 3: 300.0}}, 2),
        (400, {"hot": {5: 50.0, 3: 50.0}, "since_s": {5: 0.0, 3: 0.0}}, 3),
        (400, {"since_s": {}}, None),
    ],
)
def test_bounds(now_s: float, changed: dict[str, Any], found: int | None) -> None:
    assert candidate(BOUNDS, now_s, **(READY | changed)) == found


def test_a_break_in_being_hot_starts_anew() -> None:
    watch = HotWatch()
    assert watch.see(10, {1: 5.0}) == {1: 10}
    assert watch.see(20, {1: 5.0, 2: 5.0}) == {1: 10, 2: 20}
    assert watch.see(30, {2: 5.0}) == {2: 20}
    assert watch.see(40, {1: 5.0, 2: 5.0}) == {1: 40, 2: 20}


def test_one_key_is_a_reason_not_to_split_and_is_not_named() -> None:
    sample = KeySample.of(["user:42"] * 9 + ["other"], 0, 1 << 32)
    assert why_not(sample) == "one key has 90% of its newest 10 messages"
    assert why_not(KeySample.of([f"k{n}" for n in range(10)], 0, 1 << 32)) == ""
    for few in (0, 9):
        sample = KeySample.of([f"k{n}" for n in range(few)], 0, 1 << 32)
        assert why_not(sample) == f"only {few} of its messages could be looked at"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"max_shards": 1}, "max_shards is a number from 2"),
        ({"max_shards": 2.5}, "max_shards is a number from 2"),
        ({"max_shards": True}, "max_shards is a number from 2"),
        ({"max_shards": 16385}, "max_shards is a number from 2"),
        ({"max_shards": 4, "every_s": -1}, "every_s is a number of seconds"),
        ({"max_shards": 4, "hot_for_s": float("nan")}, "hot_for_s is a number of seconds"),
    ],
)
def test_bounds_that_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        AutoSplit(**wrong)
