"""The one path a call takes to Redis: queued for the node that owns its slot, written together with what else waits
there, sent again until its deadline.

Invariants:
- One write is under way per node; what waits meanwhile goes together in the next one, at most MAX_CALLS calls or about
  MAX_BYTES bytes of it.
- A request is packed when it is written, not when it is queued: it carries all that came in the meantime.
- Every submitted request ends in exactly one `settle` or `fail`, unless the pipes themselves are cancelled.
- Requests are safe to send twice (the functions see to that), so an unknown outcome is sent again; only when the
  deadline passes does it become the caller's StoreTimeout. The exception says so: a CallOnce ends with it.
- Backing off is done by the request that failed: others of the same node go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import anyio
from anyio.abc import TaskGroup
from redis.asyncio.cluster import ClusterNode

from shardq.errors import ClosedError, ShardqError, StoreTimeout, StoreUnavailable
from shardq.storage.cluster import Cluster, Confirm, Packed, pack_call
from shardq.storage.trouble import Trouble

MAX_CALLS = 64
MAX_BYTES = 4 * 1024 * 1024
BACKOFF_FIRST_S = 0.02
BACKOFF_LAST_S = 0.5
DEFAULT_TIMEOUT_S = 10.0


class Request(Protocol):
    """Something to be called on the node that owns `slot`, until `deadline` (the event loop's clock, seconds)."""

    slot: int
    deadline: float

    def pack(self) -> Packed:
        """The call in wire form; asked again for every try, must mean the same call each time."""

    def settle(self, reply: Any) -> None:
        """The call was carried out and this is its reply."""

    def fail(self, error: ShardqError) -> None:
        """The call was given up; `error.outcome_unknown` tells whether it may have been carried out."""


class Call:
    """A request that one task waits for."""

    __slots__ = ("_packed", "deadline", "done", "error", "reply", "slot")

    def __init__(self, slot: int, packed: Packed, deadline: float) -> None:
        self.slot = slot
        self.deadline = deadline
        self._packed = packed
        self.done = anyio.Event()
        self.reply: Any = None
        self.error: ShardqError | None = None

    def pack(self) -> Packed:
        return self._packed

    def settle(self, reply: Any) -> None:
        self.reply = reply
        self.done.set()

    def fail(self, error: ShardqError) -> None:
        self.error = error
        self.done.set()

    async def result(self) -> Any:
        await self.done.wait()
        if self.error is not None:
            raise self.error
        return self.reply


class CallOnce(Call):
    """A call that must not be carried out twice: sent again only while it is certain that it was not carried out."""

    __slots__ = ()


class _Sending:
    """A request with what is known of its tries."""

    __slots__ = ("asked", "outcome_unknown", "request", "tries")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tries = 0
        self.asked: ClusterNode | None = None
        self.outcome_unknown = False


class _Pipe:
    """The queue and the sender of one node."""

    def __init__(self, node: ClusterNode) -> None:
        self.node = node
        self.waiting: deque[_Sending] = deque()
        self.more = anyio.Event()

    def put(self, sending: _Sending) -> None:
        self.waiting.append(sending)
        self.more.set()

    def take(self) -> tuple[list[_Sending], list[Packed]]:
        batch: list[_Sending] = []
        packed: list[Packed] = []
        size = 0
        confirmed: Confirm | None = None
        while self.waiting and len(batch) < MAX_CALLS and size < MAX_BYTES:
            call = self.waiting[0].request.pack()
            if call.confirm is not None and confirmed is not None and call.confirm is not confirmed:
                break
            confirmed = confirmed or call.confirm
            sending = self.waiting.popleft()
            if sending.asked is not None:
                call = Packed(call.data, True, call.confirm)
                sending.asked = None
            batch.append(sending)
            packed.append(call)
            size += len(call.data)
        return batch, packed


class Pipes:
    """All pipes of one client part. Runs its senders in the task group it was given."""

    def __init__(self, cluster: Cluster, tasks: TaskGroup, on_retry: Callable[[str], None] | None = None) -> None:
        self.cluster = cluster
        self._tasks = tasks
        self._pipes: dict[str, _Pipe] = {}
        self._calls: set[Call] = set()
        self._on_retry = on_retry  # told the action of each Trouble that a request is sent again for

    def submit(self, request: Request) -> None:
        """Queues `request`; it is settled or failed later."""
        self._route(_Sending(request))

    def submit_after(self, request: Request, pause_s: float) -> None:
        """The same after a pause."""
        self._tasks.start_soon(self._submit_after, request, pause_s)

    async def _submit_after(self, request: Request, pause_s: float) -> None:
        await anyio.sleep(pause_s)
        self.submit(request)

    async def call(
        self,
        slot: int,
        function: str,
        keys: Sequence[str],
        args: Sequence[str | bytes | int] = (),
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        confirm: Confirm | None = None,
    ) -> Any:
        """Calls one function and returns its reply. Raises StoreError when it was not carried out in `timeout_s`."""
        return await self.command(slot, pack_call(function, keys, args), timeout_s=timeout_s, confirm=confirm)

    async def command(
        self, slot: int, data: bytes, *, timeout_s: float = DEFAULT_TIMEOUT_S, confirm: Confirm | None = None
    ) -> Any:
        """Sends one command that is safe to repeat, already in wire form."""
        call = Call(slot, Packed(data, False, confirm), anyio.current_time() + timeout_s)
        self._calls.add(call)
        try:
            self.submit(call)
            return await call.result()
        finally:
            self._calls.discard(call)

    async def commands_once(
        self, slot: int, commands: Sequence[bytes], *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> list[Any]:
        """Sends commands that must not be carried out twice, in one write, and returns their replies.

        Raises StoreTimeout when the outcome of one is unknown. Cancelled, some may be carried out still.
        """
        deadline = anyio.current_time() + timeout_s
        calls = [CallOnce(slot, Packed(data), deadline) for data in commands]
        self._calls.update(calls)
        try:
            for call in calls:
                self.submit(call)
            return [await call.result() for call in calls]
        finally:
            self._calls.difference_update(calls)

    def close(self) -> None:
        """Ends every call that a task still waits for; the pipes' own tasks end with their group."""
        for call in self._calls:
            call.fail(ClosedError("the client was closed with this call under way: it may have been carried out"))

    def _route(self, sending: _Sending) -> None:
        node = sending.asked or self.cluster.node_of(sending.request.slot)
        if node is None:
            error = StoreUnavailable(f"no master owns slot {sending.request.slot}: is every master up?")
            self._tasks.start_soon(self._again, sending, Trouble("refresh", error), None)
            return
        pipe = self._pipes.get(node.name)
        if pipe is None or pipe.node is not node:
            pipe = self._pipes[node.name] = _Pipe(node)
            self._tasks.start_soon(self._send_all, pipe)
        pipe.put(sending)

    async def _send_all(self, pipe: _Pipe) -> None:
        while True:
            if not pipe.waiting:
                pipe.more = anyio.Event()
                await pipe.more.wait()
            batch, packed = pipe.take()
            replies = await self.cluster.exchange(pipe.node, packed)
            for sending, reply in zip(batch, replies, strict=True):
                if isinstance(reply, Trouble):
                    self._tasks.start_soon(self._again, sending, reply, pipe.node)
                else:
                    sending.request.settle(reply)

    async def _again(self, sending: _Sending, trouble: Trouble, node: ClusterNode | None) -> None:
        """Does what the trouble asks for, waits, and queues the request again, or gives it up."""
        sending.tries += 1
        sending.outcome_unknown = sending.outcome_unknown or getattr(trouble.error, "outcome_unknown", False)
        if self._on_retry is not None:
            self._on_retry(trouble.action)
        if trouble.action == "load" and node is not None:
            refused = await self.cluster.load_functions(node)
            if refused is not None:
                trouble = refused if refused.action != "fail" else Trouble("fail", trouble.error)
        elif trouble.action == "moved":
            await self.cluster.follow(trouble)
        elif trouble.action == "ask" and trouble.address is not None:
            sending.asked = self.cluster.node_at(trouble.address)
        elif trouble.action == "refresh":
            await self.cluster.refresh(node.name if node is not None else None)
        if trouble.action == "fail" or (sending.outcome_unknown and isinstance(sending.request, CallOnce)):
            sending.request.fail(trouble.error)
            return
        pause = self._pause(sending.tries, trouble)
        if anyio.current_time() + pause > sending.request.deadline:
            sending.request.fail(self._given_up(sending, trouble))
            return
        await anyio.sleep(pause)
        self._route(sending)

    @staticmethod
    def _pause(tries: int, trouble: Trouble) -> float:
        redirected = trouble.action in ("moved", "ask", "load")
        if redirected and tries <= 3:
            return 0.0
        return min(BACKOFF_FIRST_S * float(2 ** min(tries - 1, 10)), BACKOFF_LAST_S)

    @staticmethod
    def _given_up(sending: _Sending, trouble: Trouble) -> ShardqError:
        if sending.outcome_unknown and not getattr(trouble.error, "outcome_unknown", False):
            error: ShardqError = StoreTimeout(f"gave up with the outcome unknown; last: {trouble.error}")
            error.__cause__ = trouble.error
            return error
        return trouble.error
