"""One owned shard, from the first fetch to the last commit: what is in flight, what the next step carries. Pure.

Invariants (tests/core/test_session.py holds a model of the store to them):
- What is handled later is known before any entry is fetched: while there is news of it, a step brings no entry. Pending
  entries come next, from ID 0 in order; only when they are through, new ones come, in the same step if there is room.
- An entry is acknowledged when each of its messages is finished or put off; progress of the others is committed with
  each step. A message counts as gone from its entry only in the step that stores it elsewhere.
- A step is built once and sent until it is answered; what it carries is dropped only when the store says it applied it.
- After a step whose reply was lost, pending entries are read from ID 0 again, and those held already are skipped.
- A message that can't be decoded is a dead letter with its bytes, never an endless loop; one that was delivered
  SUSPECT_DELIVERIES times without an outcome is put among those that are handled alone (core/later.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shardq.core import records
from shardq.core.effects import Effect
from shardq.core.intake import (
    build_messages,
    dead_letter,
    is_batch,
    keep,
    open_kept,
    pack_progress,
    pristine_value,
    unpack_progress,
)
from shardq.core.jobs import job_of
from shardq.core.lanes import lane_key
from shardq.core.later import FATAL_GETS, MAX_ITEMS, SUSPECT_GETS, Later, key_tag
from shardq.core.message import Batch, Message, Ownership
from shardq.errors import CorruptData

NEW = ">"
FIRST = "0-0"
LEFT_PENDING, LEFT_NEW, LEFT_NOTHING = "pending", "new", ""
Entry = tuple[bytes, Sequence[bytes]]

STEP_BYTES = 2 * 1024 * 1024
DEAD_BYTES = 64 * 1024 * 1024
FIRST_ENTRIES = 2  # of a size not known yet; where these leave room, the same step brings more
FIRST_ITEMS = 16
MAX_ENTRIES = 500
ITEMS_AT_ONCE = 500
SUSPECT_DELIVERIES = 3


@dataclass(slots=True)
class Put:
    """A message that is to be handled later: a new item (0) or one that is put back."""

    item: int
    wait_ms: int
    gets: int
    tag: bytes
    record: bytes


@dataclass(slots=True)
class Move:
    """A message that is put off, on its way out of its entry."""

    message: Message
    put: Put

    @property
    def size(self) -> int:
        return len(self.put.record) + len(self.put.tag)


@dataclass(slots=True)
class Step:
    """One step's content: fixed once built. `full` when it needs more of the shard's keys than the stream and
    counters."""

    number: int
    cursor: str
    entries_max: int
    known: int
    full: bool
    acked: int
    retried: int
    finished: list[Batch]
    partial: list[tuple[Batch, bytes]]
    dead: list[tuple[int, bytes]]
    puts: list[Put] = field(default_factory=list)
    drops: list[int] = field(default_factory=list)
    gets: list[int] = field(default_factory=list)
    jobs: list[tuple[str, int, bytes]] = field(default_factory=list)
    effects: list[tuple[Message, Effect]] = field(default_factory=list)
    lanes: list[str | None] = field(default_factory=list)
    seen: bytes | None = None
    untouched: list[str] = field(default_factory=list)
    ungets: list[int] = field(default_factory=list)
    room: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a step brought. `progress` is that of pending entries, which come before new ones. `due_in_ms`: until a
    delayed message is due; None when none waits. `left`: what there may be still, LEFT_PENDING, LEFT_NEW or
    LEFT_NOTHING."""

    entries: Sequence[Entry] = ()
    progress: Sequence[bytes] = ()
    next_item: int = 1
    due_in_ms: int | None = None
    marks: bytes = b""
    now_ms: int = 0
    items: Sequence[bytes] | None = None
    records: Sequence[bytes] = ()
    left: str = LEFT_NEW


