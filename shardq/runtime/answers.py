"""What a thread gets for the work it hands to an event loop (background.py): futures, and the count of failures that
nobody has heard of. Starts and sends nothing.

Invariant: a failure that no caller was told of is in `Losses`, for the next `flush` or `close` to raise.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from datetime import datetime, timedelta
from typing import Any, Generic, TypedDict, TypeVar

from shardq.core.records import Headers, Key
from shardq.errors import ClosedError, NotStored, ShardqError, StoreTimeout
from shardq.runtime.producer import Producer

T = TypeVar("T")
Work = Callable[[Producer], Awaitable[T]]


class SendOptions(TypedDict, total=False):
    """The options of `Producer.send` besides key and headers, where they are explained."""

    delay: float | timedelta | None
    at: float | datetime | None
    dedupe_id: str | None
    dedupe_window: float | timedelta | None


class Losses:
    """How many messages are not (known to be) stored of which no caller was told. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._first: BaseException | None = None
        self._round = 0

    def add(self, count: int, error: BaseException, answer: Answer[Any] | None = None) -> None:
        """`answer` is where the caller may learn of it."""
        with self._lock:
            self._count += count
            self._first = self._first or error
            if answer is not None:
                answer.lost, answer.lost_in = count, self._round

    def forget(self, answer: Answer[Any]) -> None:
        """The caller was told."""
        with self._lock:
            if answer.lost and answer.lost_in == self._round:
                self._count -= answer.lost
                self._first = self._first if self._count else None
            answer.lost = 0

    def take(self) -> NotStored | None:
        """What to raise for all there are; they count as told then."""
        with self._lock:
            count, first, self._count, self._first = self._count, self._first, 0, None
            self._round += 1
        if first is None or not count:
            return None
        unknown = getattr(first, "outcome_unknown", False)
        error = NotStored(f"{count} messages are not {'known to be ' if unknown else ''}stored: {first}", count)
        error.__cause__ = first
        return error


class Answer(Future[T], Generic[T]):
    """What will come of one piece of work, in the process that asked for it."""

    def __init__(self, losses: Losses) -> None:
        super().__init__()
        self.heard = False  # set by a caller who waits no longer and was told that the end is not known
        self.lost, self.lost_in = 0, 0
        self._losses = losses
        self._pid = os.getpid()

    def result(self, timeout: float | None = None) -> T:
        self._check_process()
        try:
            return super().result(timeout)
        finally:
            self.told()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._check_process()
        try:
            return super().exception(timeout)
        finally:
            self.told()

    def told(self) -> None:
        """The caller knows how this ended, if it has."""
        if self.lost and self.done():
            self._losses.forget(self)

    def fail(self, error: BaseException) -> None:
        """Ends it with an error of its own: threads that raise one and the same would mix up their tracebacks."""
        if isinstance(error, ShardqError):
            cause, error = error.__cause__, copy.copy(error)
            error.__cause__ = cause
        if not self.heard:
            self._losses.add(error.failed if isinstance(error, NotStored) else 1, error, self)
        self.set_exception(error)

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            msg = "this message was sent before the process forked: its parent stores it and knows how that ended"
            raise ClosedError(msg)


class MessageAnswer(Answer[str]):
    """A message on its way to its id."""

    def __init__(
        self, losses: Losses, key: Key, value: Any, headers: Headers | None, options: SendOptions, size: int = 0
    ) -> None:
        super().__init__(losses)
        self.key, self.value, self.headers, self.options, self.size = key, value, headers, options, size


class JobAnswer(Answer[T], Generic[T]):
    """Anything else that is to be done with the producer."""

    def __init__(self, losses: Losses, work: Work[T], on_stop: Callable[[], None] = lambda: None) -> None:
        super().__init__(losses)
        self.work = work
        self.on_stop = on_stop
        self.left = False  # its caller was interrupted and waits no longer
        self.size = 0


AnyAnswer = MessageAnswer | JobAnswer[Any]


def wait(answer: Answer[T], timeout: float | None, what: str) -> T:
    """The result. A message or job whose caller gives up, or is interrupted, is withdrawn if it was not begun."""
    try:
        answer.exception(timeout)
    except TimeoutError:
        withdrawn = answer.cancel()
        if withdrawn or not answer.done():
            raise too_late(answer, timeout, what, withdrawn) from None
    except BaseException:
        answer.cancel()
        raise
    return answer.result()


def too_late(answer: Answer[Any], timeout: float | None, what: str, withdrawn: bool) -> StoreTimeout:
    answer.heard = True
    how = "it was not sent" if withdrawn else "it may be stored still: sending goes on until `delivery_timeout`"
    error = StoreTimeout(f"{what} within {timeout:g} s; {how}")
    error.outcome_unknown = not withdrawn
    return error
