"""The session of a shard's owner against a model of the store: crashes, lost replies and takeovers at any point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shardq.core import records
from shardq.core.message import Message, Ownership
from shardq.core.session import NEW, Entry, Session, Step, dead_letter, unpack_progress

ID = tuple[int, int]  # entry, index of the message
NONCES = "ab"
FATES = ["answered"] * 4 + ["reply lost", "call lost"]
RECORD = b"the record of a message whose attempts are used up"


class Reply(NamedTuple):
    status: str
    entries: Sequence[Entry] = ()
    progress: Sequence[bytes] = ()


def number_of(entry: str | bytes) -> int:
    text = entry.decode() if isinstance(entry, bytes) else entry
    return int(text.split("-")[0])


def batch_bytes(count: int) -> bytes:
    return records.encode(records.RecordBatch(7, None, ["k"] * count, [b"v"] * count, None))


@dataclass
class Store:
    """One shard as scripts/append.lua and scripts/step.lua keep it, for one group."""

    stream: dict[int, list[bytes]] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)  # also of entries that were deleted while pending
    pending: list[int] = field(default_factory=list)
    progress: dict[int, bytes] = field(default_factory=dict)
    token: str = ""
    step_number: int = 0
    last: int = 0
    appended: int = 0
    foreign: int = 0
    acked: int = 0
    dead: int = 0
    delivered: int = 0
    letters: list[tuple[int, bytes]] = field(default_factory=list)

    def add(self, fields: list[bytes], count: int, *, ours: bool) -> None:
        entry = len(self.counts) + 1
        self.stream[entry], self.counts[entry] = fields, count
        self.appended += count if ours else 0

    def step(self, token: str, step: Step) -> Reply:
        if token != self.token:
            return Reply("FENCED")
        if step.number <= self.step_number:
            return Reply("REPEAT")
        self.step_number = step.number
        self.acked += step.acked
        for batch in step.finished:
            self.pending.remove(number_of(batch.entry))  # an entry acknowledged twice is the test's failure
            self.progress.pop(number_of(batch.entry), None)
        for batch, done in step.partial:
            self.progress[number_of(batch.entry)] = done
        self.letters += step.dead
        self.dead += sum(count for count, _ in step.dead)
        return self.fetch(step) if step.entries_max else Reply("OK")

    def fetch(self, step: Step) -> Reply:
        if step.cursor != NEW:
            found = [entry for entry in self.pending if entry > number_of(step.cursor)][: step.entries_max]
            return Reply("OK", self.entries(found), [self.progress.get(entry, b"") for entry in found])
        found = [entry for entry in self.stream if entry > self.last][: step.entries_max]
        self.pending += found
        for entry in found:
            self.last = entry
            self.delivered += self.counts[entry]
            self.foreign += self.stream[entry][0] != b"at"
        return Reply("OK", self.entries(found))

    def entries(self, numbers: list[int]) -> list[Entry]:
        return [(f"{number}-0".encode(), self.stream.get(number, [])) for number in numbers]

    def unfinished(self) -> set[ID]:
        """Every message that the group has not finished, by reading all there is."""
        left = set()
        for entry in [*self.pending, *(entry for entry in self.stream if entry > self.last)]:
            done = unpack_progress(self.progress.get(entry, b""), self.counts[entry])
            left |= {(entry, index) for index in range(self.counts[entry]) if not done[index]}
        return left


class SessionMachine(RuleBasedStateMachine):
    """`session` is the present owner's; `held` what its handlers have, `finished` what any owner's handler finished."""

    @initialize()
    def begin(self) -> None:
        self.store = Store()
        self.session = Session(Ownership("q", "g", 0, 0, ""), 0, dead_letter)
        self.finished: set[ID] = set()
        self.broken: dict[int, int] = {}
        self.deleted: set[int] = set()
        self.epoch = 0
        self.take_over()

    # -- what other clients do ----------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 9))
    def append(self, count: int) -> None:
        self.store.add([b"at", b"0", b"batch", batch_bytes(count)], count, ours=True)

    @rule(count=st.integers(1, 9), tail=st.binary(max_size=5))
    def append_a_broken_batch(self, count: int, tail: bytes) -> None:
        self.broken[len(self.store.counts) + 1] = count
        self.store.add([b"at", b"0", b"batch", batch_bytes(count)[:4] + b"\xc1" + tail], count, ours=True)

    @rule(fields=st.lists(st.sampled_from([b"name", b"value", b"batch"]), min_size=1, max_size=3))
    def append_a_foreign_entry(self, fields: list[bytes]) -> None:
        self.store.add([part for name in fields for part in (name, b"x")], 1, ours=False)

    @precondition(lambda self: any(self.deletable()))
    @rule(data=st.data())
    def delete_a_pending_entry(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.deletable()))
        del self.store.stream[entry]
        self.deleted.add(entry)

    def deletable(self) -> list[int]:
        # Of one message: whoever reads it then can only tell that one entry is gone.
        return [entry for entry in self.store.pending if self.store.counts[entry] == 1 and entry in self.store.stream]

    # -- what the owner does ------------------------------------------------------------------------------------------

    @rule(now=st.sampled_from([True, False, False, False]))
    def crash(self, now: bool) -> None:
        if now:
            self.take_over()

    def take_over(self) -> None:
        """The owner crashed, or was too slow: a step of its own that is still under way comes too late."""
        late = (self.session, self.waiting) if self.epoch and self.waiting is not None else None
        self.epoch += 1
        owner = Ownership("q", "g", 0, self.epoch, NONCES[self.epoch % 2])
        self.session = Session(owner, 0, dead_letter)
        self.store.token, self.store.step_number = owner.token, 0
        self.held: list[Message] = []
        self.seen: set[ID] = set()
        self.waiting: Step | None = None
        self.uncommitted = self.store.unfinished()
        if late is not None:
            assert self.store.step(late[0].owner.token, late[1]).status == "FENCED"

    @precondition(lambda self: self.held)
    @rule(data=st.data(), bury=st.booleans())
    def finish_one(self, data: st.DataObject, bury: bool) -> None:
        message = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.finished.add((number_of(message.batch.entry), message.index))
        if bury:
            self.session.bury(message, RECORD)
        else:
            self.session.finish(message)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), all_of_it=st.booleans())
    def finish_several_of_one_batch(self, data: st.DataObject, all_of_it: bool) -> None:
        batch = data.draw(st.sampled_from(self.held)).batch
        mine = [message for message in self.held if message.batch is batch]
        chosen = mine if all_of_it else data.draw(st.lists(st.sampled_from(mine), min_size=1, unique_by=id))
        self.finished |= {(number_of(message.batch.entry), message.index) for message in chosen}
        self.held = [message for message in self.held if message not in chosen]
        self.session.finish_list(chosen)

    @rule(limit=st.integers(1, 4) | st.just(0), fate=st.sampled_from(FATES))
    def step(self, limit: int, fate: str) -> None:
        """One try of the step that is under way, or of a new one."""
        if self.waiting is None:
            self.waiting = self.session.next_step(limit)
        self.try_step(fate)

    def try_step(self, fate: str) -> None:
        step = self.waiting
        assert step is not None
        if fate == "call lost":
            return
        entries = [number_of(batch.entry) for batch in step.finished]
        reply = self.store.step(self.session.owner.token, step)
        self.nothing_unfinished_was_acknowledged(entries)
        if fate == "reply lost":
            return
        self.waiting = None
        assert reply.status != "FENCED"
        self.session.applied(step)
        if reply.status == "REPEAT":
            self.session.reread()
            return
        for messages in self.session.receive(step, reply.entries, reply.progress):
            self.hand_out(messages)

    def hand_out(self, messages: list[Message]) -> None:
        ids = [(number_of(message.batch.entry), message.index) for message in messages]
        assert ids == sorted(ids)
        assert not self.seen & set(ids), "handled twice by one owner"
        at_takeover = {entry for entry, _ in self.uncommitted}
        assert all(id_ in self.uncommitted for id_ in ids if id_[0] in at_takeover), "handled again though committed"
        self.seen |= set(ids)
        self.held += messages

    def nothing_unfinished_was_acknowledged(self, entries: list[int]) -> None:
        for entry in entries:
            if entry not in self.broken and entry not in self.deleted:
                assert {(entry, index) for index in range(self.store.counts[entry])} <= self.finished

    # -- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def counters_are_exact(self) -> None:
        store = self.store
        backlog = store.appended + store.foreign - store.acked - store.dead
        unread = sum(fields[0] != b"at" for entry, fields in store.stream.items() if entry > store.last)
        assert backlog == len(store.unfinished()) - unread
        assert self.session.outstanding == len(self.held)

    def teardown(self) -> None:
        rounds = 0
        while self.waiting is not None or self.held or self.session.uncommitted or self.store.unfinished():
            rounds += 1
            assert rounds < 1000, "never comes to an end"
            for message in self.held:
                self.finished.add((number_of(message.batch.entry), message.index))
                self.session.finish(message)
            self.held = []
            self.waiting = self.waiting or self.session.next_step(3)
            self.try_step("answered")
        self.counters_are_exact()
        assert not self.store.pending
        assert not self.session.in_flight
        every = {(entry, index) for entry, count in self.store.counts.items() for index in range(count)}
        set_aside = {id_ for id_ in every if id_[0] in self.broken or id_[0] in self.deleted}
        assert every - set_aside <= self.finished, "lost"
        letters = [(msgspec.msgpack.decode(raw), count) for count, raw in self.store.letters if raw != RECORD]
        entries = [(number_of(letter["entry"]), count) for letter, count in letters]
        assert len(entries) == len(dict(entries)), "two dead letters of one entry"
        kept = {entry: count for entry, count in self.broken.items() if entry not in self.deleted}
        assert {entry: count for entry, count in entries if entry not in self.deleted} == kept


SessionMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=40)
TestSession = SessionMachine.TestCase
