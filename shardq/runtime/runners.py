"""The runners: tasks that call the user's handler, one message at a time each. Fetches and commits nothing.

Invariants:
- A handler starts only while its shard's lease is trusted by this process's own clock; when trust ends, running
  handlers of the shard are cancelled. Their messages wait, and go on here if the lease turns out to be ours still.
- A message of a lost or draining shard is dropped unhandled: it is pending in Redis, its next owner handles it.
- A handler's exception never ends a runner: the message is tried again later, its key waits; then it is a dead letter.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic, time_ns
from typing import cast

import anyio
import anyio.lowlevel
import msgspec
from anyio.abc import TaskGroup

from shardq.core.message import Message
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.shard import OwnedShard

Handler = Callable[[Message], Awaitable[object]]
BatchHandler = Callable[[Sequence[Message]], Awaitable[object]]

YIELD_AFTER_S = 0.005
RETRY_FIRST_S = 0.1
BATCH_MESSAGES = 1000

_log = logging.getLogger("shardq")


class _Runner:
    __slots__ = ("scope", "shard")

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.shard: OwnedShard | None = None


class Runners:
    """Common part: the tasks, the clock of trust, failures and retries. `deliver` is how messages come in."""

    def __init__(self, settings: WorkerSettings, count: int) -> None:
        self._settings = settings
        self._runners = [_Runner() for _ in range(count)]
        # Messages that may be handled now, oldest first; the lanes of every shard put theirs here.
        self.ready: deque[Message] = deque()
        self._idle: list[anyio.Event] = []
        self._later: list[tuple[float, int, OwnedShard, list[Message]]] = []
        self._order = itertools.count()
        self._later_changed = anyio.Event()

    def start(self, tasks: TaskGroup) -> None:
        for runner in self._runners:
            tasks.start_soon(self._keep_serving, runner)
        tasks.start_soon(self._retry_later)

    def deliver(self, shard: OwnedShard, batches: list[list[Message]]) -> None:
        """Messages just fetched, in order."""
        raise NotImplementedError

    def resume(self, shard: OwnedShard, messages: list[Message]) -> None:
        """Messages that were stopped, or failed, and are to be handled (again) now."""
        raise NotImplementedError

    async def _serve(self, runner: _Runner) -> None:
        raise NotImplementedError

    def interrupt(self, shard: OwnedShard) -> None:
        """Cancels what runs for the shard: its lease is not trusted any more, or lost."""
        for runner in self._runners:
            if runner.shard is shard:
                runner.scope.cancel()

    def wake(self, count: int) -> None:
        """Wakes as many idle runners as there is work for."""
        for _ in range(min(count, len(self._idle))):
            self._idle.pop().set()

    async def rest(self) -> None:
        """A runner without work waits here."""
        event = anyio.Event()
        self._idle.append(event)
        try:
            await event.wait()
        finally:
            if not event.is_set():
                self._idle.remove(event)

    async def _keep_serving(self, runner: _Runner) -> None:
        while True:
            with anyio.CancelScope() as runner.scope:
                await self._serve(runner)

    # -- failures --------------------------------------------------------------------------------------------

    def failed(self, shard: OwnedShard, messages: list[Message], error: Exception) -> bool:
        """The handler raised: tried again later, or dead letters when the tries are used up; true in that case."""
        if shard.lost:
            return False
        again: list[Message] = []
        what = _text(lambda: repr(error))
        for message in messages:
            if message.attempt > self._settings.retries:
                _log.error(
                    "message %s (key %r) failed %d times and is a dead letter now: %s",
                    message.id,
                    message.key,
                    message.attempt,
                    what,
                )
                shard.bury(message, dead_record(message, error))
            else:
                _log.warning(
                    "message %s (key %r) failed, try %d of %d: %s",
                    message.id,
                    message.key,
                    message.attempt,
                    self._settings.retries + 1,
                    what,
                    exc_info=error,
                )
                message.attempt += 1
                shard.session.retried += 1
                again.append(message)
        if again:
            pause = RETRY_FIRST_S * 2 ** (again[0].attempt - 2)
            heapq.heappush(self._later, (monotonic() + pause, next(self._order), shard, again))
            self._later_changed.set()
        return not again

    async def _retry_later(self) -> None:
        while True:
            pause = self._later[0][0] - monotonic() if self._later else float("inf")
            if pause > 0:
                with anyio.move_on_after(pause):
                    await self._later_changed.wait()
                self._later_changed = anyio.Event()
                continue
            _, _, shard, messages = heapq.heappop(self._later)
            self.resume(shard, messages)


def asked_to_stop() -> bool:
    """Whether a CancelledError just caught was asked for from outside; else the handler met some cancelled task."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def own_cancellation(error: BaseException) -> Exception:
    failure = RuntimeError("the handler awaited something that was cancelled")
    failure.__cause__ = error
    return failure


def _text(make: Callable[[], str]) -> str:
    """A user's exception in words: its own __repr__ may fail, its text may hold what UTF-8 can't carry."""
    try:
        return make().encode(errors="backslashreplace").decode()
    except Exception as error:
        return f"<{type(error).__name__} while describing the failure>"


