"""How commands print: tables for people (rich on a terminal, plain columns elsewhere) or a thing's fields, one JSON
object a line for programs. Knows no queue.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unicodedata import east_asian_width

import click

LINE_WIDTH = 160  # where the output is no terminal
CUT_LEAST = 24


def print_json(objects: Iterable[Mapping[str, Any]]) -> None:
    """One object a line."""
    for each in objects:
        click.echo(json.dumps(each, ensure_ascii=False))


def tell_unreadable(context: click.Context, queues: Mapping[str, str]) -> None:
    """A line on stderr for each queue that can't be read, with the reason; then the command ends with status 1."""
    for queue, why in queues.items():
        click.echo(f"queue {queue} can't be read: {' '.join(why.split())}", err=True)
    if queues:
        context.exit(1)


def print_fields(fields: Mapping[str, str | None]) -> None:
    """A line for each, `name: text`, the texts below each other; what is None is left out."""
    shown = {name: text for name, text in fields.items() if text is not None}
    width = max(map(len, shown)) + 1
    for name, text in shown.items():
        click.echo(f"{name + ':':<{width}} {text}".rstrip())


def print_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], *, left: Iterable[str] = (), shorten: str = ""
) -> None:
    """Columns named in `left` are left-aligned (text), the others right-aligned (numbers). The column `shorten` is cut
    to what the others leave of the line."""
    lefts = [header in set(left) for header in headers]
    if shorten:
        rows = _shortened(headers, rows, headers.index(shorten))
    widths = _widths(headers, rows)
    if sys.stdout.isatty():
        _print_rich(headers, rows, lefts, sum(widths) + 2 * len(widths))
        return
    for row in (headers, *rows):
        cells = zip(row, widths, lefts, strict=True)
        click.echo("  ".join(padded(cell, width, left=left) for cell, width, left in cells).rstrip())


def _shortened(headers: Sequence[str], rows: Sequence[Sequence[str]], at: int) -> list[list[str]]:
    widths = _widths(headers, rows)
    room = max(CUT_LEAST, line_width() - 2 * len(widths) - sum(widths) + widths[at])
    return [[*row[:at], cut(row[at], room), *row[at + 1 :]] for row in rows]


def _widths(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(text_width, column)) for column in zip(headers, *rows, strict=True)]


def text_width(text: str) -> int:
    """The columns it takes on a terminal."""
    return len(text) if text.isascii() else sum(map(_char_width, text))


def _char_width(char: str) -> int:
    return 2 if east_asian_width(char) in "WF" else 1


def padded(text: str, width: int, *, left: bool = True) -> str:
    """With blanks up to `width` columns, behind it or before it."""
    blanks = " " * (width - text_width(text))
    return text + blanks if left else blanks + text


def cut(text: str, room: int) -> str:
    """With `...` for what takes more than `room` columns."""
    if len(text) <= room and text.isascii():
        return text
    taken, end = 0, 0
    for at, char in enumerate(text, start=1):
        taken += _char_width(char)
        if taken <= room - 3:
            end = at
        elif taken > room:
            return f"{text[:end]}..."
    return text


def line_width() -> int:
    """The columns that a line may take where it need not be whole."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else LINE_WIDTH


def _print_rich(headers: Sequence[str], rows: Sequence[Sequence[str]], lefts: Sequence[bool], width: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    for header, left in zip(headers, lefts, strict=True):
        table.add_column(header, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: what a user named may look like rich's own markup
    console = Console()
    # A terminal that is too narrow wraps the lines; figures must not be cut off.
    console.width = max(console.width, width)
    console.print(table)


def age(seconds: float | None) -> str:
    """A duration as a person reads it: "-", 0.3s, 12s, 4m05s, 3h12m, 2d04h."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, rest_s = divmod(int(seconds), 60)
    hours, rest_minutes = divmod(minutes, 60)
    days, rest_hours = divmod(hours, 24)
    if days:
        return f"{days}d{rest_hours:02}h"
    return f"{hours}h{rest_minutes:02}m" if hours else f"{minutes}m{rest_s:02}s"


@contextmanager
def quiet_when_unread() -> Iterator[None]:
    """Whoever read the output has gone, as `| head` does: that ends the command, quietly."""
    try:
        yield
    except BaseExceptionGroup as group:
        _, rest = group.split(BrokenPipeError)
        if rest is not None:
            raise
        _leave()
    except BrokenPipeError:
        _leave()


def _leave() -> None:
    # Python flushes stdout once more at its end, and would complain there.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
