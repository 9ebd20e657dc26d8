"""Dead letters out of stored bytes, whatever these are; which ones a filter means; what a replay hands back, in which
order."""

from __future__ import annotations

import tracemalloc
from datetime import UTC
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardq.core import records
from shardq.core.dead import DeadFilter, DeadLetter, in_order, job_again, kept_again, open_letter, parse_dead_id
from shardq.core.intake import dead_letter, open_kept
from shardq.core.jobs import JobState, decode_state
from shardq.core.later import key_tag
from shardq.core.message import Ownership
from shardq.core.records import RecordBatch
from shardq.errors import CorruptData, UsageError

ENTRY = "1795231414661-3"
FIELDS = ("id", "key", "value", "headers", "sent_at_ms", "attempts", "failed_at_ms", "error", "traceback", "raw")
# Goes with the mending of core/dead.py that these tests ask for.
OWNER = Ownership("orders", "billing", 4, 1, "n")

keys = st.none() | st.text() | st.binary()
headers = st.none() | st.dictionaries(st.text(), st.text() | st.binary(), max_size=3)
anything: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary()
    | st.datetimes(timezones=st.just(UTC))
    | st.builds(msgspec.msgpack.Ext, st.integers(0, 127), st.binary(max_size=8)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4) | st.integers(-9, 9) | st.binary(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
u64 = st.integers(0, 2**64 - 1)


def stored(record: Any, count: bytes = b"1") -> list[bytes]:
    """The fields of a dead letter."""
    return [b"count", count, b"record", msgspec.msgpack.encode(record)]


def letter(**fields: Any) -> DeadLetter:
    """A dead letter as it would be read."""
    record = {"id": f"4/{ENTRY}/2", "key": "k", "value": 1, "failed_at_ms": 10_000, **fields}
    return open_letter(4, ENTRY, stored(record))


# -- opening -----------------------------------------------------------------------------------------------------------


def test_every_field_of_a_message() -> None:
    record = {
        "id": "4/1-2/3",
        "key": b"\xff",
        "value": {"n": [1, None]},
        "headers": {"trace": "x", "raw": b"\x00"},
        "sent_at_ms": 1000,
        "attempts": 3,
        "failed_at_ms": 2000,
        "error": "ValueError('no')",
        "traceback": "Traceback ...",
    }
    found = open_letter(4, ENTRY, stored(record))
    rest = {name: value for name, value in record.items() if name != "id"}
    assert found == DeadLetter(id=f"4/{ENTRY}", shard=4, message_id="4/1-2/3", messages=1, **rest)  # type: ignore[arg-type]


def test_an_entry_that_could_not_be_read() -> None:
    found = open_letter(4, ENTRY, [b"count", b"7", b"record", dead_letter("1-2", None, b"\x00bad", "too short")])
    assert (found.messages, found.raw, found.error, found.message_id) == (7, b"\x00bad", "too short", "")
    assert (found.key, found.value, found.attempts, found.failed_at_ms) == (None, None, 0, 1795231414661)
    assert found.entry == "1-2"
    assert open_letter(4, ENTRY, [b"record", dead_letter("", None, b"", "")]).entry == ""


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "does not decode"),
        (b"\xc1", "does not decode"),
        (b"\xa1\xff", "does not decode"),
        (b"\x80\x80", "does not decode"),
        (b"\x81\x80\x01", "does not decode"),
        (b"\x91" * 100_000, "does not decode"),
        (b"\xc0", "is not a map"),
        (b"\x91\x01", "is not a map"),
    ],
    ids=lambda value: value[:4].hex() if isinstance(value, bytes) else "",
)
def test_a_letter_that_can_not_be_read_itself_says_so_and_keeps_its_bytes(raw: bytes, says: str) -> None:
    found = open_letter(4, ENTRY, [b"count", b"2", b"record", raw])
    assert says in found.error
    assert (found.messages, found.raw, found.failed_at_ms) == (2, raw, 1795231414661)


