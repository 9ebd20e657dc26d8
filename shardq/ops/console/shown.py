"""What the page gets to see, as JSON: rows of shards, dead letters, messages. Pure: reads nothing from Redis.

Values are sent as text, never as JSON of their own: JavaScript would round large integers, and text is all that the
page may put anywhere. What does not print (control characters, marks that turn the writing round) is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from shardq.core.dead import DeadLetter
from shardq.core.history import Record
from shardq.core.jsonlines import readable_value
from shardq.ops.inspect import GroupView, ShardView

MAX_CELL_CHARS, MAX_VALUE_CHARS = 300, 16_384


class Row(NamedTuple):
    """One shard for one group, as the page has it; the page is told the names once. Rates are messages a second.

    up       false: its node did not answer, the values are those read last
    pel      messages that are delivered and not finished
    waiting  retries and what they hold back
    dead     dead letters kept now
    oldest_s seconds since the oldest unfinished entry was stored, None: there is none
    lease    "held", "moving", "free", or "" where the group is not on the shard
    waits    retired shards that the group has to finish before it may begin on this one
    still_s  whole seconds since a held lease was seen renewed, from 3 on; less is 0, or each second would change it
    """

    shard: int
    slot: int
    node: str
    state: str
    up: bool
    appended: int
    acked: int
    retried: int
    backlog: int
    pel: int
    waiting: int
    dead: int
    delayed: int
    entries: int
    oldest_s: float | None
    owner: str
    lease: str
    epoch: int
    still_s: int
    stored_rate: float
    handled_rate: float
    waits: Sequence[int] = ()


def row(
    shard: ShardView,
    group: GroupView | None,
    *,
    up: bool,
    still_s: float,
    stored_rate: float,
    handled_rate: float,
    waits: Sequence[int] = (),
) -> Row:
    """The row of one shard; `group` is None where the queue or the shard has no group."""
    own = (shard.shard, shard.slot, shard.node, shard.state, up, shard.appended)
    rates = (_rounded(stored_rate), _rounded(handled_rate))
    if group is None:
        return Row(*own, 0, 0, 0, 0, 0, 0, shard.delayed, shard.entries, None, "", "", 0, 0, *rates)
    counts = (group.acked, group.retried, group.backlog, group.pel_messages, group.waiting, group.dead_letters)
    lease = ("moving" if group.moving else "held") if group.held else "free"
    still = int(still_s) if group.held and still_s >= 3 else 0
    age = None if group.oldest_age_s is None else _rounded(group.oldest_age_s)
    owner = group.owner if group.held else ""
    return Row(*own, *counts, shard.delayed, shard.entries, age, owner, lease, group.epoch, still, *rates, waits)


def _rounded(value: float) -> float:
    return round(value, 1) if value < 10 else float(round(value))


# -- text --------------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """The text with what does not print escaped; line breaks and tabs stay."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else _escape(char) for char in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()


def text_of(value: Any) -> str:
    """Any key, value or headers in full: text as it is, bytes that are not UTF-8 as base64, all else as JSON."""
    shown = readable_value(value)
    if isinstance(value, bytes) and isinstance(shown, dict):
        return f"base64:{shown['$base64']}"
    return printable(shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False, indent=2))


def cut(text: str, most: int) -> str:
    """At most so many characters, and how many are left out."""
    return text if len(text) <= most else f"{text[:most]} ... ({len(text) - most} more characters)"


def _key(key: str | bytes | None) -> str | None:
    return None if key is None else cut(text_of(key), MAX_CELL_CHARS)


def _headers(headers: Mapping[str, Any] | None) -> str | None:
    return cut(text_of(headers), MAX_VALUE_CHARS) if headers else None


# -- dead letters and messages -----------------------------------------------------------------------------------------


def letter_line(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter in the list: without its value."""
    return {
        "id": letter.id,
        "shard": letter.shard,
        "key": _key(letter.key),
        "attempts": letter.attempts,
        "messages": letter.messages,
        "failed_at_ms": letter.failed_at_ms,
        "error": cut(printable(letter.error), MAX_CELL_CHARS),
    }


def letter_whole(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter with all that is known of it."""
    return letter_line(letter) | {
        "message_id": letter.message_id or None,
        "value": cut(text_of(letter.value if letter.message_id else letter.raw), MAX_VALUE_CHARS),
        "headers": _headers(letter.headers),
        "sent_at_ms": letter.sent_at_ms or None,
        "error": cut(printable(letter.error), MAX_VALUE_CHARS),
        "traceback": cut(printable(letter.traceback), MAX_VALUE_CHARS),
    }


def message(record: Record) -> dict[str, Any]:
    """A stored message."""
    return {
        "id": record.id,
        "shard": record.shard,
        "key": _key(record.key),
        "value": cut(text_of(record.value), MAX_VALUE_CHARS),
        "headers": _headers(record.headers),
        "stored_at_ms": record.stored_at_ms,
        "sent_at_ms": record.sent_at_ms or None,
        "error": None if record.error is None else cut(printable(record.error), MAX_CELL_CHARS),
    }
