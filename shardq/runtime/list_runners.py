"""Runners of a handler that is called with lists of messages: which messages make a list, and one list after the other.
Fetches and commits nothing.

Invariants beside those of runners.py:
- The lists of a shard are handled one at a time, in order: a shard is never with two runners.
- Retries come in ever shorter lists, at last alone; new messages and retries are never in one list.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Any

import anyio.lowlevel

from shardq.core import jobs
from shardq.core.message import Message
from shardq.core.retry import Reject
from shardq.runtime.failures import asked_to_stop, own_cancellation
from shardq.runtime.handlers import give_type
from shardq.runtime.retrying import handler_failed
from shardq.runtime.runners import Runner, Runners
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.shard import OwnedShard

BatchHandler = Callable[[Sequence[Message]], Awaitable[Any]]

BATCH_MESSAGES = 1000


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
                batch = shard.hand.divert(batch)
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
                    handler_failed(shard, [message], error, self._settings.retry)
            if fit:
                fitting.append(fit)
        return fitting

    async def _serve(self, runner: Runner) -> None:
        while not runner.interrupted:
            if not self._ready_shards:
                self._nothing_to_begin()
                await self.rest()
                continue
            await anyio.lowlevel.checkpoint()  # others' turn, and before the look at the lease
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
                handler_failed(shard, messages, error, self._settings.retry)
                self._next(shard)
            except asyncio.CancelledError as error:
                if asked_to_stop():
                    for message in messages:
                        shard.effects.pop(message.id, None)
                    shard.suspend(*messages)
                    raise
                handler_failed(shard, messages, own_cancellation(error), self._settings.retry)
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
