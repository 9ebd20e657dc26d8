"""From entries and kept records to messages and back: round trips, untrusted bytes, values as they were stored."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core import records
from shardq.core.intake import (
    KeptRecord,
    build_messages,
    dead_letter,
    is_batch,
    keep,
    open_kept,
    pack_progress,
    pristine_value,
    restore_value,
    unpack_progress,
)
from shardq.core.message import Batch, Message, Ownership
from shardq.core.records import Key
from shardq.errors import CorruptData

OWNER = Ownership("q", "g", 3, 5, "nonce")
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
KEYS = st.none() | TEXT | st.binary()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | TEXT | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
HEADERS = st.none() | st.dictionaries(TEXT, TEXT | st.binary(), max_size=3)


@given(KEYS, VALUES, HEADERS, st.integers(0, 2**63 - 1), st.integers(0, 65_534), st.integers(1, 2**31), TEXT)
def test_a_kept_record_comes_back(
    key: Key, value: Any, headers: Any, sent: int, index: int, attempt: int, error: str
) -> None:
    message = Message(key, "not this", headers, sent, index, Batch(OWNER, "7-1", index + 1), 99)
    opened, said = open_kept(OWNER, 12, keep(message, value, attempt, error))
    assert (opened.key, opened.value, opened.sent_at_ms, opened.attempt, said) == (key, value, sent, attempt, error)
    assert (opened.headers or None) == (headers or None)
    assert (opened.id, opened.batch.item, opened.batch.count) == (message.id, 12, 1)
    assert pristine_value(opened) == value
    again, _ = open_kept(OWNER, 12, keep(opened, pristine_value(opened), attempt, error))
    assert (again.value, again.id) == (value, message.id)


def record(**changes: Any) -> bytes:
    whole = {"entry": "7-1", "index": 0, "key": "k", "value": 1, "headers": None, "sent_at_ms": 7, "attempt": 1}
    return msgspec.msgpack.encode([*{**whole, **changes}.values(), "why"])


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        b"\x90",
        record()[:-1],
        record(entry=5),
        record(index=-1),
        record(index="0"),
        record(key=5),
        record(key=["k"]),
        record(headers=["h"]),
        record(headers={"h": 5}),
        record(headers={"h": None}),
        record(headers={5: "h"}),
        record(sent_at_ms=None),
        record(attempt=0),
        record(attempt=-5),
        record(value=msgspec.Raw(b"\x81\x80\x01")),  # a map that has a map for a key
        record(value=msgspec.Raw(b"\xc7\x0c\xff" + b"\xff" * 12)),  # a timestamp of no year
        record(value=msgspec.Raw(b"\xa1\xff")),  # text that is none
        record(value=msgspec.Raw(b"\x91" * 100_000 + b"\xc0")),
    ],
    ids=map(str, range(20)),
)
def test_broken_records(raw: bytes) -> None:
    with pytest.raises(CorruptData, match="a message that was put off"):
        open_kept(OWNER, 12, raw)


@given(st.binary(max_size=40) | st.binary(max_size=20).map(lambda tail: record()[:12] + tail))
def test_any_bytes_are_a_record_or_corrupt(raw: bytes) -> None:
    try:
        message, error = open_kept(OWNER, 12, raw)
    except CorruptData:
        return
    assert open_kept(OWNER, 12, keep(message, message.value, message.attempt, error))


@given(st.integers(0, 60), st.binary(min_size=1, max_size=3))
def test_mutated_records_are_records_or_corrupt(place: int, patch: bytes) -> None:
    raw = bytearray(record(value={"a": [1, 2, "x"]}, headers={"h": b"x"}))
    raw[place : place + len(patch)] = patch
    try:
        message, error = open_kept(OWNER, 12, bytes(raw))
    except CorruptData:
        return
    assert keep(message, message.value, message.attempt, error)


# -- values as they were stored ------------------------------------------------------------------------------


def batch_of(values: list[Any]) -> list[Message]:
    raw = records.encode(records.RecordBatch(7, None, ["k"] * len(values), values, None))
    return build_messages(records.decode(raw), Batch(OWNER, "7-1", len(values), raw))


def scribble(message: Message) -> None:
    if isinstance(message.value, dict):
        message.value["scribble"] = 1
        for inner in message.value.values():
            if isinstance(inner, list):
                inner.append("scribble")
    else:
        message.value = "scribble"


def test_a_value_is_pristine_after_a_handler_changed_it() -> None:
    values = [{"a": [1, 2]}, "text", {"b": 1}]
    messages = batch_of(values)
    for message in messages:
        scribble(message)
    assert [pristine_value(message) for message in messages] == values


def test_a_kept_value_is_pristine_after_a_handler_changed_it() -> None:
    for value in ({"a": [1]}, "text"):
        message, _ = open_kept(OWNER, 12, record(value=value))
        scribble(message)
        assert pristine_value(message) == value


def test_a_restored_value_may_be_changed_again() -> None:
    messages = batch_of([{"a": [1, 2]}, {"a": [3]}])
    for _ in range(3):
        for message in messages:
            scribble(message)
            restore_value(message)
        assert [message.value for message in messages] == [{"a": [1, 2]}, {"a": [3]}]
    kept, _ = open_kept(OWNER, 12, record(value={"a": [1]}))
    scribble(kept)
    restore_value(kept)
    assert kept.value == {"a": [1]}


def test_a_message_without_what_it_was_read_from_has_the_value_it_has() -> None:
    assert pristine_value(Message("k", 5, None, 7, 0, Batch(OWNER, "7-1", 1))) == 5


def test_a_compressed_batch_is_read_again() -> None:
    raw = records.encode(records.RecordBatch(7, None, ["k"], [{"a": "x" * 5000}], None), "zlib")
    (message,) = build_messages(records.decode(raw), Batch(OWNER, "7-1", 1, raw))
    scribble(message)
    assert pristine_value(message) == {"a": "x" * 5000}


# -- batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "offsets", "fits"),
    [
        (50, [0, 9], True),
        (50, [0, -90], True),
        (2**63 - 1, [0, 0], True),
        (2**63, [0, 0], False),
        (50, [0, 2**63], False),
    ],
)
def test_times_that_could_not_be_written_again_are_corrupt(base: int, offsets: list[int], fits: bool) -> None:
    decoded = records.RecordBatch(base, offsets, ["k"] * 2, [b"v"] * 2, None)
    if not fits:
        with pytest.raises(CorruptData, match="holds times beyond"):
            build_messages(decoded, Batch(OWNER, "7-1", 2))
        return
    messages = build_messages(decoded, Batch(OWNER, "7-1", 2))
    assert [message.sent_at_ms for message in messages] == [base + offset for offset in offsets]
    assert all(keep(message, message.value, 1, "") for message in messages)


@pytest.mark.parametrize(
    ("fields", "ours"),
    [
        ([b"at", b"0", b"batch", b""], True),
        ([b"at", b"0", b"batch", b"", b"more", b""], True),
        ([b"at", b"0", b"batch"], False),
        ([b"batch", b"", b"at", b"0"], False),
        ([b"at", b"0"], False),
        ([], False),
    ],
)
def test_which_entries_are_ours(fields: list[bytes], ours: bool) -> None:
    assert is_batch(fields) == ours


@given(st.binary(), st.text(st.characters(exclude_categories=["Cs"])))
def test_a_dead_letter_of_what_could_not_be_read(raw: bytes, error: str) -> None:
    letter = msgspec.msgpack.decode(dead_letter("7-1", None, raw, error))
    assert letter == {"entry": "7-1", "index": None, "raw": raw, "error": error}


def test_the_record_in_wire_form() -> None:
    message = Message("k", 1, {"h": b"x"}, 7, 2, Batch(OWNER, "7-1", 3))
    raw = keep(message, [1], 4, "why")
    assert msgspec.msgpack.decode(raw) == ["7-1", 2, "k", [1], {"h": b"x"}, 7, 4, "why"]
    assert msgspec.msgpack.decode(raw, type=KeptRecord).attempt == 4


# -- progress ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 1), min_size=1, max_size=100).map(bytearray))
def test_progress_round_trip(done: bytearray) -> None:
    packed = pack_progress(done)
    assert unpack_progress(packed, len(done)) == done
    assert len(packed) == (len(done) + 7) // 8


@pytest.mark.parametrize(
    ("done", "packed"),
    [([1], b"\x01"), ([0, 1], b"\x02"), ([0] * 8 + [1], b"\0\x01"), ([1] * 9, b"\xff\x01"), ([0] * 16, b"\0\0")],
)
def test_progress_is_one_bit_a_message_lowest_first(done: list[int], packed: bytes) -> None:
    assert pack_progress(bytearray(done)) == packed


@given(st.binary(max_size=5), st.integers(1, 40))
def test_progress_that_does_not_fit_is_no_progress(progress: bytes, count: int) -> None:
    done = unpack_progress(progress, count)
    assert len(done) == count
    if len(progress) != (count + 7) // 8:
        assert not any(done)
