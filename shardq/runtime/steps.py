"""Sends the steps of one lease: each until it is answered, and in another form where what it carries was refused; what
it brought goes to the runners. Decides neither when a step is due nor how much it fetches (runtime/serving.py).

Invariants:
- A step that got no answer is sent again as it is; TRYAGAIN, MOVED, timeouts and a cluster that is down are not a lost
  lease. Only FENCED is.
- A step that was refused was not applied: it is sent in another form, under a new number.
- Deletions that a step brought news of are known before anything it brought is handled.
- What a step brought goes to the runners in the turn of the event loop in which its answer comes, ahead of this shard's
  own loop, which is woken behind them. Nothing is taken of an answer that nobody waits for any more.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from functools import partial
from time import monotonic

import anyio

from shardq.core.effects import redirected
from shardq.core.jobs import DEAD
from shardq.core.step import Step
from shardq.errors import CorruptData, LeaseLost, ShardqError, StoreError
from shardq.runtime.delete import read_marks
from shardq.runtime.failures import dead_record_of
from shardq.runtime.idle import IdlePoll
from shardq.runtime.owning import Owning
from shardq.runtime.shard import OwnedShard
from shardq.runtime.wishes import Wishes
from shardq.storage import calls

PAUSE_AFTER_ERROR_S = 1.0
FULL_PAUSE_S = 0.1

CANT_READ_MARKS = "can't read what was deleted"
NO_ANSWER = "a commit got no answer, it is sent again"

_log = logging.getLogger("shardq")


class Steps:
    """`unanswered` is the step that may or may not have been applied, while there is one."""

    def __init__(self, owning: Owning, held: OwnedShard, wishes: Wishes) -> None:
        self.unanswered: Step | None = None
        self._taken: Step | None = None  # the last step whose answer went to the runners as it came
        self._owning, self._held, self._wishes = owning, held, wishes

    async def step(self, limit: int, *, renew: bool, last: bool = False) -> calls.Stepped:
        """One step that fetches `limit` entries; returns its answer. Raises LeaseLost."""
        session = self._held.session
        content = session.last_step() if last else session.next_step(limit, self._owning.settings.buffer_messages)
        stepped, sent = await self._send(content, renew=renew)
        if self._taken is content:
            return stepped
        return await self._answered(content, stepped, sent, renew=renew)

    async def polled(self, poll: IdlePoll) -> calls.Stepped:
        """The same where a poll was answered, or failed, and this goes on with it."""
        content = poll.content
        self.unanswered = content
        try:
            if poll.error is not None:
                raise poll.error
            stepped = calls.read_step(self._held.keys, self._owning.group, content, poll.reply)
            sent = poll.sent_monotonic_s
        except (StoreError, CorruptData) as error:
            self._failed(NO_ANSWER, error)
            stepped, sent = await self._send(content, renew=True)
            self._well(NO_ANSWER)
        self.unanswered = None
        return await self._answered(content, stepped, sent, renew=True)

    async def commit_rest(self) -> None:
        """After a cancellation, a last try: what was finished. Raises what the store does."""
        applied = True
        if self.unanswered is not None:  # what it carries may not have been applied yet
            stepped = await self._call(self.unanswered, renew=False)
            applied = stepped.status not in ("EFFECT", "FULL")
        if applied:  # else the next step would acknowledge entries whose other messages the refused one stood for
            await self._call(self._held.session.last_step(), renew=False)

    # -- sending ---------------------------------------------------------------------------------------------

    async def _send(self, content: Step, *, renew: bool) -> tuple[calls.Stepped, float]:
        """Sends one step until it is answered; returns the answer and when the answered try began."""
        held, lease_s = self._held, self._owning.settings.lease_s
        self.unanswered, failed = content, False
        while True:
            sent = monotonic()
            try:
                stepped = await self._call(content, renew=renew, heard=partial(self._heard, content, sent, renew=renew))
            except (StoreError, CorruptData) as error:
                failed = True
                self._failed(NO_ANSWER, error)
                if self._wishes.leaving and held.running == 0 and not held.trust.trusted(monotonic()):
                    msg = f"shard {held.shard} of {held.queue} was left without its last commit: its lease runs out"
                    raise LeaseLost(msg) from error
                await anyio.sleep(min(PAUSE_AFTER_ERROR_S, lease_s / 5) * random.uniform(0.5, 1.0))
            else:
                if failed:
                    self._well(NO_ANSWER)
                self.unanswered = None
                self._owning.meters.steps.observe(monotonic() - sent)
                return stepped, sent

    def _call(
        self, content: Step, *, renew: bool, heard: Callable[[calls.Stepped], None] | None = None
    ) -> Awaitable[calls.Stepped]:
        owning, held = self._owning, self._held
        return calls.step(
            owning.pipes,
            held.keys,
            owning.group,
            held.token,
            content,
            renew=renew,
            wait=content.entries_max > 0,
            timeout_s=owning.settings.lease_s,
            heard=heard,
        )

    def _failed(self, what: str, error: object) -> None:
        self._owning.failed(what, error, self._held.shard)

    def _well(self, what: str) -> None:
        self._owning.well(what, self._held.shard)

    # -- what was answered -----------------------------------------------------------------------------------

    async def _answered(self, content: Step, stepped: calls.Stepped, sent: float, *, renew: bool) -> calls.Stepped:
        while stepped.status in ("EFFECT", "FULL"):
            if stepped.status == "EFFECT":
                if not await self._redirect(content, stepped):
                    self._refuse(content, stepped)
            else:
                await self._wait_for_room()
            renew = True
            stepped, sent = await self._send(content, renew=renew)
        if self._taken is content:
            return stepped
        self._applied(content, sent, renew=renew)
        if stepped.status == "REPEAT":
            self._held.session.reread(content, monotonic())
        else:
            if stepped.fetched.marks != self._held.session.marks_version:
                await self._load_marks()
            self._deliver(content, stepped)
        return stepped

    def _heard(self, content: Step, sent: float, stepped: calls.Stepped, *, renew: bool) -> None:
        """In the turn in which the answer comes. What asks for more than to be taken in is left to the shard's loop."""
        if stepped.status == "OK" and stepped.fetched.marks == self._held.session.marks_version:
            self.unanswered, self._taken = None, content
            self._applied(content, sent, renew=renew)
            self._deliver(content, stepped)

    def _applied(self, content: Step, sent: float, *, renew: bool) -> None:
        held = self._held
        held.session.applied(content)
        if renew:
            self._owning.runners.resume(held, held.renewed(sent))

    def _deliver(self, content: Step, stepped: calls.Stepped) -> None:
        held, now = self._held, monotonic()
        held.due_in(now, stepped.fetched.due_in_ms)
        self._owning.runners.deliver(held, held.session.receive(content, stepped.fetched, now))

    async def _load_marks(self) -> None:
        """Tried until it is answered, like the step itself."""
        pipes, held = self._owning.pipes, self._held
        while True:
            try:
                held.set_marks(*await read_marks(pipes, held.keys, timeout_s=self._owning.settings.lease_s))
            except (StoreError, CorruptData) as error:
                self._failed(CANT_READ_MARKS, error)
                await anyio.sleep(PAUSE_AFTER_ERROR_S * random.uniform(0.5, 1.0))
            else:
                self._well(CANT_READ_MARKS)
                return

    async def _redirect(self, content: Step, stepped: calls.Stepped) -> bool:
        """A shard that the step sends to was sealed: what it sends there goes to those that took the keys over, once
        they are known. False where that is not it."""
        held = self._held
        _, refused = (
            content.effects[max(stepped.effect, 1) - 1] if stepped.effect <= len(content.effects) else (0, None)
        )
        if refused is None or refused.to is None or stepped.why not in ("SEALED", "MISSING"):
            return False
        looked = True
        try:
            await refused.to[0].refresh()
        except StoreError:
            looked = False  # the sealed shard's children are asked for again
        except ShardqError:
            return False  # there is no such queue any more
        new = redirected(refused, held.slot)
        if new is None or (new.key == refused.key and looked and stepped.why == "MISSING"):
            return False
        if new.key == refused.key:
            await self._wait_for_room()
        content.effects = [
            (message, (each.key == refused.key and redirected(each, held.slot)) or each)
            for message, each in content.effects
        ]
        held.session.renumber(content)
        return True

    def _refuse(self, content: Step, stepped: calls.Stepped) -> None:
        """Redis refused an effect: nobody but its author can mend that, so its message is a dead letter."""
        held = self._held
        if not 1 <= stepped.effect <= len(content.effects):
            msg = f"shard {held.shard} of {held.queue}: the store refused an effect that was not sent"
            raise CorruptData(msg)
        message, effect = content.effects[stepped.effect - 1]
        error = f"Redis refused {effect.command} on {effect.key}: {stepped.why}"
        _log.error("message %s (key %r) is a dead letter: %s", message.id, message.key, error)
        held.session.amend(content, message, dead_record_of(message, error))
        held.tell_job(message, DEAD, error=error)

    async def _wait_for_room(self) -> None:
        """A queue that this step sends to is full, or sealed with no table published yet: everything waits until its
        workers have made room, or whoever began the reshard has done it."""
        held = self._held
        if self._wishes.leaving and not held.trust.trusted(monotonic() + self._owning.settings.lease_s / 2):
            msg = f"shard {held.shard} of {held.queue}: left without its last commit, a queue it sends to takes nothing"
            raise LeaseLost(msg)
        await anyio.sleep(FULL_PAUSE_S)
