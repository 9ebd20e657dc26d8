"""What becomes of a handler's exception: its text, and the dead letter of a message that is given up. Decides
nothing."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from time import time_ns

import msgspec

from shardq.core.intake import pristine_value, unhindered
from shardq.core.message import Message

ERROR_CHARACTERS = 2000
TRACEBACK_CHARACTERS = 8000


def asked_to_stop() -> bool:
    """Whether a CancelledError just caught was asked for from outside; else the handler met some cancelled task."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def own_cancellation(error: BaseException) -> Exception:
    failure = RuntimeError("the handler awaited something that was cancelled")
    failure.__cause__ = error
    return failure


def text_of(error: Exception) -> str:
    """An exception in words."""
    return _text(lambda: repr(error))[:ERROR_CHARACTERS]


def _text(make: Callable[[], str]) -> str:
    """A user's exception in words: its own __repr__ may fail, its text may hold what UTF-8 can't carry."""
    try:
        return make().encode(errors="backslashreplace").decode()
    except Exception as error:
        return f"<{type(error).__name__} while describing the failure>"


def dead_record(message: Message, error: Exception) -> bytes:
    """What is kept of a message that failed: all that a replay needs, and why it failed."""
    trace = _text(lambda: "".join(traceback.format_exception(error)))[-TRACEBACK_CHARACTERS:]
    return _record(message, text_of(error), trace)


def dead_record_of(message: Message, error: str) -> bytes:
    """The same where no exception was raised."""
    return _record(message, error[:ERROR_CHARACTERS], "")


def _record(message: Message, error: str, trace: str) -> bytes:
    # As it was stored: what the handler put into the object it was given is neither replayed nor shown.
    value = pristine_value(message)
    record = {
        "id": message.id,
        "key": message.key,
        "value": value,
        "headers": dict(message.headers) if message.headers else None,
        "sent_at_ms": message.sent_at_ms,
        "attempts": message.attempt,
        "failed_at_ms": time_ns() // 1_000_000,
        "error": error,
        "traceback": trace,
    }
    return unhindered(lambda: msgspec.msgpack.encode(record))
