"""Cron expressions as ticks: forwards and backwards alike, across changes of the clocks, and whatever a user writes."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from itertools import islice, pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardq.errors import UsageError
from shardq.runtime.cron import LONGEST, Cron

BERLIN = "Europe/Berlin"
HOUR = 3600
# The clocks go from 2 to 3 o'clock, and from 3 back to 2.
SPRING = int(datetime(2026, 3, 29, 3, tzinfo=ZoneInfo(BERLIN)).timestamp())
AUTUMN = int(datetime(2026, 10, 25, 2, fold=1, tzinfo=ZoneInfo(BERLIN)).timestamp())

FIELDS = st.tuples(
    st.sampled_from(["*", "0", "30", "*/15", "15,45", "5-10", "59"]),
    st.sampled_from(["*", "0", "1", "2", "3", "*/2", "1,2,3", "0-4", "23"]),
    st.sampled_from(["*", "*", "29", "25", "L", "LW"]),
    st.sampled_from(["*", "*", "3", "10"]),
    st.sampled_from(["*", "*", "0", "MON-FRI", "SUN"]),
).map(" ".join)


def forwards(cron: Cron, after: int, to: int) -> list[int]:
    found: list[int] = []
    tick = cron.after(after)
    while tick is not None and tick <= to:
        found.append(tick)
        tick = cron.after(tick)
    return found


@given(
    expression=FIELDS,
    zone=st.sampled_from([BERLIN, "America/New_York", "UTC"]),
    around=st.sampled_from([SPRING, AUTUMN, SPRING - 21 * 24 * HOUR + 6 * HOUR, AUTUMN + 7 * 24 * HOUR + 5 * HOUR]),
    before=st.integers(0, 30 * HOUR),
    past=st.integers(-4 * HOUR, 4 * HOUR),
)
@example("30 2 * * *", BERLIN, AUTUMN, 10 * HOUR, 600)  # now in the hour that comes twice, the second time
@example("30 2 * * *", BERLIN, SPRING, 10 * HOUR, 0)
def test_both_directions_name_the_same_ticks(expression: str, zone: str, around: int, before: int, past: int) -> None:
    """Leaders look back from wherever they are: none may find a tick that the others don't."""
    cron = Cron(expression, zone)
    now, start = around + past, around - before - 4 * HOUR
    ahead = forwards(cron, start, now)
    back = []
    for tick in cron.until(now):
        if tick <= start:
            break
        back.append(tick)
    assert back == ahead[::-1]
    assert all(one < other for one, other in pairwise(ahead))
    following = cron.after(now)
    assert following is None or following > now


@pytest.mark.parametrize(
    ("expression", "around", "times"),
    [
        ("30 2 * * *", SPRING, ["28T02:30:00+01:00", "29T03:00:00+02:00", "30T02:30:00+02:00"]),
        ("30 2 * * *", AUTUMN, ["24T02:30:00+02:00", "25T02:30:00+02:00", "26T02:30:00+01:00"]),
        ("0 3 * * *", SPRING, ["28T03:00:00+01:00", "29T03:00:00+02:00", "30T03:00:00+02:00"]),
        ("0 * * * *", SPRING - HOUR, ["29T01:00:00+01:00", "29T03:00:00+02:00", "29T04:00:00+02:00"]),
        ("0 * * * *", AUTUMN, ["25T02:00:00+02:00", "25T02:00:00+01:00", "25T03:00:00+01:00"]),
        ("0 30 2 * * *", AUTUMN, ["25T02:30:00+02:00", "25T02:30:00+01:00", "26T02:30:00+01:00"]),
    ],
)
def test_changes_of_the_clocks(expression: str, around: int, times: list[str]) -> None:
    """Left out: sent right after. Repeated: sent once. With `*`, or with seconds: by real time."""
    cron = Cron(expression, BERLIN)
    first = next(tick for tick in cron.until(around + HOUR) if cron.iso(tick).endswith(times[0]))
    ticks = [first]
    while len(ticks) < 3:
        ticks.append(cron.after(ticks[-1]) or 0)
    assert [cron.iso(tick)[8:] for tick in ticks] == times


def test_seconds_go_first() -> None:
    cron = Cron("*/20 * * * * *", "UTC")
    assert list(islice(cron.until(1_800_000_000), 3)) == [1_800_000_000, 1_799_999_980, 1_799_999_960]
    assert cron.after(1_800_000_000) == 1_800_000_020


def test_what_never_comes() -> None:
    assert Cron("* * */20 * 1L", "UTC").after(1_800_000_000) is None
    assert list(Cron("* * */20 * 1L", "UTC").until(1_800_000_000)) == []
    assert Cron("0 0 29 2 *", BERLIN).after(253_402_200_000) is None  # the year 9999
    assert list(Cron("0 0 29 2 *", BERLIN).until(-62_135_500_000)) == []  # the year 1


@pytest.mark.parametrize(
    "expression",
    ["", "* * * *", "* * * * * * *", "60 * * * *", "* * * * MOON", "@daily", "0 0 31 2 *", "9" * 5000, None, 5, b"x"],
)
def test_what_is_no_cron_expression(expression: Any) -> None:
    with pytest.raises(UsageError, match="is not a cron expression"):
        Cron(expression, "UTC")


@given(st.text("0123456789*/,-#LWlwMONJAFEB ²½٣ß\x00\t", max_size=40) | st.text(max_size=LONGEST + 5))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(UsageError):
        cron = Cron(text, BERLIN)
        cron.after(1_800_000_000)
        next(cron.until(1_800_000_000), None)


@pytest.mark.parametrize(
    "zone", ["", "Nowhere", "America", "../UTC", "/etc/localtime", "localtime", "a\0b", "\ud800", "x" * 300, None, 5]
)
def test_what_is_no_time_zone(zone: Any) -> None:
    with pytest.raises(UsageError, match="time zone"):
        Cron("* * * * *", zone)
