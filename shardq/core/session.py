"""One owned shard, from the first fetch to the last commit: what is in flight, what the next step carries. Pure.

Invariants (tests/core/test_session.py holds a model of the store to them):
- Pending entries come first, from ID 0 in order; only when they are through, new ones are asked for.
- An entry is acknowledged when each of its messages is finished; progress of the others is committed with each step.
- A step is built once and sent until it is answered; what it carries is dropped only when the store says it applied it.
- After a step whose reply was lost, pending entries are read from ID 0 again, and those held already are skipped.
- A message that can't be decoded is a dead letter with its bytes, never an endless loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import msgspec

from shardq.core import records
from shardq.core.message import Batch, Message, Ownership
from shardq.errors import CorruptData

NEW = ">"
FIRST = "0-0"
Entry = tuple[bytes, Sequence[bytes]]

STEP_BYTES = 2 * 1024 * 1024
FIRST_ENTRIES = 16
MAX_ENTRIES = 500

_DIGITS = bytes([48, 49]) + bytes(range(2, 256))


@dataclass(slots=True)
class Step:
    """One step's content: fixed once built."""

    number: int
    cursor: str
    entries_max: int
    acked: int
    retried: int
    finished: list[Batch]
    partial: list[tuple[Batch, bytes]]
    dead: list[tuple[int, bytes]]