@pytest.mark.parametrize(
    "count",
    [
        b"",
        b"x",
        b"-1",
        b"1.5",
        b"\xd9\xa3",
        b" 1",
        None,
        b"9" * 5000,
        b"9007199254740992",
    ],
)
def test_a_count_that_is_none_is_one(count: bytes | None) -> None:
    fields = stored({}, count) if count is not None else stored({})[2:]
    assert open_letter(4, ENTRY, fields).messages == 1


def check_sound(found: DeadLetter, entry: str) -> None:
    """Whatever was stored: a letter that can be listed, shown, chosen and sorted, and replayed or refused."""
    assert found.id == f"4/{entry}"
    assert 0 <= found.messages < 2**53
    assert all(type(text) is str for text in (found.message_id, found.error, found.traceback))
    assert all(type(number) is int for number in (found.messages, found.attempts, found.sent_at_ms, found.failed_at_ms))
    assert isinstance(found.key, (str, bytes, type(None)))
    assert isinstance(found.headers, (dict, type(None)))
    assert type(found.raw) is bytes
    DeadFilter(key="k", error="x", older_than_s=1.0, newer_than_s=5.0).takes(found, 10**13)
    assert in_order([found]) == [found]
    try:
        handed = kept_again(found)
    except CorruptData:
        return
    for _, record in handed:  # what is handed back can be handled
        open_kept(OWNER, 1, record)


@given(st.lists(st.binary() | st.sampled_from([b"count", b"record", b"\x80", b"1"]), max_size=6), u64, u64)
def test_no_bytes_raise(fields: list[bytes], ms: int, seq: int) -> None:
    check_sound(open_letter(4, f"{ms}-{seq}", fields), f"{ms}-{seq}")


@settings(max_examples=100)
@given(
    st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), anything, max_size=8),
    st.binary(max_size=4) | u64.map(lambda number: str(number).encode()),
)
def test_no_fields_raise(record: dict[str, Any], count: bytes) -> None:
    check_sound(open_letter(4, ENTRY, stored(record, count)), ENTRY)


@given(st.binary(max_size=200), st.integers(0, 200), st.binary(min_size=1, max_size=4))
def test_no_damage_raises(value: bytes, at: int, damage: bytes) -> None:
    whole = stored({"id": f"4/{ENTRY}/0", "key": "k", "value": value, "headers": {"a": "b"}, "sent_at_ms": 1})[3]
    broken = whole[:at] + damage + whole[at + len(damage) :]
    check_sound(open_letter(4, ENTRY, [b"count", b"1", b"record", broken]), ENTRY)


@pytest.mark.parametrize("claim", [b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"], ids=bytes.hex)
def test_a_length_that_is_only_claimed_takes_no_memory(claim: bytes) -> None:
    record = b"\x81\xa5value" + claim + b"\xff\xff\xff\xff" + b"\x01" * 16
    tracemalloc.start()
    try:
        assert "does not decode" in open_letter(4, ENTRY, [b"count", b"1", b"record", record]).error
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


# -- ids ---------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 16383), u64, u64)
def test_an_id_is_read_back(shard: int, ms: int, seq: int) -> None:
    found = open_letter(shard, f"{ms}-{seq}", [])
    assert parse_dead_id(found.id) == (shard, f"{ms}-{seq}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0/1",
        "1-0",
        "0/1-0/0",
        "0/1-0\n",
        "-1/1-0",
        "01/1-0",
        "0/1-" + "9" * 5000,
        "0/x-0",
        "0/\u0661-0",
        "0/99999999999999999999-0",
        None,
        5,
    ],
    ids=lambda text: repr(text)[:20],
)
def test_what_is_no_id(text: Any) -> None:
    with pytest.raises(UsageError, match="is not the id of a dead letter") as refused:
        parse_dead_id(text)
    assert "\n" not in str(refused.value)


# -- filters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "takes"),
    [
        (DeadFilter(), True),
        (DeadFilter(key="k"), True),
        (DeadFilter(key=b"k"), True),
        (DeadFilter(key="K"), False),
        (DeadFilter(key=""), False),
        (DeadFilter(error="timeout"), True),
        (DeadFilter(error="TIME"), True),
        (DeadFilter(error="time out"), False),
        (DeadFilter(older_than_s=4.9), True),
        (DeadFilter(older_than_s=5), False),
        (DeadFilter(newer_than_s=5.1), True),
        (DeadFilter(newer_than_s=5), False),
        (DeadFilter(older_than_s=4, newer_than_s=6), True),
        (DeadFilter(older_than_s=6, newer_than_s=4), False),
        (DeadFilter(key="k", error="other"), False),
        (DeadFilter(key="other", error="timeout"), False),
    ],
    ids=str,
)
def test_a_filter_takes_what_fits_everything(wanted: DeadFilter, takes: bool) -> None:
    assert wanted.takes(letter(key="k", error="Timeout()", failed_at_ms=10_000), 15_000) is takes


