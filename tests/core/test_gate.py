"""The gate of a shard's keys: who waits, who passes, in what order, and that nothing is left behind or kept."""

from __future__ import annotations

from collections import defaultdict, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core.gate import ASK_AT_ONCE, KeyGate
from shardq.core.limits import Grant
from shardq.core.message import Batch, Message, Ownership

OWNER = Ownership("q", "g", 0, 1, "n")
HOLD_US = 200_000


def message(key: str | bytes | None, number: int = 0, item: int = 0) -> Message:
    return Message(key, number, None, 0, 0, Batch(OWNER, f"{number}-1", 1, item=item))


def grant(given: int, first_us: int = 0, step_us: float = 1e6, again_us: int = 0) -> Grant:
    return Grant(given, first_us, step_us, HOLD_US, again_us)


class Rig:
    """A gate with a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.ready: deque[Message] = deque()
        self.behind: dict[str, int] = {}
        self.gate = KeyGate(
            self.ready.append, lambda message: self.behind.get(str(message.key), 0), lambda: self.now, lambda: None
        )

    def answer(self, lane: str, *grants: Grant) -> None:
        for one in grants:
            self.gate.granted(lane, one, self.now, self.now)
        self.gate.pass_due(self.now)

    def asked(self) -> dict[str, int]:
        return {lane: count for lane, _, count in self.gate.asks()}


def test_a_message_waits_until_its_key_has_leave() -> None:
    rig = Rig()
    rig.gate.append(message("a"))
    assert not rig.ready
    assert rig.gate.asks() == [("a", b"ka", 1)]
    rig.answer("a", grant(1, first_us=500_000))
    assert not rig.ready
    rig.now += 0.4
    assert rig.gate.pass_due(rig.now) == pytest.approx(0.1)
    rig.now += 0.1
    rig.gate.pass_due(rig.now)
    assert len(rig.ready) == 1
    assert rig.gate.spend(rig.ready.popleft(), rig.now)
    assert rig.gate.waiting == 0


def test_messages_without_a_key_pass_at_once() -> None:
    rig = Rig()
    rig.gate.extend([message(None), message(None)])
    assert len(rig.ready) == 2
    assert all(rig.gate.spend(one, rig.now) for one in rig.ready)
    assert rig.gate.asks() == []


def test_a_key_of_bytes_is_the_key_of_its_text() -> None:
    rig = Rig()
    rig.gate.extend([message("a"), message(b"a")])
    assert rig.gate.asks() == [("a", b"ka", 2)]


def test_what_waits_behind_is_asked_for_too() -> None:
    rig = Rig()
    rig.behind["a"] = 7
    rig.gate.append(message("a"))
    assert rig.asked() == {"a": 8}


def test_one_that_found_no_runner_in_time_comes_back_and_asks_anew() -> None:
    rig = Rig()
    rig.gate.append(message("a"))
    rig.asked()
    rig.answer("a", grant(1))
    late = rig.ready.popleft()
    rig.now += HOLD_US / 1e6 + 0.01
    assert not rig.gate.spend(late, rig.now)
    assert rig.gate.waiting == 1
    assert rig.asked() == {"a": 1}


def test_leave_that_came_too_late_is_asked_for_again() -> None:
    rig = Rig()
    rig.gate.append(message("a"))
    rig.asked()
    sent, rig.now = rig.now, rig.now + 5
    rig.gate.granted("a", grant(1), sent, rig.now)
    rig.gate.pass_due(rig.now)
    assert not rig.ready
    assert rig.asked() == {"a": 1}


def test_a_key_that_gets_nothing_asks_when_it_was_told_to() -> None:
    rig = Rig()
    rig.gate.append(message("a"))
    rig.asked()
    assert rig.gate.granted("a", grant(0, first_us=9_000_000, again_us=8_000_000), rig.now, rig.now) == 9.0
    rig.now += 7.9
    rig.gate.pass_due(rig.now)
    assert rig.asked() == {}
    rig.now += 0.1
    rig.gate.pass_due(rig.now)
    assert rig.asked() == {"a": 1}


def test_not_all_keys_are_asked_for_in_one_call() -> None:
    rig = Rig()
    rig.gate.extend(message(f"k{number}") for number in range(ASK_AT_ONCE + 5))
    assert (len(rig.asked()), len(rig.asked()), len(rig.asked())) == (ASK_AT_ONCE, 5, 0)


def test_a_call_without_an_answer_is_made_again() -> None:
    rig = Rig()
    rig.gate.append(message("a"))
    rig.gate.ask_again(rig.asked())
    assert rig.asked() == {"a": 1}


def test_what_is_taken_out_waits_no_longer() -> None:
    rig = Rig()
    first, second = message("a", 1), message("a", 2, item=5)
    rig.gate.extend([first, second])
    assert not rig.gate.waits_again("a")
    assert rig.gate.take_out("a") == [first, second]
    assert rig.gate.waiting == 0
    assert rig.asked() == {}
    rig.gate.append(second)
    assert rig.gate.waits_again("a")


def test_keys_that_are_through_take_no_memory() -> None:
    rig = Rig()
    for number in range(50):
        rig.gate.append(message(f"k{number}"))
    for lane in rig.asked():
        rig.answer(lane, grant(3))
    taken_out = message("left")
    rig.gate.append(taken_out)
    rig.asked()
    rig.gate.take_out("left")
    rig.answer("left", grant(2, first_us=1_000_000))
    for _ in range(3):
        rig.now += 5
        rig.gate.pass_due(rig.now)
    assert not rig.gate._tokens
    assert not rig.gate._lines
    assert not rig.gate._due


@given(st.data())
def test_no_message_is_begun_without_leave_and_none_is_lost(data: st.DataObject) -> None:
    """Whatever comes between: late runners, answers without leave, calls that failed."""
    rig, number = Rig(), 0
    leave: dict[str, int] = defaultdict(int)
    begun: dict[str, list[int]] = defaultdict(list)
    sent: dict[str, list[int]] = defaultdict(list)

    def run_ready() -> None:
        one = rig.ready.popleft()
        if rig.gate.spend(one, rig.now):
            begun[str(one.key)].append(one.value)

    def answer_all(*, generous: bool) -> None:
        for lane, _, count in rig.gate.asks():
            given = count if generous else data.draw(st.integers(0, count))
            first_us = 0 if generous else data.draw(st.integers(-5, 400_000))
            leave[lane] += given
            rig.gate.granted(lane, grant(given, first_us, 1000.0, 100_000), rig.now, rig.now)

    for _ in range(data.draw(st.integers(1, 30))):
        match data.draw(st.sampled_from(["come", "answer", "fail", "wait", "run"])):
            case "come":
                # A key has one message here at a time, as its lane sees to.
                key = data.draw(st.sampled_from(["a", "b", "c"]))
                if len(begun[key]) == len(sent[key]):
                    number += 1
                    sent[key].append(number)
                    rig.gate.append(message(key, number))
            case "answer":
                answer_all(generous=False)
            case "fail":
                rig.gate.ask_again([lane for lane, _, _ in rig.gate.asks()])
            case "wait":
                rig.now += data.draw(st.sampled_from([0.001, 0.1, 1.0]))
            case _ if rig.ready:
                run_ready()
        rig.gate.pass_due(rig.now)
        assert all(len(begun[key]) <= leave[key] for key in begun)
    for _ in range(10):
        rig.now += 0.5
        rig.gate.pass_due(rig.now)
        answer_all(generous=True)
        rig.gate.pass_due(rig.now)
        while rig.ready:
            run_ready()
    assert dict(begun) | {} == {key: values for key, values in sent.items() if values} | {
        key: [] for key in begun if not sent[key]
    }
