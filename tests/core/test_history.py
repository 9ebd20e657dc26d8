"""Entries opened into records, the bounds of a part of the history, and shards merged into one order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core import records
from shardq.core.history import Entry, Merge, Position, Record, bounds, has_key, is_empty, open_entry, within
from shardq.core.ids import MessageId
from shardq.core.records import RecordBatch

ID = "1795231414661-7"


def ours(*values: Any, **columns: Any) -> list[bytes]:
    """The fields of an entry that holds these values, with columns of RecordBatch replaced."""
    packed = [records.pack_value(value) for value in values]
    batch = RecordBatch(1000, None, [None] * len(values), packed, None)
    return [b"at", b"0", b"batch", records.encode(batch._replace(**columns))]


# -- opening -----------------------------------------------------------------------------------------------------------


def test_a_batch_becomes_its_records() -> None:
    fields = ours("a", b"b", offsets_ms=[0, -3], keys=["k", b"\xff"], headers=[None, {"trace": b"x"}])
    assert open_entry(3, (ID, fields)) == [
        Record(f"3/{ID}/0", 3, "k", "a", None, 1000, 1795231414661),
        Record(f"3/{ID}/1", 3, b"\xff", b"b", {"trace": b"x"}, 997, 1795231414661),
    ]


def test_deleted_messages_leave_the_others_their_places() -> None:
    batch = RecordBatch(1000, None, ["a", "b", "c"], [1, 2, 3], None)
    fields = [b"at", b"0", b"batch", records.encode(records.without(records.without(batch, 0), 1))]
    assert [(record.id, record.value) for record in open_entry(3, (ID, fields))] == [(f"3/{ID}/2", 3)]


def test_another_clients_entry_is_a_map_of_its_fields() -> None:
    (record,) = open_entry(0, (ID, [b"name", b"value", b"\xff", b"x"]))
    assert record == Record(f"0/{ID}/0", 0, None, {"name": b"value", b"\xff": b"x"}, None, 0, 1795231414661)


@pytest.mark.parametrize(
    ("fields", "value", "says"),
    [
        ([b"at", b"0", b"batch", b"\x01\x00\x00\x01nonsense"], b"\x01\x00\x00\x01nonsense", "does not decode"),
        ([b"at", b"0", b"batch", b""], b"", "no header"),
        ([b"at", b"0", b"batch", b"\x09\x00\x00\x01"], b"\x09\x00\x00\x01", "version 9"),
        ([], b"", "do not come in pairs"),
        ([b"odd"], b"", "do not come in pairs"),
    ],
)
def test_a_broken_entry_is_a_record_that_says_so(fields: list[bytes], value: bytes, says: str) -> None:
    (record,) = open_entry(5, (ID, fields))
    assert (record.id, record.shard, record.key, record.value) == (f"5/{ID}/0", 5, None, value)
    assert record.error is not None
    assert says in record.error


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_no_fields_whatever_raise(fields: list[bytes]) -> None:
    assert open_entry(0, (ID, fields))
    assert open_entry(0, (ID, [b"at", b"0", b"batch", *fields]))


@pytest.mark.parametrize(
    ("own", "asked", "same"),
    [("k", b"k", True), (b"k", b"k", True), ("é", "é".encode(), True), ("k", b"j", False), (None, b"", False)],
    ids=["str", "bytes", "umlaut", "another", "none"],
)
def test_a_str_and_its_utf8_bytes_are_one_key(own: Any, asked: bytes, same: bool) -> None:
    assert has_key(Record("0/1-0/0", 0, own, None, None, 0, 1), asked) == same


# -- a part of it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "here", "there"),
    [
        (None, None, ("-", "+"), ("-", "+")),
        (5, 9, ("5", "9"), ("5", "9")),
        (MessageId(0, "5-3", 7), MessageId(0, "9-1", 0), ("5-3", "9-1"), ("5", "9")),
    ],
)
def test_a_message_id_is_exact_on_its_own_shard(
    start: Position, end: Position, here: tuple[str, str], there: tuple[str, str]
) -> None:
    assert bounds(0, start, end) == here
    assert bounds(1, start, end) == there


@pytest.mark.parametrize(
    ("lower", "upper", "empty"),
    [
        ("-", "0", False),
        ("7", "+", False),
        ("7", "7", False),
        ("7", "7-0", False),
        ("7-1", "7", False),
        ("7-1", "7-0", True),
        ("8", "7", True),
        ("7-5", "6", True),
    ],
)
def test_bounds_that_nothing_lies_between(lower: str, upper: str, empty: bool) -> None:
    assert is_empty(lower, upper) == empty


def test_within_an_entry_the_index_counts() -> None:
    found = open_entry(2, (ID, ours(*range(5))))

    def values(start: Position, end: Position) -> list[int]:
        return [record.value for record in within(found, start, end)]

    assert values(None, 10) == [0, 1, 2, 3, 4]
    assert values(MessageId(2, ID, 2), None) == [2, 3, 4]
    assert values(None, MessageId(2, ID, 2)) == [0, 1, 2]
    assert values(MessageId(2, ID, 1), MessageId(2, ID, 3)) == [1, 2, 3]
    assert values(MessageId(2, ID, 9), None) == []
    assert values(MessageId(3, ID, 2), MessageId(2, "9-9", 1)) == [0, 1, 2, 3, 4]
    assert within([], MessageId(2, ID, 2), None) == []


# -- the merge ---------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), unique=True, max_size=12), max_size=5),
    st.booleans(),
    st.data(),
)
def test_the_order_is_by_ms_sequence_and_shard(
    shards: list[list[tuple[int, int]]], reverse: bool, data: st.DataObject
) -> None:
    left = {shard: sorted(keys, reverse=reverse) for shard, keys in enumerate(shards)}
    wanted = sorted(((*key, shard) for shard, keys in left.items() for key in keys), reverse=reverse)
    merge, got = Merge(left, reverse=reverse), list[tuple[int, int, int]]()
    while merge.hungry:
        for shard in sorted(merge.hungry):
            size = data.draw(st.integers(1, 4))
            page, left[shard] = left[shard][:size], left[shard][size:]
            merge.feed(shard, entries(page), last=not left[shard])
        got += ((*map(int, entry[0].split("-")), shard) for shard, entry in merge.ready())  # type: ignore[misc]
    assert got == wanted


def entries(keys: Sequence[tuple[int, int]]) -> list[Entry]:
    return [(f"{ms}-{seq}", []) for ms, seq in keys]


def test_nothing_is_said_before_it_is_known() -> None:
    merge = Merge([0, 1])
    merge.feed(0, entries([(1, 0), (5, 0)]), last=False)
    assert list(merge.ready()) == []
    merge.feed(1, entries([(2, 0), (3, 0)]), last=True)
    assert [(shard, entry[0]) for shard, entry in merge.ready()] == [(0, "1-0"), (1, "2-0"), (1, "3-0"), (0, "5-0")]
    assert merge.hungry == {0}
    merge.feed(0, [], last=True)
    assert list(merge.ready()) == []
    assert not merge.hungry
