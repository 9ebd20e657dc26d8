"""The runners: tasks that call the user's handler, one message at a time each. Fetches and commits nothing.

Invariants:
- A handler starts only while its shard's lease is trusted by this process's own clock; when trust ends, running
  handlers of the shard are cancelled. Their messages wait, and go on here if the lease turns out to be ours still.
- A message of a lost or draining shard is dropped unhandled: it is pending in Redis, its next owner handles it.
- A handler's exception never ends a runner: the message is handled later, or it is a dead letter.
- One suspect (core/later.py) runs at a time in the whole process.
- With rate limits or shared slots a message is begun only with leave (runtime/limits.py) and a slot (runtime/slots.py),
  looked for when a runner has it in hand; without them it goes back, and no runner waits with it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Any

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from shardq.core import jobs
from shardq.core.lanes import let_go
from shardq.core.message import Message
from shardq.core.retry import Reject, RetryLater
from shardq.runtime.failures import asked_to_stop, dead_record, own_cancellation, text_of
from shardq.runtime.handlers import give_type
from shardq.runtime.limits import GroupLimiter, Limits
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.shard import OwnedShard
from shardq.runtime.slots import Share

Handler = Callable[[Message], Awaitable[Any]]
BatchHandler = Callable[[Sequence[Message]], Awaitable[Any]]

YIELD_AFTER_S = 0.005
BATCH_MESSAGES = 1000

_log = logging.getLogger("shardq")


class _Runner:
    __slots__ = ("interrupted", "scope", "shard")

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.shard: OwnedShard | None = None
        self.interrupted = False

    def interrupt(self) -> None:
        self.interrupted = True
        self.scope.cancel()


class Runners:
    """Common part: the tasks, the clock of trust, failures. `deliver` is how messages come in."""

    # Where messages that may be handled now are put, by the lanes of every shard; None where lists are handled.
    ready: deque[Message] | None = None

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._runners = [_Runner() for _ in range(settings.concurrency)]
        self._idle: list[asyncio.Future[None]] = []
        self._alone: OwnedShard | None = None
        self.limits: Limits | None = None
        self.limiter: GroupLimiter | None = None
        self.share: Share | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn_began_s = 0.0
        self._turn_is_told = False

    def start(self, tasks: TaskGroup) -> None:
        self._loop, self._turn_began_s = asyncio.get_running_loop(), monotonic()
        for runner in self._runners:
            tasks.start_soon(self._keep_serving, runner)

    def deliver(self, shard: OwnedShard, batches: list[list[Message]]) -> None:
        """Messages just fetched, in order."""
        raise NotImplementedError

    def resume(self, shard: OwnedShard, messages: list[Message]) -> None:
        """Messages that were stopped and are to be handled now."""
        raise NotImplementedError

    def end(self) -> None:
        """Nothing more is begun: what is left here is pending in Redis."""

    async def _serve(self, runner: _Runner) -> None:
        raise NotImplementedError

    @property
    def waiting(self) -> int:
        """How many messages could be begun now but for the group's limit and the slots; of lists, how many lists."""
        raise NotImplementedError

    def demand(self) -> tuple[int, int]:
        """How many messages would be begun at once if the group's limit allowed it, and how many wait in all."""
        raise NotImplementedError

    # -- limits and shares -----------------------------------------------------------------------------------

    def restrict(self, limits: Limits | None, share: Share | None) -> None:
        """Before `start`: what holds for the messages of these runners."""
        self.limits, self.share = limits, share
        self.limiter = limits.limiter if limits is not None else None
        if share is not None:
            share.open(self._startable, self.wake)

    def attach(self, shard: OwnedShard) -> None:
        """The shard's lease was taken: its messages will come here."""
        if self.limits is not None:
            self.limits.guard(shard)

    def admit(self, message: Message) -> None:
        """A message that waited for its key's limit may be begun."""
        assert self.ready is not None
        self.ready.append(message)
        self.wake(1)

    @property
    def has_plenty(self) -> bool:
        """Whether more messages are ready than these runners will begin soon."""
        return self.waiting > 2 * self._settings.concurrency

    def _startable(self) -> int:
        if self.limiter is not None and not self.limiter.tokens.usable(monotonic()):
            return 0
        return self.waiting

    def _has_leave(self, now_s: float) -> bool:
        """Whether the group's limit and the slots let a message be begun now; then the slot is taken, leave is not."""
        if self.limiter is not None and not self.limiter.tokens.usable(now_s):
            self.limiter.want()
            if self.share is not None:
                self.share.decline()
            return False
        return self.share is None or self.share.enter()

    def _nothing_to_begin(self) -> None:
        if self.share is not None:
            self.share.decline()

    def may_run_alone(self, shard: OwnedShard) -> bool:
        """Whether no suspect is being handled in this process; then `shard` may hand out one."""
        holder = self._alone
        if holder is not None and not holder.lost and holder.session.later.alone is not None:
            return False
        self._alone = shard
        return True

    def interrupt(self, shard: OwnedShard) -> None:
        """Cancels what runs for the shard: its lease is not trusted any more, or lost."""
        for runner in self._runners:
            if runner.shard is shard:
                runner.interrupt()

    def wake(self, count: int) -> None:
        """Wakes as many idle runners as there is work for."""
        self._tell_turn()
        while count > 0 and self._idle:
            waiter = self._idle.pop()
            if not waiter.done():  # its task may have been cancelled
                waiter.set_result(None)
                count -= 1

    def _tell_turn(self) -> None:
        """Notes when the next turn of the event loop begins: what all runners do in one counts together."""
        if not self._turn_is_told and self._loop is not None:
            self._turn_is_told = True
            self._loop.call_soon(self._turn_begins)

    def _turn_begins(self) -> None:
        self._turn_is_told = False
        self._turn_began_s = monotonic()

    async def rest(self) -> None:
        """A runner without work waits here."""
        loop = self._loop or asyncio.get_running_loop()
        waiter = loop.create_future()
        self._idle.append(waiter)
        try:
            await waiter
        finally:
            if waiter.cancelled() and waiter in self._idle:
                self._idle.remove(waiter)

    async def _keep_serving(self, runner: _Runner) -> None:
        while True:
            with anyio.CancelScope() as runner.scope:
                runner.interrupted = False
                await self._serve(runner)

    # -- outcomes --------------------------------------------------------------------------------------------

    def failed(self, shard: OwnedShard, messages: list[Message], error: Exception) -> None:
        """The handler raised: its messages are tried again later, or dead letters."""
        if shard.lost:
            for message in messages:
                let_go(message)
            return
        what = text_of(error)
        for message in messages:
            wait_s = self._wait_s(message, error)
            if wait_s is None:
                _log.error(
                    "message %s (key %r) is a dead letter after %d tries: %s",
                    message.id,
                    message.key,
                    message.attempt,
                    what,
                )
                shard.tell_job(message, jobs.DEAD, error=what)
                shard.bury(message, dead_record(message, error))
                continue
            _log.warning(
                "message %s (key %r) failed, try %d of %d, again in %.3g s: %s",
                message.id,
                message.key,
                message.attempt,
                self._settings.retry.attempts,
                wait_s,
                what,
                exc_info=None if isinstance(error, RetryLater) else error,
            )
            shard.tell_job(message, jobs.RETRYING, error=what)
            shard.put_off(message, wait_s, what)

    def _wait_s(self, message: Message, error: Exception) -> float | None:
        """Seconds until the next try; None when there is none."""
        retry = self._settings.retry
        if message.attempt >= retry.attempts or isinstance(error, Reject):
            return None
        return error.delay if isinstance(error, RetryLater) else retry.delay_s(message.attempt, random.random())


