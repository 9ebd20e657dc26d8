"""Which ticks are due, against a plain model; and schedules as bytes."""

from __future__ import annotations

from contextlib import suppress
from itertools import count
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core.hashing import key_hash
from shardq.core.routing import RoutingTable
from shardq.core.schedule import GRACE_S, MISSED, MOST_MISSED, Missed, Schedule, due_ticks, tick_producer
from shardq.errors import CorruptData

TEXTS = st.text() | st.binary()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
SCHEDULES = st.builds(
    Schedule,
    name=st.text(min_size=1, max_size=20),
    cron=st.text(max_size=20),
    timezone=st.text(max_size=20),
    key=st.none() | TEXTS,
    value=VALUES,
    headers=st.none() | st.dictionaries(st.text(), TEXTS, max_size=3),
    missed=st.sampled_from(MISSED),
    since_ms=st.integers(0, 2**53 - 1),
    turn=st.integers(0, 2**40),
)
NOW = 1_800_000_000


# -- what is due ------------------------------------------------------------------------------------------


@given(
    ticks=st.sets(st.integers(NOW - 300, NOW + 20), max_size=60),
    after=st.integers(NOW - 320, NOW + 20),
    missed=st.sampled_from(MISSED),
)
def test_it_is_what_the_policy_says(ticks: set[int], after: int, missed: Missed) -> None:
    due = due_ticks(sorted(ticks, reverse=True), after, NOW, missed)
    open_ones = sorted(tick for tick in ticks if after < tick <= NOW)
    punctual = [tick for tick in open_ones if tick >= NOW - GRACE_S]
    sent = {"all": open_ones, "last": open_ones[-1:], "skip": punctual}[missed]
    assert list(due.ticks) == sent
    assert due.left_out == len(open_ones) - len(sent)
    assert due.late == len(open_ones) - len(punctual)


@given(
    looks=st.lists(st.integers(0, 90), max_size=8),
    step=st.integers(1, 30),
    missed=st.sampled_from(MISSED),
)
def test_each_tick_is_sent_or_left_out_once(looks: list[int], step: int, missed: Missed) -> None:
    """A leader that looks again and again, each time from the last tick that was sent."""
    now, sent, left_out = NOW, list[int](), 0
    last = NOW
    for pause in looks:
        now += pause
        due = due_ticks((now - now % step - n * step for n in count()), last, now, missed)
        sent += due.ticks
        if due.ticks:
            left_out += due.left_out
            last = due.ticks[-1]
    ticks = [tick for tick in range(NOW - NOW % step, last + 1, step) if tick > NOW]
    assert sent == sorted(set(sent))
    assert set(sent) <= set(ticks)
    assert len(sent) + left_out == len(ticks)


@given(after=st.integers(NOW - 10**7, NOW - MOST_MISSED - 1))
def test_it_looks_back_no_further_than_its_bound(after: int) -> None:
    taken = []

    def endless() -> Any:
        for n in count():
            taken.append(n)
            yield NOW - n

    due = due_ticks(endless(), after, NOW, "all")
    assert due.ticks == tuple(range(NOW - MOST_MISSED + 1, NOW + 1))
    assert due.left_out == 1
    assert len(taken) == MOST_MISSED + 1
    assert due_ticks(endless(), after, NOW, "last").left_out == MOST_MISSED


# -- as it is stored --------------------------------------------------------------------------------------


@given(SCHEDULES)
def test_it_comes_back_from_its_bytes(schedule: Schedule) -> None:
    again = Schedule.from_bytes(schedule.name, schedule.to_bytes())
    assert again == schedule
    assert again.to_bytes() == schedule.to_bytes()


def test_the_order_of_headers_makes_no_difference() -> None:
    one, other = ({"a": "1", "b": "2"}, {"b": "2", "a": "1"})
    assert (
        Schedule(name="n", cron="c", headers=one).to_bytes() == Schedule(name="n", cron="c", headers=other).to_bytes()
    )


def test_a_newer_one_with_more_to_say_is_read() -> None:
    fields = msgspec.msgpack.decode(Schedule(name="n", cron="c").to_bytes())
    assert Schedule.from_bytes("n", msgspec.msgpack.encode(fields | {"later": 1})) == Schedule(name="n", cron="c")


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with suppress(CorruptData):
        Schedule.from_bytes("n", data)


@pytest.mark.parametrize(
    "change",
    [
        {"cron": 5},
        {"key": 5},
        {"key": []},
        {"headers": {"a": None}},
        {"headers": [1]},
        {"missed": "never"},
        {"since_ms": -1},
        {"since_ms": 2**60},
        {"timezone": None},
    ],
)
def test_a_field_of_the_wrong_kind_is_refused(change: dict[str, Any]) -> None:
    fields = msgspec.msgpack.decode(Schedule(name="n", cron="c").to_bytes())
    with pytest.raises(CorruptData, match="set it again"):
        Schedule.from_bytes("n", msgspec.msgpack.encode(fields | change))


# -- what takes the place of what -------------------------------------------------------------------------


@given(SCHEDULES, st.none() | SCHEDULES, st.integers(0, 2**53 - 1))
def test_the_same_times_go_on_and_new_ones_begin_now(wanted: Schedule, before: Schedule | None, now_ms: int) -> None:
    stored = wanted.over(before, now_ms)
    goes_on = before is not None and (before.cron, before.timezone) == (wanted.cron, wanted.timezone)
    assert stored.since_ms == (before.since_ms if before is not None and goes_on else now_ms)
    assert msgspec.structs.replace(stored, since_ms=wanted.since_ms, turn=wanted.turn) == wanted
    if before is not None:
        assert stored.turn - before.turn == (0 if stored.to_bytes() == before.to_bytes() else 1)
    assert wanted.over(stored, now_ms + 1) == stored


@given(st.none() | TEXTS, st.integers(1, 40))
def test_it_goes_to_the_shard_of_its_key(key: str | bytes | None, shards: int) -> None:
    table = RoutingTable.equal(shards)
    hash_ = key_hash("name" if key is None else key)
    assert Schedule(name="name", cron="c", key=key).shard_in(table) == table.shard_for(hash_)


def test_its_ticks_have_a_producer_of_their_own() -> None:
    """The functions keep `p:cron/...` for ever: its name is part of what is stored."""
    assert tick_producer("nightly") == "cron/nightly"
