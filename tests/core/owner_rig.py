"""The owner of a shard, as runtime/shard.py and runtime/steps.py join session, lanes and what is handled later, driven
by hand against the model of the store, with what must hold at every moment. Small bounds, its own clock, no I/O.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterator, Sequence

import msgspec
import pytest

from shardq.core import appetite, in_hand, later
from shardq.core.lanes import lane_key
from shardq.core.lease import Trust
from shardq.core.message import Message
from shardq.core.records import Key
from shardq.core.step import Step
from shardq.runtime import runners
from shardq.runtime import shard as runtime_shard
from shardq.runtime.failures import dead_record_of
from shardq.runtime.list_runners import BatchRunners
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.shard import OwnedShard
from shardq.storage.keys import Keys
from tests.core.store_model import BAD, GOOD, ID, Store, batch_of, number_of

LANES = ("a", "b", "\udcff")


class Clock:
    now_s = 0.0


def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that a test of a few messages reaches."""
    monkeypatch.setattr(later, "PAGE", 3)
    monkeypatch.setattr(later, "WAVE", 2)
    monkeypatch.setattr(appetite, "ITEMS_AT_ONCE", 2)
    for module in (appetite, in_hand):
        monkeypatch.setattr(module, "STEP_BYTES", 200)
    monkeypatch.setattr(runtime_shard, "monotonic", lambda: Clock.now_s)
    monkeypatch.setattr(runners, "Runner", object)  # no tasks here


def id_of(message: Message) -> ID:
    return number_of(message.batch.entry), message.index


def lane(key: Key) -> str | None:
    return lane_key(key) if key is not None else None


async def never(messages: Sequence[Message]) -> None:
    raise AssertionError


