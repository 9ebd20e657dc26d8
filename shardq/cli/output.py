"""How commands print: tables for people (rich on a terminal, plain columns elsewhere), one JSON object a line for
programs. Knows no queue.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click


def print_json(objects: Iterable[Mapping[str, Any]]) -> None:
    """One object a line."""
    for each in objects:
        click.echo(json.dumps(each, ensure_ascii=False))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, left: Iterable[str] = ()) -> None:
    """Columns named in `left` are left-aligned (text), the others right-aligned (numbers)."""
    lefts = [header in set(left) for header in headers]
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    if sys.stdout.isatty():
        _print_rich(headers, rows, lefts, sum(widths) + 2 * len(widths))
        return
    for row in (headers, *rows):
        cells = zip(row, widths, lefts, strict=True)
        click.echo("  ".join(cell.ljust(width) if left else cell.rjust(width) for cell, width, left in cells).rstrip())


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
