"""What all runners of a worker share: the tasks that call the user's handler, their rest, the leave to begin a message,
and how handlers of a shard are stopped. How messages are handled one by one is in message_runners.py, in lists in
list_runners.py. Fetches and commits nothing.

Invariants:
- A handler starts only while its shard's lease is trusted by this process's own clock; when trust ends, running
  handlers of the shard are cancelled. Their messages wait, and go on here if the lease turns out to be ours still.
- A message of a lost or draining shard is dropped unhandled: it is pending in Redis, its next owner handles it.
- A handler's exception never ends a runner (runtime/retrying.py has what becomes of its messages).
- One suspect (core/later.py) runs at a time in the whole process.
- With rate limits or shared slots a message is begun only with leave (runtime/limits.py) and a slot (runtime/slots.py),
  looked for when a runner has it in hand; without them it goes back, and no runner waits with it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from time import monotonic

import anyio
from anyio.abc import TaskGroup

from shardq.core.message import Message
from shardq.runtime.limits import GroupLimiter, Limits
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.shard import OwnedShard
from shardq.runtime.slots import Share


class Runner:
    """One task. `shard` is that of the message it handles now; `interrupt` ends the handler, not the runner."""

    __slots__ = ("interrupted", "scope", "shard")

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.shard: OwnedShard | None = None
        self.interrupted = False

    def interrupt(self) -> None:
        self.interrupted = True
        self.scope.cancel()


class Runners:
    """`deliver` is how messages come in; `ready` and `_serve` are how they are handled."""

    # Where messages that may be handled now are put, by the lanes of every shard; None where lists are handled.
    ready: deque[Message] | None = None

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._runners = [Runner() for _ in range(settings.concurrency)]
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

    async def _serve(self, runner: Runner) -> None:
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

    async def _keep_serving(self, runner: Runner) -> None:
        while True:
            with anyio.CancelScope() as runner.scope:
                runner.interrupted = False
                await self._serve(runner)
