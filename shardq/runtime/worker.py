"""The worker as a program declares it: the handler of a group, with its settings, middleware and hooks. What one run
of it does is in worker_run.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeVar

import anyio
import anyio.to_thread

from shardq.core.budget import DEFAULT_BYTES
from shardq.core.compression import check_available
from shardq.core.limits import parse_limit
from shardq.core.meters import Meters
from shardq.core.records import Headers, Key
from shardq.core.retry import Retry
from shardq.core.schedule import Missed, Schedule
from shardq.core.values import ValueType
from shardq.errors import ClosedError, UsageError
from shardq.runtime.client import Client
from shardq.runtime.groups import Position
from shardq.runtime.handlers import (
    Middleware,
    check_function,
    in_threads,
    is_async,
    with_meters,
    with_middleware,
    with_timeout,
    with_type,
)
from shardq.runtime.list_runners import BatchRunners
from shardq.runtime.member import made_up_name
from shardq.runtime.message_runners import MessageRunners
from shardq.runtime.queue import Queue
from shardq.runtime.runners import Runners
from shardq.runtime.schedules import make_schedule
from shardq.runtime.settings import DEFAULT_RETRY, WorkerSettings
from shardq.runtime.slots import Share
from shardq.runtime.tasks import one_error
from shardq.runtime.tracing import Tracer
from shardq.runtime.worker_run import WorkerRun
from shardq.storage.keys import check_name

F = TypeVar("F", bound=Callable[..., Any])


class Worker:
    """Handles the messages of one queue for one group.

        worker = shardq.Worker("orders", group="billing", concurrency=32)

        @worker.handler
        async def bill(message: shardq.Message) -> None: ...

    Run it with `shardq work MODULE:worker`, or inside a program with `await worker.run(client)`.

    queue, group   names; the queue must exist when the worker runs
    name           this process's name in the group, unique there; made up when not given
    shards         declares the queue with so many shards if it does not exist
    start          where the group begins if it does not exist yet: see `Queue.open_group`
    type           the type of the values (anything msgspec can convert to); one that does not fit is a dead letter
    concurrency    messages handled at a time in this process
    retry          when a failing message is tried again, and when it becomes a dead letter
    ordering       "key": a message that waits for its next try holds back later ones of its key, other keys go on;
                   "none": nothing waits, messages of one key may run side by side
    timeout        seconds a handler may take; longer counts as a failure
    lease          seconds: a crashed worker's shards rest about this long
    buffer         messages held of one shard at most, about
    buffer_bytes   bytes of messages that this worker holds of all its shards at most, about
    drain_limit    seconds that a stopping worker waits for running handlers before it cancels them
    balance        what is made even among the group's workers: the "count" of their shards, or the measured "load".
                   It is the group's: give it to every worker (and `shardq coordinator`), the leader's own counts
    capacity       what this worker can do beside the others, with balance="load": one of 2 gets twice the load
    limit          messages that the whole group begins to handle in a time, over all its workers: "100/s", "90/m",
                   "1000/h", with a burst if you like ("100/s burst 50"); retries count. Of workers that state different
                   ones the strictest holds for all of them
    key_limit      the same for each key; for messages without a key, and for a batch_handler, there is none
    """

    def __init__(
        self,
        queue: str,
        *,
        group: str,
        name: str | None = None,
        shards: int | None = None,
        start: Position = "earliest",
        type: Any = None,
        concurrency: int = 32,
        retry: Retry = DEFAULT_RETRY,
        ordering: Literal["key", "none"] = "key",
        timeout: float | None = None,
        lease: float = 5.0,
        buffer: int = 2000,
        buffer_bytes: int = DEFAULT_BYTES,
        drain_limit: float = 25.0,
        balance: Literal["count", "load"] = "count",
        capacity: float = 1.0,
        limit: str | None = None,
        key_limit: str | None = None,
    ) -> None:
        self.queue = check_name("queue", queue)
        self.group = check_name("group", group)
        self.name = check_name("worker", name) if name is not None else None
        self._shards, self._start = shards, start
        self._convert = ValueType(type).convert if type is not None else None
        if timeout is not None and not timeout > 0:
            msg = f"timeout must be above 0 seconds, not {timeout!r}"
            raise UsageError(msg)
        self._timeout_s = timeout
        self.settings = WorkerSettings(
            lease_s=lease,
            leader_lease_s=min(3.0, 0.6 * lease),
            concurrency=concurrency,
            buffer_messages=buffer,
            buffer_bytes=buffer_bytes,
            drain_limit_s=drain_limit,
            retry=retry,
            ordering=ordering,
            balance=balance,
            capacity=capacity,
            limit=parse_limit("limit", limit) if limit is not None else None,
            key_limit=parse_limit("key_limit", key_limit) if key_limit is not None else None,
        )
        self._function: Callable[..., Any] | None = None
        self._takes_lists = False
        self._middleware: list[Middleware] = []
        self._on_start: list[Callable[[Client], Any]] = []
        self._on_stop: list[Callable[[Client], Any]] = []
        self._schedules: list[Schedule] = []
        self._stop: anyio.Event | None = None

    # -- what it calls ---------------------------------------------------------------------------------------

    def handler(self, function: F) -> F:
        """Decorator: `async def f(message)`, or a plain `def f(message)` that is run in a thread, is called for each
        message; one at a time per key. What it returns is the result of the message's job, if it has one."""
        return self._set_handler(function, lists=False)

    def batch_handler(self, function: F) -> F:
        """Decorator: `async def f(messages)`, or a plain `def`, is called with lists of messages of one shard, in
        order. When it raises, all of them have failed; retries come in ever shorter lists, at last one by one."""
        return self._set_handler(function, lists=True)

    def middleware(self, function: F) -> F:
        """Decorator: `async def f(message, call_next)` runs around the handler and returns `await call_next(message)`.
        With a batch handler it is given the list. The first one is the outermost."""
        check_function(function, "a middleware", 2)
        if not is_async(function):
            msg = "a middleware is an async function: write `async def f(message, call_next)`"
            raise UsageError(msg)
        self._middleware.append(function)
        return function

    def on_start(self, function: F) -> F:
        """Decorator: `f(client)`, async or plain, is called before the first message is handled."""
        check_function(function, "on_start's function", 1)
        self._on_start.append(function)
        return function

    def on_stop(self, function: F) -> F:
        """Decorator: `f(client)`, async or plain, is called after the last message was handled."""
        check_function(function, "on_stop's function", 1)
        self._on_stop.append(function)
        return function

    def cron(
        self,
        cron: str,
        *,
        name: str,
        key: Key = None,
        value: Any = None,
        headers: Headers | None = None,
        timezone: str = "UTC",
        missed: Missed = "last",
    ) -> Schedule:
        """Has the worker set a schedule of its queue before it handles the first message: arguments and errors are
        those of `client.schedule`. It stays when the worker goes, until it is removed."""
        schedule = make_schedule(name, cron, key=key, value=value, headers=headers, timezone=timezone, missed=missed)
        self._schedules.append(schedule)
        return schedule

    def _set_handler(self, function: F, *, lists: bool) -> F:
        if self.has_handler:
            msg = f"this worker has a handler already; make another shardq.Worker for {function!r}"
            raise UsageError(msg)
        check_function(function, "a handler", 1)
        if lists and self.settings.key_limit is not None:
            msg = "key_limit is for @worker.handler: a list holds messages of many keys; use limit, or one at a time"
            raise UsageError(msg)
        self._function, self._takes_lists = function, lists
        return function

    @property
    def has_handler(self) -> bool:
        return self._function is not None

    def _runners(
        self, queue: Queue, meters: Meters | None, tracing: Tracer | None, settings: WorkerSettings
    ) -> Runners:
        function, concurrency = self._function, settings.concurrency
        assert function is not None
        handler = function if is_async(function) else in_threads(function, concurrency)
        if self._middleware:
            handler = with_middleware(handler, self._middleware)
        convert = self._convert or queue.convert
        if convert is not None and not self._takes_lists:
            handler = with_type(handler, convert)
        if self._timeout_s is not None:
            handler = with_timeout(handler, self._timeout_s)
        if meters is not None:
            handler = with_meters(handler, meters.group(self.queue, self.group))
        if tracing is not None:
            handler = tracing.wrap(handler, self.queue, self.group, self.settings.retry.attempts)
        if self._takes_lists:
            return BatchRunners(settings, handler, convert)
        return MessageRunners(settings, handler)

    @staticmethod
    async def _call_hooks(hooks: list[Callable[[Client], Any]], client: Client) -> None:
        for hook in hooks:
            if is_async(hook):
                await hook(client)
            else:
                await anyio.to_thread.run_sync(hook, client)

    # -- running ---------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Asks a running worker to finish what is in flight, hand its shards over and return from `run`."""
        if self._stop is not None:
            self._stop.set()

    async def run(self, client: Client) -> None:
        """Handles messages until `stop()` or cancellation.

        `stop()` is graceful: nothing is handled twice because of it. A cancelled worker cancels its handlers, commits
        what they finished and gives its leases back; what they did not finish is handled again elsewhere.

        Raises StoreError when the cluster does not answer for 10 s while the worker starts. Once it runs it outlives
        any outage by itself. It ends `drain_limit` + `lease` + 3 s after `stop()` at the latest, and 3 s after a
        cancellation, if its handlers end when they are cancelled.
        """
        await self._run(client, None)

    async def join(self, client: Client) -> Queue:
        """Declares or joins its queue and opens its group, which is how `run` begins; repeating it changes nothing.

        Raises StoreError when the cluster does not answer for 10 s, and what `Client.queue` raises.
        """
        queue = await client.queue(self.queue, shards=self._shards)
        check_available(queue.settings.compression)
        await queue.open_group(self.group, self._start)
        return queue

    async def _run(self, client: Client, share: Share | None) -> None:
        """With a share the handler slots are those that it has a part in, and `concurrency` is their number."""
        if self._stop is not None:
            msg = "this worker runs already: make another shardq.Worker to run two in one process"
            raise ClosedError(msg)
        if not self.has_handler:
            msg = f"the worker of {self.queue!r} has no handler: add one with @worker.handler or @worker.batch_handler"
            raise UsageError(msg)
        self._stop = anyio.Event()
        try:
            queue = await self.join(client)
            for schedule in self._schedules:
                await client.put_schedule(self.queue, schedule)
            name = self.name or made_up_name()
            await self._call_hooks(self._on_start, client)
            try:
                # After the hooks, one of which may have instrumented the client.
                settings = replace(self.settings, concurrency=share.slots.count) if share else self.settings
                runners = self._runners(queue, client.meters, client.tracing, settings)
                with one_error():
                    await WorkerRun(client, queue, self.group, name, self.settings, runners, self._stop, share).run()
            finally:
                with anyio.CancelScope(shield=True):
                    await self._call_hooks(self._on_stop, client)
        finally:
            self._stop = None
            if share is not None:
                share.close()
