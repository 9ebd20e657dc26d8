"""Notices on the wire and in the buffer: what goes in comes out, bytes from elsewhere do no harm, memory is bounded."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core.notices import ID_BYTES, MAX_VALUE_BYTES, Arrived, Buffer, Missed, RecentIds, decode, encode, id_of
from shardq.core.records import pack_value
from shardq.errors import CorruptData, InvalidValue, MessageTooLarge

ID = bytes(range(ID_BYTES))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(values, st.binary(min_size=ID_BYTES, max_size=ID_BYTES))
def test_a_value_comes_out_as_it_went_in(value: Any, notice_id: bytes) -> None:
    frame = encode(notice_id, pack_value(value))
    assert decode(frame) == value
    assert type(decode(frame)) is type(value)
    assert id_of(frame) == notice_id


def test_the_frame_stays_as_it_is() -> None:
    """Listeners of this version must understand senders of this version, whenever they were installed."""
    assert encode(ID, "price") == b"\x01\x00" + ID + b"\xa5price"


@given(st.binary(max_size=60))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    for frame in (data, b"\x01\x00" + ID + data):
        try:
            decode(frame)
        except CorruptData:
            continue
        assert id_of(frame) is not None


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x01\x00" + ID,
        b"\x02\x00" + ID + b"\xc0",
        b"\x01\x01" + ID + b"\xc0",
        b"\x01\x00" + ID + b"\xc0\xc0",
        b"\x01\x00" + ID + b"\xa2\xff\xff",
        b"\x01\x00" + ID + b"\x91" * 100_000,
    ],
)
def test_what_is_no_frame_is_refused(frame: bytes) -> None:
    with pytest.raises(CorruptData):
        decode(frame)


@pytest.mark.parametrize("value", [b"x" * MAX_VALUE_BYTES, "x" * MAX_VALUE_BYTES, [b"x" * (MAX_VALUE_BYTES - 6)]])
def test_the_largest_value_passes(value: Any) -> None:
    assert decode(encode(ID, pack_value(value))) == value


@pytest.mark.parametrize(
    "value", [b"x" * (MAX_VALUE_BYTES + 1), "é" * (MAX_VALUE_BYTES // 2 + 1), ["x" * MAX_VALUE_BYTES]]
)
def test_a_larger_value_is_refused(value: Any) -> None:
    with pytest.raises(MessageTooLarge, match=f"at most {MAX_VALUE_BYTES}"):
        encode(ID, pack_value(value))


@pytest.mark.parametrize("value", [object(), "\ud800", {1: {2, object()}}])
def test_what_msgpack_does_not_carry_is_refused(value: Any) -> None:
    with pytest.raises(InvalidValue):
        pack_value(value)


def test_ids_are_known_until_others_came_after_them() -> None:
    recent = RecentIds(3)
    assert [recent.add(name) for name in (b"a", b"b", b"a", b"c", b"a", b"d")] == [True, True, False, True, False, True]
    assert recent.add(b"a"), "three others came since it was first seen"
    assert not recent.add(b"d")


def arrived(number: int, source: str = "s", size: int = 0) -> Arrived:
    return Arrived(source, f"c{number}", bytes(size))


def drain(buffer: Buffer) -> list[str | Missed]:
    taken: list[str | Missed] = []
    while (item := buffer.take()) is not None:
        taken.append(item if isinstance(item, Missed) else item.channel)
    return taken


def test_notices_and_gaps_come_out_in_order() -> None:
    buffer = Buffer(10, 10_000)
    buffer.put(arrived(1))
    buffer.gap("a")
    buffer.gap("b")
    buffer.gap("a")
    buffer.put(arrived(2))
    buffer.gap("a")
    assert drain(buffer) == ["c1", Missed(("a", "b"), 0), "c2", Missed(("a",), 0)]
    assert buffer.take() is None


def test_a_full_buffer_drops_the_oldest_and_says_so() -> None:
    buffer = Buffer(3, 10_000)
    for number in range(10):
        buffer.put(arrived(number, source=f"s{number % 2}"))
    assert drain(buffer) == [Missed(("s0", "s1"), 7), "c7", "c8", "c9"]


def test_gaps_of_what_was_dropped_are_kept() -> None:
    buffer = Buffer(2, 10_000)
    buffer.put(arrived(1))
    buffer.gap("away")
    buffer.put(arrived(2))
    buffer.put(arrived(3))
    assert drain(buffer) == [Missed(("s", "away"), 1), "c2", "c3"]


def test_a_gap_before_the_dropped_ones_grows() -> None:
    buffer = Buffer(1, 10_000)
    buffer.gap("away")
    buffer.put(arrived(1))
    buffer.gap("later")
    buffer.put(arrived(2))
    buffer.put(arrived(3))
    assert drain(buffer) == [Missed(("away", "s", "later"), 2), "c3"]


def test_large_notices_are_dropped_by_their_size() -> None:
    buffer = Buffer(1000, 10_000)
    for number in range(10):
        buffer.put(arrived(number, size=3000))
    assert drain(buffer) == [Missed(("s",), 7), "c7", "c8", "c9"]
    buffer.put(arrived(11, size=50_000))
    assert drain(buffer) == ["c11"], "one is held whatever its size"


def test_long_names_of_channels_take_room_too() -> None:
    """A pattern matches what others publish without shardq as well."""
    buffer = Buffer(1000, 10_000)
    for number in range(10):
        buffer.put(Arrived("s", f"{number}".rjust(3000, "c"), b""))
    missed, *channels = drain(buffer)
    assert missed == Missed(("s",), 7)
    assert [str(channel)[-1] for channel in channels] == ["7", "8", "9"]


@given(st.lists(st.sampled_from(["put", "gap", "take"]), max_size=200), st.integers(1, 5))
def test_each_notice_comes_out_or_is_counted(actions: list[str], limit: int) -> None:
    buffer = Buffer(limit, 10**9)
    taken: list[str | Missed] = []
    put = gaps = 0
    for action in actions:
        if action == "put":
            put += 1
            buffer.put(arrived(put))
        elif action == "gap":
            gaps += 1
            buffer.gap("g")
        elif (item := buffer.take()) is not None:
            taken.append(item if isinstance(item, Missed) else item.channel)
    rest = drain(buffer)
    assert len([item for item in rest if isinstance(item, str)]) <= limit
    assert len([item for item in rest if isinstance(item, Missed)]) <= limit + 1
    taken += rest
    names = [item for item in taken if isinstance(item, str)]
    assert len(names) + sum(item.dropped for item in taken if isinstance(item, Missed)) == put
    assert names == sorted(names, key=lambda name: int(name[1:]))
    assert bool(gaps) == any("g" in item.channels for item in taken if isinstance(item, Missed))


def test_a_msgspec_struct_travels_as_a_map() -> None:
    class Price(msgspec.Struct):
        cents: int

    assert decode(encode(ID, pack_value(Price(5)))) == {"cents": 5}
