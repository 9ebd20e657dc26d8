"""What a session makes of the entries and records it receives, and what its steps carry; case by case."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core import budget, jobs, records
from shardq.core.appetite import FIRST_ROOM_BYTES, MAX_ENTRIES
from shardq.core.budget import Account, Budget
from shardq.core.effects import Effect
from shardq.core.intake import keep, pack_progress
from shardq.core.later import FATAL_GETS, SUSPECT_GETS, Later
from shardq.core.message import Batch, Message, Ownership
from shardq.core.records import Key
from shardq.core.session import Session
from shardq.core.step import FIRST, LEFT_NEW, LEFT_PENDING, NEW, Entry, Fetched

NO_ONE = Ownership("q", "g", 3, 5, "nonce")
JOB = "q/3/9f86d081884c7d65"


def batch_bytes(count: int) -> bytes:
    return records.encode(records.RecordBatch(7, None, ["k"] * count, [b"v"] * count, None))


def describe(message: Message, error: str) -> bytes:
    return msgspec.msgpack.encode({"id": message.id, "error": error})


def new_session(*, by_key: bool = True) -> Session:
    """One that knows that nothing is to be handled later."""
    session = Session(Ownership("q", "g", 3, 5, "nonce"), 0, Later(by_key=by_key), describe)
    receive(session, [])
    return session


def receive(
    session: Session,
    entries: list[Entry],
    progress: list[bytes] | None = None,
    *,
    items: list[bytes] | None = None,
    kept: list[bytes] | None = None,
) -> list[list[Message]]:
    """What a step brings; progress as the store tells it of entries that were delivered once."""
    step = session.next_step(10)
    session.applied(step)
    told = [b"1:" + bits for bits in progress or []]
    fetched = Fetched(entries, told, session.later.next_item + len(items or []), None, b"", 0, items or [], kept or [])
    return session.receive(step, fetched, 0.0)


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
    session.hand.finish(one)
    step = session.next_step(0)
    assert (step.acked, [batch.entry for batch in step.finished], step.partial) == (1, ["7-1"], [])


def test_a_step_keeps_its_content_until_it_is_answered() -> None:
    session = new_session()
    ((one, other),) = receive(session, [(b"7-1", ours(batch_bytes(2)))])
    session.hand.finish(one)
    step = session.next_step(0)
    assert (step.acked, step.finished, [progress for _, progress in step.partial]) == (1, [], [b"\1"])
    session.hand.finish(other)
    assert (step.acked, step.finished, [progress for _, progress in step.partial]) == (1, [], [b"\1"])
    assert session.next_step(0).number == step.number + 1


@given(st.integers(0, 5000), st.integers(1, 1000), st.integers(0, 10_000), st.integers(1, 5000))
def test_entries_wanted_stays_in_its_bounds(held: int, count: int, size: int, most: int) -> None:
    session = new_session()
    raw = records.encode(records.RecordBatch(7, None, [None] * count, [b"v" * size] + [b""] * (count - 1), None))
    receive(session, [(b"7-1", ours(raw))])
    session.hand.outstanding = held
    wanted = session.entries_wanted(most)
    assert (wanted == 0) == (held >= most)
    assert wanted <= MAX_ENTRIES


def test_pending_entries_are_asked_for_until_a_step_had_no_news_of_what_is_handled_later() -> None:
    session = Session(NO_ONE, 0, Later(by_key=True), describe)
    pages = [[b"%d:0:0:" % item for item in range(1, 1001)], [b"1500:0:0:"], []]
    for known, page in zip((0, 1000, 1500), pages, strict=True):
        step = session.next_step(session.entries_wanted(100), 100)
        assert (step.cursor, step.known, step.entries_max > 0) == (FIRST, known, True)
        assert step.full == (known < 1500)
        session.applied(step)
        left = LEFT_PENDING if page else LEFT_NEW
        session.receive(step, Fetched(next_item=1501, items=page if step.full else None, left=left), 0.0)
        assert session.hungry == (known == 0)
    step = session.next_step(session.entries_wanted(100), 100)
    assert (step.cursor, step.full) == (NEW, False)


@pytest.mark.parametrize(("held", "room"), [(0, 100), (60, 40), (100, 1), (500, 1)])
def test_a_step_says_how_many_messages_there_is_room_for(held: int, room: int) -> None:
    session = new_session()
    session.hand.outstanding = held
    assert session.next_step(0, 100).room is None, "it fetches nothing"
    step = session.next_step(3, 100)
    assert step.room == (MAX_ENTRIES, room, FIRST_ROOM_BYTES)


@pytest.mark.parametrize("items", [0, 3])
def test_what_is_kept_does_not_count_for_the_size_of_entries(items: int) -> None:
    session = new_session()
    members = [b"%d:0:0:" % (number + 1) for number in range(items)]
    receive(session, [], items=members)
    session.ask(session.later.take_due(1.0, 10, lambda: True))
    kept = [keep(message_of("k", number), b"v", 1, "") for number in range(items)]
    receive(session, [(b"7-1", ours(batch_bytes(1)))], kept=kept)
    assert session.appetite.messages_per_entry == 1.0


# -- deleted messages ----------------------------------------------------------------------------------------


def test_deleted_messages_are_finished_unhandled() -> None:
    """Those that were taken out of the batch, and those that are marked; each counts as acknowledged once."""
    session = new_session()
    session.set_marks(b"4", frozenset({("7-1", 2), ("8-1", 0)}))
    whole = records.RecordBatch(7, None, ["k"] * 4, [b"v"] * 4, None)
    raw = records.encode(records.without(whole, 1))
    ((one, other),) = receive(session, [(b"7-1", ours(raw)), (b"8-1", [b"name", b"Ann"])])
    assert (one.index, other.index) == (0, 3)
    step = session.next_step(0)
    assert (step.acked, [batch.entry for batch in step.finished]) == (3, ["8-1"])
    assert [progress for _, progress in step.partial] == [pack_progress(bytearray([0, 1, 1, 0]))]
    session.hand.finish_list([one, other])
    step = session.next_step(0)
    assert (step.acked, [batch.entry for batch in step.finished]) == (2, ["7-1"])


def test_deleted_messages_that_were_finished_before_do_not_count_again() -> None:
    session = new_session()
    raw = records.encode(records.without(records.RecordBatch(7, None, ["k"] * 2, [b"v"] * 2, None), 1))
    ((one,),) = receive(session, [(b"7-1", ours(raw))], [pack_progress(bytearray([0, 1]))])
    assert one.index == 0
    assert session.next_step(0).acked == 0


def test_the_store_is_told_once_which_marks_are_known() -> None:
    session = new_session()
    session.set_marks(b"4", frozenset())
    assert session.hungry
    assert session.next_step(0).seen == b"4"
    assert session.next_step(0).seen is None


# -- what is kept --------------------------------------------------------------------------------------------


def message_of(key: Key, value: object, index: int = 0) -> Message:
    return Message(key, value, None, 7, index, Batch(NO_ONE, "7-1", index + 1))


def fetched_item(session: Session, raw: bytes, gets: int = 0) -> list[list[Message]]:
    """What comes when the store's only item is fetched, that was fetched so many times before."""
    receive(session, [], items=[b"1:0:%d:kk" % gets])
    session.ask(session.later.take_due(1.0, 10, lambda: True))
    return receive(session, [], kept=[raw])