def dead_record(message: Message, error: Exception) -> bytes:
    """What is kept of a message that failed: all that a replay needs, and why it failed."""
    try:
        return _dead_record(message, message.value, error)
    except (TypeError, ValueError, OverflowError, RecursionError):
        # The handler put something into the value that msgpack can't carry; the entry's id still says which it was.
        return _dead_record(message, _text(lambda: repr(message.value)), error)


def _dead_record(message: Message, value: object, error: Exception) -> bytes:
    return msgspec.msgpack.encode(
        {
            "id": message.id,
            "key": message.key,
            "value": value,
            "headers": message.headers,
            "sent_at_ms": message.sent_at_ms,
            "attempts": message.attempt,
            "failed_at_ms": time_ns() // 1_000_000,
            "error": _text(lambda: repr(error))[:2000],
            "traceback": _text(lambda: "".join(traceback.format_exception(error)))[-8000:],
        }
    )


class MessageRunners(Runners):
    """`handler`: one message at a time per key, different keys side by side, `concurrency` in all."""

    def __init__(self, settings: WorkerSettings, handler: Handler) -> None:
        super().__init__(settings, settings.concurrency)
        self._handler = handler

    def deliver(self, shard: OwnedShard, batches: list[list[Message]]) -> None:
        for messages in batches:
            shard.lanes.add(messages)
        self.wake(len(self.ready))

    def resume(self, shard: OwnedShard, messages: list[Message]) -> None:
        self.ready.extend(messages)
        self.wake(len(messages))

    async def _serve(self, runner: _Runner) -> None:
        ready, handler = self.ready, self._handler
        yielded_s = monotonic()
        while not runner.scope.cancel_called:  # a cancellation meant for the last message must not hit the next one
            if not ready:
                await self.rest()
                yielded_s = monotonic()
                continue
            message = ready.popleft()
            shard = cast("OwnedShard", message.batch.owner)
            if shard.lost or shard.draining:
                continue
            now_s = monotonic()
            if now_s >= shard.trusted_until_monotonic_s:
                shard.suspended.append(message)
                continue
            runner.shard = shard
            shard.running += 1
            try:
                if now_s - yielded_s > YIELD_AFTER_S:
                    # Handlers that never wait must not starve renewals.
                    yielded_s = now_s
                    await anyio.lowlevel.checkpoint()
                await handler(message)
            except Exception as error:
                if self.failed(shard, [message], error):
                    shard.lanes.done(message.key)
            except asyncio.CancelledError as error:
                if asked_to_stop():
                    shard.suspended.append(message)
                    raise
                if self.failed(shard, [message], own_cancellation(error)):
                    shard.lanes.done(message.key)
            else:
                shard.finish(message)
                if not shard.lost:
                    shard.lanes.done(message.key)
            finally:
                runner.shard = None
                shard.stopped()


class BatchRunners(Runners):
    """`batch_handler`: lists of messages of one shard, in order, one list at a time per shard."""

    def __init__(self, settings: WorkerSettings, handler: BatchHandler) -> None:
        super().__init__(settings, settings.concurrency)
        self._handler = handler
        self._waiting: dict[OwnedShard, deque[list[Message]]] = {}
        self._ready_shards: deque[OwnedShard] = deque()

    def deliver(self, shard: OwnedShard, batches: list[list[Message]]) -> None:
        if not batches:
            return
        for known in [known for known in self._waiting if known.lost]:
            del self._waiting[known]
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
        # A failed list goes first again: order within the shard.
        by_batch = [list(group) for _, group in itertools.groupby(messages, key=lambda message: message.batch)]
        waiting = self._waiting.setdefault(shard, deque())
        waiting.extendleft(reversed(by_batch))
        self._ready_shards.append(shard)
        self.wake(1)

    def _take(self, shard: OwnedShard) -> list[list[Message]]:
        waiting, count = self._waiting[shard], 0
        taken: list[list[Message]] = []
        while waiting and (not taken or count + len(waiting[0]) <= BATCH_MESSAGES):
            taken.append(waiting.popleft())
            count += len(taken[-1])
        return taken

    async def _serve(self, runner: _Runner) -> None:
        while not runner.scope.cancel_called:
            if not self._ready_shards:
                await self.rest()
                continue
            shard = self._ready_shards.popleft()
            if shard.lost or shard.draining:
                self._waiting.pop(shard, None)
                continue
            taken = self._take(shard)
            messages = list(itertools.chain.from_iterable(taken))
            if not messages:
                del self._waiting[shard]
                continue
            if monotonic() >= shard.trusted_until_monotonic_s:
                shard.suspended.extend(messages)
                continue
            runner.shard = shard
            shard.running += 1
            try:
                await anyio.lowlevel.checkpoint()
                await self._handler(messages)
            except Exception as error:
                if self.failed(shard, messages, error):
                    self._next(shard)
            except asyncio.CancelledError as error:
                if asked_to_stop():
                    shard.suspended.extend(messages)
                    raise
                if self.failed(shard, messages, own_cancellation(error)):
                    self._next(shard)
            else:
                shard.finish_list(taken)
                self._next(shard)
            finally:
                runner.shard = None
                shard.stopped()

    def _next(self, shard: OwnedShard) -> None:
        """The shard's list is through: the next one, if there is one."""
        if self._waiting.get(shard):
            self._ready_shards.append(shard)
            self.wake(1)
        else:
            self._waiting.pop(shard, None)
