"""Dead letters: what a stored one says, which ones a filter means, and what a replay hands back. Pure.

A dead letter is a stream entry of two fields: `count`, the messages it stands for, and `record`, a msgpack map. That
of a message has id, key, value, headers, sent_at_ms, attempts, failed_at_ms, error, traceback; that of an entry that
could not be read has entry, index, raw (its bytes) and error.

Bytes from Redis are untrusted: what does not decode is a dead letter with that as its error, never an exception.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from shardq.core import records
from shardq.core.ids import MessageId, entry_key
from shardq.core.intake import KeptRecord, unhindered
from shardq.core.jobs import RETRYING, JobState, encode_state, job_of, job_place
from shardq.core.lanes import lane_key
from shardq.core.later import key_tag
from shardq.core.records import Headers, Key
from shardq.errors import CorruptData, UsageError

_ID = re.compile(r"(0|[1-9][0-9]{0,9})/(.+)", re.DOTALL)
_COUNT_DIGITS = 15  # beyond 2^53 Lua would not count exactly


class DeadLetter(msgspec.Struct, frozen=True):
    """One dead letter.

    id             `<shard>/<entry id>` of the dead letter itself, by which it is shown, replayed and purged
    message_id     the message's; '' when its entry could not be read
    messages       how many messages it stands for: 1, or all of an entry that could not be read
    attempts       tries that were made; 0 when it could not be read
    sent_at_ms, failed_at_ms   Unix time in ms
    raw            the bytes of an entry that could not be read, else b""
    entry          the id of that entry as far as it is known, else ''
    """

    id: str
    shard: int
    message_id: str
    key: Key
    value: Any
    headers: Headers | None
    messages: int
    attempts: int
    sent_at_ms: int
    failed_at_ms: int
    error: str
    traceback: str
    raw: bytes = b""
    entry: str = ""


class DeadFilter(msgspec.Struct, frozen=True):
    """Which dead letters are meant: all that fit everything given.

    key            of this key
    error          its error holds this text, in capitals or not
    older_than_s, newer_than_s   failed longer, or less long ago than that
    """

    key: Key = None
    error: str = ""
    older_than_s: float | None = None
    newer_than_s: float | None = None

    def takes(self, letter: DeadLetter, now_ms: int) -> bool:
        """Whether `letter` is meant; `now_ms` by the clock of the caller."""
        age_s = (now_ms - letter.failed_at_ms) / 1000
        return (
            (self.key is None or (letter.key is not None and lane_key(letter.key) == lane_key(self.key)))
            and self.error.lower() in letter.error.lower()
            and (self.older_than_s is None or age_s > self.older_than_s)
            and (self.newer_than_s is None or age_s < self.newer_than_s)
        )


def parse_dead_id(text: str) -> tuple[int, str]:
    """The shard and the entry id of a dead letter's id. Raises UsageError."""
    match = _ID.fullmatch(str(text))
    if match is None or not _parses(entry_key, match[2]):
        shown = repr(text) if len(repr(text)) <= 80 else f"{repr(text)[:77]}..."
        msg = f"{shown} is not the id of a dead letter; it looks like 3/1795231414661-0 (shard/entry id)"
        raise UsageError(msg)
    return int(match[1]), match[2]


def _parses(parse: Callable[[str], object], text: object) -> bool:
    try:
        parse(text)  # type: ignore[arg-type]  # it refuses what is no str too
    except UsageError:
        return False
    return True


def open_letter(shard: int, entry: str, fields: Sequence[bytes]) -> DeadLetter:
    """The dead letter of a stored entry."""
    stored = dict(zip(fields[::2], fields[1::2], strict=False))
    raw, failed_at_ms, digits = stored.get(b"record", b""), entry_key(entry)[0], stored.get(b"count", b"")
    count = int(digits) if digits.isdigit() and len(digits) <= _COUNT_DIGITS else 1
    record: Any = None
    try:
        record = msgspec.msgpack.decode(raw)
        problem = _problem(record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError, ValueError, TypeError) as error:
        problem = f"does not decode: {error}"
    if problem:
        record = {"raw": raw, "error": f"the dead letter itself {problem}"}
    return _letter(f"{shard}/{entry}", shard, count, failed_at_ms, record)