@dataclass(slots=True)
class Session:
    """What the owner of one shard holds. `bury_record` makes a dead letter of (entry, index or None, raw, error)."""

    owner: Ownership
    number: int
    bury_record: Callable[[str, int | None, bytes, str], bytes]
    cursor: str = FIRST
    in_flight: dict[str, Batch] = field(default_factory=dict)
    finished: list[Batch] = field(default_factory=list)
    dead: list[tuple[int, bytes]] = field(default_factory=list)
    acked: int = 0
    retried: int = 0
    outstanding: int = 0
    messages_per_entry: float = 1.0
    bytes_per_entry: float = 0.0
    entries_cap: int = MAX_ENTRIES

    # -- handling --------------------------------------------------------------------------------------------

    def finish(self, message: Message) -> None:
        """The handler is through with the message."""
        batch = message.batch
        batch.done[message.index] = 1
        batch.changed = True
        batch.remaining -= 1
        self.acked += 1
        self.outstanding -= 1
        if batch.remaining == 0:
            self.finished.append(batch)

    def finish_list(self, messages: list[Message]) -> None:
        """The handler is through with some or all messages of one batch."""
        batch = messages[0].batch
        if len(messages) < batch.remaining:
            for message in messages:
                self.finish(message)
            return
        batch.remaining = 0
        self.acked += len(messages)
        self.outstanding -= len(messages)
        self.finished.append(batch)

    def bury(self, message: Message, record: bytes) -> None:
        """The message's attempts are used up: `record` is kept as a dead letter with the next commit."""
        self.finish(message)
        self.acked -= 1
        self.dead.append((1, record))

    @property
    def uncommitted(self) -> bool:
        return bool(self.acked or self.retried or self.finished or self.dead)

    # -- committing and fetching -----------------------------------------------------------------------------

    def entries_wanted(self, messages_max: int) -> int:
        """Entries to ask for so that about `messages_max` messages are in hand; 0 when there are enough."""
        want = messages_max - self.outstanding
        if want <= 0:
            return 0
        if not self.bytes_per_entry:
            return min(FIRST_ENTRIES, self.entries_cap)
        by_count = int(want / self.messages_per_entry) or 1
        by_bytes = int(STEP_BYTES / self.bytes_per_entry) or 1
        return min(by_count, by_bytes, self.entries_cap)

    def next_step(self, entries_max: int) -> Step:
        """The next step: everything finished so far, and a fetch of at most `entries_max` entries."""
        self.number += 1
        partial = []
        for batch in self.in_flight.values():
            if batch.changed and batch.remaining:
                partial.append((batch, pack_progress(batch.done)))
                batch.changed = False
        step = Step(self.number, self.cursor, entries_max, self.acked, self.retried, self.finished, partial, self.dead)
        self.acked = self.retried = 0
        self.finished, self.dead = [], []
        return step

    def applied(self, step: Step) -> None:
        """The store applied the step."""
        for batch in step.finished:
            self.in_flight.pop(batch.entry, None)

    def reread(self) -> None:
        """A reply was lost: what it may have brought is pending, so look there first."""
        self.cursor = FIRST
        # It may be the size of the answer that kept it from coming in time.
        self.entries_cap = max(1, self.entries_cap // 2)

    def receive(self, step: Step, entries: Sequence[Entry], progress: Sequence[bytes]) -> list[list[Message]]:
        """Takes in what the step fetched; returns the messages to handle, in order, a list for each batch."""
        if step.cursor != NEW and step.entries_max:
            self.cursor = entries[-1][0].decode() if entries else NEW
        batches: list[list[Message]] = []
        size = fresh = 0
        if entries:
            self.entries_cap = min(self.entries_cap * 2, MAX_ENTRIES)
        for position, (entry_id, fields) in enumerate(entries):
            entry = entry_id.decode()
            if entry in self.in_flight:
                continue
            messages = self._open(entry, fields, progress[position] if position < len(progress) else b"")
            if messages:
                batches.append(messages)
            size += sum(map(len, fields))
            fresh += 1
        if fresh:
            self._learn(fresh, sum(map(len, batches)), size)
        return batches

    def _learn(self, entries: int, messages: int, size: int) -> None:
        self.messages_per_entry = 0.5 * self.messages_per_entry + 0.5 * max(messages, 1) / entries
        self.bytes_per_entry = max(size / entries, 0.5 * self.bytes_per_entry, 1.0)

    def _open(self, entry: str, fields: Sequence[bytes], progress: bytes) -> list[Message]:
        if len(fields) < 4 or fields[0] != b"at" or fields[2] != b"batch":
            return self._open_foreign(entry, fields)
        raw = fields[3]
        try:
            decoded = records.decode(raw)
        except CorruptData as error:
            return self._set_aside(entry, records.count_of(raw), raw, str(error))
        batch = Batch(self.owner, entry, len(decoded.keys))
        self.in_flight[entry] = batch
        messages = build_messages(decoded, batch)
        if progress:
            messages = self._resume(batch, messages, progress)
        self.outstanding += len(messages)
        return messages

    def _resume(self, batch: Batch, messages: list[Message], progress: bytes) -> list[Message]:
        done = unpack_progress(progress, batch.count)
        batch.done[:] = done
        rest = [message for message in messages if not done[message.index]]
        batch.remaining = len(rest)
        if not rest:
            self.finished.append(batch)
        return rest

    def _open_foreign(self, entry: str, fields: Sequence[bytes]) -> list[Message]:
        if len(fields) % 2 or not fields:
            return self._set_aside(entry, 1, b"", "the entry was deleted while it was pending")
        batch = Batch(self.owner, entry, 1)
        self.in_flight[entry] = batch
        self.outstanding += 1
        return [Message(None, records.foreign_value(fields), None, 0, 0, batch)]

    def _set_aside(self, entry: str, count: int, raw: bytes, error: str) -> list[Message]:
        batch = Batch(self.owner, entry, count)
        batch.remaining = 0
        self.in_flight[entry] = batch
        self.finished.append(batch)
        self.dead.append((count, self.bury_record(entry, None, raw, error)))
        return []


def build_messages(decoded: records.RecordBatch, batch: Batch) -> list[Message]:
    """One Message for each record of a batch."""
    base, offsets, keys, values, headers = decoded
    if offsets is None and headers is None:
        return [
            Message(key, value, None, base, index, batch)
            for index, (key, value) in enumerate(zip(keys, values, strict=True))
        ]
    times = [base + offset for offset in offsets] if offsets is not None else repeat(base)
    own = headers if headers is not None else repeat(None)
    return list(map(Message, keys, values, own, times, range(len(keys)), repeat(batch)))


def pack_progress(done: bytearray) -> bytes:
    """One bit a message, the first message in the lowest bit of the first byte."""
    # int() reads the flags as binary digits, highest first: one C call instead of a loop over a thousand flags.
    number = int(done[::-1].translate(_DIGITS), 2)
    return number.to_bytes((len(done) + 7) // 8, "little")


def unpack_progress(progress: bytes, count: int) -> bytearray:
    """The reverse of `pack_progress`. Bytes that don't fit the batch are no progress: handled again, never lost."""
    if len(progress) != (count + 7) // 8:
        return bytearray(count)
    number = int.from_bytes(progress, "little")
    return bytearray(number >> index & 1 for index in range(count))


def dead_letter(entry: str, index: int | None, raw: bytes, error: str) -> bytes:
    """The record of an entry that could not be read."""
    return msgspec.msgpack.encode({"entry": entry, "index": index, "raw": raw, "error": error})
