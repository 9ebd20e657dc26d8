"""The record batch: its bytes, its round trip, and that no bytes whatever raise anything but CorruptData."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardq.core import records
from shardq.core.records import RecordBatch
from shardq.errors import CorruptData, InvalidValue

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
KEYS = st.none() | TEXT | st.binary(max_size=20)
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | TEXT | st.binary()
NESTED = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=10)
HEADERS = st.none() | st.dictionaries(TEXT, TEXT | st.binary(max_size=10), max_size=3)
BASE_MS = st.integers(0, 2**53)


@st.composite
def batches(draw: st.DrawFn) -> RecordBatch:
    count = draw(st.integers(1, 8))

    def column(items: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(items, min_size=count, max_size=count))

    offsets = column(st.integers(-(2**31), 2**31)) if draw(st.booleans()) else None
    headers = column(HEADERS) if draw(st.booleans()) else None
    return RecordBatch(draw(BASE_MS), offsets, column(KEYS), column(NESTED), headers)


def packed(batch: RecordBatch) -> bytes:
    return records.encode(batch._replace(values=[records.pack_value(value) for value in batch.values]))


def body(*items: bytes, count: int = 1) -> bytes:
    """A batch of `count` by its header whose array of five holds `items`, in msgpack."""
    return bytes((1, 0, count >> 8, count & 255, 0x95)) + b"".join(items)


@given(batches())
def test_what_goes_in_comes_out(batch: RecordBatch) -> None:
    assert records.decode(packed(batch)) == batch


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_one_sparse_header_among_many(present: list[bool]) -> None:
    headers = [{"trace": "x"} if there else None for there in present]
    count = len(present)
    batch = RecordBatch(0, None, [None] * count, [b""] * count, headers)
    assert records.decode(packed(batch)).headers == headers


def test_the_most_and_the_fewest_messages() -> None:
    most = RecordBatch(1, None, [None] * 65535, [b""] * 65535, None)
    assert records.decode(records.encode(most)) == most
    assert records.count_of(records.encode(most)) == 65535
    for count in (0, 65536):
        with pytest.raises(ValueError, match="1 to 65535"):
            records.encode(RecordBatch(1, None, [None] * count, [b""] * count, None))


# Written out by hand from the module's docstring and the msgpack specification.
GOLDEN = bytes.fromhex(
    "01 00 0003"  # version, flags, count
    "95"
    "cf 0000018bcfe56800"  # base time 1700000000000
    "93 00 fd 07"  # offsets 0, -3, 7
    "93 a1 6b c4 02 ff00 c0"  # keys "k", b"\xff\0", None
    "93 c4 01 76 a1 76 81 a1 6e 92 01 c3"  # values b"v", "v", {"n": [1, True]}
    "93 c0 82 a1 74 a1 78 a1 62 c4 01 00 c0"  # headers None, {"t": "x", "b": b"\0"}, None
)
GOLDEN_BATCH = RecordBatch(
    1700000000000,
    [0, -3, 7],
    ["k", b"\xff\0", None],
    [b"v", "v", {"n": [1, True]}],
    [None, {"t": "x", "b": b"\0"}, None],
)
GOLDEN_PLAIN = bytes.fromhex("01 00 0001 95 07 c0 91 c0 91 c4 00 c0")


def test_golden_bytes() -> None:
    assert packed(GOLDEN_BATCH) == GOLDEN
    assert records.decode(GOLDEN) == GOLDEN_BATCH


def test_golden_bytes_of_the_least_batch() -> None:
    least = RecordBatch(7, None, [None], [b""], None)
    assert packed(least) == GOLDEN_PLAIN
    assert records.decode(GOLDEN_PLAIN) == least


def decode_or_refuse(data: bytes) -> None:
    """Decodes to a batch whose every part has its type, or raises CorruptData; anything else is the test's failure."""
    try:
        batch = records.decode(data)
    except CorruptData:
        return
    count = len(batch.keys)
    assert records.count_of(data) == count >= 1
    assert len(batch.values) == count
    assert batch.offsets_ms is None or [type(ms) for ms in batch.offsets_ms] == [int] * count
    assert type(batch.base_ms) is int
    assert all(key is None or type(key) in (str, bytes) for key in batch.keys)
    assert batch.headers is None or len(batch.headers) == count
    for headers in batch.headers or ():
        assert headers is None or all(type(part) is str for part in headers)
        assert headers is None or all(type(part) in (str, bytes) for part in headers.values())


