"""One event loop in a thread of its own with an open producer in it: what `SyncProducer` hands its work to. Knows
nothing of forks or of the end of the program; sync.py does.

Work goes to the loop in one list, drained whole when the loop wakes, and a batch's answers are given when the batch is
stored: no task, loop iteration or wake-up per message. (A task for each message made it seven times slower: the loop
lets go of the interpreter's lock in every iteration, and other threads keep it for five milliseconds.)

Invariants:
- What is posted is begun in the order posted: a thread's messages of one key are stored in the order it sent them.
- Every answer posted ends: with a result, an error, or withdrawn by `cancel()` before it was begun.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from shardq.core.conditions import condition
from shardq.errors import ClosedError, NotStored, ShardqError, StoreTimeout
from shardq.runtime.answers import AnyAnswer, JobAnswer, Losses, MessageAnswer, SendOptions
from shardq.runtime.batches import PendingBatch, all_ended
from shardq.runtime.producer import Producer
from shardq.runtime.tasks import one_error

_log = logging.getLogger("shardq")

_NO_OPTIONS = SendOptions(delay=None, at=None, dedupe_id=None, dedupe_window=None)
MOST_OPEN = 10_000  # messages under way: beside its value each takes about a kilobyte


class _Settler:
    """Waits for the batches of one shard, in order, and gives their messages' answers."""

    def __init__(self) -> None:
        self.batches: deque[PendingBatch] = deque()
        self.woken = anyio.Event()


