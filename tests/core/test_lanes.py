"""Lanes against a plain model: order per key, one at a time per key, keyless side by side, no memory left behind."""

from __future__ import annotations

from collections import defaultdict, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shardq.core.lanes import Lanes, lane_key
from shardq.core.message import Batch, Message, Ownership
from shardq.core.records import Key

# "a" and b"a", "é" and its UTF-8 bytes are one key each; b"\xff" is no UTF-8 at all.
KEYS: list[Key] = [None, "a", b"a", "é", "é".encode(), b"\xff", "b", ""]


def same_key(key: Key) -> bytes | None:
    return key.encode() if isinstance(key, str) else key


def new_message(key: Key, number: int) -> Message:
    batch = Batch(Ownership("q", "g", 0, 1, "n"), "1-0", 1)
    return Message(key, number, None, 0, 0, batch)


class LanesMachine(RuleBasedStateMachine):
    """The model: for each key the numbers of its messages, oldest first, and whether the first is being handled."""

    def __init__(self) -> None:
        super().__init__()
        self.ready: deque[Message] = deque()
        self.lanes = Lanes(self.ready)
        self.added = 0
        self.waiting: dict[bytes, deque[int]] = defaultdict(deque)
        self.keyless: set[int] = set()
        self.running: list[Message] = []

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=5))
    def add(self, keys: list[Key]) -> None:
        messages = [new_message(key, self.added + index) for index, key in enumerate(keys)]
        self.added += len(keys)
        for message in messages:
            lane = same_key(message.key)
            if lane is None:
                self.keyless.add(message.value)
            else:
                self.waiting[lane].append(message.value)
        self.lanes.add(messages)

    @precondition(lambda self: self.ready)
    @rule()
    def take(self) -> None:
        message = self.ready.popleft()
        lane = same_key(message.key)
        if lane is None:
            self.keyless.remove(message.value)
        else:
            assert lane not in [same_key(other.key) for other in self.running], "two of one key at a time"
            assert self.waiting[lane][0] == message.value, "not the oldest of its key"
        self.running.append(message)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        message = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        lane = same_key(message.key)
        if lane is not None:
            self.waiting[lane].popleft()
            if not self.waiting[lane]:
                del self.waiting[lane]
        self.next_is_ready(message)

    def next_is_ready(self, message: Message) -> None:
        following = self.lanes.done(message)
        if following is not None:
            self.ready.append(following)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def leave_with_those_behind(self, data: st.DataObject) -> None:
        message = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        lane = same_key(message.key)
        left = self.waiting.pop(lane, deque()) if lane is not None else deque()
        behind = [number for number in left if number != message.value]
        assert [other.value for other in self.lanes.empty(message)] == behind

    @rule()
    def lose_the_lease(self) -> None:
        self.lanes.clear()
        self.ready.clear()
        self.waiting.clear()
        self.keyless.clear()
        self.running.clear()
        assert len(self.lanes) == 0

    @invariant()
    def all_that_may_run_is_ready(self) -> None:
        running = {same_key(message.key) for message in self.running}
        may_run = {numbers[0] for lane, numbers in self.waiting.items() if lane not in running} | self.keyless
        assert {message.value for message in self.ready} == may_run
        assert len(self.ready) == len(may_run)

    @invariant()
    def a_key_costs_memory_only_while_it_has_messages(self) -> None:
        assert len(self.lanes) == len(self.waiting)
        for key in KEYS:
            if key is not None:
                assert self.lanes.busy(lane_key(key)) == (same_key(key) in self.waiting)

    def teardown(self) -> None:
        while self.ready or self.running:
            message = self.ready.popleft() if self.ready else self.running.pop()
            self.next_is_ready(message)
        assert len(self.lanes) == 0


TestLanes = LanesMachine.TestCase


@given(st.binary(max_size=8), st.binary(max_size=8))
def test_lane_keys_differ_where_bytes_differ(one: bytes, other: bytes) -> None:
    assert (lane_key(one) == lane_key(other)) == (one == other)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_and_its_bytes_share_a_lane(text: str) -> None:
    assert lane_key(text) == lane_key(text.encode())


@pytest.mark.parametrize("keys", [["a", b"a"], [b"a", "a"]])
def test_text_and_bytes_wait_for_each_other(keys: list[Key]) -> None:
    ready: deque[Message] = deque()
    lanes = Lanes(ready)
    lanes.add([new_message(key, index) for index, key in enumerate(keys)])
    assert [message.value for message in ready] == [0]
    following = lanes.done(ready[0])
    assert following is not None
    assert following.value == 1
    assert lanes.done(following) is None


def test_emptying_a_lane_leaves_the_others() -> None:
    ready: deque[Message] = deque()
    lanes = Lanes(ready)
    lanes.add([new_message(key, number) for number, key in enumerate(["a", b"a", "b", "a", "b", None])])
    assert [message.value for message in lanes.empty(ready[0])] == [1, 3]
    assert not lanes.busy("a")
    assert lanes.busy("b")
    assert [message.value for message in ready] == [0, 2, 5]
    following = lanes.done(ready[1])
    assert following is not None
    assert following.value == 4


@pytest.mark.parametrize("key", [None, "a", b"a"], ids=repr)
def test_emptying_a_lane_that_nothing_is_in(key: Key) -> None:
    assert Lanes(deque()).empty(new_message(key, 0)) == []
