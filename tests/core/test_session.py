"""The owner of a shard (session, lanes, what is handled later, as runtime/shard.py joins them) against a model of the
store: failures, retries, dead letters and replays, with crashes, lost replies and takeovers at any point.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterator, Sequence

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shardq.core import later, session
from shardq.core.lanes import lane_key
from shardq.core.lease import Trust
from shardq.core.message import Message
from shardq.core.records import Key
from shardq.core.session import Step
from shardq.runtime import runners
from shardq.runtime import shard as runtime_shard
from shardq.runtime.failures import dead_record_of
from shardq.runtime.runners import BatchRunners
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.shard import OwnedShard
from shardq.storage.keys import Keys
from tests.core.store_model import BAD, GOOD, ID, Store, batch_of, number_of

KEYS: list[Key] = [None, "a", "a", b"a", b"\xff"]
NONCES = "ab"
FATES = ["answered"] * 4 + ["reply lost", "call lost"]
ENDS = ["take"] * 6 + ["returns"] * 3 + ["fails 0", "fails 0.05", "fails 1", "fails 30", "dead", "writes"]
OTHERS = ["append"] * 6 + ["broken", "foreign", "delete", "delete an entry"]
SOME_KEYS = st.lists(st.sampled_from(KEYS), min_size=1, max_size=4)
WAITS_S = st.sampled_from([0.0, 0.0, 0.0, 0.05, 2.0, 40.0])
EVENTS = st.tuples(st.sampled_from(ENDS), st.integers(0, 5))


class Clock:
    now_s = 0.0


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that a test of a few messages reaches."""
    monkeypatch.setattr(later, "PAGE", 3)
    monkeypatch.setattr(later, "WAVE", 2)
    monkeypatch.setattr(session, "ITEMS_AT_ONCE", 2)
    monkeypatch.setattr(session, "STEP_BYTES", 200)
    monkeypatch.setattr(runtime_shard, "monotonic", lambda: Clock.now_s)
    monkeypatch.setattr(runners, "_Runner", object)  # no tasks here


def id_of(message: Message) -> ID:
    return number_of(message.batch.entry), message.index


def lane(key: Key) -> str | None:
    return lane_key(key) if key is not None else None


async def never(messages: Sequence[Message]) -> None:
    raise AssertionError