@pytest.mark.parametrize(
    ("of_letter", "wanted", "takes"),
    [
        (None, "", False),
        ("", "", True),
        ("", b"", True),
        (b"\xff", b"\xff", True),
        (b"\xff", "\xff", False),
        (None, None, True),
    ],
    ids=repr,
)
def test_keys_are_compared_by_their_bytes(of_letter: Any, wanted: Any, takes: bool) -> None:
    assert DeadFilter(key=wanted).takes(letter(key=of_letter), 0) is takes


def test_one_from_the_future_is_new() -> None:
    assert DeadFilter(newer_than_s=1).takes(letter(failed_at_ms=10**15), 0)
    assert not DeadFilter(older_than_s=0).takes(letter(failed_at_ms=10**15), 0)


# -- replay ------------------------------------------------------------------------------------------------------------


@given(keys, anything, headers, st.integers(-(2**62), 2**62), st.integers(1, 99), u64, u64, st.integers(0, 65534))
def test_a_message_is_handed_back_as_it_was_its_tries_counted_anew(
    key: Any, value: Any, own: Any, sent: int, attempts: int, ms: int, seq: int, index: int
) -> None:
    name = f"4/{ms}-{seq}/{index}"
    dead = letter(id=name, key=key, value=value, headers=own, sent_at_ms=sent, attempts=attempts, error="no")
    ((tag, record),) = kept_again(dead)
    message, error = open_kept(OWNER, 1, record)
    assert tag == key_tag(key)
    assert (message.id, message.key, message.headers or None) == (name, key, own or None)
    assert (message.sent_at_ms, message.attempt, error) == (sent, 1, "")
    assert msgspec.msgpack.encode(message.value) == msgspec.msgpack.encode(value)


def batch(*values: Any, **columns: Any) -> bytes:
    packed = [records.pack_value(value) for value in values]
    return records.encode(RecordBatch(1000, None, [None] * len(values), packed, None)._replace(**columns))


def test_all_messages_of_an_entry_that_can_be_read_now_are_handed_back() -> None:
    raw = batch("a", b"b", {"n": 3}, keys=["k", b"\xff", None], offsets_ms=[0, -3, 5], headers=[None, {"t": "x"}, None])
    handed = kept_again(open_letter(4, ENTRY, stored({"raw": raw, "error": "an old reader"}, b"3")))
    found = [open_kept(OWNER, 1, record)[0] for _, record in handed]
    assert [tag for tag, _ in handed] == [b"kk", b"k\xff", b""]
    assert [(each.key, each.value, each.headers, each.sent_at_ms, each.attempt) for each in found] == [
        ("k", "a", None, 1000, 1),
        (b"\xff", b"b", {"t": "x"}, 997, 1),
        (None, {"n": 3}, None, 1005, 1),
    ]
    assert [each.id for each in found] == [f"4/{ENTRY}/{index}" for index in range(3)]