class OwnerRig:
    """`shard` is the present owner's. `over` are the messages that its handlers are through with or that were finished
    in the store when it took over; `returned` those that any owner's handler returned from."""

    by_key = True
    lists: BatchRunners | None = None
    shard: OwnedShard

    def __init__(self) -> None:
        Clock.now_s = 100.0
        self.store = Store()
        self.lane_of: dict[ID, str | None] = {}
        self.broken: dict[int, int] = {}
        self.lost_entries: set[int] = set()
        self.unordered: set[ID] = set()  # replayed, deleted, or never read: they have no place in their key's order
        self.erased: set[ID] = set()
        self.returned: set[ID] = set()
        self.waiting: Step | None = None
        self.epoch = 0
        self.crash()

    # -- what other clients do -------------------------------------------------------------------------------

    def append(self, *keys: Key) -> None:
        self._note(keys)
        self.store.add([b"at", b"0", b"batch", batch_of(self.store.next_entry, keys)], len(keys), ours=True)

    def append_foreign(self) -> None:
        self._note([None])
        self.store.add([b"name", b"x", b"batch", b"x"], 1, ours=False)

    def append_broken(self, count: int) -> None:
        entry = self.store.next_entry
        self._note([None] * count)
        self.broken[entry] = count
        self.unordered |= {(entry, index) for index in range(count)}
        self.store.add([b"at", b"0", b"batch", batch_of(1, ["k"] * count)[:4] + b"\xc1"], count, ours=True)

    def _note(self, keys: Sequence[Key]) -> None:
        entry = self.store.next_entry
        self.lane_of |= {(entry, index): lane(key) for index, key in enumerate(keys)}

    def deletable(self) -> list[int]:
        """Entries of one message: whoever reads another then can only tell that one entry is gone."""
        return [entry for entry in self.store.pending if self.store.counts[entry] == 1 and entry in self.store.stream]

    def delete_entry(self, entry: int) -> None:
        del self.store.stream[entry]
        self.lost_entries.add(entry)
        self.unordered.add((entry, 0))

    def delete(self, id_: ID) -> None:
        self.store.mark(id_)
        self.unordered.add(id_)
        self.erased.add(id_)

    def replay(self) -> None:
        """The oldest dead letter of a message."""
        letters = [msgspec.msgpack.decode(raw) for _, raw in self.store.letters]
        replayed = self.store.replay(next(place for place, letter in enumerate(letters) if "id" in letter))
        self.unordered.add(replayed)
        self.over.discard(replayed)
        self.tries.pop(replayed, None)
        self.returned.discard(replayed)

    def wait(self, passed_s: float) -> None:
        Clock.now_s += passed_s
        self.store.now_ms += int(passed_s * 1000)

    # -- the owner's life ------------------------------------------------------------------------------------

    def leave(self) -> None:
        """In good order: what was not handled counts as never fetched."""
        self._until_answered()
        self.waiting = self.shard.session.last_step()
        self._until_answered()
        self.crash()

    def _until_answered(self) -> None:
        while self.waiting is not None:
            self.try_step("answered")

    def crash(self) -> None:
        """Or the owner was too slow: a step of its own that is still under way comes too late."""
        late = (self.shard, self.waiting) if self.waiting is not None else None
        self.epoch += 1
        self.ready: deque[Message] = deque()
        self.shard = OwnedShard(
            "q",
            "g",
            0,
            self.epoch,
            "ab"[self.epoch % 2],
            keys=Keys("p", "q").shard(0, "t"),
            step=0,
            trust=Trust(5, Clock.now_s),
            ready=self.ready if self.lists is None else None,
            by_key=self.by_key,
        )
        self.shard.session.arrivals.describe = self._given_up
        self.store.token, self.store.step_number = self.shard.token, 0
        self.running: list[Message] = []
        self.waiting = None
        self.over: set[ID] = set(self.lane_of) - self.store.unfinished()
        self.due_s: dict[ID, float] = {}
        self.tries: dict[ID, int] = {}
        if late is not None:
            assert self.store.step(late[0].token, late[1]).status == "FENCED"

    def _given_up(self, message: Message, error: str) -> bytes:
        assert "its worker process died" in error
        self.over.add(id_of(message))
        return dead_record_of(message, error)

    # -- handling --------------------------------------------------------------------------------------------

    @property
    def may_take(self) -> bool:
        return bool(self.ready)

    def take(self, count: int = 1) -> None:
        for _ in range(count):
            message = self.ready.popleft()
            if self.shard.is_deleted(message):
                self.over.add(id_of(message))
                self._finish(message)
            else:
                self._start(message)

    def _start(self, message: Message) -> None:
        id_ = id_of(message)
        assert id_ not in self.over, "handled again though it was over"
        assert id_ not in map(id_of, self.running), "handled twice at once"
        assert message.value in ([*id_], {"name": b"x", "batch": b"x"}), "the value is not the one that was sent"
        assert Clock.now_s >= self.due_s.pop(id_, 0.0) - 0.001, "handled before it was due"
        assert message.attempt == self.tries.setdefault(id_, message.attempt), "the failure before was not counted"
        if self.by_key and self.lane_of[id_] is not None:
            self._start_of_key(message, id_)
        self.running.append(message)

    def _start_of_key(self, message: Message, id_: ID) -> None:
        assert self.lane_of[id_] == lane(message.key)
        if self.lists is None:
            assert self.lane_of[id_] not in [self.lane_of[id_of(other)] for other in self.running], "two at a time"
        if id_ not in self.unordered:
            before = {other for other in self._ordered(self.lane_of[id_]) if other < id_}
            assert before <= self.over | set(map(id_of, self.running)), "handled before an earlier one of its key"

    def _ordered(self, of_lane: str | None) -> list[ID]:
        return sorted(id_ for id_, other in self.lane_of.items() if other == of_lane and id_ not in self.unordered)

    def end(self, place: int, what: str) -> None:
        """A handler ends: 'returns', 'writes' (the first message of a batch what Redis refuses), 'dead' or 'fails
        <seconds to the next try>'."""
        self._end(self.running.pop(place), what)

    def interrupt(self) -> None:
        """The lease was not trusted for a moment: what runs is stopped, and goes on."""
        for message in self.running:
            self._scribble(message)
        self.shard.suspended, self.running = self.running, []
        self._resume(self.shard.renewed(Clock.now_s))

    def _resume(self, messages: list[Message]) -> None:
        self.ready.extend(messages)

    def _end(self, message: Message, what: str) -> None:
        self._scribble(message)
        if what == "dead":
            self.over.add(id_of(message))
            self.shard.bury(message, dead_record_of(message, "it failed"))
        elif what.startswith("fails"):
            wait_s = float(what.split()[1])
            self.due_s[id_of(message)], self.tries[id_of(message)] = Clock.now_s + wait_s, message.attempt + 1
            self.shard.effects[message.id] = [GOOD]
            self.shard.put_off(message, wait_s, "it failed")
        else:
            self._returns(message, effects=what == "writes")
            self._finish(message)

    def _finish(self, message: Message) -> None:
        following = self.shard.finish(message)
        if following is not None:
            self.ready.append(following)

    def _returns(self, message: Message, *, effects: bool) -> None:
        self.over.add(id_of(message))
        self.returned.add(id_of(message))
        if effects:
            self.shard.effects[message.id] = [GOOD, BAD if message.index == 0 else GOOD]

    @staticmethod
    def _scribble(message: Message) -> None:
        """What handlers do to the object they are given is nobody else's business."""
        if isinstance(message.value, list):
            message.value.append("scribble")
        else:
            message.value["scribble"] = b"y"

    # -- committing and fetching -----------------------------------------------------------------------------

    def step(self, limit: int = 9, *fates: str) -> None:
        """Tries of the step that is under way, or of new ones: 'answered', 'reply lost' or 'call lost'."""
        for fate in fates or ("answered",):
            self.waiting = self.waiting or self._new_step(limit)
            self.try_step(fate)

    def _new_step(self, limit: int) -> Step:
        """As Serving and Steps do it."""
        held = self.shard.session
        if held.later.due_in_s(Clock.now_s) <= 0 and held.items_wanted > 0:
            held.ask(held.later.take_due(Clock.now_s, held.items_wanted, lambda: held.later.alone is None))
        return held.next_step(min(limit, held.entries_wanted(1000)), 12)

    def try_step(self, fate: str) -> None:
        step, held = self.waiting, self.shard.session
        assert step is not None
        if fate == "call lost":
            return
        before = set(self.store.kept_id.values())
        answer = self.store.step(self.shard.token, step)
        self._nothing_unfinished_was_acknowledged(step, before)
        if fate == "reply lost":
            return
        assert answer.status != "FENCED"
        if answer.status == "EFFECT":
            self._refuse(step, answer.effect)
            return
        self.waiting = None
        held.applied(step)
        if answer.status == "REPEAT":
            held.reread(step, Clock.now_s)
            return
        if answer.fetched.marks != held.marks_version:
            self.shard.set_marks(answer.fetched.marks, self.store.marks)
        batches = held.receive(step, answer.fetched, Clock.now_s)
        for messages in batches:
            ids = list(map(id_of, messages))
            assert ids == sorted(ids)
            assert ids
            assert not self.over & set(ids), "fetched again though it was over"
        self._deliver(batches)

    def _deliver(self, batches: list[list[Message]]) -> None:
        for messages in batches:
            self.shard.admit(messages)

    def _refuse(self, step: Step, number: int) -> None:
        message = step.effects[number - 1][0]
        self.returned.discard(id_of(message))
        self.shard.session.amend(step, message, dead_record_of(message, "Redis refused"))

    def _nothing_unfinished_was_acknowledged(self, step: Step, kept_before: set[ID]) -> None:
        """An entry goes in the step that puts its last messages elsewhere, not before it."""
        elsewhere = self.over | self.erased | self.store.dead_ids() | set(self.store.kept_id.values()) | kept_before
        for batch in step.finished:
            entry = number_of(batch.entry)
            if entry not in self.store.pending and entry not in self.broken and entry not in self.lost_entries:
                assert {(entry, index) for index in range(self.store.counts[entry])} <= elsewhere

    # -- what must hold --------------------------------------------------------------------------------------

    def in_hand(self) -> Iterator[Message]:
        yield from self.running
        yield from self.ready
        if self.shard.lanes is not None:
            for message in [*self.running, *self.ready]:
                while (following := message._next) is not None:
                    yield following
                    message = following

    def check(self) -> None:
        left = self.store.unfinished()
        assert self.store.backlog() == len(left), "the counters are not exact"
        assert self.shard.hand.outstanding == len(list(self.in_hand()))
        gone = set(self.lane_of) - left - self.returned - self.erased - self.store.dead_ids()
        assert {entry for entry, _ in gone} <= self.broken.keys() | self.lost_entries, "lost"
        assert all(count == 2 for count in self.store.carried_out.values()), "effects came in part, or twice"
        if self.by_key:
            self._each_key_is_finished_from_its_beginning(left)
            if self.lists is None:
                lanes = Counter(self.lane_of[id_of(message)] for message in [*self.running, *self.ready])
                assert all(count == 1 for of_lane, count in lanes.items() if of_lane is not None)

    def _each_key_is_finished_from_its_beginning(self, left: set[ID]) -> None:
        """Whoever takes over now finds each key finished up to some message, and nothing behind that."""
        for of_lane in LANES:
            marks = [id_ in left for id_ in self._ordered(of_lane)]
            assert marks == sorted(marks), "a later message of the key was finished first"

    # -- the end ---------------------------------------------------------------------------------------------

    def handle_all(self) -> None:
        while self.ready or self.running:
            if self.ready:
                self.take()
            if self.running:
                self.end(-1, "returns")

    def settle(self) -> None:
        """Every handler returns from now on: nothing is left over, here or in the store."""
        held = self.shard.session
        rounds = 0
        while self.waiting or any(self.in_hand()) or held.hand.uncommitted or held.hungry or self.store.unfinished():
            rounds += 1
            assert rounds < 1000, "never comes to an end"
            self.handle_all()
            self.step(3)
            self.wait(40.0)
            self.check()
        assert not self.store.pending
        assert not self.store.kept
        self._nothing_is_remembered()
        self._dead_letters_are_of_what_was_broken()

    def _nothing_is_remembered(self) -> None:
        held = self.shard.session
        assert not held.hand.entries
        assert not held.later.holding
        assert not held.later.items
        assert not held.later.suspects_wait
        assert not held.later.out
        assert held.later.due_in_s(Clock.now_s) == float("inf")
        assert held.later.alone is None
        assert not self.shard.effects
        assert self.shard.lanes is None or not len(self.shard.lanes)

    def _dead_letters_are_of_what_was_broken(self) -> None:
        letters = [(msgspec.msgpack.decode(raw), count) for count, raw in self.store.letters]
        entries = [(number_of(letter["entry"]), count) for letter, count in letters if "id" not in letter]
        assert len(entries) == len(dict(entries)), "two dead letters of one entry"
        kept = {entry: count for entry, count in self.broken.items() if entry not in self.lost_entries}
        assert {entry: count for entry, count in entries if entry not in self.lost_entries} == kept


