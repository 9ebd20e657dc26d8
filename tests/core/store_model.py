"""One shard as scripts/append.lua, step.lua, dead.lua and delete.lua keep it for one group, in plain Python: what tests
of the core hold an owner to. Knows nothing of the owner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from shardq.core import later, records
from shardq.core.effects import Effect
from shardq.core.intake import KeptRecord, unpack_progress
from shardq.core.later import key_tag
from shardq.core.records import Key
from shardq.core.step import LEFT_NEW, LEFT_NOTHING, LEFT_PENDING, NEW, Entry, Fetched, Step

ID = tuple[int, int]  # entry, index of the message
BAD = Effect("k", "INCRBY", ("1",))  # the store refuses it, as if it knew the key for a hash
GOOD = Effect("k", "SET", ("1",))


class Answer(NamedTuple):
    """As storage/calls.py gives it."""

    status: str
    fetched: Fetched = Fetched()
    effect: int = 0


class Index(NamedTuple):
    """An item's member in the set `later`."""

    due_ms: int
    gets: int
    tag: bytes


def number_of(entry: str | bytes) -> int:
    text = entry.decode() if isinstance(entry, bytes) else entry
    return int(text.split("-")[0])


def batch_of(entry: int, keys: Sequence[Key], headers: Sequence[Any] | None = None) -> bytes:
    """A record batch whose values say which message each is: lists, which a handler can change."""
    values = [[entry, index] for index in range(len(keys))]
    return records.encode(records.RecordBatch(7, None, keys, values, headers))


