"""What waits to be sent: a request with what is known of its tries, and the queue of one node. Does no I/O; the rules
are those of pipes.py, which sends.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

from redis.asyncio.cluster import ClusterNode

from shardq.errors import ShardqError, StoreTimeout, StoreUnavailable
from shardq.storage.alarm import NEVER, Alarm
from shardq.storage.commands import Confirm, Packed

MAX_CALLS = 64
MAX_BYTES = 4 * 1024 * 1024
LEFT_BEFORE_SWEEP = 64


class Request(Protocol):
    """Something to be called on the node that owns `slot`, until `deadline` (time.monotonic, seconds: the clock of
    asyncio, and of uvloop; asking the running loop for it costs a system call on Python 3.11)."""

    slot: int
    deadline: float

    def pack(self) -> Packed:
        """The call in wire form; asked again for every try, must mean the same call each time."""

    def settle(self, reply: Any) -> None:
        """The call was carried out and this is its reply."""

    def fail(self, error: ShardqError) -> None:
        """The call was given up; `error.outcome_unknown` tells whether it may have been carried out."""


class Call:
    """A request that one task waits for, by a future of the event loop's own: an anyio event and a cancel scope with a
    time limit cost several times as much, and there is one of these for every step."""

    __slots__ = ("_future", "_packed", "deadline", "done", "error", "reply", "slot")

    def __init__(self, slot: int, packed: Packed, deadline: float) -> None:
        self.slot = slot
        self.deadline = deadline
        self._packed = packed
        self.done = False
        self._future = asyncio.get_running_loop().create_future()
        self.reply: Any = None
        self.error: ShardqError | None = None

    def pack(self) -> Packed:
        return self._packed

    def settle(self, reply: Any) -> None:
        self.reply, self.done = reply, True
        self._wake()

    def fail(self, error: ShardqError) -> None:
        self.error, self.done = error, True
        self._wake()

    def _wake(self) -> None:
        if not self._future.done():  # its task was cancelled, or its time is over
            self._future.set_result(None)

    async def wait(self) -> bool:
        """Whether it ended before its time was over, which `OpenCalls` looks after."""
        if not self.done:
            await self._future
        return self.done

    def expire(self) -> None:
        """Its time is over: whoever waits for it waits no longer."""
        self._wake()

    def outcome(self) -> Any:
        """The reply of one that is done; raises what it ended with."""
        if self.error is not None:
            raise self.error
        return self.reply


class TakenCall(Call):
    """A call whose reply is given to `take` in the turn of the loop in which it comes: what that returns is the
    outcome, what it raises is raised to whoever waits. Once nobody waits any more nothing is taken."""

    __slots__ = ("_take", "failure")

    def __init__(self, slot: int, packed: Packed, deadline: float, take: Callable[[Any], Any]) -> None:
        super().__init__(slot, packed, deadline)
        self._take = take
        self.failure: Exception | None = None

    def settle(self, reply: Any) -> None:
        if self._future.done():
            return
        try:
            reply = self._take(reply)
        except Exception as error:
            self.failure = error
        super().settle(reply)

    def outcome(self) -> Any:
        if self.failure is not None:
            raise self.failure
        return super().outcome()


class CallOnce(Call):
    """A call that must not be carried out twice: sent again only while it is certain that it was not carried out."""

    __slots__ = ()


class OpenCalls:
    """Calls that tasks wait for. One timer for all ends those whose time is over: nearly none comes to that."""

    def __init__(self) -> None:
        self._calls: set[Call] = set()
        self._alarm = Alarm(self._end_late_ones)

    def add(self, call: Call) -> None:
        self._calls.add(call)
        if call.deadline < self._alarm.moment_s:
            self._alarm.set(call.deadline)

    def discard(self, call: Call) -> None:
        self._calls.discard(call)

    def fail(self, error: ShardqError) -> None:
        """Ends all of them."""
        for call in self._calls:
            call.fail(error)

    def _end_late_ones(self) -> None:
        now = monotonic()
        left = [call.deadline for call in self._calls if call.deadline > now]
        for call in self._calls:
            if call.deadline <= now:
                call.expire()
        self._alarm.set(min(left, default=NEVER))


class Sending:
    """A request with what is known of its tries. `left`: nobody waits for it any more, it need not be sent. `refused`:
    a node took it for wrongly called, though it has no older functions than ours, or has them no longer."""

    __slots__ = ("asked", "error", "left", "outcome_unknown", "pipe", "refused", "request", "tries", "written_to")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tries = 0
        self.asked: ClusterNode | None = None
        self.error: ShardqError | None = None
        self.outcome_unknown = False
        self.written_to = ""  # the node whose answer is awaited right now
        self.left = self.refused = False
        self.pipe: Pipe | None = None  # where it waits

    def leave(self) -> None:
        if not self.left:
            self.left = True
            if self.pipe is not None:
                self.pipe.one_left()

    def given_up(self) -> ShardqError:
        """Why it is not tried any longer."""
        last, error = self.error, self.error
        if self.written_to:
            error = StoreTimeout(f"{self.written_to} did not answer in time: the call may have been carried out")
        elif last is None:
            error = StoreUnavailable("not sent in time: its node was slow with what had been sent before")
        elif self.outcome_unknown and not getattr(last, "outcome_unknown", False):
            error = StoreTimeout(f"gave up with the outcome unknown; last: {last}")
        else:
            return last
        error.__cause__ = last
        return error


class Pipe:
    """The queue and the sender of one node. `retired`: the sender ends when nothing waits."""

    def __init__(self, node: ClusterNode) -> None:
        self.node = node
        self.waiting: deque[Sending] = deque()
        self.retired = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sender: asyncio.Future[None] | None = None
        self._left = 0

    def put(self, sending: Sending) -> None:
        sending.pipe = self
        self.waiting.append(sending)
        self.rouse()

    def retire(self) -> None:
        self.retired = True
        self.rouse()

    def rouse(self) -> None:
        """The sender looks what waits."""
        if self._sender is not None and not self._sender.done():
            self._sender.set_result(None)

    async def more(self) -> None:
        """The sender waits here until something waits, or it is to end."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()  # a system call, up to Python 3.11
        self._sender = self._loop.create_future()
        try:
            await self._sender
        finally:
            self._sender = None

    def one_left(self) -> None:
        """Callers that come and go while the node hangs must not pile up here."""
        self._left += 1
        if self._left > max(LEFT_BEFORE_SWEEP, len(self.waiting) // 2):
            self.waiting = deque(sending for sending in self.waiting if not sending.left)
            self._left = 0

    def take_all(self) -> deque[Sending]:
        taken, self.waiting, self._left = self.waiting, deque(), 0
        return taken

    def _next(self, now: float) -> Sending | None:
        """The first that is still to be sent; ends those before it whose time is over."""
        while self.waiting:
            sending = self.waiting[0]
            if not sending.left and now <= sending.request.deadline:
                return sending
            self.waiting.popleft()
            sending.pipe = None
            if not sending.left:
                sending.request.fail(sending.given_up())
        return None

    def take(self, now: float) -> tuple[list[Sending], list[Packed], float]:
        """What goes in the next write, which may be nothing, and the last of its deadlines."""
        batch: list[Sending] = []
        packed: list[Packed] = []
        size, last_deadline, name = 0, 0.0, self.node.name
        confirmed: Confirm | None = None
        while self.waiting and len(batch) < MAX_CALLS and size < MAX_BYTES:
            sending = self._next(now)
            if sending is None:
                break
            request = sending.request
            call = request.pack()
            if call.confirm is not None and confirmed is not None and call.confirm is not confirmed:
                break
            confirmed = confirmed or call.confirm
            self.waiting.popleft()
            sending.pipe, sending.written_to = None, name
            if request.deadline > last_deadline:
                last_deadline = request.deadline
            if sending.asked is not None:
                call = Packed(call.data, True, call.confirm)
                sending.asked = None
            batch.append(sending)
            packed.append(call)
            size += len(call.data)
        return batch, packed, last_deadline