def test_a_kept_message_comes_back() -> None:
    session = new_session()
    ((message,),) = fetched_item(session, keep(message_of("k", {"a": 1}), {"a": 1}, 4, "it failed"))
    assert (message.key, message.value, message.attempt, message.id) == ("k", {"a": 1}, 4, "3/7-1/0")
    session.hand.finish(message)
    step = session.next_step(0)
    assert (step.acked, step.drops, step.finished, step.full) == (1, [1], [], True)


def test_a_message_whose_time_has_not_come_is_kept_with_its_attempt() -> None:
    session = new_session()
    (messages,) = receive(session, [(b"5-1", ours(batch_bytes(1)))])
    before = messages[0].attempt
    session.hand.postpone(messages[0], 1.5, 0.0)
    step = session.next_step(0)
    (put,) = step.puts
    assert (put.item, put.wait_ms, put.gets) == (0, 1500, 0)
    assert (step.retried, session.hand.outstanding) == (0, 0)
    ((kept,),) = fetched_item(session, put.record)
    assert (kept.value, kept.attempt, kept.key) == (messages[0].value, before, messages[0].key)


def test_one_that_was_kept_before_is_kept_as_it_was_with_what_is_known_against_it() -> None:
    session = new_session()
    raw = keep(message_of("k", "value"), "value", 4, "it failed")
    ((message,),) = fetched_item(session, raw, gets=2)
    session.hand.postpone(message, 2.0, 0.0)
    (put,) = session.next_step(0).puts
    assert (put.item, put.wait_ms, put.gets, put.record) == (message.batch.item, 2000, 2, raw)


