"""What a session makes of the entries it receives: messages, dead letters, progress; and the bits of progress."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core import records
from shardq.core.message import Message, Ownership
from shardq.core.session import Entry, Session, dead_letter, pack_progress, unpack_progress


def batch_bytes(count: int) -> bytes:
    return records.encode(records.RecordBatch(7, None, ["k"] * count, [b"v"] * count, None))


def new_session() -> Session:
    return Session(Ownership("q", "g", 3, 5, "nonce"), 0, dead_letter)


def receive(session: Session, entries: list[Entry], progress: list[bytes] | None = None) -> list[list[Message]]:
    step = session.next_step(10)
    session.applied(step)
    return session.receive(step, entries, progress or [])


def ours(raw: bytes) -> list[bytes]:
    return [b"at", b"0", b"batch", raw]


def test_messages_carry_what_was_sent() -> None:
    raw = records.encode(records.RecordBatch(50, [0, 9], ["k", None], [b"v", "w"], [None, {"h": "x"}]))
    session = new_session()
    ((one, other),) = receive(session, [(b"7-1", ours(raw))])
    assert (one.key, one.value, one.headers, one.sent_at_ms, one.id) == ("k", b"v", None, 50, "3/7-1/0")
    assert (other.key, other.value, other.headers, other.sent_at_ms, other.id) == (None, "w", {"h": "x"}, 59, "3/7-1/1")
    assert (one.queue, one.group, one.shard, one.fence, one.attempt) == ("q", "g", 3, 5, 1)


def test_another_clients_entry_is_one_message() -> None:
    ((message,),) = receive(new_session(), [(b"7-1", [b"name", b"Ann", b"at", b"0"])])
    assert (message.key, message.value, message.sent_at_ms) == (None, {"name": b"Ann", "at": b"0"}, 0)


def test_a_broken_entry_is_one_dead_letter_with_its_bytes() -> None:
    session = new_session()
    raw = b"\1\0\0\5" + b"\xc1"
    assert receive(session, [(b"7-1", ours(raw))]) == []
    step = session.next_step(0)
    ((count, letter),) = step.dead
    assert count == 5
    assert [batch.entry for batch in step.finished] == ["7-1"]
    decoded = msgspec.msgpack.decode(letter)
    assert decoded["entry"] == "7-1"
    assert decoded["raw"] == raw
    assert "does not decode" in decoded["error"]


def test_a_deleted_entry_is_set_aside() -> None:
    session = new_session()
    assert receive(session, [(b"7-1", [])]) == []
    step = session.next_step(0)
    assert [batch.entry for batch in step.finished] == ["7-1"]
    ((count, letter),) = step.dead
    assert (count, msgspec.msgpack.decode(letter)["error"]) == (1, "the entry was deleted while it was pending")


def test_progress_of_a_predecessor_is_skipped() -> None:
    session = new_session()
    ((one,),) = receive(session, [(b"7-1", ours(batch_bytes(3)))], [pack_progress(bytearray([1, 0, 1]))])
    assert one.index == 1
    session.finish(one)
    step = session.next_step(0)
    assert (step.acked, [batch.entry for batch in step.finished], step.partial) == (1, ["7-1"], [])


def test_a_step_keeps_its_content_until_it_is_answered() -> None:
    session = new_session()
    ((one, other),) = receive(session, [(b"7-1", ours(batch_bytes(2)))])
    session.finish(one)
    step = session.next_step(0)
    assert (step.acked, step.finished, [progress for _, progress in step.partial]) == (1, [], [b"\1"])
    session.finish(other)
    assert (step.acked, step.finished, [progress for _, progress in step.partial]) == (1, [], [b"\1"])
    assert session.next_step(0).number == step.number + 1


@given(st.integers(0, 5000), st.floats(1, 1000), st.just(0.0) | st.floats(1, 1e7), st.integers(1, 5000))
def test_entries_wanted_stays_in_its_bounds(held: int, messages: float, size: float, most: int) -> None:
    session = new_session()
    session.outstanding, session.messages_per_entry, session.bytes_per_entry = held, messages, size
    wanted = session.entries_wanted(most)
    assert (wanted == 0) == (held >= most)
    assert wanted <= 500


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
