"""Runners of a handler that is called for each message. Its loop runs for every message: it is written out where a call
would cost, and calls nothing that is the same for two messages in a row. Fetches and commits nothing.

Invariants beside those of runners.py:
- The next message of a key goes on with the runner that finished the one before, for as long as it may; then others
  have their turn, so that handlers that never wait don't starve renewals.
- Between the look at the lease and the handler's start nothing waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

from shardq.core import jobs
from shardq.core.lanes import let_go
from shardq.core.message import Message
from shardq.runtime.failures import asked_to_stop, own_cancellation
from shardq.runtime.retrying import handler_failed
from shardq.runtime.runners import Runner, Runners
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.shard import OwnedShard

Handler = Callable[[Message], Awaitable[Any]]

YIELD_AFTER_S = 0.005


class MessageRunners(Runners):
    """`handler`: one message at a time per key, different keys side by side, `concurrency` in all."""

    def __init__(self, settings: WorkerSettings, handler: Handler) -> None:
        super().__init__(settings)
        self._handler = handler
        self.ready: deque[Message] = deque()

    def deliver(self, shard: OwnedShard, batches: list[list[Message]]) -> None:
        # For those that are ready already runners were woken then; but one without leave to begin rests all the same.
        woken = len(self.ready) if self.limits is None and self.share is None else 0
        for messages in batches:
            shard.admit(messages)
        self.wake(len(self.ready) - woken)

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

    async def _serve(self, runner: Runner) -> None:
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
                        handler_failed(shard, [message], error, self._settings.retry)
                        break
                    except asyncio.CancelledError as error:
                        if asked_to_stop():
                            shard.effects.pop(message.id, None)
                            shard.suspend(message)
                            raise
                        handler_failed(shard, [message], own_cancellation(error), self._settings.retry)
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
