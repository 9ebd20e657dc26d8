"""The owner of a shard against a model of the store: failures, retries, dead letters, replays and deletions, with
crashes, lost replies and takeovers at any point. At random, and case by case where chance seldom leads.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shardq.core import in_hand
from shardq.core.records import Key
from tests.core.owner_rig import ListsRig, OwnerRig, UnorderedRig, small_bounds

KEYS: list[Key] = [None, "a", "a", b"a", b"\xff"]
FATES = ["answered"] * 4 + ["reply lost", "call lost"]
ENDS = (
    ["interrupt"] + ["take"] * 6 + ["returns"] * 3 + ["fails 0", "fails 0.05", "fails 1", "fails 30", "dead", "writes"]
)
OTHERS = ["append"] * 6 + ["broken", "foreign", "delete", "delete an entry"]
SOME_KEYS = st.lists(st.sampled_from(KEYS), min_size=1, max_size=4)
WAITS_S = st.sampled_from([0.0, 0.0, 0.0, 0.05, 2.0, 40.0])
EVENTS = st.tuples(st.sampled_from(ENDS), st.integers(0, 5))


@pytest.fixture(autouse=True)
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    small_bounds(monkeypatch)


class OwnerMachine(RuleBasedStateMachine):
    """What must hold is checked after each rule; at the end nothing may be left over."""

    kind: type[OwnerRig] = OwnerRig

    @initialize(stored=st.lists(SOME_KEYS, min_size=1, max_size=4))
    def begin(self, stored: list[list[Key]]) -> None:
        self.rig = self.kind()
        for keys in stored:
            self.rig.append(*keys)

    @rule(what=st.sampled_from(OTHERS), keys=SOME_KEYS, place=st.integers(0, 8))
    def others(self, what: str, keys: list[Key], place: int) -> None:
        rig = self.rig
        if what == "append":
            rig.append(*keys)
        elif what == "broken":
            rig.append_broken(place + 1)
        elif what == "foreign":
            rig.append_foreign()
        elif what == "delete":
            self.delete_one_of_the_youngest(place)
        elif deletable := rig.deletable():
            rig.delete_entry(deletable[place % len(deletable)])

    def delete_one_of_the_youngest(self, place: int) -> None:
        id_ = list(self.rig.lane_of)[-1 - place % len(self.rig.lane_of)]
        if id_ in self.rig.store.unfinished() and id_[0] not in self.rig.broken:
            self.rig.delete(id_)

    @precondition(lambda self: self.rig.store.dead_ids())
    @rule()
    def replay(self) -> None:
        self.rig.replay()

    @rule(how=st.sampled_from(["stay", "stay", "crash", "crash", "leave"]))
    def go(self, how: str) -> None:
        if how == "leave":
            self.rig.leave()
        elif how == "crash":
            self.rig.crash()

    @precondition(lambda self: self.rig.may_take or self.rig.running)
    @rule(events=st.lists(EVENTS, min_size=1, max_size=4))
    def handle(self, events: list[tuple[str, int]]) -> None:
        rig = self.rig
        for what, place in events:
            if rig.may_take and (what == "take" or not rig.running):
                rig.take()
            elif what == "interrupt":
                rig.interrupt()
            elif rig.running:
                rig.end(place % len(rig.running), "returns" if what == "take" else what)

    @rule(limit=st.integers(1, 4), fates=st.lists(st.sampled_from(FATES), min_size=1, max_size=4), wait_s=WAITS_S)
    def step(self, limit: int, fates: list[str], wait_s: float) -> None:
        self.rig.wait(wait_s)
        self.rig.step(limit, *fates)

    @invariant()
    def all_holds(self) -> None:
        self.rig.check()

    def teardown(self) -> None:
        self.rig.settle()


class UnorderedMachine(OwnerMachine):
    kind = UnorderedRig


class ListsMachine(OwnerMachine):
    kind = ListsRig


for machine, examples in ((OwnerMachine, 120), (UnorderedMachine, 40), (ListsMachine, 80)):
    machine.TestCase.settings = settings(max_examples=examples, stateful_step_count=50)
TestOwner = OwnerMachine.TestCase
TestUnorderedOwner = UnorderedMachine.TestCase
TestOwnerOfLists = ListsMachine.TestCase


# -- case by case --------------------------------------------------------------------------------------------


def started(*entries: list[Key], kind: type[OwnerRig] = OwnerRig) -> OwnerRig:
    """An owner that knows what is handled later, and has fetched these entries."""
    rig = kind()
    for keys in entries:
        rig.append(*keys)
    rig.step()
    rig.step()  # pending ones: there are none
    rig.step()
    return rig


def with_a_replay(*entries: list[Key]) -> OwnerRig:
    """Message (1, 0) of key "a" became a dead letter and was replayed while the next one of its key is being
    handled."""
    rig = started(["a"], *entries)
    rig.take()
    rig.end(0, "dead")
    rig.step()
    rig.take()
    rig.replay()
    rig.step()
    rig.step()
    rig.step()
    assert rig.shard.session.later.items
    assert [message.value for message in rig.running] == [[2, 0]]
    assert not rig.may_take
    return rig


@pytest.mark.parametrize("what", ["returns", "fails 1", "dead"])
def test_a_replayed_message_has_its_turn_after_those_in_hand(what: str) -> None:
    rig = with_a_replay(["a"])
    rig.end(0, what)
    rig.step()
    rig.take()
    assert [message.value for message in rig.running] == [[1, 0]]
    rig.check()
    rig.settle()


@pytest.mark.parametrize("how", ["crash", "leave"])
def test_those_that_come_while_a_replayed_one_waits_stay_behind_those_in_hand(how: str) -> None:
    rig = with_a_replay(["a"])
    rig.append("a")
    rig.step()
    rig.step()
    getattr(rig, how)()
    rig.settle()


def test_an_item_is_not_fetched_before_it_is_put_back() -> None:
    """More is put off at once than one step takes, so what is put back waits for the step after."""
    rig = started(["a"], [None] * 9)
    rig.take()
    rig.end(0, "fails 0")
    rig.step()
    rig.step()
    rig.take(10)
    assert rig.running[-1].batch.item
    for _ in range(10):
        rig.end(0, "fails 0")
    rig.settle()


def test_what_fails_in_another_process_again_is_not_put_before_what_is_in_hand() -> None:
    """Delivered more often than the older entry of its key, which was not handled when its owner went."""
    rig = started(["a"], ["a"])
    rig.crash()
    for limit in (1, 9):
        rig.step()
        rig.step(limit)
        if limit == 1:
            rig.leave()
        else:
            rig.crash()
    rig.step()
    rig.step()
    rig.take()
    rig.end(0, "fails 0")
    rig.settle()


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_lost_replies_make_no_suspects_of_what_is_behind_those_in_hand(lost: int) -> None:
    rig = started(["a"])
    rig.take()
    rig.append("a")
    for _ in range(lost):
        rig.step(9, "reply lost", "answered")
    rig.step()
    rig.step()
    rig.end(0, "fails 0")
    rig.settle()


def test_dead_letters_are_stored_before_what_comes_after_them() -> None:
    rig = started(["a"] * 9, ["b"] * 9)
    for _ in range(9):
        rig.take(2)
        rig.end(0, "dead")
        rig.end(0, "dead")
    rig.append("a", "b")
    rig.step()
    rig.take(2)
    rig.end(0, "returns")
    rig.end(0, "returns")
    rig.step()
    rig.check()
    rig.crash()
    rig.settle()


def test_more_dead_letters_than_one_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_hand, "DEAD_BYTES", 300)
    rig = started([None] * 9)
    rig.take(9)
    for _ in range(9):
        rig.end(0, "dead")
    rig.step()
    assert 0 < rig.store.dead < 9
    assert rig.shard.hand.uncommitted
    rig.settle()
    assert rig.store.dead == 9


def test_who_goes_in_good_order_leaves_no_suspects() -> None:
    rig = started(["a", "b"], [None])
    rig.take(3)
    rig.end(0, "fails 0")
    rig.running.clear()
    rig.step()
    for _ in range(9):
        rig.step()
        rig.step()
        assert rig.store.pending
        assert rig.store.later[1].gets == 1
        rig.leave()
        assert set(rig.store.pending.values()) == {0}
        assert rig.store.later[1].gets == 0
    rig.settle()
    assert not rig.store.letters


def test_who_crashes_again_and_again_ends_with_dead_letters_of_what_was_in_hand() -> None:
    rig = started(["a", "b"], [None])
    for _ in range(30):
        for _ in range(9):
            rig.step()
            rig.wait(1.0)
        rig.check()
        rig.crash()
    assert rig.store.dead == 3
    assert not rig.store.unfinished()


def test_suspects_come_before_anything_new() -> None:
    rig = started(["a"], [None] * 4)
    for _ in range(2):
        rig.crash()
        for _ in range(4):
            rig.step()
    rig.append("new")
    rig.lane_of[3, 0] = "new"
    rig.step()
    rig.step()
    assert [message.value for message in rig.ready] == [[1, 0], [2, 0]]  # a wave
    for _ in range(3):
        rig.take()
        rig.end(0, "returns")
        rig.step()
    rig.step()
    assert [3, 0] in [message.value for message in rig.ready]
    rig.settle()


def test_a_suspect_behind_one_that_waits_long_holds_up_nothing_new() -> None:
    rig = started(["a"], ["a"], [None])
    rig.take()
    rig.end(0, "fails 3600")
    for _ in range(3):
        rig.step(1)
        rig.step(1)
        rig.crash()
        rig.step(9)
        rig.step(9, "call lost")
    rig.waiting = None
    rig.crash()
    rig.append("new")
    rig.lane_of[4, 0] = "new"
    for _ in range(9):
        rig.step()
        while rig.may_take:
            rig.take()
            rig.end(0, "returns")
    assert (4, 0) in rig.over
    rig.settle()


@pytest.mark.parametrize("kind", [OwnerRig, UnorderedRig, ListsRig])
def test_who_was_stopped_finds_the_value_as_it_was_sent(kind: type[OwnerRig]) -> None:
    rig = started(["a", "a"], ["a"], kind=kind)
    rig.append_foreign()
    rig.step()
    for _ in range(3):
        rig.take()
        rig.interrupt()
    rig.take()
    rig.interrupt()
    rig.take()
    rig.end(0, "fails 0")
    rig.settle()


@pytest.mark.parametrize("kind", [OwnerRig, UnorderedRig, ListsRig])
def test_an_answer_is_lost_again_and_again(kind: type[OwnerRig]) -> None:
    """Nobody died: nothing becomes a dead letter, however often it was fetched in vain."""
    rig = started(["a", "a", None], ["a", b"\xff"], kind=kind)
    rig.take()
    rig.end(0, "fails 0")
    for _ in range(20):
        rig.step(1, "reply lost", "answered")
        rig.check()
    rig.settle()
    assert not rig.store.letters
    assert len(rig.returned) == 5
