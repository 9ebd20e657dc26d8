"""Lanes: what may be handled now. One message at a time per key, in the order added; different keys side by side.

Invariants (tests/core/test_lanes.py holds a model to them):
- Between `take` of a message with a key and `done` of that key, no other message of that key is taken.
- Messages of one key are taken in the order they were added. Messages without a key are each a lane of their own.
- A key costs memory only while it has a message in here.

A str key and a bytes key with the same UTF-8 bytes are one key: they hash to one shard, so they share a lane too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from shardq.core.message import Message


class Ready(Protocol):
    """Where messages go whose turn it is: a deque, or what lets them pass into one (core/gate.py)."""

    def append(self, message: Message, /) -> None: ...

    def extend(self, messages: Iterable[Message], /) -> None: ...


class Lanes:
    """The lanes of one owned shard. `ready` is what several Lanes may share, oldest first.

    Each message knows the one of its key that waits for it, so a lane is nothing but its newest message: what comes and
    what is done takes no container, and mostly no look into a dict.
    """

    __slots__ = ("_newest", "ready")

    def __init__(self, ready: Ready) -> None:
        self.ready = ready
        self._newest: dict[str, Message] = {}

    def add(self, messages: list[Message]) -> None:
        """Takes messages in, in order."""
        newest, line_up = self._newest, self.ready.append
        known = newest.get
        for message in messages:
            key = message.key
            if type(key) is not str:
                if key is None:
                    line_up(message)
                    continue
                key = lane_key(key)
            before = known(key)
            newest[key] = message
            if before is None:
                line_up(message)
            else:
                before._next = message

    def done(self, message: Message) -> Message | None:
        """The message, which was taken, is finished. Returns the next one of its key, which is taken now: the caller
        handles it, or puts it among those that are ready."""
        following = message._next
        if following is not None:
            message._next = None
        elif message.key is not None:
            del self._newest[lane_key(message.key)]
        return following

    def busy(self, lane: str) -> bool:
        """Whether a message of the key is in here."""
        return lane in self._newest

    def behind(self, message: Message) -> int:
        """How many messages of its key wait for this one, which is ready or taken."""
        count = 0
        while (following := message._next) is not None:
            count, message = count + 1, following
        return count

    def empty(self, message: Message) -> list[Message]:
        """The message, which was taken, leaves, and so do those behind it, which are returned."""
        if message.key is None:
            return []
        self._newest.pop(lane_key(message.key), None)
        left: list[Message] = []
        while (following := message._next) is not None:
            message._next = None
            left.append(following)
            message = following
        return left

    def clear(self) -> None:
        """Forgets all that waits. What is in `ready` is skipped by whoever takes it, for its lease is lost."""
        self._newest.clear()

    def __len__(self) -> int:
        """Keys that have a message in here."""
        return len(self._newest)


def let_go(message: Message) -> None:
    """Nobody handles the message here any more, nor those behind it: parts them. Each holds the next, so the end of the
    first would be the end of all, one inside the other, and a C stack is full after some thousands."""
    following = message._next
    while following is not None:
        message._next = None
        message, following = following, following._next


def lane_key(key: str | bytes) -> str:
    """One spelling for str and bytes keys of the same bytes; injective over bytes."""
    return key if isinstance(key, str) else key.decode("utf-8", "surrogateescape")
