"""Lanes: what may be handled now. One message at a time per key, in the order added; different keys side by side.

Invariants (tests/core/test_lanes.py holds a model to them):
- Between `take` of a message with a key and `done` of that key, no other message of that key is taken.
- Messages of one key are taken in the order they were added. Messages without a key are each a lane of their own.
- A key costs memory only while it has a message in here.

A str key and a bytes key with the same UTF-8 bytes are one key: they hash to one shard, so they share a lane too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol

from shardq.core.message import Message
from shardq.core.records import Key


class Ready(Protocol):
    """Where messages go whose turn it is: a deque, or what lets them pass into one (core/gate.py)."""

    def append(self, message: Message, /) -> None: ...

    def extend(self, messages: Iterable[Message], /) -> None: ...


class Lanes:
    """The lanes of one owned shard. `ready` is what several Lanes may share, oldest first."""

    __slots__ = ("_waiting", "ready")

    def __init__(self, ready: Ready) -> None:
        self.ready = ready
        # None: the key's only message is ready or being handled. A deque: more wait behind it.
        self._waiting: dict[str, deque[Message] | None] = {}

    def add(self, messages: list[Message]) -> None:
        """Takes messages in, in order."""
        waiting, ready = self._waiting, self.ready
        for message in messages:
            key = message.key
            if key is None:
                ready.append(message)
                continue
            if type(key) is not str:
                key = lane_key(key)
            if key not in waiting:
                waiting[key] = None
                ready.append(message)
            elif (behind := waiting[key]) is None:
                waiting[key] = deque((message,))
            else:
                behind.append(message)

    def done(self, key: Key) -> Message | None:
        """The message of this key that was taken last is finished. Returns the next one of the key, which is taken now:
        the caller handles it, or puts it among those that are ready."""
        if key is None:
            return None
        if type(key) is not str:
            key = lane_key(key)
        behind = self._waiting[key]
        if behind:
            return behind.popleft()
        del self._waiting[key]
        return None

    def busy(self, lane: str) -> bool:
        """Whether a message of the key is in here."""
        return lane in self._waiting

    def behind(self, lane: str) -> int:
        """How many messages of the key wait for the one that was taken last."""
        return len(self._waiting.get(lane) or ())

    def empty(self, key: Key) -> list[Message]:
        """The message of this key that was taken last leaves, and so do those behind it, which are returned."""
        if key is None:
            return []
        return list(self._waiting.pop(lane_key(key), None) or ())

    def clear(self) -> None:
        """Forgets all that waits. What is in `ready` is skipped by whoever takes it, for its lease is lost."""
        self._waiting.clear()

    def __len__(self) -> int:
        """Keys that have a message in here."""
        return len(self._waiting)


def lane_key(key: str | bytes) -> str:
    """One spelling for str and bytes keys of the same bytes; injective over bytes."""
    return key if isinstance(key, str) else key.decode("utf-8", "surrogateescape")