def test_a_broken_record_is_a_dead_letter() -> None:
    session = new_session()
    assert fetched_item(session, b"\xc1") == []
    step = session.next_step(0)
    ((count, letter),) = step.dead
    assert (count, step.drops, step.acked) == (1, [1], 0)
    assert msgspec.msgpack.decode(letter)["raw"] == b"\xc1"
    assert session.hand.outstanding == 0
    assert not session.later.holding


def test_a_record_that_was_emptied_is_finished() -> None:
    session = new_session()
    assert fetched_item(session, b"") == []
    step = session.next_step(0)
    assert (step.dead, step.drops, step.acked) == ([], [1], 1)
    assert not session.later.holding


@pytest.mark.parametrize("gets", range(FATAL_GETS + 2))
def test_what_workers_died_of_is_a_dead_letter_at_last(gets: int) -> None:
    session = new_session()
    got = fetched_item(session, keep(message_of("k", b"v"), b"v", 1, "before"), gets)
    assert bool(got) == (gets < FATAL_GETS)
    if not got:
        ((count, letter),) = session.next_step(0).dead
        assert count == 1
        error = msgspec.msgpack.decode(letter)["error"]
        assert error == f"its worker process died {gets} times while handling it; before: before"


@pytest.mark.parametrize("times", range(6))
def test_what_was_delivered_again_and_again_is_put_where_suspects_are(times: int) -> None:
    session = new_session()
    step = session.next_step(10)
    entry: Entry = (b"7-1", ours(batch_bytes(3)))
    got = session.receive(step, Fetched([entry], [b"%d:" % times + pack_progress(bytearray([0, 1, 0]))]), 0.0)
    assert bool(got) == (times < 3)
    assert session.hand.outstanding == (2 if got else 0)
    step = session.next_step(10)
    assert [put.gets for put in step.puts] == ([] if got else [SUSPECT_GETS] * 2)
    assert [batch.entry for batch in step.finished] == ([] if got else ["7-1"])
    assert (step.acked, step.retried) == (0, 0)


def test_the_last_step_names_what_was_not_handled() -> None:
    session = new_session()
    receive(session, [], items=[b"1:0:0:kx", b"2:0:0:ky"])
    session.ask(session.later.take_due(1.0, 10, lambda: True))
    kept = [keep(message_of("k", b"v"), b"v", 1, "")] * 2
    batches = receive(
        session, [(b"7-1", ours(batch_bytes(2))), (b"8-1", ours(batch_bytes(1))), (b"9-1", [b"a", b"b"])], kept=kept
    )
    (item,), _, (one, _), (other,), _ = batches
    for message in (item, one, other):
        session.hand.finish(message)
    step = session.last_step()
    assert [batch.entry for batch in step.finished] == ["8-1"]
    assert (step.untouched, step.ungets, step.full, step.entries_max) == (["7-1", "9-1"], [2], True, 0)


# -- jobs and effects ----------------------------------------------------------------------------------------


def test_only_the_last_state_of_a_job_is_stored() -> None:
    session = new_session()
    session.hand.tell_job(JOB, 5, b"one")
    session.hand.tell_job(JOB, 6, b"two")
    assert session.hand.uncommitted
    step = session.next_step(0)
    assert (step.jobs, step.full) == ([(JOB, 6, b"two")], True)
    assert not session.next_step(0).jobs