@given(
    st.binary()
    | st.binary().map(lambda tail: b"\1\0\0\1\x95" + tail)
    | st.binary().map(lambda tail: b"\1\4\0\1\x96" + tail)
)
@example(b"")
@example(b"\1\0\0")
@example(b"\1\0\0\1")
def test_arbitrary_bytes(data: bytes) -> None:
    decode_or_refuse(data)


@given(batches(), st.data())
def test_mutated_batches(batch: RecordBatch, data: st.DataObject) -> None:
    raw = packed(batch)
    at = data.draw(st.integers(0, len(raw)))
    cut = data.draw(st.integers(0, 3))
    decode_or_refuse(raw[:at] + data.draw(st.binary(max_size=3)) + raw[at + cut :])


@given(batches())
def test_every_cut_and_every_tail_is_refused(batch: RecordBatch) -> None:
    raw = packed(batch)
    for end in range(len(raw)):
        with pytest.raises(CorruptData, match="record batch"):
            records.decode(raw[:end])
    with pytest.raises(CorruptData, match="does not decode"):
        records.decode(raw + b"\0")


@given(batches(), st.data())
def test_deleted_messages_leave_their_places(batch: RecordBatch, data: st.DataObject) -> None:
    count = len(batch.keys)
    gone = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count))
    left = batch
    for index in gone:
        left = records.without(left, index)
    found = records.decode(packed(left))
    assert (list(found.holes or ()), len(found.keys)) == (sorted(set(gone)), count)
    assert records.count_of(packed(left)) == count
    for index in range(count):
        there = index not in gone
        assert found.keys[index] == (batch.keys[index] if there else None)
        assert found.values[index] == (batch.values[index] if there else None)
        assert batch.headers is None or found.headers is not None
        assert found.headers is None or found.headers[index] == (
            batch.headers[index] if batch.headers and there else None
        )
    assert found.offsets_ms == batch.offsets_ms
    assert batch.holes is None, "the batch it was made from is as it was"


def test_only_places_that_are_there_are_deleted() -> None:
    with pytest.raises(IndexError):
        records.without(GOLDEN_BATCH, 3)


GOLDEN_HOLES = bytes.fromhex("01 04 0003 96 07 c0 93 a1 61 c0 a1 63 93 01 c0 03 c0 91 01")


def test_golden_bytes_of_a_batch_with_a_deleted_message() -> None:
    batch = records.without(RecordBatch(7, None, ["a", "b", "c"], [1, 2, 3], None), 1)
    assert packed(batch) == GOLDEN_HOLES
    assert records.decode(GOLDEN_HOLES) == batch


@pytest.mark.parametrize(
    "data",
    [
        pytest.param("01 04 0001 95 07 c0 91 c0 91 c0 c0", id="no list"),
        pytest.param("01 04 0001 96 07 c0 91 c0 91 c0 c0 c0", id="nil"),
        pytest.param("01 04 0001 96 07 c0 91 c0 91 c0 c0 90", id="none"),
        pytest.param("01 04 0001 96 07 c0 91 c0 91 c0 c0 91 01", id="beyond the end"),
        pytest.param("01 04 0001 96 07 c0 91 c0 91 c0 c0 91 ff", id="before the start"),
        pytest.param("01 04 0001 96 07 c0 91 c0 91 c0 c0 92 00 00", id="twice"),
        pytest.param("01 04 0002 96 07 c0 92 c0 c0 92 c0 c0 c0 92 01 00", id="falling"),
        pytest.param("01 04 0001 96 07 c0 91 c0 91 c0 c0 91 a1 30", id="text"),
        pytest.param("01 04 0001 96 07 c0 91 a1 61 91 c0 c0 91 00", id="key left"),
        pytest.param("01 04 0001 96 07 c0 91 c0 91 07 c0 91 00", id="value left"),
        pytest.param("01 04 0001 96 07 c0 91 c0 91 c0 91 80 91 00", id="headers left"),
        pytest.param("01 00 0001 96 07 c0 91 c0 91 c0 c0 91 00", id="no flag"),
    ],
)
def test_wrong_places_of_deleted_messages(data: str) -> None:
    with pytest.raises(CorruptData):
        records.decode(bytes.fromhex(data))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(body(b"\x07", b"\xc0", b"\x91\xc0", b"\x91" + b"\x91" * 200_000 + b"\xc0", b"\xc0"), id="arrays"),
        pytest.param(body(b"\x07", b"\xc0", b"\x91\xc0", b"\x91" + b"\x81\xc0" * 200_000, b"\xc0"), id="maps"),
        pytest.param(body(b"\x07", b"\xc0", b"\x91" * 200_000, b"\x91\xc0", b"\xc0"), id="keys"),
    ],
)
def test_deep_nesting_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptData):
        records.decode(data)