def _problem(record: Any) -> str:
    """Why no worker could handle what the record says; '' when one could, or when it holds an unread entry."""
    if not isinstance(record, dict):
        return "is not a map"
    if record.get("id") and not _parses(MessageId.parse, record["id"]):
        return "names no message"
    if not isinstance(record.get("key"), (str, bytes, type(None))):
        return "has a key that is neither str nor bytes"
    return "" if _sound_headers(record.get("headers")) else "has headers that are no map from str to str or bytes"


def _sound_headers(headers: Any) -> bool:
    return headers is None or (
        isinstance(headers, dict)
        and all(isinstance(name, str) and isinstance(value, (str, bytes)) for name, value in headers.items())
    )


def _letter(name: str, shard: int, count: int, failed_at_ms: int, record: Mapping[Any, Any]) -> DeadLetter:
    def text(field: str) -> str:
        value = record.get(field)
        return value if isinstance(value, str) else ""

    def number(field: str, otherwise: int = 0) -> int:
        value = record.get(field)
        return value if type(value) is int else otherwise

    raw, unread = record.get("raw"), text("entry")
    return DeadLetter(
        id=name,
        shard=shard,
        message_id=text("id"),
        key=record.get("key"),
        value=record.get("value"),
        headers=record.get("headers"),
        messages=count,
        attempts=number("attempts"),
        sent_at_ms=number("sent_at_ms"),
        failed_at_ms=number("failed_at_ms", failed_at_ms),
        error=text("error"),
        traceback=text("traceback"),
        raw=raw if isinstance(raw, bytes) else b"",
        entry=unread if _parses(entry_key, unread) else "",
    )


def kept_again(letter: DeadLetter) -> list[tuple[bytes, bytes]]:
    """What a replay hands back: (tag of the key, kept record) of each of its messages, tries counted anew.

    Raises CorruptData for an entry that still can't be read.
    """
    if letter.message_id:
        where = MessageId.parse(letter.message_id)
        return [_kept(where.entry, where.index, letter.key, letter.value, letter.headers, letter.sent_at_ms)]
    if not letter.raw:
        msg = f"dead letter {letter.id} has nothing that could be handled: {letter.error or 'its message is gone'}"
        raise CorruptData(msg)
    batch = records.decode(letter.raw)
    return [
        _kept(
            _entry(letter),
            index,
            key,
            batch.values[index],
            batch.headers[index] if batch.headers else None,
            batch.base_ms + (batch.offsets_ms[index] if batch.offsets_ms else 0),
        )
        for index, key in enumerate(batch.keys)
        if index not in (batch.holes or ())
    ]


def job_again(letter: DeadLetter, group: str, now_ms: int) -> tuple[str, int, bytes] | None:
    """What a replay makes of the record of the message's job (its id, for how many ms it is kept, the record): it waits
    for a try again. None for a message without a job."""
    named = job_of(letter.headers) if letter.headers and letter.message_id else None
    if named is None:
        return None
    queue, _ = job_place(named[0])
    state = JobState(named[0], RETRYING, queue, group, letter.attempts, letter.sent_at_ms, now_ms, error=letter.error)
    return *named, encode_state(state)


def _entry(letter: DeadLetter) -> str:
    return letter.entry or letter.id.partition("/")[2]


def _kept(
    entry: str, index: int, key: Key, value: Any, headers: Headers | None, sent_at_ms: int
) -> tuple[bytes, bytes]:
    record = KeptRecord(entry, index, key, value, dict(headers) if headers else None, sent_at_ms, 1, "")
    return key_tag(key), unhindered(lambda: msgspec.msgpack.encode(record))


def in_order(letters: Sequence[DeadLetter]) -> list[DeadLetter]:
    """In the order in which their messages were appended, as far as that is known."""

    def place(letter: DeadLetter) -> tuple[tuple[int, int], int]:
        if letter.message_id:
            where = MessageId.parse(letter.message_id)
            return entry_key(where.entry), where.index
        return entry_key(_entry(letter)), 0

    return sorted(letters, key=place)