def test_a_job_whose_effect_was_refused_is_not_done() -> None:
    session = new_session()
    headers = [jobs.job_headers(None, JOB, 5), None]
    raw = records.encode(records.RecordBatch(7, None, ["k"] * 2, [b"v"] * 2, headers))
    ((one, other),) = receive(session, [(b"7-1", ours(raw))])
    effect = Effect("k", "INCRBY", ("1",))
    session.hand.owner.effects = {one.id: [effect, effect], other.id: [effect]}
    session.hand.tell_job(JOB, 5, b"done")
    session.hand.tell_job("q/3/00000000", 5, b"done")
    session.hand.finish(one)
    session.hand.finish(other)
    step = session.next_step(0)
    number = step.number
    session.amend(step, one, b"refused")
    assert step.number == session.number == number + 1
    assert [job for job, _, _ in step.jobs] == ["q/3/00000000"]
    assert step.effects == [(other, effect)]
    assert (step.acked, step.dead) == (1, [(1, b"refused")])
    assert [batch.entry for batch in step.finished] == ["7-1"]


@pytest.mark.parametrize("how", ["put_off", "bury"])
def test_effects_of_a_message_that_failed_are_forgotten(how: str) -> None:
    session = new_session()
    ((one,),) = receive(session, [(b"7-1", ours(batch_bytes(1)))])
    session.hand.owner.effects[one.id] = [Effect("k", "DEL", ())]
    if how == "bury":
        session.hand.bury(one, b"dead")
    else:
        session.hand.put_off(one, 1.5, "it failed", 0.0)
    step = session.next_step(0)
    assert (list(step.effects), session.hand.owner.effects) == ([], {})
    assert [put.wait_ms for put in step.puts] == ([] if how == "bury" else [1500])


# -- how much at once ----------------------------------------------------------------------------------------


def test_fewer_items_are_asked_for_after_an_answer_was_lost() -> None:
    """It may be their size that kept it from coming in time."""
    session = new_session()
    most = session.items_wanted
    assert most >= 16
    for expected in (1, 1):
        for _ in range(12):
            session.reread(session.next_step(0), 0.0)
        assert session.items_wanted == expected
    fetched_item(session, keep(message_of("k", b"v"), b"v", 1, ""))
    assert session.items_wanted == 2


def test_large_items_are_asked_for_one_by_one() -> None:
    session = new_session()
    fetched_item(session, keep(message_of("k", b""), b"v" * 3_000_000, 1, ""))
    assert session.items_wanted == 1


@pytest.mark.parametrize(
    ("room", "outstanding", "wanted"),
    [(10, 4, 6), (4, 4, 0), (2, 4, 0), (2, 0, 1)],
    ids=["room", "full", "over", "one"],
)
def test_bytes_in_hand_bound_what_is_asked_for_but_for_one_entry(
    monkeypatch: pytest.MonkeyPatch, room: int, outstanding: int, wanted: int
) -> None:
    """Four entries are in hand, and there is room for so many as large as these."""
    session = new_session()
    receive(session, [(b"%d-1" % entry, ours(batch_bytes(10))) for entry in range(1, 5)])
    each = session.hand.held_bytes // 4
    account = session.account = Account(Budget(each * room))
    account.settle(4 * each)
    session.appetite.entry_bytes = each
    session.hand.outstanding = outstanding
    monkeypatch.setattr(budget, "STEP_BYTES", 1)
    assert session.entries_wanted(1000) == wanted


def test_a_step_that_waits_for_room_fetches_nothing() -> None:
    shared = Budget(1000)
    other = Account(shared)
    other.settle(1000)
    session = Session(NO_ONE, 0, Later(by_key=True), describe, Account(shared))
    assert session.reserve(session.entries_wanted(100), 100) == 0
    assert session.account.waits
    other.settle(0)
    assert session.account.pledge
    assert session.reserve(session.entries_wanted(100), 100) == 1, "it is not known how large entries are"
    step = session.next_step(1, 100)
    assert step.room == (MAX_ENTRIES, 100, session.account.pledge)
    session.receive(step, Fetched([(b"1-1", ours(batch_bytes(1)))], items=[]), 0.0)
    assert (session.account.pledge, shared.used) == (0, session.hand.held_bytes)
