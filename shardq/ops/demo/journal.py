"""What was handled, on disk: one line for each call of the handler, one file for each process.

A line is one write to an append-only file, so it survives a SIGKILL of its process and is never half of another's.
Judges nothing (report.py does), and writes only into the folder it is given.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import msgspec

from shardq.errors import CorruptData

_SUFFIX = ".journal"


class Handling(NamedTuple):
    """One call of the handler that came to its end. Times are CLOCK_MONOTONIC, the same for all local processes."""

    worker: str
    row: int
    tail: str | None
    carrier: str
    dep_delay: int | None
    start_ns: int
    end_ns: int
    pid: int
    shard: int


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Handling)


class Journal:
    """One process's file in `folder`."""

    def __init__(self, folder: Path) -> None:
        path = folder / f"{os.getpid()}{_SUFFIX}"
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, handling: Handling) -> None:
        """One line, whole or not at all."""
        os.write(self._file, _ENCODER.encode(handling) + b"\n")


class JournalReader:
    """Reads all journals of a folder as they grow."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[Path, int] = {}

    def read_new(self) -> list[Handling]:
        """The whole lines written since the last call, in the order written for each process. Raises CorruptData."""
        handlings: list[Handling] = []
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            offset = self._offsets.get(path, 0)
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]  # a line that is being written is read next time
            self._offsets[path] = offset + len(whole)
            try:
                handlings += _DECODER.decode_lines(whole)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise CorruptData(f"{path} has a line that no worker wrote ({error}): run the demo again.") from error
        return handlings