class Background:
    """The thread. It opens its producer when it starts, and ends after `stop()` or with the error of the opening; from
    then on it takes nothing more."""

    def __init__(
        self,
        name: str,
        opened: Callable[[], AbstractAsyncContextManager[Producer]],
        losses: Losses,
        most_bytes: int,
        on_end: Callable[[Background], None],
    ) -> None:
        self.over = False  # it takes nothing more: it was stopped, or has ended
        self._opened, self._losses, self._most_bytes, self._on_end = opened, losses, most_bytes, on_end
        self._pid = os.getpid()
        self._room = threading.Condition(threading.Lock())
        self._inbox: deque[AnyAnswer | None] = deque()
        self._drained: deque[AnyAnswer | None] = deque()
        self._open: dict[AnyAnswer, None] = {}
        self._open_bytes = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asleep: anyio.Event | None = None
        self._waiting: dict[PendingBatch, list[tuple[int, MessageAnswer]]] = {}
        self._settlers: dict[int, _Settler] = {}
        self._jobs: dict[JobAnswer[Any], anyio.Event] = {}
        self._abandoned = False
        self._thread = threading.Thread(target=self._run_thread, name=name, daemon=True)

    # -- from any thread -------------------------------------------------------------------------------------

    def start(self) -> None:
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads, or the interpreter is at its end
            self._end(error)
            msg = f"no thread could be started to send from: {error}"
            raise ClosedError(msg) from error

    def post(self, answer: AnyAnswer, *, wait_for_room: bool = False) -> bool:
        """False when it takes nothing more, then nothing was done: start another one."""
        with self._room:
            while wait_for_room and not self.over and self._is_full():
                self._room.wait()
            if self.over:
                return False
            self._inbox.append(answer)
            self._open[answer] = None
            self._open_bytes += answer.size
            self._wake()
        return True

    def _is_full(self) -> bool:
        return bool(self._open) and (len(self._open) >= MOST_OPEN or self._open_bytes > self._most_bytes)

    def stop(self) -> None:
        """It takes nothing more, and ends when all that was posted has ended."""
        with self._room:
            if not self.over:
                self.over = True
                self._room.notify_all()
                self._inbox.append(None)
                self._wake()

    def abandon(self) -> None:
        """`stop()` for the garbage collector, which may come while any lock is held."""
        self._abandoned = True
        if self._pid == os.getpid() and self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self.stop)
            except RuntimeError:
                return  # the loop is closed already

    def join(self, timeout: float | None = None) -> bool:
        """Waits for its end; whether that has come."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def open(self) -> int:
        """Messages and jobs under way."""
        return len(self._open)

    def _wake(self) -> None:
        if self._asleep is not None:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._asleep.set)
            self._asleep = None

    # -- the thread ------------------------------------------------------------------------------------------

    def _run_thread(self) -> None:
        error: BaseException | None = None
        try:
            with one_error():
                anyio.run(self._run)
        except NotStored as lost:  # by the closing of the producer
            self._losses.add(lost.failed, lost.__cause__ or lost)
        except ShardqError as failure:
            error = failure
        except BaseException as failure:
            _log.exception("%s ended by an error", self._thread.name)
            error = failure
        finally:
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        with self._room:
            self.over = True
            self._room.notify_all()
        for answer in self._open:
            if answer.running():
                answer.fail(StoreTimeout(f"sending ended with this message under way: {error!r}"))
            elif not answer.done() and answer.set_running_or_notify_cancel():
                answer.fail(error or ClosedError("sending ended before this message was begun"))
        self._on_end(self)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        if self._abandoned:
            self.stop()
        async with self._opened() as producer, anyio.create_task_group() as settling:
            async with anyio.create_task_group() as jobs:
                await self._serve(producer, jobs, settling)
                for answer in list(self._jobs):
                    answer.on_stop()
            await self._all_settled()
            settling.cancel_scope.cancel()

    async def _serve(self, producer: Producer, jobs: TaskGroup, settling: TaskGroup) -> None:
        while True:
            answer = await self._next()
            if answer is None:
                return
            # Not inside _put: while there is no room, the message can still be withdrawn.
            await producer._wait_for_space()
            if not answer.set_running_or_notify_cancel():
                self._release([answer])
            elif isinstance(answer, MessageAnswer):
                await self._put(answer, producer, settling)
            else:
                self._jobs[answer] = anyio.Event()
                jobs.start_soon(self._do, answer, producer)

    async def _next(self) -> AnyAnswer | None:
        while not self._drained:
            event = anyio.Event()
            with self._room:
                if self._inbox:
                    self._drained, self._inbox = self._inbox, deque()
                else:
                    self._asleep = event
            if self._drained:
                await anyio.lowlevel.checkpoint()  # a flood of messages must not starve those who send them on
            else:
                await event.wait()
        return self._drained.popleft()

    async def _put(self, answer: MessageAnswer, producer: Producer, settling: TaskGroup) -> None:
        """What `Producer.send` does up to its wait."""
        try:
            if answer.options or producer._job_ms:
                wanted, job_ms = condition(**_NO_OPTIONS | answer.options), producer._job_ms
                put = producer._put_conditional(answer.key, answer.value, answer.headers, wanted, job_ms)
                batch, index, _ = await put
            else:
                batch, index = producer._put(answer.key, answer.value, answer.headers)
        except Exception as error:
            answer.fail(error)
            self._release([answer])
            return
        self._await(batch, index, answer, producer, settling)

    def _await(
        self, batch: PendingBatch, index: int, answer: MessageAnswer, producer: Producer, settling: TaskGroup
    ) -> None:
        waiting = self._waiting.get(batch)
        if waiting is None:
            waiting = self._waiting[batch] = []
            settler = self._settlers.get(batch.shard.id)
            if settler is None:
                settler = self._settlers[batch.shard.id] = _Settler()
                settling.start_soon(self._settle, settler, producer, settling)
            settler.batches.append(batch)
            settler.woken.set()
        waiting.append((index, answer))

    async def _settle(self, settler: _Settler, producer: Producer, settling: TaskGroup) -> None:
        while True:
            while settler.batches:
                batch = settler.batches.popleft()
                await batch.wait()
                if batch.moved is None:
                    self._give(batch, producer)
                else:
                    for index, answer in self._waiting.pop(batch):
                        self._await(*batch.moved[index], answer, producer, settling)
            settler.woken = anyio.Event()
            await settler.woken.wait()

    def _give(self, batch: PendingBatch, producer: Producer) -> None:
        answers = self._waiting.pop(batch)
        if batch.error is None:
            for index, answer in answers:
                answer.set_result(batch.id_of(index))
        else:
            if not batch.bulk:
                producer._unreported.pop(batch, None)
            for _, answer in answers:
                answer.fail(batch.error)
        self._release([answer for _, answer in answers])

    async def _do(self, answer: JobAnswer[Any], producer: Producer) -> None:
        try:
            result = await answer.work(producer)
        except Exception as error:
            answer.fail(error)
        else:
            answer.set_result(result)
        self._jobs.pop(answer).set()
        self._release([answer])

    def _release(self, answers: Sequence[AnyAnswer]) -> None:
        with self._room:
            for answer in answers:
                del self._open[answer]
                self._open_bytes -= answer.size
            self._room.notify(len(answers))

    async def flush(self, producer: Producer) -> None:
        """A job: ends when every message posted before it has ended. Other threads' `send_many` may go on for ever."""
        for ended in [ended for answer, ended in self._jobs.items() if answer.left]:
            await ended.wait()
        asked = list(self._waiting)
        batches = [*asked, *await all_ended(asked)]
        while not self._waiting.keys().isdisjoint(batches):
            await anyio.lowlevel.checkpoint()  # until the settlers have been there
        try:
            await producer.flush()
        except NotStored as lost:
            self._losses.add(lost.failed, lost.__cause__ or lost)

    async def _all_settled(self) -> None:
        while self._waiting:
            await next(iter(self._waiting)).wait()
            await anyio.lowlevel.checkpoint()
