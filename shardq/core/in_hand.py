"""The messages of one shard that are in hand, and what became of them: counted and kept here until a step carries it to
the store. Knows neither how they came (core/arrivals.py) nor when a step is due. Pure.

Invariants (tests/core/test_session.py holds a model of the store to them):
- An entry is acknowledged when each of its messages is finished or put off; progress of the others is committed with
  each step. A message counts as gone from its entry only in the step that stores it elsewhere.
- What a step was given is given to no other one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from shardq.core.effects import Effect
from shardq.core.intake import keep, pack_progress, pristine_value
from shardq.core.lanes import lane_key
from shardq.core.later import Later, key_tag
from shardq.core.message import Batch, Message, Ownership
from shardq.core.step import STEP_BYTES, Put, Step

DEAD_BYTES = 64 * 1024 * 1024


@dataclass(slots=True)
class _Move:
    """A message that is put off, on its way out of its entry."""

    message: Message
    put: Put

    @property
    def size(self) -> int:
        return len(self.put.record) + len(self.put.tag)


class InHand:
    """`entries` are those that were fetched and are not acknowledged, by their ids; `outstanding` counts the messages
    without an outcome, `acked` and `retried` those that a coming step tells the store of. `held_bytes` are those of
    entries and items that are not finished, so of messages that are finished too, while others of their entry are not.

    runtime/shard.py counts some of these itself, for it does so for every message."""

    def __init__(self, owner: Ownership, later: Later) -> None:
        self.owner, self.later = owner, later
        self.entries: dict[str, Batch] = {}
        self.acked = self.retried = self.outstanding = self.held_bytes = 0
        self._finished: list[Batch] = []
        self._dead: list[tuple[int, bytes]] = []
        self._moves: deque[_Move] = deque()
        self._moves_bytes = 0
        self._burials: deque[tuple[Message, bytes]] = deque()
        self._drops: list[int] = []
        self._jobs: dict[str, tuple[int, bytes]] = {}
        self._effects: list[tuple[Message, Effect]] = []

    # -- outcomes --------------------------------------------------------------------------------------------

    def finish(self, message: Message, now_s: float = 0.0) -> None:
        """The handler is through with the message."""
        batch = message.batch
        self.acked += 1
        self.outstanding -= 1
        if batch.item:
            self.held_bytes -= batch.size
            self.drop(batch.item, now_s)
        else:
            self.leave(message)
        if self.owner.effects:
            self.take_effects(message)

    def whole(self, batch: Batch) -> None:
        """Nothing of the batch is left to be handled."""
        self.held_bytes -= batch.size
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
        self.held_bytes -= batch.size
        self._finished.append(batch)

    def leave(self, message: Message) -> None:
        """The message is gone from its entry."""
        batch = message.batch
        batch.done[message.index] = 1
        batch.changed = True
        batch.remaining -= 1
        if batch.remaining == 0:
            self.held_bytes -= batch.size
            self._finished.append(batch)

    def drop(self, item: int, now_s: float) -> None:
        """An item that was fetched is over: the store forgets it."""
        self._drops.append(item)
        self.later.finish(item, now_s)

    def give_up(self, count: int, record: bytes) -> None:
        """`count` messages that nobody can handle are one dead letter."""
        self._dead.append((count, record))

    def bury(self, message: Message, record: bytes, now_s: float = 0.0) -> None:
        """The message's attempts are used up: `record` is kept as a dead letter with the next commit."""
        self.owner.effects.pop(message.id, None)
        self.outstanding -= 1
        self._burials.append((message, record))
        if message.batch.item:
            self.held_bytes -= message.batch.size
            self.later.finish(message.batch.item, now_s)

    def tell_job(self, job: str, keep_ms: int, record: bytes) -> None:
        """The state of a tracked job, stored with the next commit."""
        self._jobs[job] = (keep_ms, record)

    # -- put off ---------------------------------------------------------------------------------------------

    def put_off(self, message: Message, wait_s: float, error: str, now_s: float) -> None:
        """The message failed and is tried again after `wait_s`."""
        self.owner.effects.pop(message.id, None)
        self.outstanding -= 1
        self.retried += 1
        record = keep(message, pristine_value(message), message.attempt + 1, error)
        self._put(message, Put(message.batch.item, int(wait_s * 1000), 0, key_tag(message.key), record))
        if message.batch.item:
            self.held_bytes -= message.batch.size
            self.later.put_back(message.batch.item, now_s + wait_s)

    def park(self, message: Message, gets: int = 0) -> None:
        """The message waits behind another one of its key that was put off; or, with `gets` fetches that had no
        outcome, among those that are handled alone."""
        self.outstanding -= 1
        self._put(message, Put(0, 0, gets, key_tag(message.key), keep(message, message.value, message.attempt, "")))

    def postpone(self, message: Message, wait_s: float, now_s: float) -> None:
        """The message may not be handled before `wait_s` have passed: it is kept till then, its attempt not counted."""
        self.outstanding -= 1
        item, gets, record = message.batch.item, 0, message.batch.raw
        if item:
            self.held_bytes -= message.batch.size
            gets = self.later.postpone(item, now_s + wait_s)
        else:
            record = keep(message, message.value, message.attempt, "")
        self._put(message, Put(item, int(wait_s * 1000), gets, key_tag(message.key), record))

    def divert(self, messages: list[Message]) -> list[Message]:
        """Parks those that have to wait behind kept ones; returns the others."""
        free: list[Message] = []
        for message in messages:
            if message.batch.item or not self.later.keeps_back(_lane_of(message)):
                free.append(message)
            else:
                self.park(message)
        return free

    def _put(self, message: Message, put: Put) -> None:
        move = _Move(message, put)
        self._moves.append(move)
        self._moves_bytes += move.size
        if not put.item:
            self.later.expect(_lane_of(message))

    @property
    def crowded(self) -> bool:
        """Whether more is put off than one step takes."""
        return self._moves_bytes > STEP_BYTES

    # -- committing ------------------------------------------------------------------------------------------

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

    @property
    def empty(self) -> bool:
        """Whether nothing was fetched that the store has not been told the end of."""
        return not (self.outstanding or self.entries or self.later.out or self.uncommitted or self._effects)

    def load(self, step: Step) -> None:
        """What is finished so far, as far as it fits, goes with this step."""
        if self._burials:
            self._take_burials()
        if self._moves:
            step.puts, step.lanes = self._take_moves()
        for batch in self.entries.values():
            if batch.changed and batch.remaining:
                step.partial.append((batch, pack_progress(batch.done)))
                batch.changed = False
        step.acked, step.retried, self.acked, self.retried = self.acked, self.retried, 0, 0
        step.finished, self._finished = self._finished, []
        if self._jobs:
            step.jobs = [(job, keep_ms, record) for job, (keep_ms, record) in self._jobs.items()]
            self._jobs = {}
        if self._dead or self._drops or self._effects:
            step.dead, step.drops, step.effects = self._dead, self._drops, self._effects
            self._dead, self._drops, self._effects = [], [], []
        step.full = step.full or bool(step.puts or step.dead or step.drops or step.jobs or step.effects)

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
                self.leave(move.message)
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
                self.leave(message)

    def committed(self, step: Step) -> None:
        """The store applied the step."""
        for batch in step.finished:
            self.entries.pop(batch.entry, None)
        self.later.applied(step.lanes)


def _lane_of(message: Message) -> str | None:
    return lane_key(message.key) if message.key is not None else None