class MessageRunners(Runners):
    """`handler`: one message at a time per key, different keys side by side, `concurrency` in all."""

    def __init__(self, settings: WorkerSettings, handler: Handler) -> None:
        super().__init__(settings)
        self._handler = handler
        self.ready: deque[Message] = deque()

    def deliver(self, shard: OwnedShard, batches: list[list[Message]]) -> None:
        for messages in batches:
            shard.admit(messages)
        self.wake(len(self.ready))

    def resume(self, shard: OwnedShard, messages: list[Message]) -> None:
        self.ready.extend(messages)
        self.wake(len(messages))

    def end(self) -> None:
        for message in self.ready:
            let_go(message)
        self.ready.clear()

    @property
    def waiting(self) -> int:
        return len(self.ready)

    def demand(self) -> tuple[int, int]:
        return min(len(self.ready), len(self._idle)), len(self.ready)

    def _may_begin(self, message: Message, shard: OwnedShard, now_s: float) -> bool | None:
        """Whether the message, which is in hand, may be begun; else it has gone back to where it waits. None: and no
        other one may."""
        if not self._has_leave(now_s):
            self.ready.appendleft(message)
            return None
        if shard.gate is not None and not shard.gate.spend(message, now_s):
            if self.share is not None:
                self.share.give_back()
            return False
        if self.limiter is not None:
            self.limiter.spend(now_s)
        return True

    async def _serve(self, runner: _Runner) -> None:
        ready, handler = self.ready, self._handler
        restricted, share = self.limits is not None or self.share is not None, self.share
        fresh = True  # nothing was handled since it was woken
        following: Message | None = None  # the next of the key that was just handled
        while not runner.interrupted:  # a cancellation meant for the last message must not hit the next one
            if following is None and not ready:
                self._nothing_to_begin()
                await self.rest()
                fresh = True
                continue
            now_s, turn_ends_s = monotonic(), self._turn_began_s + YIELD_AFTER_S
            # Whoever was woken handles one at least: when a turn is long, all would else be woken for nothing.
            if not fresh and now_s > turn_ends_s:
                if following is not None:
                    ready.append(following)  # it is the turn of others
                    following = None
                # Handlers that never wait must not starve renewals. Not between the look at the lease and the handler's
                # start: a process that is stopped just there would start it when it wakes, its lease long taken.
                self._tell_turn()
                await asyncio.sleep(0)
                fresh = True
                continue
            fresh = False
            message = following if following is not None else ready.popleft()
            following = None
            shard: OwnedShard = message.batch.owner  # type: ignore[assignment]  # its only kind; cast() costs a call
            if shard.lost or shard.draining:
                let_go(message)
                continue
            if now_s >= shard.trusted_until_monotonic_s:
                shard.suspend(message)
                continue
            if shard.marked and shard.is_deleted(message):
                following = shard.finish(message)
                continue
            if restricted and not (begins := self._may_begin(message, shard, now_s)):
                if begins is None:
                    await self.rest()
                    fresh = True
                continue
            runner.shard = shard
            shard.running += 1
            # Neither can come sooner: a turn that ends begins anew, and trust that is there only grows.
            unchanged_s = min(turn_ends_s, shard.trusted_until_monotonic_s)
            try:
                while True:
                    try:
                        headers = message.headers
                        if headers is not None:
                            shard.tell_job(message, jobs.RUNNING)
                        result = await handler(message)
                    except Exception as error:
                        self.failed(shard, [message], error)
                        break
                    except asyncio.CancelledError as error:
                        if asked_to_stop():
                            shard.effects.pop(message.id, None)
                            shard.suspend(message)
                            raise
                        self.failed(shard, [message], own_cancellation(error))
                        break
                    if headers is not None:
                        shard.tell_job(message, jobs.DONE, result=result)
                    following = shard.finish(message)
                    if restricted:
                        if following is not None:  # it has to look for leave like any other
                            shard.line_up(following)
                            following = None
                        break
                    # What follows in the same shard goes on here, with no more than what may have changed looked at.
                    if shard.ending or shard.marked or monotonic() >= unchanged_s:
                        break
                    if runner.interrupted:
                        break  # type: ignore[unreachable]  # it may have become so while the handler ran
                    if following is not None:
                        message, following = following, None
                    elif ready and ready[0].batch.owner is shard:
                        message = ready.popleft()
                    else:
                        break
            finally:
                runner.shard = None
                shard.running -= 1
                if share is not None:
                    share.leave()
                if shard.ending:
                    shard.stopped()
        if following is not None:
            ready.appendleft(following)


