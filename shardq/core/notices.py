"""Notices: what a broadcast puts on the wire, what a listener is given, and the bounded buffer between the two.
Knows nothing of channels' names in Redis, of connections or of tasks.

The frame of one notice, byte for byte:

    byte  0      version of this format: 1
    byte  1      flags: 0. A reader refuses flags it does not know
    bytes 2-17   an id drawn at random, by which a listener that is sent a notice twice passes it on once
    bytes 18-    the value: one msgpack item; bytes travel as bin, text as str

Bytes from Redis are untrusted: decoding raises CorruptData and nothing else.
"""

from __future__ import annotations

from collections import deque
from sys import getsizeof
from typing import Any, NamedTuple

import msgspec

from shardq.core.records import value_bytes
from shardq.errors import CorruptData, MessageTooLarge

VERSION = 1
ID_BYTES = 16
MAX_VALUE_BYTES = 1024 * 1024
_HEADER_BYTES = 2 + ID_BYTES
_ITEM_BYTES = 240  # about what Python itself needs for one waiting notice, beside its channel's name

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder()


class Notice(msgspec.Struct, frozen=True):
    """One broadcast, as a listener is given it.

    channel  the channel it was broadcast on, also when a pattern matched it
    value    bytes, str, or what msgpack carried
    """

    channel: str
    value: Any


class Missed(msgspec.Struct, frozen=True):
    """Stands among the notices where some may be missing; what was broadcast before it, read anew where it matters.

    channels  the channels and patterns concerned, as they were given to `listen`
    dropped   how many notices came and were dropped: the buffer was full, or they could not be read. 0 when a
              subscription was away for a while, for then nobody knows how many there were
    """

    channels: tuple[str, ...]
    dropped: int


def encode(notice_id: bytes, value: Any) -> bytes:
    """The frame; `value` as `records.pack_value` gave it. Raises MessageTooLarge."""
    size = value_bytes(value)
    if size > MAX_VALUE_BYTES:
        msg = f"a broadcast of {size} bytes: at most {MAX_VALUE_BYTES}; store it, and broadcast where it is"
        raise MessageTooLarge(msg)
    frame = bytearray((VERSION, 0))
    frame += notice_id
    _encoder.encode_into(value, frame, _HEADER_BYTES)
    return bytes(frame)


def id_of(frame: bytes) -> bytes | None:
    """The id in a frame; None when it has no header that can be read."""
    sound = len(frame) > _HEADER_BYTES and frame[0] == VERSION and frame[1] == 0
    return frame[2:_HEADER_BYTES] if sound else None


def decode(frame: bytes) -> Any:
    """The value in a frame. Raises CorruptData."""
    if id_of(frame) is None:
        msg = f"a notice of {len(frame)} bytes without a header of version {VERSION}, flags 0"
        raise CorruptData(msg)
    try:
        return _decoder.decode(memoryview(frame)[_HEADER_BYTES:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError, ValueError, TypeError) as error:
        msg = f"a notice does not decode: {error}"
        raise CorruptData(msg) from error


class RecentIds:
    """Remembers the last `size` ids."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._order: deque[bytes] = deque()
        self._known: set[bytes] = set()

    def add(self, notice_id: bytes) -> bool:
        """Remembers an id; False when it was known."""
        if notice_id in self._known:
            return False
        self._known.add(notice_id)
        self._order.append(notice_id)
        if len(self._order) > self._size:
            self._known.discard(self._order.popleft())
        return True


class Arrived(NamedTuple):
    """A notice that waits to be read. `source` is the channel or pattern, as given to `listen`, that brought it."""

    source: str
    channel: str
    frame: bytes

    @property
    def size(self) -> int:
        # Who publishes without shardq may call a channel that a pattern matches anything, of any length.
        return len(self.frame) + getsizeof(self.channel) + _ITEM_BYTES


class _Gap:
    """A Missed that may still grow."""

    def __init__(self) -> None:
        self.sources: dict[str, None] = {}
        self.dropped = 0

    def add(self, source: str, dropped: int) -> None:
        self.sources[source] = None
        self.dropped += dropped

    def merge(self, other: _Gap) -> None:
        self.sources |= other.sources
        self.dropped += other.dropped


class Buffer:
    """Notices in the order they came, gaps in their places. Holds at most `max_notices` of about `max_bytes` in all
    (one notice is held whatever its size): beyond that the oldest give way, and a gap stands for them."""

    def __init__(self, max_notices: int, max_bytes: int) -> None:
        self._max_notices = max_notices
        self._max_bytes = max_bytes
        self._items: deque[Arrived | _Gap] = deque()
        self._notices = 0
        self._bytes = 0

    def put(self, arrived: Arrived) -> None:
        self._items.append(arrived)
        self._notices += 1
        self._bytes += arrived.size
        while self._notices > self._max_notices or (self._bytes > self._max_bytes and self._notices > 1):
            self._drop_oldest()

    def gap(self, source: str) -> None:
        """From here back, notices of `source` may be missing."""
        if not self._items or not isinstance(self._items[-1], _Gap):
            self._items.append(_Gap())
        last = self._items[-1]
        assert isinstance(last, _Gap)
        last.add(source, 0)

    def take(self) -> Arrived | Missed | None:
        """The oldest item; None when there is none."""
        if not self._items:
            return None
        item = self._items.popleft()
        if isinstance(item, _Gap):
            return Missed(tuple(item.sources), item.dropped)
        self._forget(item)
        return item

    def _drop_oldest(self) -> None:
        gap = _Gap()
        self._merge_first(gap)
        item = self._items.popleft()
        assert isinstance(item, Arrived)
        self._forget(item)
        gap.add(item.source, 1)
        self._merge_first(gap)
        self._items.appendleft(gap)

    def _merge_first(self, gap: _Gap) -> None:
        if self._items and isinstance(self._items[0], _Gap):
            gap.merge(self._items[0])
            self._items.popleft()

    def _forget(self, arrived: Arrived) -> None:
        self._notices -= 1
        self._bytes -= arrived.size