HUGE = b"\xff\xff\xff\xff"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(body(b"\x07", b"\xc0", b"\xdd" + HUGE), id="keys"),
        pytest.param(body(b"\x07", b"\xdd" + HUGE), id="offsets"),
        pytest.param(body(b"\x07", b"\xc0", b"\x91\xc0", b"\xdd" + HUGE), id="values"),
        pytest.param(body(b"\x07", b"\xc0", b"\x91\xc0", b"\x91\xdf" + HUGE), id="map in a value"),
        pytest.param(body(b"\x07", b"\xc0", b"\x91\xc0", b"\x91\xdb" + HUGE), id="str"),
        pytest.param(body(b"\x07", b"\xc0", b"\x91\xc0", b"\x91\xc6" + HUGE), id="bin"),
        pytest.param(body(b"\x07", b"\xc0", b"\x91\xc0", b"\x91\xc9" + HUGE + b"\x01"), id="ext"),
        pytest.param(b"\1\0\0\1\xdd" + HUGE, id="body"),
    ],
)
def test_huge_claimed_lengths_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptData):
        records.decode(data)


@pytest.mark.parametrize(
    ("header", "says"),
    [(b"\0\0\0\1", "version 0"), (b"\2\0\0\1", "version 2"), (b"\1\3\0\1", "flags 3"), (b"\1\x08\0\1", "flags 8")],
)
def test_unknown_version_or_flags(header: bytes, says: str) -> None:
    with pytest.raises(CorruptData, match=says):
        records.decode(header + GOLDEN_PLAIN[4:])


ONE, TWO, NIL = b"\x91\xc0", b"\x92\xc0\xc0", b"\xc0"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(body(b"\x07", NIL, ONE, ONE, NIL, count=2), id="header says more"),
        pytest.param(body(b"\x07", NIL, TWO, TWO, NIL), id="header says fewer"),
        pytest.param(body(b"\x07", NIL, b"\x90", b"\x90", NIL, count=0), id="none"),
        pytest.param(body(b"\x07", NIL, TWO, ONE, NIL, count=2), id="a value is missing"),
        pytest.param(body(b"\x07", NIL, ONE, TWO, NIL), id="a value too many"),
        pytest.param(body(b"\x07", b"\x91\x00", TWO, TWO, NIL, count=2), id="an offset is missing"),
        pytest.param(body(b"\x07", b"\x90", ONE, ONE, NIL), id="no offsets in a list of offsets"),
        pytest.param(body(b"\x07", NIL, TWO, TWO, ONE, count=2), id="headers are missing"),
        pytest.param(body(b"\x07", NIL, ONE, ONE, TWO), id="headers too many"),
    ],
)
def test_counts_that_disagree(data: bytes) -> None:
    with pytest.raises(CorruptData, match="other lengths"):
        records.decode(data)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(body(b"\x07", NIL, b"\x91\x05", ONE, NIL), id="key is a number"),
        pytest.param(body(b"\x07", NIL, b"\x91\x90", ONE, NIL), id="key is a list"),
        pytest.param(body(b"\x07", NIL, ONE, ONE, b"\x91\x81\xa1a\x05"), id="header value is a number"),
        pytest.param(body(b"\x07", NIL, ONE, ONE, b"\x91\x81\xa1a\xc0"), id="header value is nil"),
        pytest.param(body(b"\x07", NIL, ONE, ONE, b"\x91\x81\x05\xa1a"), id="header name is a number"),
        pytest.param(body(b"\xa1a", NIL, ONE, ONE, NIL), id="base is text"),
        pytest.param(body(b"\x07", b"\x91\xa1a", ONE, ONE, NIL), id="offset is text"),
        pytest.param(body(b"\x07", NIL, ONE, b"\x91\xa1\xff", NIL), id="text is not UTF-8"),
    ],
)
def test_parts_of_the_wrong_type(data: bytes) -> None:
    with pytest.raises(CorruptData):
        records.decode(data)


