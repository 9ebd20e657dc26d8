"""What a sender may ask for, in the terms of scripts/append.lua; all else is refused with UsageError."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime, time, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core.conditions import Condition, check_dedupe_id, condition, seconds, unix_ms
from shardq.core.retry import MAX_DELAY_S
from shardq.errors import UsageError


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ((None, None, None, None), Condition()),
        ((0, None, None, None), Condition("in:0")),
        ((1.5, None, None, None), Condition("in:1500")),
        ((0.0001, None, None, None), Condition("in:1")),  # never earlier than asked
        ((timedelta(minutes=1), None, None, None), Condition("in:60000")),
        ((None, 0, None, None), Condition("at:0")),
        ((None, 1_700_000_000.25, None, None), Condition("at:1700000000250")),
        ((None, datetime(2026, 1, 1, tzinfo=UTC), None, None), Condition("at:1767225600000")),
        (
            (None, datetime(2026, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))), None, None),
            Condition("at:1767225600000"),
        ),
        ((None, None, "a", None), Condition("", "a", 600_000)),
        ((None, None, "a", 2), Condition("", "a", 2000)),
        ((None, None, "a", 0), Condition("", "a", 1)),
        ((None, None, "a", timedelta(days=1)), Condition("", "a", 86_400_000)),
        ((5, None, "é" * 256, 1), Condition("in:5000", "é" * 256, 1000)),
    ],
)
def test_what_is_asked_for(asked: tuple[Any, Any, Any, Any], meant: Condition) -> None:
    assert condition(*asked) == meant


@given(st.floats(0, MAX_DELAY_S))
def test_a_delay_is_never_cut_short(delay: float) -> None:
    name, _, ms = condition(delay, None, None, None).when.partition(":")
    assert name == "in"
    assert delay * 1000 <= int(ms) <= delay * 1000 + 1


@given(st.datetimes(datetime(1970, 1, 2), datetime(2999, 1, 1), timezones=st.timezones()))
def test_a_moment_is_the_same_in_every_zone(moment: datetime) -> None:
    assert abs(unix_ms(moment) - moment.timestamp() * 1000) <= 1
    assert unix_ms(moment) == unix_ms(moment.astimezone(UTC))


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ((1, 1, None, None), "not both"),
        ((None, None, None, 5), "give that too"),
        *(
            ((value, None, None, None), "delay is 0 to")
            for value in (-1, math.nan, math.inf, "1", True, MAX_DELAY_S * 2)
        ),
        ((timedelta(seconds=-1), None, None, None), "delay is 0 to"),
        ((10**400, None, None, None), "delay is 0 to"),
        ((date(2026, 1, 1), None, None, None), "delay is 0 to"),
        *(((None, value, None, None), "a time is") for value in (-1, math.nan, math.inf, "1", True, 1e12, 10**400)),
        ((None, timedelta(1), None, None), "a time is"),
        ((None, date(2026, 1, 1), None, None), "a time is"),
        ((None, time(12), None, None), "a time is"),
        ((None, datetime(1969, 1, 1, tzinfo=UTC), None, None), "a time is"),
        ((None, datetime(2026, 1, 1), None, None), "has no time zone"),
        *(((None, None, value, None), "a dedupe_id is") for value in ("", "a" * 257, b"a", 5, ["a"])),
        ((None, None, "\ud800", None), "surrogates"),
        *(((None, None, "a", value), "dedupe_window is 0 to") for value in (-1, math.nan, "1", True, MAX_DELAY_S * 2)),
    ],
)
def test_what_is_refused(asked: tuple[Any, Any, Any, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        condition(*asked)


@given(st.one_of(st.text(), st.binary(), st.floats(), st.integers(), st.none(), st.booleans(), st.lists(st.integers())))
def test_anything_is_taken_or_refused(value: Any) -> None:
    for check in (lambda: seconds("delay", value), lambda: unix_ms(value), lambda: check_dedupe_id(value)):
        try:
            check()
        except UsageError:
            continue


def test_a_refusal_shows_only_the_beginning_of_what_is_long() -> None:
    with pytest.raises(UsageError, match="a dedupe_id is") as caught:
        check_dedupe_id("a" * 10_000)
    assert len(str(caught.value)) < 200
