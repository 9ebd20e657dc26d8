"""One owned shard in a worker: its session, its lanes and the clock of its lease, seen by the runners that handle its
messages and by the loop that commits them (runtime/serving.py). Does no I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import monotonic, time_ns
from typing import Any

from shardq.core import jobs
from shardq.core.budget import Account, Budget
from shardq.core.gate import KeyGate
from shardq.core.intake import restore_value
from shardq.core.lanes import Lanes, Ready, lane_key, let_go
from shardq.core.later import Later
from shardq.core.lease import Trust
from shardq.core.message import Message, Ownership
from shardq.core.session import Session
from shardq.runtime.failures import dead_record_of
from shardq.runtime.waker import Waker
from shardq.storage.alarm import NEVER
from shardq.storage.keys import ShardKeys

PROMOTE_PAUSE_S = 0.01  # so much at least lies between two moves: what becomes due meanwhile goes together


class OwnedShard(Ownership):
    """From acquire to loss. `lost` and `draining` only ever turn true; runners drop messages of such a shard unhandled:
    they are pending in Redis, and the next owner handles them.

    ready    where messages that may be handled now are put; None when whole lists are handled, which need no lanes
    by_key   whether messages of one key wait for each other
    budget   the bytes that the worker may hold; one of its own where there is none
    """

    __slots__ = (
        "_on_lost",
        "awake",
        "draining",
        "ending",
        "gate",
        "hand",
        "keys",
        "lanes",
        "marked",
        "promote_at_monotonic_s",
        "promoted_at_monotonic_s",
        "ready",
        "running",
        "session",
        "suspended",
        "tidy_at_monotonic_s",
        "trust",
        "wake_at",
    )

    def __init__(
        self,
        queue: str,
        group: str,
        shard: int,
        epoch: int,
        nonce: str,
        *,
        keys: ShardKeys,
        step: int,
        trust: Trust,
        ready: deque[Message] | None,
        by_key: bool,
        budget: Budget | None = None,
    ) -> None:
        super().__init__(queue, group, shard, epoch, nonce, keys.slot)
        self.keys = keys
        self.trust = trust
        self.trusted_until_monotonic_s = trust.until_monotonic_s
        self.ready: Ready | None = ready
        self.gate: KeyGate | None = None
        self._on_lost: Callable[[], None] = self.wake
        self.lanes = Lanes(ready) if by_key and ready is not None else None
        account = Account(budget or Budget(), self.wake)
        busy = self.lanes.busy if self.lanes is not None else lambda _: False
        self.session = Session(self, step, Later(by_key=by_key, lane_busy=busy), self._fatal, account)
        self.hand = self.session.hand
        self.marked: frozenset[tuple[str, int]] = frozenset()
        self.running = 0
        self.draining = False
        self.ending = False
        self.suspended: list[Message] = []
        self.promote_at_monotonic_s = NEVER
        self.promoted_at_monotonic_s = 0.0
        self.tidy_at_monotonic_s = 0.0
        self.wake_at = -1
        self.awake = Waker()

    def local_key(self, name: str) -> str:
        return self.keys.data(name)

    def now_ms(self) -> int:
        return time_ns() // 1_000_000

    def wake(self) -> None:
        """The loop of this shard looks at once."""
        self.awake.set()

    def renewed(self, sent_monotonic_s: float) -> list[Message]:
        """A renewal succeeded: trust goes on. Returns the messages that waited for it."""
        self.trust.renewed(sent_monotonic_s)
        self.trusted_until_monotonic_s = self.trust.until_monotonic_s
        suspended, self.suspended = self.suspended, []
        for message in suspended:
            restore_value(message)
        return suspended

    def suspend(self, *messages: Message) -> None:
        """Messages that were stopped, or could not begin, for want of trust: they wait for a renewal."""
        if not self.lost:
            self.suspended.extend(messages)
            return
        for message in messages:
            let_go(message)

    # -- the limit of its keys -------------------------------------------------------------------------------

    def guard(self, gate: KeyGate, on_lost: Callable[[], None]) -> None:
        """From now on messages pass through the gate before they are ready."""
        self.gate, self.ready, self._on_lost = gate, gate, on_lost
        if self.lanes is not None:
            self.lanes.ready = gate

    def line_up(self, message: Message) -> None:
        """A message whose key is free waits with all others for a runner."""
        assert self.ready is not None
        self.ready.append(message)

    def behind(self, message: Message) -> int:
        """How many messages of its key wait for this one."""
        return self.lanes.behind(message) if self.lanes is not None else 0

    # -- what is due -----------------------------------------------------------------------------------------

    def due_in(self, now_s: float, due_in_ms: int | None) -> None:
        """A step said when the next delayed message is due."""
        if due_in_ms is None:
            self.promote_at_monotonic_s = NEVER
        else:
            self.promote_at_monotonic_s = max(now_s + due_in_ms / 1000, self.promoted_at_monotonic_s + PROMOTE_PAUSE_S)

    def keeps_time(self, now_s: float) -> bool:
        """Whether anything of it is due that comes with time (timekeeping.py)."""
        return now_s >= self.promote_at_monotonic_s or now_s >= self.tidy_at_monotonic_s

    def promoted(self, now_s: float, next_ms: int | None) -> None:
        """What was due is in the stream now."""
        self.promoted_at_monotonic_s = now_s
        self.due_in(now_s, next_ms)

    # -- messages in -----------------------------------------------------------------------------------------

    def admit(self, messages: list[Message]) -> None:
        """Messages of one batch just fetched: those that may be handled now become ready, the others wait."""
        assert self.ready is not None
        if messages[0].batch.item:  # its turn has come already
            self.ready.extend(messages)
            return
        if self.session.later.holding:
            messages = self.hand.divert(messages)
        if self.lanes is not None:
            self.lanes.add(messages)
        else:
            self.ready.extend(messages)

    def set_marks(self, version: bytes, marks: frozenset[tuple[str, int]]) -> None:
        """Messages that are deleted: those in hand are not handled any more."""
        self.marked = marks
        self.session.set_marks(version, marks)

    def is_deleted(self, message: Message) -> bool:
        return (message.batch.entry, message.index) in self.marked

    # -- outcomes --------------------------------------------------------------------------------------------

    def finish(self, message: Message) -> Message | None:
        """The handler returned. Returns the next message of the key, if it waited for this one: it is to be handled
        now, or put among those that are ready."""
        if self.lost:
            let_go(message)
            return None
        hand, batch = self.hand, message.batch
        if batch.item:
            hand.finish(message, monotonic())
            self.wake()
            return None
        # `InHand.finish` and `Lanes.done`, written out: this runs for every message.
        hand.acked += 1
        hand.outstanding = outstanding = hand.outstanding - 1
        batch.done[message.index] = 1
        batch.changed = True
        batch.remaining = left = batch.remaining - 1
        if not left:
            hand.whole(batch)
        if self.effects:
            hand.take_effects(message)
        following = message._next
        if following is not None:
            message._next = None
        elif self.lanes is not None:
            self.lanes.done(message)
            if hand.later.holding:
                self._lane_left(message)
        if outstanding <= self.wake_at:
            self.awake.set()
        return following

    def finish_list(self, batches: list[list[Message]]) -> None:
        """The handler of whole lists returned."""
        if self.lost:
            return
        now = monotonic()
        for batch in batches:
            self.hand.finish_list(batch, now)
        self._through()
        if self.session.later.items:
            self.wake()

    def put_off(self, message: Message, wait_s: float, error: str) -> None:
        """The handler failed: the message, and what is behind it in its lane, is handled later."""
        if self.lost:
            return
        behind = self._empty_lane(message)
        self.hand.put_off(message, wait_s, error, monotonic())
        for other in behind:
            self.hand.park(other)
        if not message.batch.item:
            self._lane_left(message)  # a replayed message of the key may have waited for it
        self.wake()

    def bury(self, message: Message, record: bytes) -> None:
        """The message becomes a dead letter with the next commit."""
        if self.lost:
            return
        self.hand.bury(message, record, monotonic())
        if self.lanes is not None and not message.batch.item:
            following = self.lanes.done(message)
            if following is not None:
                self.lanes.ready.append(following)
            self._lane_left(message)
        self._through()
        self.wake()

    def postpone(self, messages: list[Message], wait_s: float) -> None:
        """Messages of one key that may not be handled yet go back into the store, with those behind them in their
        lane, to come again after `wait_s`."""
        if self.lost:
            return
        for message in messages:
            behind = self._empty_lane(message)
            self.hand.postpone(message, wait_s, monotonic())
            for other in behind:
                self.hand.park(other)
            if not message.batch.item:
                self._lane_left(message)
        self.wake()

    def _fatal(self, message: Message, error: str) -> bytes:
        """The dead letter of a message that is given up unhandled; its job is over too."""
        self.tell_job(message, jobs.DEAD, error=error)
        return dead_record_of(message, error)

    def tell_job(self, message: Message, status: str, *, result: Any = None, error: str = "") -> None:
        """Notes the state of the message's job, if it has one, for the next commit."""
        named = jobs.job_of(message.headers) if message.headers else None
        if named is None or self.lost:
            return
        job, keep_ms = named
        state = jobs.JobState(
            job,
            status,
            self.queue,
            self.group,
            message.attempt,
            message.sent_at_ms,
            self.now_ms(),
            result,
            error,
        )
        self.hand.tell_job(job, keep_ms, jobs.encode_state(state))

    def _empty_lane(self, message: Message) -> list[Message]:
        """The message leaves its lane; returns those behind it, which leave with it."""
        return self.lanes.empty(message) if self.lanes is not None and not message.batch.item else []

    def _lane_left(self, message: Message) -> None:
        if message.key is not None and self.lanes is not None:
            lane = lane_key(message.key)
            if not self.lanes.busy(lane):
                self.session.later.lane_free(lane, monotonic())
                self.wake()

    def _through(self) -> None:
        if self.hand.outstanding <= self.wake_at:
            self.wake()

    def drain(self) -> None:
        """Nothing more of this shard is handled; what runs is waited for, and committed."""
        self.draining = self.ending = True
        self.session.account.withdraw()

    def stopped(self) -> None:
        """A handler ended while its shard is draining or lost: the loop waits for the last one."""
        if self.running == 0:
            self.wake()

    def lose(self) -> None:
        """The lease is gone: nothing of this shard is handled or committed any more."""
        self.lost = self.ending = True
        if self.lanes is not None:
            self.lanes.clear()
        for message in self.suspended:
            let_go(message)
        self.suspended = []
        self.session.account.close()
        self._on_lost()
        self.wake()
