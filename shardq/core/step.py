"""The shapes of a step, which commits and fetches in one call: what it carries, and what it brings. Data only: what
goes in is decided in core/session.py, how it is written in storage/calls.py, what becomes of it in scripts/step.lua.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardq.core.effects import Effect
from shardq.core.message import Batch, Message

NEW = ">"
FIRST = "0-0"
LEFT_PENDING, LEFT_NEW, LEFT_NOTHING = "pending", "new", ""
Entry = tuple[bytes, Sequence[bytes]]

STEP_BYTES = 2 * 1024 * 1024


@dataclass(slots=True)
class Put:
    """A message that is to be handled later: a new item (0) or one that is put back."""

    item: int
    wait_ms: int
    gets: int
    tag: bytes
    record: bytes


@dataclass(slots=True)
class Step:
    """One step's content: fixed once built. `full` when it needs more of the shard's keys than the stream and
    counters."""

    number: int
    cursor: str
    entries_max: int
    known: int
    full: bool
    acked: int
    retried: int
    finished: list[Batch]
    partial: list[tuple[Batch, bytes]]
    dead: list[tuple[int, bytes]]
    puts: Sequence[Put] = ()  # these are rare: none costs a list in each step
    drops: Sequence[int] = ()
    gets: Sequence[int] = ()
    jobs: Sequence[tuple[str, int, bytes]] = ()
    effects: Sequence[tuple[Message, Effect]] = ()
    lanes: Sequence[str | None] = ()
    seen: bytes | None = None
    untouched: Sequence[str] = ()
    ungets: Sequence[int] = ()
    room: tuple[int, int, int] | None = None


class Fetched(NamedTuple):
    """What a step brought. `progress` is that of pending entries, which come before new ones. `due_in_ms`: until a
    delayed message is due; None when none waits. `left`: what there may be still, LEFT_PENDING, LEFT_NEW or
    LEFT_NOTHING."""

    entries: Sequence[Entry] = ()
    progress: Sequence[bytes] = ()
    next_item: int = 1
    due_in_ms: int | None = None
    marks: bytes = b""
    now_ms: int = 0
    items: Sequence[bytes] | None = None
    records: Sequence[bytes] = ()
    left: str = LEFT_NEW
