"""How `peek` and `tail` show messages, and the options they share. Reads nothing from Redis.

For people: a line each with id, time of storing (UTC), key and value. What would upset a terminal is escaped; bytes
that are not UTF-8 are shown as `base64:...`. For programs: a line of JSON each (core/jsonlines.py, the readable form).
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import click

from shardq.core.history import Record
from shardq.core.jsonlines import readable, readable_value
from shardq.runtime.history import When

KEY_LEAST, KEY_MOST = 8, 32
LINE_WIDTH = 160
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


def choice_options(command: Command) -> Command:
    """`--shard` (several) and `--key`, passed as `shards` and `key`."""
    for option in (
        click.option("--key", metavar="KEY", help="Only this key's messages; only its shard is read."),
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
        self._width = shutil.get_terminal_size().columns if sys.stdout.isatty() else LINE_WIDTH

    def print(self, records: Sequence[Record]) -> None:
        if not records:
            return
        if self._as_json:
            lines = [json.dumps(readable(record), ensure_ascii=False) for record in records]
        else:
            lines = self._lines(records)
        click.echo("\n".join(lines))

    def _lines(self, records: Sequence[Record]) -> list[str]:
        keys = [_cut("-" if record.key is None else _text(record.key), KEY_MOST) for record in records]
        self._id_width = max(self._id_width, *(len(record.id) for record in records))
        self._key_width = max(self._key_width, *map(len, keys))
        return [self._line(record, key) for record, key in zip(records, keys, strict=True)]

    def _line(self, record: Record, key: str) -> str:
        start = f"{record.id:<{self._id_width}}  {_time(record.stored_at_ms)}  {key:<{self._key_width}}  "
        room = max(VALUE_LEAST, self._width - len(start))
        shown = _escaped(f"! {record.error}") if record.error is not None else _text(record.value)
        return start + _cut(shown, room)


def _time(ms: int) -> str:
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):  # an id that another client chose need not be a time
        return f"{ms} ms".ljust(24)


def _text(value: Any) -> str:
    shown = readable_value(value)
    if isinstance(value, bytes) and isinstance(shown, dict):
        return f"base64:{shown['$base64']}"
    return _escaped(shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False))


def _escaped(text: str) -> str:
    """Control characters and what else does not print, as `\\n`, `\\x1b`, `\\u202e`: a line stays a line."""
    return text if text.isprintable() else "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 3]}..."
