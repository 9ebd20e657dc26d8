"""What stands between the runners and the user's function: threads for plain functions, types, middleware, the time
limit. Builds one async callable; each layer costs only those who use it. Knows nothing of shards and leases.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from shardq.core.message import Message
from shardq.core.meters import GroupMeters
from shardq.core.retry import Reject
from shardq.errors import InvalidValue, UsageError

M = TypeVar("M", Message, Sequence[Message])
Next = Callable[[Any], Awaitable[Any]]
Middleware = Callable[[Any, Next], Awaitable[Any]]


def is_async(function: Any) -> bool:
    """Whether calling it gives something to await, also when it is an object or a partial around such a function."""
    while isinstance(function, functools.partial):
        function = function.func
    call = function if inspect.isroutine(function) else type(function).__call__
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def check_function(function: Any, what: str, arguments: int) -> None:
    """Raises UsageError unless `function` can be called with so many arguments."""
    if not callable(function):
        msg = f"{what} is a function, not {function!r}"
        raise UsageError(msg)
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        msg = f"{what} is a plain function or an async one, not a generator: {function!r} has a yield"
        raise UsageError(msg)
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except TypeError as error:
        msg = f"{what} is called with {arguments} arguments, {function!r} can't be: {error}"
        raise UsageError(msg) from error
    except ValueError:
        return  # a builtin that has no signature to look at


def in_threads(function: Callable[..., Any], concurrency: int) -> Callable[..., Awaitable[Any]]:
    """A plain function as an async one: each call in a worker thread, at most `concurrency` at a time."""
    limiter = anyio.CapacityLimiter(concurrency)

    @functools.wraps(function)
    async def call(*args: Any) -> Any:
        # Not abandoned when cancelled: a message whose thread still runs must not be handled here a second time.
        return await anyio.to_thread.run_sync(function, *args, limiter=limiter)

    return call


def with_type(handler: Next, convert: Callable[[Any], Any]) -> Next:
    """Gives the message's value its type first. A value that does not fit is a dead letter at once."""

    async def typed(message: Message) -> Any:
        give_type(message, convert)
        return await handler(message)

    return typed


def give_type(message: Message, convert: Callable[[Any], Any]) -> None:
    """Raises Reject when the value does not fit."""
    try:
        message.value = convert(message.value)
    except InvalidValue as error:
        raise Reject(str(error)) from error


def with_middleware(handler: Next, middleware: Sequence[Middleware]) -> Next:
    """The first one is the outermost."""
    for layer in reversed(middleware):
        handler = _layer(layer, handler)
    return handler


def _layer(layer: Middleware, inner: Next) -> Next:
    async def call(given: Any) -> Any:
        return await layer(given, inner)

    return call


def with_meters(handler: Next, meters: GroupMeters) -> Next:
    """Times each call. What was handled counts from its sending; of a list, the oldest message does."""

    async def metered(given: Any) -> Any:
        messages = (given,) if isinstance(given, Message) else given
        meters.in_flight += len(messages)
        started = time.monotonic()
        seconds = meters.failed
        try:
            result = await handler(given)
            seconds = meters.done
            if sent_at_ms := messages[0].sent_at_ms:  # 0 for another client's entry
                meters.end_to_end.observe(time.time() - sent_at_ms / 1000)
            return result
        finally:
            seconds.observe(time.monotonic() - started)
            meters.in_flight -= len(messages)

    return metered


def with_timeout(handler: Next, timeout_s: float) -> Next:
    """A handler that takes longer is cancelled and has failed. A plain function's thread can't be stopped: it has
    failed when it returns too late."""

    async def limited(given: Any) -> Any:
        with anyio.move_on_after(timeout_s) as scope:
            result = await handler(given)
            if anyio.current_time() < scope.deadline:
                return result
        msg = f"the handler took longer than its timeout of {timeout_s:g} s"
        raise TimeoutError(msg)

    return limited