@given(batches(), st.binary(max_size=4), st.integers(0, 255))
def test_count_of_says_what_decode_returns(batch: RecordBatch, junk: bytes, version: int) -> None:
    raw = packed(batch)
    assert records.count_of(raw) == len(records.decode(raw).keys)
    if version != records.VERSION:
        assert records.count_of(bytes((version,)) + raw[1:]) == 1
    assert records.count_of(junk[:3]) == 1
    assert records.count_of(b"\1\0\0\0" + junk) == 1
    # A body that is damaged behind a sound header was appended with that count.
    assert records.count_of(raw[:4] + junk) == len(batch.keys)


RECURSIVE: list[Any] = []
RECURSIVE.append(RECURSIVE)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(object(), id="object"),
        pytest.param(2**70, id="2**70"),
        pytest.param(-(2**70), id="-2**70"),
        pytest.param("\ud800", id="surrogate"),
        pytest.param({"a": ["\ud800"]}, id="surrogate inside"),
        pytest.param({"\udfff": 1}, id="surrogate in a name"),
        pytest.param([object()], id="object inside"),
        pytest.param(RECURSIVE, id="recursive"),
        pytest.param(lambda: None, id="function"),
    ],
)
def test_values_that_cannot_be_carried(value: object) -> None:
    with pytest.raises(InvalidValue, match="send bytes"):
        records.pack_value(value)


@given(NESTED)
def test_a_packed_value_no_longer_changes(value: Any) -> None:
    box = {"inside": [value]}
    ready = records.pack_value(box)
    box["inside"].append("later")
    raw = records.encode(RecordBatch(0, None, [None], [ready], None))
    assert records.decode(raw).values == [{"inside": [value]}]


@given(NESTED | TEXT)
@example("\U0001f600" * 100)
def test_value_bytes_is_the_size_in_the_batch(value: Any) -> None:
    ready = records.pack_value(value)
    alone = len(records.encode(RecordBatch(0, None, [None], [ready], None))) - len(GOLDEN_PLAIN) + 2
    assert 0 <= alone - records.value_bytes(ready) <= 5


@given(st.dictionaries(TEXT, TEXT | st.binary()))
def test_sound_headers(headers: dict[str, str | bytes]) -> None:
    assert records.check_headers(headers) is headers


@pytest.mark.parametrize(
    "headers",
    [None, 5, "a=b", [("a", "b")], {"a": 1}, {1: "a"}, {b"a": "b"}, {"a": None}, {"a": "\ud800"}, {"\ud800": "a"}],
)
def test_headers_that_cannot_be_carried(headers: object) -> None:
    with pytest.raises(InvalidValue):
        records.check_headers(headers)


def test_the_value_of_another_clients_entry() -> None:
    assert records.foreign_value([b"a", b"1", b"\xff", b"2", b"a", b"3"]) == {"a": b"3", b"\xff": b"2"}


def test_a_typed_struct_travels_as_a_map() -> None:
    class Order(msgspec.Struct):
        sku: int

    raw = records.encode(RecordBatch(0, None, ["k"], [records.pack_value(Order(7))], None))
    assert records.decode(raw).values == [{"sku": 7}]
