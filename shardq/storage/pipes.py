"""The one path a call takes to Redis: queued for the node that owns its slot, written together with what else waits
there, sent again until its deadline.

Invariants:
- One write is under way per node; what waits meanwhile goes together in the next one, at most MAX_CALLS calls or about
  MAX_BYTES bytes of it.
- A request is packed when it is written, not when it is queued: it carries all that came in the meantime.
- Every submitted request ends in exactly one `settle` or `fail`, unless the pipes themselves are cancelled, or its
  caller waits no longer.
- A call ends when its time is over, wherever it is then. Any other request is not written after its deadline, and has
  ended one exchange (`Cluster.exchange`) after it at the latest.
- Requests are safe to send twice (the functions see to that), so an unknown outcome is sent again; only when the
  deadline passes does it become the caller's StoreTimeout. The exception says so: a CallOnce ends with it.
- Backing off is done by the request that failed: others of the same node go on. A node that took no connection, broke
  it or did not answer backs off as a whole: what waits for it does not try it one by one, and is routed anew each time.
- No two clients, and no two requests of one, back off in step: every pause is spread by chance.
- There is a sender only for nodes that the cluster knows.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup
from redis.asyncio.cluster import ClusterNode

from shardq.core.backoff import backoff_s
from shardq.errors import ClosedError, ShardqError, StoreError, StoreUnavailable
from shardq.storage.cluster import Cluster
from shardq.storage.commands import Confirm, Packed, pack_call
from shardq.storage.exchange import SETTLED, Settle
from shardq.storage.requests import Call, CallOnce, OpenCalls, Pipe, Request, Sending, TakenCall
from shardq.storage.trouble import Trouble

BACKOFF_FIRST_S = 0.02
BACKOFF_LAST_S = 0.5
DEFAULT_TIMEOUT_S = 10.0

Taken = TypeVar("Taken")


class Pipes:
    """All pipes of one client part. Runs its senders in the task group it was given. `chance` gives numbers in [0, 1)
    that spread the pauses."""

    def __init__(
        self,
        cluster: Cluster,
        tasks: TaskGroup,
        on_retry: Callable[[str], None] | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.cluster = cluster
        self._tasks = tasks
        self._pipes: dict[str, Pipe] = {}
        self._calls = OpenCalls()
        self._swept_version = -1
        self._chance = chance
        self._on_retry = on_retry  # told the action of each Trouble that a request is sent again for

    def submit(self, request: Request) -> Sending:
        """Queues `request`; it is settled or failed later."""
        sending = Sending(request)
        self._route(sending)
        return sending

    def expect(self, slot: int) -> None:
        """A task that was just woken is about to submit a request: the sender of its node is woken behind it, and sends
        in the same turn of the event loop. Nothing is amiss if none comes."""
        node = self.cluster.node_of(slot)
        pipe = self._pipes.get(node.name) if node is not None else None
        if pipe is not None:
            pipe.rouse()

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
        """Calls one function and returns its reply. Raises StoreError, after `timeout_s` seconds at the latest."""
        return await self.command(slot, pack_call(function, keys, args), timeout_s=timeout_s, confirm=confirm)

    async def command(
        self, slot: int, data: bytes, *, timeout_s: float = DEFAULT_TIMEOUT_S, confirm: Confirm | None = None
    ) -> Any:
        """Sends one command that is safe to repeat, already in wire form. Raises like `call`."""
        return await self._answer(Call(slot, Packed(data, False, confirm), monotonic() + timeout_s))

    def taken(
        self, slot: int, data: bytes, take: Callable[[Any], Taken], *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> Awaitable[Taken]:
        """The same where `take` is given the reply in the turn of the event loop in which it comes, unless the caller
        waits no longer; returns, or raises, what `take` does."""
        return self._answer(TakenCall(slot, Packed(data), monotonic() + timeout_s, take))

    async def _answer(self, call: Call) -> Any:
        sending = Sending(call)
        self._calls.add(call)
        try:
            self._route(sending)
            if await call.wait():
                return call.outcome()
            raise sending.given_up()
        finally:
            self._calls.discard(call)
            sending.leave()

    async def commands(
        self, commands: Sequence[tuple[int, bytes]], *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> list[Any]:
        """Sends many commands that are safe to repeat, each to its slot; their replies, in order. Raises the
        error of the first one that failed."""
        deadline = monotonic() + timeout_s
        return await self._answers([Call(slot, Packed(data), deadline) for slot, data in commands])

    async def each(
        self, commands: Sequence[tuple[int, bytes]], *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> list[Any | ShardqError]:
        """The same where some may fail: for each command its reply, or the error it ended with."""
        deadline = monotonic() + timeout_s
        calls = [Call(slot, Packed(data), deadline) for slot, data in commands]
        await self._all_end(calls)
        return [call.reply if call.error is None else call.error for call in calls]

    async def commands_once(
        self, slot: int, commands: Sequence[bytes], *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> list[Any]:
        """Sends commands that must not be carried out twice, in one write, and returns their replies.

        Raises a StoreError with `outcome_unknown` when only some were, or may have been, carried out; after `timeout_s`
        seconds at the latest. Cancelled, some may be carried out still.
        """
        deadline = monotonic() + timeout_s
        calls = [CallOnce(slot, Packed(data), deadline) for data in commands]
        try:
            return await self._answers(calls)
        except StoreError as error:
            carried_out = any(call.done and call.error is None for call in calls)
            if not carried_out or error.outcome_unknown:
                raise
            partly = type(error)(f"only a part of it was carried out: {error}")
            partly.outcome_unknown = True
            raise partly from error

    async def _answers(self, calls: Sequence[Call]) -> list[Any]:
        await self._all_end(calls)
        return [call.outcome() for call in calls]

    async def _all_end(self, calls: Sequence[Call]) -> None:
        """Sends the calls and waits for all; those that nobody waits for any longer are not sent if they were not."""
        sendings = [Sending(call) for call in calls]
        for call in calls:
            self._calls.add(call)
        try:
            for sending in sendings:
                self._route(sending)
            for call, sending in zip(calls, sendings, strict=True):
                if not await call.wait():
                    call.fail(sending.given_up())
        finally:
            for call, sending in zip(calls, sendings, strict=True):
                self._calls.discard(call)
                sending.leave()

    def close(self) -> None:
        """Ends every call that a task still waits for; the pipes' own tasks end with their group."""
        self._calls.fail(ClosedError("the client was closed with this call under way: it may have been carried out"))

    def _route(self, sending: Sending) -> None:
        if self._swept_version != self.cluster.topology_version:
            self._retire_unknown()
        node = sending.asked or self.cluster.node_of(sending.request.slot)
        if node is None:
            error = StoreUnavailable(f"no master owns slot {sending.request.slot}: is every master up?")
            self._tasks.start_soon(self._again, sending, Trouble("refresh", error), None)
            return
        pipe = self._pipes.get(node.name)
        if pipe is None or pipe.node is not node:
            if pipe is not None:
                pipe.retire()
            pipe = self._pipes[node.name] = Pipe(node)
            self._tasks.start_soon(self._send_all, pipe)
        pipe.put(sending)

    def _retire_unknown(self) -> None:
        self._swept_version = self.cluster.topology_version
        for name, pipe in list(self._pipes.items()):
            if not self.cluster.still_has(pipe.node):
                del self._pipes[name]
                pipe.retire()

    async def _send_all(self, pipe: Pipe) -> None:
        failures = 0
        while True:
            if not pipe.waiting:
                if pipe.retired:
                    return
                await pipe.more()
            now = monotonic()
            batch, packed, last_deadline = pipe.take(now)
            if not batch:
                continue
            # Replies are settled as they come. Whoever waited for one has its turn before this task has: what they send
            # next is in the next write.
            replies = await self.cluster.exchange(
                pipe.node, packed, within_s=last_deadline - now, settle=_settler(batch)
            )
            pending = False
            for sending, reply in zip(batch, replies, strict=True):
                if reply is SETTLED:
                    continue
                pending, sending.written_to = True, ""
                if isinstance(reply, Trouble):
                    self._tasks.start_soon(self._again, sending, reply, pipe.node)
                else:
                    sending.request.settle(reply)
            if pending:
                await anyio.lowlevel.checkpoint()
            away = isinstance(reply, Trouble) and reply.away
            failures = failures + 1 if away else 0
            if away:
                await self._hold(pipe, failures)

    async def _hold(self, pipe: Pipe, failures: int) -> None:
        """The node is away: what waits for it goes where its slots are by now. A single broken connection costs no
        pause, the next one may do."""
        await self.cluster.refresh(pipe.node.name)
        if failures > 1:
            await anyio.sleep(self._pause(failures - 1))
        for sending in pipe.take_all():
            sending.pipe = None
            if not sending.left:
                self._route(sending)

    async def _again(self, sending: Sending, trouble: Trouble, node: ClusterNode | None) -> None:
        """Does what the trouble asks for, waits, and queues the request again, or gives it up."""
        sending.tries += 1
        sending.error = trouble.error
        sending.outcome_unknown = sending.outcome_unknown or getattr(trouble.error, "outcome_unknown", False)
        if self._on_retry is not None:
            self._on_retry(trouble.action)
        trouble = await self._mend(sending, trouble, node)
        sending.error = trouble.error
        if sending.left:
            return
        request = sending.request
        if trouble.action == "fail" or (sending.outcome_unknown and isinstance(request, CallOnce)):
            request.fail(trouble.error)
            return
        left_s = request.deadline - monotonic()
        if left_s <= 0:
            request.fail(sending.given_up())
            return
        redirected = trouble.action in ("moved", "ask", "load", "update") and sending.tries <= 3
        if not redirected:
            await anyio.sleep(min(self._pause(sending.tries), left_s))
        if not sending.left:
            self._route(sending)

    async def _mend(self, sending: Sending, trouble: Trouble, node: ClusterNode | None) -> Trouble:
        """Returns what is left of the trouble."""
        if trouble.action == "load" and node is not None:
            refused = await self.cluster.load_functions(node)
            if refused is not None:
                return refused if refused.action != "fail" else Trouble("fail", trouble.error)
        elif trouble.action == "update" and not (node is not None and await self.cluster.update_functions(node)):
            # Another call, or another process, may have updated it since it answered: then it is well the next time.
            if sending.refused:
                return Trouble("fail", trouble.error)
            sending.refused = True
        elif trouble.action == "moved":
            await self.cluster.follow(trouble)
        elif trouble.action == "ask" and trouble.address is not None:
            sending.asked = self.cluster.node_at(trouble.address)
        elif trouble.action == "refresh":
            await self.cluster.refresh(node.name if node is not None else None)
        return trouble

    def _pause(self, tries: int) -> float:
        return backoff_s(tries, BACKOFF_FIRST_S, BACKOFF_LAST_S, self._chance())


def _settler(batch: Sequence[Sending]) -> Settle:
    def settle(index: int, reply: Any) -> None:
        sending = batch[index]
        sending.written_to = ""
        sending.request.settle(reply)

    return settle