@dataclass
class Store:
    """`counts` and `keys` are kept of every entry, `pending` has how often each was delivered."""

    stream: dict[int, list[bytes]] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    pending: dict[int, int] = field(default_factory=dict)
    progress: dict[int, bytes] = field(default_factory=dict)
    later: dict[int, Index] = field(default_factory=dict)
    kept: dict[int, bytes] = field(default_factory=dict)
    kept_id: dict[int, ID] = field(default_factory=dict)  # also of those that were emptied
    letters: list[tuple[int, bytes]] = field(default_factory=list)
    jobs: dict[str, bytes] = field(default_factory=dict)
    carried_out: Counter[str] = field(default_factory=Counter)
    next_item: int = 1
    token: str = ""
    step_number: int = 0
    refused: tuple[str, int, int] = ("", 0, 0)
    marks: frozenset[tuple[str, int]] = frozenset()
    marks_version: int = 0
    now_ms: int = 1_700_000_000_000
    last: int = 0
    appended: int = 0
    foreign: int = 0
    acked: int = 0
    dead: int = 0
    retried: int = 0
    replayed: int = 0

    # -- what other clients do -------------------------------------------------------------------------------

    @property
    def next_entry(self) -> int:
        return len(self.counts) + 1

    def add(self, fields: list[bytes], count: int, *, ours: bool) -> None:
        entry = self.next_entry
        self.stream[entry], self.counts[entry] = fields, count
        self.appended += count if ours else 0

    def replay(self, place: int) -> ID:
        """Hands the dead letter of a message back to the group."""
        count, raw = self.letters.pop(place)
        letter = msgspec.msgpack.decode(raw)
        _, entry, index = letter["id"].split("/")
        record = KeptRecord(entry, int(index), letter["key"], letter["value"], letter["headers"], 7, 1, "")
        self.put(self.next_item, Index(self.now_ms, 0, key_tag(letter["key"])), msgspec.msgpack.encode(record))
        self.next_item += 1
        self.replayed += count
        return number_of(entry), int(index)

    def mark(self, id_: ID) -> None:
        """The message is deleted: owners finish it unhandled, copies of it are emptied."""
        self.marks |= {(f"{id_[0]}-0", id_[1])}
        self.marks_version += 1
        for item, kept in self.kept_id.items():
            if kept == id_:
                self.kept[item] = b""

    # -- step ------------------------------------------------------------------------------------------------

    def step(self, token: str, step: Step) -> Answer:
        if token != self.token:
            return Answer("FENCED")
        if step.number <= self.step_number:
            refused = self.refused[:2] == (token, step.number)
            return Answer("EFFECT", effect=self.refused[2]) if refused else Answer("REPEAT")
        if step.number > self.step_number + 1:
            return Answer("FENCED")
        for number, (_, effect) in enumerate(step.effects, 1):
            if effect == BAD:
                self.step_number, self.refused = step.number, (token, step.number, number)
                return Answer("EFFECT", effect=number)
        self.step_number = step.number
        self.commit(step)
        gets = [self.get(item) for item in step.gets]
        items = self.members(step.known) if step.full else None
        entries, progress, left = self.fetch(step, bool(items)) if step.entries_max else ([], [], LEFT_PENDING)
        marks = b"%d" % self.marks_version if self.marks_version else b""
        return Answer("OK", Fetched(entries, progress, self.next_item, None, marks, self.now_ms, items, gets, left))

    def commit(self, step: Step) -> None:
        assert step.full or not (step.dead or step.puts or step.drops or step.gets or step.ungets or step.jobs)
        assert step.full or not step.effects
        self.acked += step.acked
        self.retried += step.retried
        for batch in step.finished:
            del self.pending[number_of(batch.entry)]  # an entry acknowledged twice is the test's failure
            self.progress.pop(number_of(batch.entry), None)
        for batch, done in step.partial:
            assert number_of(batch.entry) in self.pending
            self.progress[number_of(batch.entry)] = done
        for entry in step.untouched:
            self.pending[number_of(entry)] = 0
        for item in step.ungets:
            self.later[item] = self.later[item]._replace(gets=max(self.later[item].gets - 1, 0))
        self.letters += step.dead
        self.dead += sum(count for count, _ in step.dead)
        for put in step.puts:
            item = put.item
            if not item:
                item, self.next_item = self.next_item, self.next_item + 1
            assert (item in self.kept) == bool(put.item), "what is put back is not there"
            self.put(item, Index(self.now_ms + put.wait_ms, put.gets, put.tag), put.record)
        for item in step.drops:
            del self.later[item], self.kept[item], self.kept_id[item]
        self.jobs |= {job: record for job, _, record in step.jobs}
        self.carried_out.update(message.id for message, _ in step.effects)

    def put(self, item: int, index: Index, record: bytes) -> None:
        kept = msgspec.msgpack.decode(record, type=KeptRecord)
        self.later[item], self.kept[item], self.kept_id[item] = index, record, (number_of(kept.entry), kept.index)

    def fetch(self, step: Step, news: bool) -> tuple[list[Entry], list[bytes], str]:
        """`news`: the step shows items that its owner did not know."""
        if step.cursor != NEW and news:
            return [], [], LEFT_PENDING
        old = [entry for entry in sorted(self.pending) if entry > number_of(step.cursor)] if step.cursor != NEW else []
        old, left = old[: step.entries_max], LEFT_PENDING
        new: list[int] = []
        if len(old) < step.entries_max:
            new, left = self.fetch_new(step)
        for entry in old + new:
            self.pending[entry] = self.pending.get(entry, 0) + 1
        progress = [b"%d:" % self.pending[entry] + self.progress.get(entry, b"") for entry in old]
        entries: list[Entry] = [(f"{entry}-0".encode(), self.stream.get(entry, [])) for entry in old + new]
        return entries, progress, left

    def fetch_new(self, step: Step) -> tuple[list[int], str]:
        assert step.room is not None
        unread = [entry for entry in self.stream if entry > self.last]
        found = unread[: step.entries_max]
        for entry in unread[step.entries_max : step.room[0]]:
            if sum(self.counts[entry] for entry in found) >= step.room[1]:
                break
            found.append(entry)
        self.foreign += sum(self.stream[entry][0] != b"at" for entry in found)
        self.last = found[-1] if found else self.last
        return found, LEFT_NEW if len(found) < len(unread) else LEFT_NOTHING

    def get(self, item: int) -> bytes:
        if item not in self.later:
            return b""
        self.later[item] = self.later[item]._replace(gets=self.later[item].gets + 1)
        return self.kept[item]

    def members(self, known: int) -> list[bytes]:
        above = sorted(item for item in self.later if item > known)[: later.PAGE]
        return [b"%d:%d:%d:" % (item, *self.later[item][:2]) + self.later[item].tag for item in above]

    # -- what there is ---------------------------------------------------------------------------------------

    def unfinished(self) -> set[ID]:
        """Every message that the group has not finished, by reading all there is."""
        left = []
        for entry in [*self.pending, *(entry for entry in self.stream if entry > self.last)]:
            done = unpack_progress(self.progress.get(entry, b""), self.counts[entry])
            left += [(entry, index) for index in range(self.counts[entry]) if not done[index]]
        left += self.kept_id.values()
        assert len(left) == len(set(left)), "a message is in two places"
        return set(left)

    def backlog(self) -> int:
        """By the counters; another client's entries count from when they are read."""
        unread = sum(fields[0] != b"at" for entry, fields in self.stream.items() if entry > self.last)
        return self.appended + self.foreign + unread - self.acked - self.dead + self.replayed

    def dead_ids(self) -> set[ID]:
        letters = (msgspec.msgpack.decode(raw) for _, raw in self.letters)
        names = [letter["id"].split("/") for letter in letters if "id" in letter]
        return {(number_of(entry), int(index)) for _, entry, index in names}
