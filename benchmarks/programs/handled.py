"""What the programs note of each message: its value carries a number and when it was due, a file says when its handler
started. Times are time.monotonic_ns(), one clock for all processes of a Linux machine. Sends and handles nothing.
"""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import NamedTuple

VALUE_BYTES = 100
_VALUE = struct.Struct("<QQ")
_ROW = struct.Struct("<QQQQ")
ROW_BYTES = _ROW.size


class Handled(NamedTuple):
    """One start of the handler: `due_ns` is when the message was to be sent, whether or not it was sent in time."""

    shard: int
    number: int
    due_ns: int
    started_ns: int

    @property
    def latency_ms(self) -> float:
        return (self.started_ns - self.due_ns) / 1e6


def value_of(number: int, due_ns: int) -> bytes:
    return _VALUE.pack(number, due_ns).ljust(VALUE_BYTES, b".")


class Notes:
    """Writes rows, each at once: what was noted outlives a SIGKILL."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)

    def add(self, shard: int, value: bytes) -> None:
        now_ns = time.monotonic_ns()
        os.write(self._file, _ROW.pack(shard, *_VALUE.unpack_from(value), now_ns))


def read_notes(path: Path) -> list[Handled]:
    """In the order of the handlers' starts; none where the file is not there yet. A row being written is left out."""
    data = path.read_bytes() if path.exists() else b""
    return [Handled(*row) for row in _ROW.iter_unpack(data[: len(data) // _ROW.size * _ROW.size])]


def read_column(path: Path, column: int, since: int = 0) -> list[int]:
    """One field of each row from the `since`th on, without making a Handled of each: millions are read in a moment."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(since * ROW_BYTES)
        data = file.read()
    return memoryview(data[: len(data) // ROW_BYTES * ROW_BYTES]).cast("Q")[column :: len(Handled._fields)].tolist()