def test_messages_of_an_entry_keep_their_ids() -> None:
    record = dead_letter("1-2", None, batch("a", "b"), "an old reader")
    handed = kept_again(open_letter(4, ENTRY, [b"count", b"2", b"record", record]))
    assert [open_kept(OWNER, 1, kept)[0].id for _, kept in handed] == ["4/1-2/0", "4/1-2/1"]


def test_messages_deleted_from_it_are_not() -> None:
    whole = records.decode(batch("a", "b", "c"))
    raw = records.encode(records.without(records.without(whole, 0), 2))
    handed = kept_again(open_letter(4, ENTRY, stored({"raw": raw}, b"3")))
    assert [open_kept(OWNER, 1, record)[0].value for _, record in handed] == ["b"]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"raw": b"\x09\x00\x00\x01", "error": "no"}, "version 9"),
        ({"raw": b"\x01", "error": "no"}, "no header"),
        ({"error": "its record is empty"}, "nothing that could be handled: its record is empty"),
        ({}, "nothing that could be handled: its message is gone"),
        ([1], "version|no header"),
    ],
)
def test_what_still_can_not_be_read_is_not_handed_back(record: Any, says: str) -> None:
    with pytest.raises(CorruptData, match=says):
        kept_again(open_letter(4, ENTRY, stored(record)))


BROKEN: list[dict[str, Any]] = [
    {"id": "nonsense"},
    {"id": "4/1-0/" + "9" * 5000},
    {"id": "4/99999999999999999999-0/1"},
    {"headers": {"trace": 5}},
    {"headers": {7: "x"}},
    {"headers": []},
    {"key": 5},
]


@pytest.mark.parametrize("fields", BROKEN, ids=lambda fields: str(fields)[:30])
def test_what_no_worker_could_handle_is_not_handed_back(fields: dict[str, Any]) -> None:
    broken = letter(**fields)
    with pytest.raises(CorruptData):
        kept_again(broken)
    assert len(in_order([broken, letter()])) == 2, "the others go on"


# -- order -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(u64, u64, st.integers(0, 999)), unique=True, max_size=20), st.randoms())
def test_letters_are_replayed_in_the_order_their_messages_were_appended(
    places: list[tuple[int, int, int]], chance: Any
) -> None:
    shuffled = list(places)
    chance.shuffle(shuffled)
    letters = [letter(id=f"4/{ms}-{seq}/{index}") for ms, seq, index in shuffled]
    assert [found.message_id for found in in_order(letters)] == [
        f"4/{ms}-{seq}/{index}" for ms, seq, index in sorted(places)
    ]


def test_one_without_a_message_has_the_place_of_its_entry() -> None:
    early, late = letter(id="4/1-0/0"), letter(id="4/1795231414662-0/0")
    unread = open_letter(4, ENTRY, stored({"entry": "1-5", "raw": b"\x00"}))
    unknown = open_letter(4, ENTRY, stored({"raw": b"\x00"}))
    assert in_order([late, unknown, unread, early]) == [early, unread, unknown, late]


def test_a_replay_says_of_a_job_that_it_waits_for_a_try() -> None:
    headers = {"shardq-job": "orders/3/0123456789abcdef", "shardq-job-keep-ms": "5000"}
    letter = DeadLetter("3/1-1", 3, "3/1-1/0", "k", 1, headers, 1, 4, 100, 200, "ValueError('no')", "")
    again = job_again(letter, "g", 777)
    assert again is not None
    assert again[:2] == ("orders/3/0123456789abcdef", 5000)
    state = JobState(again[0], "retrying", "orders", "g", 4, 100, 777, error="ValueError('no')")
    assert decode_state(again[2]) == state
    for other in (None, {}, {"shardq-job": "x"}, {**headers, "shardq-job": "forged"}):
        assert job_again(msgspec.structs.replace(letter, headers=other), "g", 777) is None
    assert job_again(msgspec.structs.replace(letter, message_id=""), "g", 777) is None