class OwnerMachine(RuleBasedStateMachine):
    """`shard` is the present owner's. `over` are the messages that its handlers are through with or that were finished
    in the store when it took over; `returned` those that any owner's handler returned from."""

    by_key = True
    lists: BatchRunners | None = None

    @initialize(stored=st.lists(SOME_KEYS, min_size=1, max_size=4))
    def begin(self, stored: list[list[Key]]) -> None:
        Clock.now_s = 100.0
        self.store = Store()
        self.lane_of: dict[ID, str | None] = {}
        self.broken: dict[int, int] = {}
        self.deleted: set[int] = set()
        self.unordered: set[ID] = set()  # replayed, deleted, or never read: they have no place in their key's order
        self.erased: set[ID] = set()
        self.returned: set[ID] = set()
        self.epoch = 0
        for keys in stored:
            self.append(keys)
        self.take_over()

    # -- what other clients do -------------------------------------------------------------------------------

    def note(self, keys: list[Key]) -> None:
        entry = self.store.next_entry
        self.lane_of |= {(entry, index): lane(key) for index, key in enumerate(keys)}

    @rule(what=st.sampled_from(OTHERS), keys=SOME_KEYS, place=st.integers(0, 8))
    def others(self, what: str, keys: list[Key], place: int) -> None:
        if what == "append":
            self.append(keys)
        elif what == "broken":
            self.append_a_broken_batch(place + 1)
        elif what == "foreign":
            self.note([None])
            self.store.add([b"name", b"x", b"batch", b"x"], 1, ours=False)
        elif what == "delete":
            self.delete_a_message(place)
        elif deletable := self.deletable():
            entry = deletable[place % len(deletable)]
            del self.store.stream[entry]
            self.deleted.add(entry)
            self.unordered.add((entry, 0))

    def append(self, keys: list[Key]) -> None:
        self.note(keys)
        self.store.add([b"at", b"0", b"batch", batch_of(self.store.next_entry, keys)], len(keys), ours=True)

    def append_a_broken_batch(self, count: int) -> None:
        entry = self.store.next_entry
        self.note([None] * count)
        self.broken[entry] = count
        self.unordered |= {(entry, index) for index in range(count)}
        self.store.add([b"at", b"0", b"batch", batch_of(1, ["k"] * count)[:4] + b"\xc1"], count, ours=True)

    def deletable(self) -> list[int]:
        # Of one message: whoever reads it then can only tell that one entry is gone.
        return [entry for entry in self.store.pending if self.store.counts[entry] == 1 and entry in self.store.stream]

    def delete_a_message(self, place: int) -> None:
        """One of the youngest."""
        id_ = list(self.lane_of)[-1 - place % len(self.lane_of)]
        if id_ in self.store.unfinished() and id_[0] not in self.broken:
            self.store.mark(id_)
            self.unordered.add(id_)
            self.erased.add(id_)

    @precondition(lambda self: self.store.dead_ids())
    @rule()
    def replay(self) -> None:
        letters = [msgspec.msgpack.decode(raw) for _, raw in self.store.letters]
        replayed = self.store.replay(next(place for place, letter in enumerate(letters) if "id" in letter))
        self.unordered.add(replayed)
        self.over.discard(replayed)
        self.returned.discard(replayed)

    # -- time, and the owner's life --------------------------------------------------------------------------

    def wait(self, passed_s: float) -> None:
        Clock.now_s += passed_s
        self.store.now_ms += int(passed_s * 1000)

    @rule(how=st.sampled_from(["stay", "stay", "crash", "crash", "leave"]))
    def go(self, how: str) -> None:
        if how == "leave":
            self.leave()
        elif how == "crash":
            self.take_over()

    def leave(self) -> None:
        """In good order: what was not handled counts as never fetched."""
        while self.waiting is not None:
            self.try_step("answered")
        self.waiting = self.shard.session.last_step()
        while self.waiting is not None:
            self.try_step("answered")
        self.take_over()

    def take_over(self) -> None:
        """The owner crashed, or was too slow: a step of its own that is still under way comes too late."""
        late = (self.shard, self.waiting) if self.epoch and self.waiting is not None else None
        self.epoch += 1
        self.ready: deque[Message] = deque()
        self.shard = OwnedShard(
            "q",
            "g",
            0,
            self.epoch,
            NONCES[self.epoch % 2],
            keys=Keys("p", "q").shard(0, "t"),
            step=0,
            trust=Trust(5, Clock.now_s),
            ready=self.ready if self.lists is None else None,
            by_key=self.by_key,
        )
        self.shard.session._describe = self.given_up
        self.store.token, self.store.step_number = self.shard.token, 0
        self.running: list[Message] = []
        self.waiting: Step | None = None
        self.over: set[ID] = set(self.lane_of) - self.store.unfinished()
        if late is not None:
            assert self.store.step(late[0].token, late[1]).status == "FENCED"

    def given_up(self, message: Message, error: str) -> bytes:
        """Its owners died of it again and again, as far as they know."""
        assert "died" in error
        self.over.add(id_of(message))
        return dead_record_of(message, error)

    # -- handling, one message at a time ---------------------------------------------------------------------

    @precondition(lambda self: self.ready or self.running)
    @rule(events=st.lists(EVENTS, min_size=1, max_size=4))
    def handle(self, events: list[tuple[str, int]]) -> None:
        for what, place in events:
            if self.ready and (what == "take" or not self.running):
                self.take()
            elif self.running:
                self.end(self.running.pop(place % len(self.running)), what)

    def take(self) -> None:
        message = self.ready.popleft()
        if self.shard.is_deleted(message):
            self.over.add(id_of(message))
            self.shard.finish(message)
        else:
            self.may_start(message)
            self.running.append(message)

    def end(self, message: Message, what: str) -> None:
        """A handler ends, in one way or another."""
        self.scribble(message)
        if what == "dead":
            self.over.add(id_of(message))
            self.shard.bury(message, dead_record_of(message, "it failed"))
        elif what.startswith("fails"):
            self.shard.effects[message.id] = [GOOD]
            self.shard.put_off(message, float(what.split()[1]), "it failed")
        else:
            self.returns(message, effects=what == "writes")
            self.shard.finish(message)

    def returns(self, message: Message, *, effects: bool) -> None:
        self.over.add(id_of(message))
        self.returned.add(id_of(message))
        if effects:
            self.shard.effects[message.id] = [GOOD, BAD if message.index == 0 else GOOD]

    def may_start(self, message: Message) -> None:
        id_ = id_of(message)
        assert id_ not in self.over, "handled again though it was over"
        assert id_ not in map(id_of, self.running), "handled twice at once"
        assert message.value in ([*id_], {"name": b"x", "batch": b"x"}), "the value is not the one that was sent"
        if not self.by_key or self.lane_of[id_] is None:
            return
        assert self.lane_of[id_] == lane(message.key)
        if self.lists is None:
            assert self.lane_of[id_] not in [self.lane_of[id_of(other)] for other in self.running], "two at a time"
        if id_ not in self.unordered:
            before = {other for other in self.ordered(self.lane_of[id_]) if other < id_}
            assert before <= self.over | set(map(id_of, self.running)), "handled before an earlier one of its key"

    def ordered(self, of_lane: str | None) -> list[ID]:
        return sorted(id_ for id_, other in self.lane_of.items() if other == of_lane and id_ not in self.unordered)

    @staticmethod
    def scribble(message: Message) -> None:
        """What handlers do to the object they are given is nobody else's business."""
        if isinstance(message.value, list):
            message.value.append("scribble")
        else:
            message.value["scribble"] = b"y"

    # -- committing and fetching -----------------------------------------------------------------------------

    @rule(limit=st.integers(1, 4), fates=st.lists(st.sampled_from(FATES), min_size=1, max_size=4), wait_s=WAITS_S)
    def step(self, limit: int, fates: list[str], wait_s: float) -> None:
        """Tries of the step that is under way, or of new ones."""
        self.wait(wait_s)
        for fate in fates:
            self.waiting = self.waiting or self.new_step(limit)
            self.try_step(fate)

    def new_step(self, limit: int) -> Step:
        """As ShardOwner does it."""
        held = self.shard.session
        if held.later.due_in_s(Clock.now_s) <= 0 and held.items_wanted > 0:
            held.ask(held.later.take_due(Clock.now_s, held.items_wanted, lambda: held.later.alone is None))
        return held.next_step(min(limit, held.entries_wanted(1000)))

    def try_step(self, fate: str) -> None:
        step, held = self.waiting, self.shard.session
        assert step is not None
        if fate == "call lost":
            return
        before = set(self.store.kept_id.values())
        answer = self.store.step(self.shard.token, step)
        self.nothing_unfinished_was_acknowledged(step, before)
        if fate == "reply lost":
            return
        assert answer.status != "FENCED"
        if answer.status == "EFFECT":
            self.refuse(step, answer.effect)
            return
        self.waiting = None
        held.applied(step)
        if answer.status == "REPEAT":
            held.reread(step, Clock.now_s)
            return
        if answer.fetched.marks != held.marks_version:
            self.shard.set_marks(answer.fetched.marks, self.store.marks)
        self.bring(held.receive(step, answer.fetched, Clock.now_s))

    def refuse(self, step: Step, number: int) -> None:
        message = step.effects[number - 1][0]
        self.returned.discard(id_of(message))
        self.shard.session.amend(step, message, dead_record_of(message, "Redis refused"))

    def bring(self, batches: list[list[Message]]) -> None:
        for messages in batches:
            ids = list(map(id_of, messages))
            assert ids == sorted(ids)
            assert ids
            assert not self.over & set(ids), "fetched again though it was over"
        self.deliver(batches)

    def deliver(self, batches: list[list[Message]]) -> None:
        for messages in batches:
            self.shard.admit(messages)

    def nothing_unfinished_was_acknowledged(self, step: Step, kept_before: set[ID]) -> None:
        """An entry goes in the step that puts its last messages elsewhere, not before it."""
        elsewhere = self.over | self.erased | self.store.dead_ids() | set(self.store.kept_id.values()) | kept_before
        for batch in step.finished:
            entry = number_of(batch.entry)
            if entry not in self.store.pending and entry not in self.broken and entry not in self.deleted:
                assert {(entry, index) for index in range(self.store.counts[entry])} <= elsewhere

    # -- what must hold --------------------------------------------------------------------------------------

    def in_hand(self) -> Iterator[Message]:
        yield from self.running
        yield from self.ready
        if self.lists is not None:
            yield from itertools.chain.from_iterable(self.lists._waiting.get(self.shard, ()))
        if self.shard.lanes is not None:
            yield from itertools.chain.from_iterable(filter(None, self.shard.lanes._waiting.values()))

    @invariant()
    def all_holds(self) -> None:
        left = self.store.unfinished()
        assert self.store.backlog() == len(left), "the counters are not exact"
        assert self.shard.session.outstanding == len(list(self.in_hand()))
        gone = set(self.lane_of) - left - self.returned - self.erased - self.store.dead_ids()
        assert {entry for entry, _ in gone} <= self.broken.keys() | self.deleted, "lost"
        assert all(count == 2 for count in self.store.carried_out.values()), (
            "effects were carried out in part, or twice"
        )
        if self.by_key:
            self.each_key_is_finished_from_its_beginning(left)
            self.one_of_a_key_is_in_hand()

    def one_of_a_key_is_in_hand(self) -> None:
        if self.lists is None:
            lanes = [self.lane_of[id_of(message)] for message in [*self.running, *self.ready]]
            assert all(count == 1 for of_lane, count in Counter(lanes).items() if of_lane is not None)

    def each_key_is_finished_from_its_beginning(self, left: set[ID]) -> None:
        """Whoever takes over now finds each key finished up to some message, and nothing behind that."""
        for of_lane in ("a", "\udcff"):
            marks = [id_ in left for id_ in self.ordered(of_lane)]
            assert marks == sorted(marks), "a later message of the key was finished first"

    # -- the end ---------------------------------------------------------------------------------------------

    def handle_all(self) -> None:
        while self.ready or self.running:
            if self.ready:
                self.take()
            if self.running:
                self.end(self.running.pop(), "returns")

    def teardown(self) -> None:
        held = self.shard.session
        rounds = 0
        while self.waiting or any(self.in_hand()) or held.uncommitted or held.hungry or self.store.unfinished():
            rounds += 1
            assert rounds < 1000, "never comes to an end"
            self.handle_all()
            self.step(3, ["answered"], 40.0)
            self.all_holds()
        assert not self.store.pending
        assert not self.store.kept
        self.nothing_is_remembered()
        self.dead_letters_are_of_what_was_broken()

    def nothing_is_remembered(self) -> None:
        held = self.shard.session
        assert not held.in_flight
        assert not held.later.holding
        assert not held.later.items
        assert held.later.due_in_s(Clock.now_s) == float("inf")
        assert held.later.alone is None
        assert not self.shard.effects
        assert self.shard.lanes is None or not len(self.shard.lanes)

    def dead_letters_are_of_what_was_broken(self) -> None:
        letters = [(msgspec.msgpack.decode(raw), count) for count, raw in self.store.letters]
        entries = [(number_of(letter["entry"]), count) for letter, count in letters if "id" not in letter]
        assert len(entries) == len(dict(entries)), "two dead letters of one entry"
        kept = {entry: count for entry, count in self.broken.items() if entry not in self.deleted}
        assert {entry: count for entry, count in entries if entry not in self.deleted} == kept