class Session:
    """What the owner of one shard holds. `describe(message, error)` makes a dead letter of a message."""

    def __init__(self, owner: Ownership, number: int, later: Later, describe: Callable[[Message, str], bytes]) -> None:
        self.owner = owner
        self._describe = describe
        self.number = number
        self.later = later
        self.cursor = FIRST
        self.loaded = False
        self.marks: frozenset[tuple[str, int]] = frozenset()
        self.marks_version = b""
        self._seen: bytes | None = None
        self.in_flight: dict[str, Batch] = {}
        self.acked = self.retried = self.outstanding = 0
        self.entries_cap, self.items_cap = MAX_ENTRIES, ITEMS_AT_ONCE
        self._finished: list[Batch] = []
        self._dead: list[tuple[int, bytes]] = []
        self._moves: deque[Move] = deque()
        self._moves_bytes = 0
        self._burials: deque[tuple[Message, bytes]] = deque()
        self._drops: list[int] = []
        self._gets: list[int] = []
        self._jobs: dict[str, tuple[int, bytes]] = {}
        self._effects: list[tuple[Message, Effect]] = []
        self._messages_per_entry = 1.0
        self._bytes_per_entry = 0.0
        self._bytes_per_item = STEP_BYTES / FIRST_ITEMS
        self._trusting = False

    # -- handling --------------------------------------------------------------------------------------------

    def finish(self, message: Message, now_s: float = 0.0) -> None:
        """The handler is through with the message."""
        batch = message.batch
        self.acked += 1
        self.outstanding -= 1
        if batch.item:
            self._drop(batch.item, now_s)
        else:
            self._leave(message)
        if self.owner.effects:
            self.take_effects(message)

    def whole(self, batch: Batch) -> None:
        """Nothing of the batch is left to be handled."""
        self._finished.append(batch)

    def take_effects(self, message: Message) -> None:
        """What the message's handler wrote goes with the next commit."""
        for effect in self.owner.effects.pop(message.id, ()):
            self._effects.append((message, effect))

    def finish_list(self, messages: list[Message], now_s: float = 0.0) -> None:
        """The handler is through with some or all messages of one batch."""
        batch = messages[0].batch
        if len(messages) < batch.remaining or batch.item or self.owner.effects:
            for message in messages:
                self.finish(message, now_s)
            return
        batch.remaining = 0
        self.acked += len(messages)
        self.outstanding -= len(messages)
        self._finished.append(batch)

    def _leave(self, message: Message) -> None:
        batch = message.batch
        batch.done[message.index] = 1
        batch.changed = True
        batch.remaining -= 1
        if batch.remaining == 0:
            self._finished.append(batch)

    def put_off(self, message: Message, wait_s: float, error: str, now_s: float) -> None:
        """The message failed and is tried again after `wait_s`."""
        self.owner.effects.pop(message.id, None)
        self.outstanding -= 1
        self.retried += 1
        record = keep(message, pristine_value(message), message.attempt + 1, error)
        self._put(message, Put(message.batch.item, int(wait_s * 1000), 0, key_tag(message.key), record))
        if message.batch.item:
            self.later.put_back(message.batch.item, now_s + wait_s)

    def park(self, message: Message) -> None:
        """The message waits behind another one of its key that was put off."""
        self.outstanding -= 1
        self._put(message, Put(0, 0, 0, key_tag(message.key), keep(message, message.value, message.attempt, "")))

    def postpone(self, message: Message, wait_s: float, now_s: float) -> None:
        """The message may not be handled before `wait_s` have passed: it is kept till then, its attempt not counted."""
        self.outstanding -= 1
        item, gets, record = message.batch.item, 0, message.batch.raw
        if item:
            gets = self.later.postpone(item, now_s + wait_s)
        else:
            record = keep(message, message.value, message.attempt, "")
        self._put(message, Put(item, int(wait_s * 1000), gets, key_tag(message.key), record))

    def _put(self, message: Message, put: Put) -> None:
        move = Move(message, put)
        self._moves.append(move)
        self._moves_bytes += move.size
        if not put.item:
            self.later.expect(_lane_of(message))

    def divert(self, messages: list[Message]) -> list[Message]:
        """Parks those that have to wait behind kept ones; returns the others."""
        free: list[Message] = []
        for message in messages:
            if message.batch.item or not self.later.keeps_back(_lane_of(message)):
                free.append(message)
            else:
                self.park(message)
        return free

    def bury(self, message: Message, record: bytes, now_s: float = 0.0) -> None:
        """The message's attempts are used up: `record` is kept as a dead letter with the next commit."""
        self.owner.effects.pop(message.id, None)
        self.outstanding -= 1
        self._burials.append((message, record))
        if message.batch.item:
            self.later.finish(message.batch.item, now_s)

    def set_marks(self, version: bytes, marks: frozenset[tuple[str, int]]) -> None:
        """The messages that are deleted as of this version: they are not handled any more, and the store is told so."""
        self.marks_version, self.marks = version, marks
        self._seen = version

    def tell_job(self, job: str, keep_ms: int, record: bytes) -> None:
        """The state of a tracked job, stored with the next commit."""
        self._jobs[job] = (keep_ms, record)

    @property
    def uncommitted(self) -> bool:
        counted = self.acked or self.retried
        leaving = self._finished or self._dead or self._burials or self._moves or self._drops
        return bool(counted or leaving or self._jobs)

    @property
    def urgent(self) -> bool:
        """Whether what is uncommitted is more than messages that are done with: someone may wait for it."""
        moved = self.retried or self._dead or self._burials or self._moves or self._drops
        return bool(moved or self._jobs or self._effects)

    # -- committing and fetching -----------------------------------------------------------------------------

    def ask(self, item_ids: list[int]) -> None:
        """These items are fetched with the next step."""
        self._gets += item_ids

    @property
    def hungry(self) -> bool:
        """Whether a step is due for what it would bring besides entries."""
        return bool(self._gets) or not self.loaded or self.later.behind or self._seen is not None

    @property
    def items_wanted(self) -> int:
        """How many items may be asked for now: some go on however much is in hand, for they hold up their keys. None
        while more is put off than one step takes: an item that is put back must not be fetched before it is."""
        if self._moves_bytes > STEP_BYTES:
            return 0
        by_bytes = int(STEP_BYTES / self._bytes_per_item) or 1
        return min(by_bytes, self.items_cap) - len(self._gets)

    def entries_wanted(self, messages_max: int) -> int:
        """Entries to ask for so that about `messages_max` messages are in hand; 0 when there are enough."""
        want = messages_max - self.outstanding
        if want <= 0 or self.later.suspects_wait or len(self.later.items) >= MAX_ITEMS:
            return 0
        if not self._bytes_per_entry:
            return min(FIRST_ENTRIES, self.entries_cap)
        by_count = int(want / self._messages_per_entry) or 1
        by_bytes = int(STEP_BYTES / self._bytes_per_entry) or 1
        return min(by_count, by_bytes, self.entries_cap)

    def next_step(self, entries_max: int, messages_max: int = 0) -> Step:
        """The next step: what is finished so far, as far as it fits, and a fetch of `entries_max` entries. If those
        leave room for more, below about `messages_max` messages in hand, more come with them."""
        self.number += 1
        room = (max(entries_max, self.entries_cap), max(messages_max - self.outstanding, 1), STEP_BYTES)
        self._take_burials()
        puts, lanes = self._take_moves()
        partial = []
        for batch in self.in_flight.values():
            if batch.changed and batch.remaining:
                partial.append((batch, pack_progress(batch.done)))
                batch.changed = False
        jobs = [(job, keep_ms, record) for job, (keep_ms, record) in self._jobs.items()]
        extra = bool(puts or self._dead or self._drops or self._gets or jobs or self._effects)
        step = Step(
            self.number,
            self.cursor,
            entries_max,
            self.later.known,
            extra or not self.loaded or self.later.behind,
            self.acked,
            self.retried,
            self._finished,
            partial,
            self._dead,
            puts,
            self._drops,
            self._gets,
            jobs,
            self._effects,
            lanes,
            self._seen,
            room=room if entries_max else None,
        )
        self._seen = None
        self.acked = self.retried = 0
        self._finished, self._dead, self._drops, self._gets, self._effects = [], [], [], [], []
        self._jobs = {}
        return step

    def idle_step(self, entries_max: int, messages_max: int) -> Step:
        """A step for a shard of which nothing is in hand: it commits nothing and may be sent again and again, under a
        number of its own each time (`count_on`), for as long as nothing comes. It has none yet."""
        room = (max(entries_max, self.entries_cap), max(messages_max, 1), STEP_BYTES)
        return Step(0, self.cursor, entries_max, self.later.known, False, 0, 0, [], [], [], room=room)

    def count_on(self, step: Step) -> None:
        """Gives an idle step its next number: the one before was answered, and nothing had come."""
        self.number += 1
        step.number = self.number

    @property
    def idle(self) -> bool:
        """Whether nothing is in hand and nothing is known to come but by new entries."""
        in_hand = self.outstanding or self.in_flight or self.later.out or self.uncommitted or self._effects
        return not in_hand and not self.hungry and self.cursor == NEW

    def last_step(self) -> Step:
        """The last step of an owner that goes in good order: what it fetched and did not handle does not count as
        delivered, so that nobody takes it for what its worker died of."""
        step = self.next_step(0)
        finished = {batch.entry for batch in step.finished}
        step.untouched = [entry for entry in self.in_flight if entry not in finished]
        step.ungets = self.later.out
        step.full = step.full or bool(step.ungets)
        return step

    def _take_moves(self) -> tuple[list[Put], list[str | None]]:
        puts: list[Put] = []
        lanes: list[str | None] = []
        size = 0
        while self._moves and size < STEP_BYTES:
            move = self._moves.popleft()
            puts.append(move.put)
            size += move.size
            if not move.put.item:
                lanes.append(_lane_of(move.message))
                self._leave(move.message)
        self._moves_bytes -= size
        return puts, lanes

    def _take_burials(self) -> None:
        """All, but for a bound that keeps the call possible: later messages of their keys are handled already, and a
        crash after those were committed would bring these back out of order."""
        size = 0
        while self._burials and size < DEAD_BYTES:
            message, record = self._burials.popleft()
            self._dead.append((1, record))
            size += len(record)
            if message.batch.item:
                self._drops.append(message.batch.item)
            else:
                self._leave(message)

    def applied(self, step: Step) -> None:
        """The store applied the step."""
        for batch in step.finished:
            self.in_flight.pop(batch.entry, None)
        self.later.applied(step.lanes)

    def amend(self, step: Step, message: Message, record: bytes) -> None:
        """The store refused an effect of `message` and applied nothing of the step: the message becomes a dead letter
        in the same step."""
        self.renumber(step)
        step.effects = [pair for pair in step.effects if pair[0] is not message]
        step.acked -= 1
        step.dead.append((1, record))
        step.full = True
        if message.headers and (named := job_of(message.headers)):
            step.jobs = [job for job in step.jobs if job[0] != named[0]]  # it is not done after all

    def renumber(self, step: Step) -> None:
        """A step that was refused is to be sent in another form, under a new number: the one it had is used up."""
        self.number += 1
        step.number = self.number

    def reread(self, step: Step, now_s: float) -> None:
        """A reply was lost: what it may have brought is pending, so look there first."""
        self.cursor = FIRST
        self.later.ask_again(now_s)
        self.later.next_item += len(step.lanes)  # its puts were applied: the index is to be read on
        # It may be the size of the answer that kept it from coming in time.
        self.entries_cap, self.items_cap = max(1, self.entries_cap // 2), max(1, self.items_cap // 2)

    def receive(self, step: Step, fetched: Fetched, now_s: float) -> list[list[Message]]:
        """Takes in what the step fetched; returns the messages to handle, in order, a list for each batch."""
        self._learn_items(step, fetched, now_s)
        entries, progress = fetched.entries, fetched.progress
        if step.cursor != NEW and step.entries_max:
            if fetched.left != LEFT_PENDING:
                self.cursor = NEW
            elif entries:
                self.cursor = entries[-1][0].decode()
        batches = self._open_items(step, fetched, now_s)
        size = fresh = count = 0
        if entries:
            self.entries_cap = min(self.entries_cap * 2, MAX_ENTRIES)
        for position, (entry_id, fields) in enumerate(entries):
            entry = entry_id.decode()
            if entry in self.in_flight:
                continue
            messages = self._open(entry, fields, progress[position] if position < len(progress) else b"")
            if messages:
                batches.append(messages)
                count += len(messages)
            size += sum(map(len, fields))
            fresh += 1
        if fresh:
            self._learn_sizes(fresh, count, size)
        return batches

    def _learn_items(self, step: Step, fetched: Fetched, now_s: float) -> None:
        if fetched.items is not None:
            self.later.learn(fetched.items, fetched.next_item, fetched.now_ms, now_s)
            self.loaded = self.loaded or not self.later.behind
        elif fetched.next_item > self.later.next_item:
            self.later.next_item = fetched.next_item  # a dead letter was replayed: the next step asks for it

    def _learn_sizes(self, entries: int, messages: int, size: int) -> None:
        self._messages_per_entry = 0.5 * self._messages_per_entry + 0.5 * max(messages, 1) / entries
        self._bytes_per_entry = max(size / entries, 0.5 * self._bytes_per_entry, 1.0)

    # -- what is handled later -------------------------------------------------------------------------------

    def _open_items(self, step: Step, fetched: Fetched, now_s: float) -> list[list[Message]]:
        if not step.gets:
            return []
        size = sum(map(len, fetched.records)) / len(step.gets)
        self._bytes_per_item = max(size, 0.5 * self._bytes_per_item, 1.0)
        self.items_cap = min(self.items_cap * 2, ITEMS_AT_ONCE)
        opened = (self._item(item, raw, now_s) for item, raw in zip(step.gets, fetched.records, strict=True))
        return [[message] for message in opened if message is not None]

    def _item(self, item: int, raw: bytes, now_s: float) -> Message | None:
        self.later.got(item)
        if not raw:  # it was deleted meanwhile
            self.acked += 1
            self._drop(item, now_s)
            return None
        gets = self.later.items[item].gets
        try:
            message, error = open_kept(self.owner, item, raw)
        except CorruptData as broken:
            self._give_up(item, dead_letter("", None, raw, str(broken)), now_s)
            return None
        if gets > FATAL_GETS:
            error = f"its worker process died {gets - 1} times while handling it" + (
                f"; before: {error}" if error else ""
            )
            self._give_up(item, self._describe(message, error), now_s)
            return None
        self.outstanding += 1
        return message

    def _give_up(self, item: int, record: bytes, now_s: float) -> None:
        self._dead.append((1, record))
        self._drop(item, now_s)

    def _drop(self, item: int, now_s: float) -> None:
        self._drops.append(item)
        self.later.finish(item, now_s)

    # -- entries ---------------------------------------------------------------------------------------------

    def _open(self, entry: str, fields: Sequence[bytes], pending: bytes) -> list[Message]:
        times, _, progress = pending.partition(b":")
        if not is_batch(fields):
            return self._suspect(times, self._open_foreign(entry, fields))
        raw = fields[3]
        try:
            decoded = records.decode(raw)
            batch = Batch(self.owner, entry, len(decoded.keys), raw)
            batch.headed = decoded.headers is not None
            messages = build_messages(decoded, batch)
        except CorruptData as error:
            return self._set_aside(entry, records.count_of(raw), raw, str(error))
        self.in_flight[entry] = batch
        if progress:
            messages = self._resume(batch, messages, progress)
        if decoded.holes or self.marks:
            messages = self._without_deleted(messages, frozenset(decoded.holes or ()))
        self.outstanding += len(messages)
        return self._suspect(times, messages)

    def _suspect(self, times: bytes, messages: list[Message]) -> list[Message]:
        """Messages that were delivered again and again without an outcome go where each is handled alone. Only those
        before all others that this session holds: one behind them would be put before an earlier one of its key. Such
        a one was delivered more often only for an answer that was lost, or an owner that went in good order."""
        if messages and (not times.isdigit() or int(times[:9]) < SUSPECT_DELIVERIES):
            self._trusting = True
        if self._trusting:
            return messages
        for message in messages:
            self.outstanding -= 1
            record = keep(message, message.value, message.attempt, "")
            self._put(message, Put(0, 0, SUSPECT_GETS, key_tag(message.key), record))
        return []

    def _resume(self, batch: Batch, messages: list[Message], progress: bytes) -> list[Message]:
        done = unpack_progress(progress, batch.count)
        batch.done[:] = done
        rest = [message for message in messages if not done[message.index]]
        batch.remaining = len(rest)
        if not rest:
            self._finished.append(batch)
        return rest

    def _without_deleted(self, messages: list[Message], holes: frozenset[int]) -> list[Message]:
        """Deleted messages are finished unhandled."""
        rest: list[Message] = []
        for message in messages:
            if message.index in holes or (message.batch.entry, message.index) in self.marks:
                self.acked += 1
                self._leave(message)
            else:
                rest.append(message)
        return rest

    def _open_foreign(self, entry: str, fields: Sequence[bytes]) -> list[Message]:
        if len(fields) % 2 or not fields:
            return self._set_aside(entry, 1, b"", "the entry was deleted while it was pending")
        batch = Batch(self.owner, entry, 1)
        self.in_flight[entry] = batch
        value = records.foreign_value(fields)
        batch.pristine = records.RecordBatch(0, None, [None], [dict(value)], None)
        messages = [Message(None, value, None, 0, 0, batch)]
        if self.marks:
            messages = self._without_deleted(messages, frozenset())
        self.outstanding += len(messages)
        return messages

    def _set_aside(self, entry: str, count: int, raw: bytes, error: str) -> list[Message]:
        batch = Batch(self.owner, entry, count)
        batch.remaining = 0
        self.in_flight[entry] = batch
        self._finished.append(batch)
        self._dead.append((count, dead_letter(entry, None, raw, error)))
        return []


def _lane_of(message: Message) -> str | None:
    return lane_key(message.key) if message.key is not None else None
