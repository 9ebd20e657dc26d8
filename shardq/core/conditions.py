"""On what conditions a message is stored: not before a time, only once, as a job. Checks what a sender asks for and
puts it in the terms of scripts/append.lua. Pure; `now` is nowhere: relative times are counted by the server.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import msgspec

from shardq.core.retry import MAX_DELAY_S
from shardq.errors import UsageError

MAX_DEDUPE_ID = 256
DEDUPE_WINDOW_S = 600.0
JOB_KEEP_S = 86400.0


@runtime_checkable
class Moment(Protocol):
    """A point in time: datetime.datetime."""

    @property
    def tzinfo(self) -> Any: ...

    def timestamp(self) -> float: ...


@runtime_checkable
class Span(Protocol):
    """A length of time: datetime.timedelta."""

    def total_seconds(self) -> float: ...


class Condition(msgspec.Struct, frozen=True):
    """`when`: '' (now), 'in:<ms>' or 'at:<Unix ms>'; `once`: a dedupe id, remembered `window_ms`."""

    when: str = ""
    once: str = ""
    window_ms: int = 0


def condition(
    delay: float | Span | None, at: float | Moment | None, dedupe_id: str | None, dedupe_window: float | Span | None
) -> Condition:
    """Raises UsageError for what is no time, no id, or contradicts itself."""
    if delay is not None and at is not None:
        msg = "give delay= or at=, not both"
        raise UsageError(msg)
    when = ""
    if delay is not None:
        when = f"in:{_ms(seconds('delay', delay))}"
    elif at is not None:
        when = f"at:{unix_ms(at)}"
    if dedupe_id is None:
        if dedupe_window is not None:
            msg = "dedupe_window= says how long a dedupe_id= is remembered: give that too"
            raise UsageError(msg)
        return Condition(when)
    window = seconds("dedupe_window", DEDUPE_WINDOW_S if dedupe_window is None else dedupe_window)
    return Condition(when, check_dedupe_id(dedupe_id), max(_ms(window), 1))


def check_dedupe_id(dedupe_id: Any) -> str:
    if type(dedupe_id) is not str or not 1 <= len(dedupe_id) <= MAX_DEDUPE_ID:
        msg = f"a dedupe_id is a str of 1 to {MAX_DEDUPE_ID} characters, not {dedupe_id!r:.80}"
        raise UsageError(msg)
    try:
        dedupe_id.encode()
    except UnicodeEncodeError as error:
        msg = "a dedupe_id has surrogates that UTF-8 can't carry"
        raise UsageError(msg) from error
    return dedupe_id


def seconds(name: str, value: float | Span) -> float:
    """A length of time in seconds, given as a number or a timedelta."""
    number = value.total_seconds() if isinstance(value, Span) else value
    if type(number) not in (int, float) or not 0 <= number <= MAX_DELAY_S:
        msg = f"{name} is 0 to {MAX_DELAY_S:g} seconds (a number or a timedelta), not {value!r:.80}"
        raise UsageError(msg)
    return float(number)


def unix_ms(at: float | Moment) -> int:
    """A point in time as Unix ms, given as Unix seconds or an aware datetime."""
    if isinstance(at, Moment):
        if at.tzinfo is None:
            msg = f"{at!r} has no time zone: use an aware datetime, like datetime.now(timezone.utc)"
            raise UsageError(msg)
        at = at.timestamp()
    if type(at) not in (int, float) or not 0 <= at <= 1e11:
        msg = f"a time is Unix seconds or an aware datetime, not {at!r:.80}"
        raise UsageError(msg)
    return int(at * 1000)


def _ms(value_s: float) -> int:
    return math.ceil(value_s * 1000)
