"""How keys, values and times are shown, how they are written in options, and how `peek` and `tail` show messages. Reads
nothing from Redis.

For people: a line with id, time of storing (UTC), key and value. What would upset a terminal is escaped; bytes that are
not UTF-8 are shown as `base64:...`. For programs: a line of JSON (core/jsonlines.py, the readable form).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import click

from shardq.cli.output import cut, line_width, padded, text_width
from shardq.core.history import Record
from shardq.core.jsonlines import readable, readable_value
from shardq.runtime.history import When

KEY_LEAST, KEY_MOST = 8, 32
VALUE_LEAST = 24

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_AGO = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w)")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")

Command = TypeVar("Command", bound=Callable[..., Any])


def parse_when(context: click.Context, parameter: click.Parameter, value: str | None) -> When:
    """For an option's `callback`: `10m`, an ISO date or time, Unix seconds, or a message id."""
    if value is None or "/" in value:
        return value
    if _NUMBER.fullmatch(value):
        return float(value)
    try:
        if ago := _AGO.fullmatch(value):
            return timedelta(seconds=float(ago[1]) * _UNITS[ago[2]])
        moment = datetime.fromisoformat(value)
        return moment.astimezone() if moment.tzinfo is None else moment
    except (ValueError, OverflowError) as error:
        forms = "10m (ms, s, m, h, d, w), 2026-07-27T10:00:00Z, Unix seconds, or a message id"
        raise click.BadParameter(f"{value!r} is no moment: write {forms}") from error


class Age(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.2
    """For an option's `type`: `10m` or seconds; passed as seconds."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value)
        ago = _AGO.fullmatch(text)
        number, unit = (ago[1], _UNITS[ago[2]]) if ago else (text, 1)
        if not _NUMBER.fullmatch(number) or not 0 <= (seconds := float(number) * unit) < math.inf:
            self.fail(f"{text!r} is no length of time: write 90, 90s, 15m, 2h or 7d (ms, s, m, h, d, w)", param, ctx)
        return seconds


def parse_key(context: click.Context, parameter: click.Parameter, value: str | None) -> str | bytes | None:
    """For an option's `callback`: a key as it was typed; bytes where that is not UTF-8."""
    if value is None:
        return None
    try:
        value.encode()
    except UnicodeEncodeError:  # Python has put surrogates for such bytes
        return os.fsencode(value)
    return value


def choice_options(command: Command) -> Command:
    """`--shard` (several) and `--key`, passed as `shards` and `key`."""
    for option in (
        click.option(
            "--key", callback=parse_key, metavar="KEY", help="Only this key's messages; only its shard is read."
        ),
        click.option(
            "--shard", "shards", type=int, multiple=True, metavar="ID", help="Only this shard; may be repeated."
        ),
    ):
        command = option(command)
    return command


class Printer:
    """Prints records as they come; columns grow with what was printed so far."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._id_width, self._key_width = 0, KEY_LEAST
        self._width = line_width()

    def print(self, records: Sequence[Record]) -> None:
        if not records:
            return
        if self._as_json:
            lines = [json.dumps(readable(record), ensure_ascii=False) for record in records]
        else:
            lines = self._lines(records)
        click.echo("\n".join(lines))

    def _lines(self, records: Sequence[Record]) -> list[str]:
        keys = [cut(key_text(record.key), KEY_MOST) for record in records]
        self._id_width = max(self._id_width, *(len(record.id) for record in records))
        self._key_width = max(self._key_width, *map(text_width, keys))
        return [self._line(record, key) for record, key in zip(records, keys, strict=True)]

    def _line(self, record: Record, key: str) -> str:
        start = f"{record.id:<{self._id_width}}  {time_text(record.stored_at_ms):<24}  {padded(key, self._key_width)}  "
        room = max(VALUE_LEAST, self._width - text_width(start))
        shown = escaped(f"! {record.error}") if record.error is not None else value_text(record.value)
        return start + cut(shown, room)


def time_text(ms: int) -> str:
    """A Unix time in ms, as `2026-11-21T03:23:34.661Z`."""
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):  # an id that another client chose need not be a time
        return f"{ms} ms"


def key_text(key: str | bytes | None) -> str:
    """A key on one line, `-` where there is none."""
    return "-" if key is None else value_text(key)


def value_text(value: Any) -> str:
    """Any value on one line, nothing left out."""
    shown = readable_value(value)
    if isinstance(value, bytes) and isinstance(shown, dict):
        return f"base64:{shown['$base64']}"
    return escaped(shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False))


def escaped(text: str) -> str:
    """Control characters and what else does not print, as `\\n`, `\\x1b`, `\\u202e`: a line stays a line."""
    return text if text.isprintable() else "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()
