"""What a shard handles later, against a plain model of the store's index: order within a key, who is held, when an item
comes, suspects in waves and alone; and the members of the index, that may be anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shardq.core import later
from shardq.core.later import ALONE_GETS, PAGE, SUSPECT_GETS, WAVE, Later, key_tag, parse_member
from shardq.core.records import Key

NOW_MS, NOW_S = 1_700_000_000_000, 1000.0
TAGS = [b"", b"ka", b"ka", b"ka", b"kb", b"k"]
LANES = ["a", "b", ""]
BROKEN = [b"", b"x", b"1:2:3", b"1:2:x:", b"1:-2:0:", b"9:9:9:q", b"9" * 17 + b":0:0:", b"1:" + b"9" * 5000 + b":0:"]


@dataclass
class Kept:
    """An item as the store has it, in `later` once it is known there; `state`: waiting, asked or out."""

    due_s: float
    gets: int
    lane: str | None
    state: str = "waiting"
    early: bool = False  # it was known before its time came: nothing waits for it, suspect or not


def member(item: int, kept: Kept, now_s: float) -> bytes:
    due_ms = NOW_MS + round((kept.due_s - now_s) * 1000)
    tag = b"" if kept.lane is None else b"k" + kept.lane.encode()
    return b"%d:%d:%d:%b" % (item, max(due_ms, 0), kept.gets, tag)


class LaterMachine(RuleBasedStateMachine):
    """`stored` is the store's index, rising; `known` what the owner was told of it; `coming` lanes of puts under way,
    those that the store took first."""

    @initialize(by_key=st.sampled_from([True, True, False]), few=st.booleans())
    def begin(self, by_key: bool, few: bool) -> None:
        self.page, self.wave = (3, 2) if few else (PAGE, WAVE)
        later.PAGE, later.WAVE = self.page, self.wave
        self.by_key = by_key
        self.busy: set[str] = set()
        self.later = Later(by_key=by_key, lane_busy=self.busy.__contains__)
        self.stored: dict[int, Kept] = {}
        self.known: set[int] = set()
        self.coming: list[str | None] = []
        self.applied = 0
        self.next_item = 1
        self.now_s = NOW_S
        self.others_alone = False

    # -- the store -------------------------------------------------------------------------------------------

    def add(self, tag: bytes, wait_s: float, gets: int) -> None:
        lane = tag[1:].decode() if tag else None
        self.stored[self.next_item] = Kept(self.now_s + wait_s, gets, lane)
        self.next_item += 1

    @rule(tags=st.lists(st.sampled_from(TAGS), min_size=1, max_size=5), wait_s=st.sampled_from([0, 0.5, 10]))
    def others_put(self, tags: list[bytes], wait_s: float) -> None:
        """Dead letters that are replayed, what a predecessor left."""
        for place, tag in enumerate(tags):
            self.add(tag, wait_s, place)

    @rule(tags=st.lists(st.sampled_from(TAGS), min_size=1, max_size=3))
    def put(self, tags: list[bytes]) -> None:
        for tag in tags:
            lane = tag[1:].decode() if tag else None
            self.later.expect(lane)
            self.coming.append(lane)

    @precondition(lambda self: len(self.coming) > self.applied)
    @rule(wait_s=st.sampled_from([0.0, 0.5]), suspect=st.booleans())
    def the_store_takes_a_put(self, wait_s: float, suspect: bool) -> None:
        lane = self.coming[self.applied]
        self.applied += 1
        self.add(b"" if lane is None else b"k" + lane.encode(), wait_s, SUSPECT_GETS if suspect else 0)
        self.later.applied([lane])

    @rule(broken=st.lists(st.sampled_from(BROKEN), max_size=2))
    def learn(self, broken: list[bytes]) -> None:
        """One page, some of it not ours."""
        above = [item for item in self.stored if item > self.later.known]
        page = above[: self.page - len(broken)]
        members = [member(item, self.stored[item], self.now_s) for item in page]
        if len(members) < len(above):
            broken = broken[: self.page - len(members)]
        self.later.learn([*broken, *members], self.next_item, NOW_MS, self.now_s)
        self.known |= set(page)
        for item in page:
            kept = self.stored[item]
            kept.early = round((kept.due_s - self.now_s) * 1000) > 0 and self.is_next(item)
        if len(members) == len(above) and not self.later.behind:
            del self.coming[: self.applied]
            self.applied = 0

    @rule(passed_s=st.sampled_from([0.05, 0.2, 1.0, 20.0]))
    def wait(self, passed_s: float) -> None:
        self.now_s += passed_s

    # -- lanes and other shards ------------------------------------------------------------------------------

    @precondition(lambda self: self.by_key)
    @rule(lane=st.sampled_from(LANES))
    def lane_fills(self, lane: str) -> None:
        """Only a lane whose key has no kept message in hand."""
        if not any(kept.lane == lane and kept.state != "waiting" for kept in self.stored.values()):
            self.busy.add(lane)

    @precondition(lambda self: self.busy)
    @rule(data=st.data())
    def lane_drains(self, data: st.DataObject) -> None:
        lane = data.draw(st.sampled_from(sorted(self.busy)))
        self.busy.discard(lane)
        self.later.lane_free(lane, self.now_s)

    @rule()
    def another_shard_has_a_suspect_alone_or_no_more(self) -> None:
        self.others_alone = not self.others_alone

    # -- whose turn it is ------------------------------------------------------------------------------------

    def line(self, lane: str | None) -> list[int]:
        return [item for item in sorted(self.known) if self.stored[item].lane == lane]

    def is_next(self, item: int) -> bool:
        """Of its key, if keys matter."""
        lane = self.stored[item].lane
        return not self.by_key or lane is None or self.line(lane)[0] == item

    def may_come(self, item: int) -> bool:
        kept = self.stored[item]
        if kept.state != "waiting" or item not in self.known:
            return False
        return self.is_next(item) and not (self.by_key and kept.lane in self.busy)

    def out(self, least: int, most: int) -> list[int]:
        """Items in hand that were fetched so often before."""
        in_hand = (item for item, kept in self.stored.items() if kept.state != "waiting")
        return [item for item in in_hand if least <= self.stored[item].gets - 1 <= most]

    @rule(most=st.integers(1, 4) | st.just(500))
    def take(self, most: int) -> None:
        taken = self.later.take_due(self.now_s, most, lambda: not self.others_alone and self.later.alone is None)
        assert len(taken) <= most
        for item in taken:
            kept = self.stored[item]
            assert self.may_come(item), "handed out before its turn, or twice"
            assert kept.due_s <= self.now_s + 0.002, "handed out before it was due"
            kept.state, kept.early = "asked", False
            kept.gets += 1
            if kept.gets - 1 >= ALONE_GETS:
                assert not self.others_alone
        assert len(self.out(ALONE_GETS, 99)) <= 1, "two that should be alone"
        assert len(self.out(SUSPECT_GETS, ALONE_GETS - 1)) <= self.wave, "more suspects than a wave"
        if len(taken) < most:
            self.nothing_that_may_come_is_left()

    def nothing_that_may_come_is_left(self) -> None:
        waiting = [item for item in self.stored if self.may_come(item) and self.stored[item].due_s < self.now_s - 0.2]
        plain = [item for item in waiting if self.stored[item].gets < SUSPECT_GETS]
        suspect = [item for item in waiting if SUSPECT_GETS <= self.stored[item].gets < ALONE_GETS]
        assert not plain, "left waiting though it was due"
        assert not suspect or len(self.out(SUSPECT_GETS, ALONE_GETS - 1)) == self.wave, "a wave that is not full"

    def in_state(self, state: str) -> list[int]:
        return [item for item, kept in self.stored.items() if kept.state == state]

    @precondition(lambda self: self.in_state("asked"))
    @rule(lost=st.sampled_from([False, False, True]))
    def answer(self, lost: bool) -> None:
        asked = self.in_state("asked")
        if lost:
            assert self.later.ask_again(self.now_s) == asked
        for item in asked:
            if lost:
                self.stored[item].state = "waiting"
                self.stored[item].gets -= 1
            else:
                self.stored[item].state = "out"
                self.later.got(item)

    @precondition(lambda self: self.in_state("out"))
    @rule(data=st.data(), wait_s=st.sampled_from([None, None, 0.0, 0.5, 10.0]))
    def outcome(self, data: st.DataObject, wait_s: float | None) -> None:
        item = data.draw(st.sampled_from(self.in_state("out")))
        if wait_s is None:
            self.finish(item)
        else:
            self.later.put_back(item, self.now_s + wait_s)
            self.stored[item].state, self.stored[item].gets = "waiting", 0
            self.stored[item].due_s = self.now_s + wait_s

    @precondition(lambda self: self.in_state("out"))
    @rule(data=st.data(), wait_s=st.sampled_from([0.5, 10.0]))
    def its_time_has_not_come(self, data: st.DataObject, wait_s: float) -> None:
        item = data.draw(st.sampled_from(self.in_state("out")))
        kept = self.stored[item]
        kept.state, kept.early, kept.gets, kept.due_s = "waiting", True, kept.gets - 1, self.now_s + wait_s
        assert self.later.postpone(item, kept.due_s) == kept.gets, "nobody died of it, but of earlier fetches"

    def finish(self, item: int) -> None:
        self.later.finish(item, self.now_s)
        del self.stored[item]
        self.known.discard(item)

    # -- what must hold --------------------------------------------------------------------------------------

    @invariant()
    def keys_are_held(self) -> None:
        held = {self.stored[item].lane for item in self.known} | set(self.coming)
        for lane in LANES:
            assert self.later.holds(lane) == (self.by_key and lane in held)
            assert self.later.keeps_back(lane) == (self.by_key and lane in held and lane not in self.busy)
        assert not self.later.holds(None)
        assert not self.later.keeps_back(None)
        assert self.later.holding == (self.by_key and bool(held - {None}))

    @invariant()
    def it_knows_what_is_out(self) -> None:
        assert self.later.out == sorted(self.in_state("asked") + self.in_state("out"))
        alone = self.out(ALONE_GETS, 99)
        assert self.later.alone == (alone[0] if alone else None)
        assert set(self.later.items) == self.known

    @invariant()
    def nothing_new_is_fetched_while_suspects_wait(self) -> None:
        """Suspects that wait for nothing but a lane or their wave."""
        turn = (item for item in self.known if self.stored[item].state == "waiting" and self.is_next(item))
        wanted = any(self.stored[item].gets >= SUSPECT_GETS and not self.stored[item].early for item in turn)
        assert self.later.suspects_wait == wanted

    def teardown(self) -> None:
        try:
            self.settle()
        finally:
            later.PAGE, later.WAVE = PAGE, WAVE

    def settle(self) -> None:
        """All that was put comes, and leaves no trace."""
        if not hasattr(self, "later"):
            return
        self.others_alone = False
        while len(self.coming) > self.applied:
            self.the_store_takes_a_put(0.0, False)
        for lane in list(self.busy):
            self.busy.discard(lane)
            self.later.lane_free(lane, self.now_s)
        rounds = 0
        while self.stored or self.later.behind or self.coming:
            rounds += 1
            assert rounds < 1000, "never comes to an end"
            self.learn([])
            self.wait(20.0)
            self.take(500)
            if self.in_state("asked"):
                self.answer(False)
            for item in self.in_state("out"):
                self.finish(item)
        assert not self.later.holding
        assert self.later.due_in_s(self.now_s) == float("inf")
        assert not self.later.suspects_wait
        assert not self.later._lines
        assert not self.later._asleep
        assert not self.later._wave
        assert not self.later._wave_behind


LaterMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50)
TestLater = LaterMachine.TestCase


# -- case by case --------------------------------------------------------------------------------------------


def yes() -> bool:
    return True


def page(first: int, last: int, tag: bytes = b"", gets: int = 0) -> list[bytes]:
    return [b"%d:%d:%d:%b" % (item, NOW_MS, gets, tag) for item in range(first, last + 1)]


def loaded(members: list[bytes], *, by_key: bool = True) -> Later:
    items = Later(by_key=by_key)
    items.learn(members, len(members) + 1, NOW_MS, NOW_S)
    return items


def test_pages_are_read_to_the_end() -> None:
    items = Later(by_key=True)
    for first in (1, 1001, 2001):
        items.learn(page(first, min(first + PAGE - 1, 2500), b"kx"), 2501, NOW_MS, NOW_S)
        assert items.behind == (first < 2001)
        assert items.known == min(first + PAGE - 1, 2500)
    assert len(items.items) == 2500


@pytest.mark.parametrize("count", [PAGE - 1, PAGE, PAGE + 1, 2 * PAGE])
def test_at_the_end_of_a_page(count: int) -> None:
    items = Later(by_key=True)
    reads = 0
    items.next_item = count + 1
    while items.behind:
        reads += 1
        items.learn(page(items.known + 1, min(items.known + PAGE, count)), count + 1, NOW_MS, NOW_S)
    assert (len(items.items), reads) == (count, (count + PAGE - 1) // PAGE)


def test_keys_stay_held_while_their_puts_are_on_a_later_page() -> None:
    items = Later(by_key=True)
    items.expect("x")
    items.applied(["x"])
    items.learn(page(1, PAGE), PAGE + 2, NOW_MS, NOW_S)
    assert items.holds("x")
    items.learn(page(PAGE + 1, PAGE + 1, b"kx"), PAGE + 2, NOW_MS, NOW_S)
    assert items.holds("x")
    assert not items._coming


def test_a_put_that_was_finished_elsewhere_holds_nothing() -> None:
    """The index has a gap where it was."""
    items = Later(by_key=True)
    items.expect("x")
    items.applied(["x"])
    items.learn([], 5, NOW_MS, NOW_S)
    assert not items.holding
    assert not items.behind


def test_a_page_that_comes_twice() -> None:
    items = loaded(page(1, 3))
    items.learn(page(1, 3), 4, NOW_MS, NOW_S)
    assert items.take_due(NOW_S, 500, yes) == [1, 2, 3]


def test_a_full_page_of_what_is_not_ours_is_not_read_for_ever() -> None:
    items = Later(by_key=True)
    items.learn([b"x"] * PAGE, PAGE + 5, NOW_MS, NOW_S)
    assert not items.items
    assert not items.behind


@pytest.mark.parametrize("by_key", [True, False])
def test_one_key_or_none(by_key: bool) -> None:
    items = loaded(page(1, 5, b"kx"), by_key=by_key)
    taken = items.take_due(NOW_S, 500, yes)
    assert taken == ([1] if by_key else [1, 2, 3, 4, 5])
    items.got(1)
    items.finish(1, NOW_S)
    assert items.take_due(NOW_S, 500, yes) == ([2] if by_key else [])


def test_the_next_of_a_key_waits_for_its_own_time() -> None:
    items = loaded([b"1:%d:0:kx" % NOW_MS, b"2:%d:0:kx" % (NOW_MS + 10_000)])
    assert items.take_due(NOW_S, 500, yes) == [1]
    items.finish(1, NOW_S)
    assert items.take_due(NOW_S + 9, 500, yes) == []
    assert items.due_in_s(NOW_S) == 10.0
    assert items.take_due(NOW_S + 10, 500, yes) == [2]


def test_what_is_put_back_keeps_its_place() -> None:
    items = loaded(page(1, 3, b"kx"))
    assert items.take_due(NOW_S, 500, yes) == [1]
    items.got(1)
    items.put_back(1, NOW_S + 5)
    assert items.take_due(NOW_S + 4, 500, yes) == []
    assert items.take_due(NOW_S + 5, 500, yes) == [1]


def test_an_item_waits_for_its_lane() -> None:
    busy = {"x"}
    items = Later(by_key=True, lane_busy=busy.__contains__)
    items.learn([*page(1, 2, b"kx"), *page(3, 3, b"ky")], 4, NOW_MS, NOW_S)
    assert items.take_due(NOW_S, 500, yes) == [3]
    assert items.take_due(NOW_S + 99, 500, yes) == []
    assert items.due_in_s(NOW_S) == float("inf")
    busy.clear()
    items.lane_free("y", NOW_S)
    assert items.take_due(NOW_S, 500, yes) == []
    items.lane_free("x", NOW_S)
    assert items.take_due(NOW_S, 500, yes) == [1]


def test_suspects_come_in_waves() -> None:
    items = loaded(page(1, 100, gets=SUSPECT_GETS))
    came: list[int] = []
    assert items.suspects_wait
    assert items.take_due(NOW_S, 500, yes) == list(range(1, WAVE + 1))
    while len(came) < 100:
        assert len(items.out) <= WAVE
        came.append(items.out[0])
        items.finish(came[-1], NOW_S)
        items.take_due(NOW_S, 500, yes)
    assert came == list(range(1, 101))
    assert not items.suspects_wait


def test_the_last_of_the_suspects_come_one_by_one_in_the_whole_process() -> None:
    items = loaded(page(1, 3, gets=ALONE_GETS))
    assert items.take_due(NOW_S, 500, lambda: False) == []
    assert items.alone is None
    assert items.due_in_s(NOW_S) == pytest.approx(later.SUSPECT_PAUSE_S)
    now_s = NOW_S
    for item in (1, 2, 3):
        now_s += 1
        (taken,) = items.take_due(now_s, 500, lambda: items.alone is None)
        assert taken == item
        assert items.out == [item]
        now_s += 1
        assert items.take_due(now_s, 500, lambda: items.alone is None) == []
        items.got(item)
        items.finish(item, now_s)
    assert items.alone is None


def test_an_answer_that_was_lost_is_nobodys_fault() -> None:
    items = loaded([*page(1, 1), *page(2, 2, gets=SUSPECT_GETS), *page(3, 3, gets=ALONE_GETS)])
    for _ in range(10):
        assert items.take_due(NOW_S, 500, lambda: items.alone is None) == [1, 2, 3]
        assert not items.take_due(NOW_S + 99, 500, lambda: items.alone is None)
        assert [item.gets for item in items.items.values()] == [1, SUSPECT_GETS + 1, ALONE_GETS + 1]
        assert items.ask_again(NOW_S) == [1, 2, 3]
        assert items.out == []
    items.take_due(NOW_S, 500, yes)
    items.got(1)
    assert items.ask_again(NOW_S) == [2, 3]


# -- members of the index ------------------------------------------------------------------------------------


@given(st.integers(1, 2**53), st.integers(0, 2**53), st.integers(0, 9), st.none() | st.text() | st.binary())
def test_a_member_comes_back(item: int, due_ms: int, gets: int, key: Key) -> None:
    try:
        tag = key_tag(key)
    except UnicodeEncodeError:  # a surrogate: no message has such a key
        return
    parsed = parse_member(b"%d:%d:%d:%b" % (item, due_ms, gets, tag), NOW_MS, NOW_S)
    assert parsed is not None
    assert (parsed.id, parsed.gets) == (item, gets)
    assert parsed.due_s == pytest.approx(NOW_S + (due_ms - NOW_MS) / 1000)
    assert (parsed.lane is None) == (key is None)
    if isinstance(key, str):
        assert parsed.lane == key
    if isinstance(key, bytes):
        assert parsed.lane == key.decode(errors="surrogateescape")


@pytest.mark.parametrize("key", [None, "a", "a:b", ":", b"\xff:", "k", ""], ids=repr)
def test_a_key_of_any_bytes_is_told_from_none(key: Key) -> None:
    parsed = parse_member(b"1:2:3:" + key_tag(key), 0, 0.0)
    assert parsed is not None
    assert (parsed.lane is None) == (key is None)


def test_text_and_its_bytes_are_one_key() -> None:
    assert key_tag("é") == key_tag("é".encode())


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: repr(broken)[:20])
def test_broken_members_are_left_where_they_are(broken: bytes) -> None:
    assert parse_member(broken, NOW_MS, NOW_S) is None
    items = loaded([broken, b"2:0:0:kx"])
    assert set(items.items) == {2}
    assert not items.behind


@given(st.binary(max_size=30) | st.lists(st.sampled_from([b"1", b"0", b"99", b"", b"k", b"x"])).map(b":".join))
def test_any_bytes_are_a_member_or_none(data: bytes) -> None:
    parsed = parse_member(data, NOW_MS, NOW_S)
    assert parsed is None or data.startswith((b"%d" % parsed.id, b"0"))