class UnorderedMachine(OwnerMachine):
    """Nothing waits for anything."""

    by_key = False


class ListsMachine(OwnerMachine):
    """Whole lists are handled, one at a time, as BatchRunners takes them. A list fails as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.lists = BatchRunners(WorkerSettings(), never)

    def take_over(self) -> None:
        super().take_over()
        self.taken: list[list[Message]] = []

    def deliver(self, batches: list[list[Message]]) -> None:
        assert self.lists is not None
        self.lists.deliver(self.shard, batches)

    @rule(events=st.lists(EVENTS, min_size=1, max_size=4))
    def handle(self, events: list[tuple[str, int]]) -> None:
        for what, _ in events:
            if self.running:
                self.end_list(what)
            elif any(self.in_hand()):
                self.take()

    def take(self) -> None:
        lists = self.lists
        assert lists is not None
        assert lists._ready_shards.pop() is self.shard
        lists._ready_shards.clear()  # of predecessors
        self.taken = lists._take(self.shard)
        for message in itertools.chain.from_iterable(self.taken):
            self.may_start(message)
            self.running.append(message)
        if not self.running:
            lists._next(self.shard)

    def end_list(self, what: str) -> None:
        messages, self.running = self.running, []
        if what == "dead" or what.startswith("fails"):
            for place, message in enumerate(messages):
                self.end(message, "dead" if place % 3 == 2 and message.batch.item else what)
        else:
            for message in messages:
                self.returns(message, effects=what == "writes")
            self.shard.finish_list(self.taken)
        assert self.lists is not None
        self.lists._next(self.shard)

    def handle_all(self) -> None:
        while any(self.in_hand()):
            self.handle([("returns", 0)])


for machine, examples in ((OwnerMachine, 150), (UnorderedMachine, 50), (ListsMachine, 100)):
    machine.TestCase.settings = settings(max_examples=examples, stateful_step_count=50)
TestOwner = OwnerMachine.TestCase
TestUnorderedOwner = UnorderedMachine.TestCase
TestOwnerOfLists = ListsMachine.TestCase
