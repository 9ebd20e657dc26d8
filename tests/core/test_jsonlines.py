"""Records as lines of JSON: the exact form is read back as it was, the readable one is always JSON."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core.history import Record
from shardq.core.jsonlines import exact, read_exact, readable, readable_value
from shardq.errors import CorruptData

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(["$utf8", "$", "$base64"])
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats()
TIMES = st.datetimes(timezones=st.just(UTC))
PLAIN = st.none() | st.booleans() | NUMBERS | TEXT | st.binary(max_size=8) | TIMES
NAMES = TEXT | st.integers(0, 9) | st.binary(max_size=3) | st.none()
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner), max_leaves=12)
KEYS = st.none() | TEXT | st.binary(max_size=8)
HEADERS = st.none() | st.dictionaries(TEXT, TEXT | st.binary(max_size=8), max_size=3)


def stored(value: Any, key: Any = None, headers: Any = None) -> Record:
    """A record with the value as it comes out of msgpack."""
    carried = msgspec.msgpack.decode(msgspec.msgpack.encode(value))
    return Record("3/1795231414661-0/7", 3, key, carried, headers, 5, 1795231414661)


@given(VALUES, KEYS, HEADERS)
def test_the_exact_form_is_read_back_as_it_was(value: Any, key: Any, headers: Any) -> None:
    record = stored(value, key, headers)
    line = exact(record)
    assert b"\n" not in line
    assert b"\r" not in line
    assert repr(read_exact(line)) == repr(record)  # repr: NaN is not equal to itself


@given(VALUES, KEYS, HEADERS)
def test_the_readable_form_is_always_json(value: Any, key: Any, headers: Any) -> None:
    printed = json.dumps(readable(stored(value, key, headers)), allow_nan=False)
    assert json.loads(printed)["id"] == "3/1795231414661-0/7"


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("text", '"text"'),
        (b"text", '{"$utf8":"text"}'),
        (b"\x00\x01\xff", '{"$base64":"AAH/"}'),
        ({"a": [1, None, True, 2.5]}, '{"a":[1,null,true,2.5]}'),
        ({1: "x"}, '{"$msgpack":"gQGheA=="}'),
        ({"$utf8": "x"}, '{"$msgpack":"gaUkdXRmOKF4"}'),
        ({"nan": math.nan}, '{"nan":{"$msgpack":"y3/4AAAAAAAA"}}'),
    ],
)
def test_how_the_exact_form_looks(value: Any, line: str) -> None:
    assert exact(stored(value)).decode().endswith(f'"key":null,"headers":null,"value":{line}}}')


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b"text", "text"),
        (b"\x00\x01\xff", {"$base64": "AAH/"}),
        ({1: b"x", b"k": "v", None: 0, "$set": 1}, {"1": "x", "k": "v", "null": 0, "$set": 1}),
        ([math.nan, -math.inf], ["nan", "-inf"]),
        (datetime(2026, 7, 27, tzinfo=UTC), "2026-07-27 00:00:00+00:00"),
        (msgspec.msgpack.Ext(5, b"x"), {"$msgpack": "1AV4"}),
    ],
)
def test_how_the_readable_form_looks(value: Any, shown: Any) -> None:
    assert readable_value(value) == shown


def test_an_extension_is_read_back() -> None:
    (ext,) = read_exact(exact(stored([msgspec.msgpack.Ext(5, b"x")]))).value
    assert (ext.code, bytes(ext.data)) == (5, b"x")


def test_nesting_as_deep_as_msgpack_carries_it() -> None:
    value: Any = None
    for _ in range(700):
        value = [value]
    assert read_exact(exact(stored(value))).value == value
    json.dumps(readable(stored(value)))


def test_what_can_not_be_read_says_why() -> None:
    broken = Record("0/1-0/0", 0, None, b"\xff", None, 0, 1, "it does not decode")
    assert readable(broken)["error"] == "it does not decode"
    assert "error" not in readable(stored(1))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"{}",
        b'{"id":"nonsense","key":null,"headers":null,"value":1,"sent_at_ms":1,"stored_at_ms":1}',
        b'{"id":"0/1-0/0","key":{"$new":"x"},"headers":null,"value":1,"sent_at_ms":1,"stored_at_ms":1}',
        b'{"id":"0/1-0/0","key":{"$base64":"!"},"headers":null,"value":1,"sent_at_ms":1,"stored_at_ms":1}',
        b'{"id":"0/1-0/0","key":{"$msgpack":"wQ=="},"headers":null,"value":1,"sent_at_ms":1,"stored_at_ms":1}',
        b'{"id":"0/1-0/0","key":{"$utf8":5},"headers":null,"value":1,"sent_at_ms":1,"stored_at_ms":1}',
        b"\xff",
    ],
)
def test_any_other_line_is_corrupt(line: bytes) -> None:
    with pytest.raises(CorruptData, match="not one of an archive's"):
        read_exact(line)
