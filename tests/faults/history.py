"""What happened in a run, as lines that processes write while it happens: sends, handlers, leases, processes, faults.
Writes and reads them; judges nothing (checker.py does).

One JSON line is one event, written by one os.write to a file opened with O_APPEND, so that a process that is killed
leaves whole lines behind. All carry CLOCK_MONOTONIC in ns, which all processes of one machine share.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import msgspec

SUFFIX = ".jsonl"


class Send(msgspec.Struct, frozen=True, array_like=True, tag="send"):
    """
    what     "unknown": it may be stored, once at most. One without an end is the same: its process was killed
    process  the producer; with `number` the name of the message in the whole run
    id       what `send` returned
    """

    what: Literal["invoke", "ok", "fail", "unknown"]
    at_ns: int
    process: str
    key: str
    number: int
    fails: bool = False  # its handler always fails, so it must become a dead letter
    id: str = ""
    error: str = ""


class Handle(msgspec.Struct, frozen=True, array_like=True, tag="handle"):
    """One handler's start or end. `epoch` is the lease's; `how` it ended: "ok", "failed" (it raised), "cancelled"."""

    what: Literal["start", "end"]
    at_ns: int
    process: str
    shard: int
    epoch: int
    id: str
    key: str
    producer: str
    number: int
    attempt: int
    how: Literal["", "ok", "failed", "cancelled"] = ""


class Lease(msgspec.Struct, frozen=True, array_like=True, tag="lease"):
    """A worker got a lease (when it heard so), or let go of it."""

    what: Literal["taken", "lost"]
    at_ns: int
    process: str
    shard: int
    epoch: int


class Process(msgspec.Struct, frozen=True, array_like=True, tag="process"):
    """What was done to a client process, or became of it. "died" is an end that nobody asked for."""

    what: Literal["started", "killed", "paused", "resumed", "told", "ended", "died", "overdue"]
    at_ns: int
    process: str
    text: str = ""


class Strike(msgspec.Struct, frozen=True, array_like=True, tag="fault"):
    """One fault: carried out from `strike` to `struck`, undone from `heal` to `healed`; `failed` when it could not be
    carried out or undone. `number` is its place in the schedule."""

    what: Literal["strike", "struck", "heal", "healed", "failed"]
    at_ns: int
    number: int
    name: str
    text: str = ""


class Change(msgspec.Struct, frozen=True, array_like=True, tag="change"):
    """An operator changes the number of shards: begins (and may be cut off), has done so, or has to try again."""

    what: Literal["begun", "done", "again"]
    at_ns: int
    process: str
    text: str = ""


Event = Send | Handle | Lease | Process | Strike | Change

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Event).decode


def now_ns() -> int:
    return time.monotonic_ns()


class Journal:
    """One process's file. Threads may share it."""

    def __init__(self, path: Path, clock: Callable[[], int] = now_ns) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        self.clock = clock

    def write(self, event: Event) -> None:
        line = _encode(event) + b"\n"
        written = os.write(self._file, line)
        assert written == len(line), "a full disk: the history has a hole"

    def close(self) -> None:
        os.close(self._file)


def parse(data: bytes) -> list[Event]:
    """The events of one file. What was being written when its process ended, a last line without its end, is left out;
    anything else that does not read is an error (msgspec.DecodeError)."""
    whole, _, _ = data.rpartition(b"\n")
    return [_decode(line) for line in whole.split(b"\n")] if whole else []


def read_history(folder: Path) -> list[Event]:
    """All events of a run, in the order of their times."""
    return in_order(event for path in sorted(folder.glob(f"*{SUFFIX}")) for event in parse(path.read_bytes()))


def in_order(events: Iterable[Event]) -> list[Event]:
    return sorted(events, key=lambda event: event.at_ns)


def latest(path: Path, most_bytes: int = 16384) -> list[Event]:
    """The last events of a file, without reading what is before them."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - most_bytes))
        data = file.read()
    return parse(data if size <= most_bytes else data.partition(b"\n")[2])