class UnorderedRig(OwnerRig):
    """Nothing waits for anything."""

    by_key = False


class ListsRig(OwnerRig):
    """Whole lists are handled, one at a time, as BatchRunners takes them. A list fails as a whole."""

    lists: BatchRunners

    def __init__(self) -> None:
        self.lists = BatchRunners(WorkerSettings(), never)
        self.taken: list[list[Message]] = []
        super().__init__()

    def crash(self) -> None:
        super().crash()
        self.taken = []

    def in_hand(self) -> Iterator[Message]:
        yield from self.running
        yield from itertools.chain.from_iterable(self.lists._waiting.get(self.shard, ()))

    def _deliver(self, batches: list[list[Message]]) -> None:
        self.lists.deliver(self.shard, batches)

    def _resume(self, messages: list[Message]) -> None:
        self.lists.resume(self.shard, messages)

    @property
    def may_take(self) -> bool:
        return not self.running and self.shard in self.lists._waiting

    def take(self, count: int = 1) -> None:
        """The next list."""
        assert self.lists._ready_shards.pop() is self.shard
        self.lists._ready_shards.clear()  # of predecessors
        self.taken = self.lists._take(self.shard)
        for message in itertools.chain.from_iterable(self.taken):
            self._start(message)
        if not self.running:
            self.lists._next(self.shard)

    def end(self, place: int, what: str) -> None:
        messages, self.running = self.running, []
        if what == "dead" or what.startswith("fails"):
            for number, message in enumerate(messages):
                self._end(message, "dead" if number % 3 == 2 and message.batch.item else what)
        else:
            for message in messages:
                self._scribble(message)
                self._returns(message, effects=what == "writes")
            self.shard.finish_list(self.taken)
        self.lists._next(self.shard)

    def handle_all(self) -> None:
        while self.running or self.may_take:
            if self.running:
                self.end(0, "returns")
            else:
                self.take()