class BatchRunners(Runners):
    """`batch_handler`: lists of messages of one shard, in order, one list at a time per shard."""

    def __init__(
        self, settings: WorkerSettings, handler: BatchHandler, convert: Callable[[Any], Any] | None = None
    ) -> None:
        super().__init__(settings)
        self._handler, self._convert = handler, convert
        self._waiting: dict[OwnedShard, deque[list[Message]]] = {}
        self._sweep_at = 0
        self._ready_shards: deque[OwnedShard] = deque()

    def deliver(self, shard: OwnedShard, batches: list[list[Message]]) -> None:
        if not batches:
            return
        if len(self._waiting) >= self._sweep_at:
            for known in [known for known in self._waiting if known.lost]:
                del self._waiting[known]
            self._sweep_at = 2 * len(self._waiting)
        if shard in self._waiting:
            self._waiting[shard].extend(batches)
            return
        # In `_waiting` means in `_ready` or with a runner: so a shard is never with two.
        self._waiting[shard] = deque(batches)
        self._ready_shards.append(shard)
        self.wake(1)

    def resume(self, shard: OwnedShard, messages: list[Message]) -> None:
        if not messages:  # a renewal that nothing waited for: the shard may be with a runner right now
            return
        # A list that was stopped goes first again: order within the shard.
        by_batch = [list(group) for _, group in itertools.groupby(messages, key=lambda message: message.batch)]
        waiting = self._waiting.setdefault(shard, deque())
        waiting.extendleft(reversed(by_batch))
        self._ready_shards.append(shard)
        self.wake(1)

    @property
    def waiting(self) -> int:
        return len(self._ready_shards)

    def demand(self) -> tuple[int, int]:
        lengths = (len(batch) for shard in self._ready_shards for batch in self._waiting[shard])
        waiting = min(sum(itertools.islice(lengths, BATCH_MESSAGES)), BATCH_MESSAGES)
        return waiting if self._idle else 0, waiting

    def _within_limit(self, shard: OwnedShard, taken: list[list[Message]]) -> list[list[Message]]:
        """As much of a list as the group's limit has leave for; the rest goes back to the front."""
        if self.limiter is None:
            return taken
        left = self.limiter.spend(monotonic(), sum(map(len, taken)))
        within: list[list[Message]] = []
        beyond: list[list[Message]] = []
        for batch in taken:
            if left:
                within.append(batch[:left])
            if len(batch) > left:
                beyond.append(batch[left:])
            left = max(left - len(batch), 0)
        self._waiting[shard].extendleft(reversed(beyond))
        return within

    def _take(self, shard: OwnedShard) -> list[list[Message]]:
        """The next list, as the batches it is made of. Retries come in ever shorter lists, so that at last the one
        message that makes them fail is alone; new messages and retries are never in one list."""
        waiting, count, most = self._waiting[shard], 0, BATCH_MESSAGES
        taken: list[list[Message]] = []
        while waiting:
            first = waiting[0][0]
            most = min(most, _list_limit(shard, first))  # before it is taken: the list may be too long for it already
            if taken and (count + len(waiting[0]) > most or bool(first.batch.item) != bool(taken[0][0].batch.item)):
                break
            batch = waiting.popleft()
            if not first.batch.item and shard.session.later.holding:
                batch = shard.session.divert(batch)
            if shard.marked:
                shard.finish_list([[message] for message in batch if shard.is_deleted(message)])
                batch = [message for message in batch if not shard.is_deleted(message)]
            if batch:
                taken.append(batch)
                count += len(batch)
        return taken

    def _typed(
        self, shard: OwnedShard, taken: list[list[Message]], convert: Callable[[Any], Any]
    ) -> list[list[Message]]:
        """Values get their type; a message whose value does not fit is a dead letter, the others of its list go on."""
        fitting: list[list[Message]] = []
        for batch in taken:
            fit: list[Message] = []
            for message in batch:
                try:
                    give_type(message, convert)
                    fit.append(message)
                except Reject as error:
                    self.failed(shard, [message], error)
            if fit:
                fitting.append(fit)
        return fitting

    async def _serve(self, runner: _Runner) -> None:
        while not runner.interrupted:
            if not self._ready_shards:
                self._nothing_to_begin()
                await self.rest()
                continue
            await anyio.lowlevel.checkpoint()  # before the look at the lease, as above
            if not self._ready_shards:
                continue
            shard = self._ready_shards.popleft()
            if shard.lost or shard.draining:
                self._waiting.pop(shard, None)
                continue
            if not self._has_leave(monotonic()):
                self._ready_shards.appendleft(shard)
                await self.rest()
                continue
            taken = self._within_limit(shard, self._take(shard))
            if self._convert is not None:
                taken = self._typed(shard, taken, self._convert)
            messages = list(itertools.chain.from_iterable(taken))
            if not messages or monotonic() >= shard.trusted_until_monotonic_s:
                self._not_begun(shard, messages)
                continue
            runner.shard = shard
            shard.running += 1
            try:
                await self._handler(messages)
            except Exception as error:
                self.failed(shard, messages, error)
                self._next(shard)
            except asyncio.CancelledError as error:
                if asked_to_stop():
                    for message in messages:
                        shard.effects.pop(message.id, None)
                    shard.suspend(*messages)
                    raise
                self.failed(shard, messages, own_cancellation(error))
                self._next(shard)
            else:
                for batch in taken:
                    if batch[0].batch.headed:
                        for message in batch:
                            shard.tell_job(message, jobs.DONE)
                shard.finish_list(taken)
                self._next(shard)
            finally:
                runner.shard = None
                shard.running -= 1
                if self.share is not None:
                    self.share.leave()
                if shard.ending:
                    shard.stopped()

    def _not_begun(self, shard: OwnedShard, messages: list[Message]) -> None:
        """Nothing of the list is left to be handled, or its shard's lease is not trusted now: then it is suspended."""
        if self.share is not None:
            self.share.give_back()
        if messages:
            shard.suspend(*messages)
        else:
            self._next(shard)

    def _next(self, shard: OwnedShard) -> None:
        """The shard's list is through: the next one, if there is one."""
        if self._waiting.get(shard):
            self._ready_shards.append(shard)
            self.wake(1)
        else:
            self._waiting.pop(shard, None)


def _list_limit(shard: OwnedShard, message: Message) -> int:
    """How many messages may be in a list with this one."""
    if not message.batch.item:
        return BATCH_MESSAGES
    suspect = shard.session.later.alone == message.batch.item
    return 1 if suspect else max(1, BATCH_MESSAGES >> 3 * (message.attempt - 1))
