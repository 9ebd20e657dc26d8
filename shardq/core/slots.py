"""Hash slots of Redis Cluster: the slot of a key, a short hash tag for a slot, the slot of a hash range.

The tags are wire format: they are part of every stored key, so the enumeration below may never change.
Never talks to a server and never builds a whole key (`shardq.storage` does that).
"""

from __future__ import annotations

from binascii import crc_hqx
from functools import cache
from itertools import count, product
from typing import TYPE_CHECKING

from shardq.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

SLOTS = 16384
"""Number of hash slots of every Redis Cluster."""

HASH_SPACE = 1 << 32
"""Number of key hashes; ranges of them are half-open, so this is also the largest upper bound."""

_ALPHABET = b"0123456789abcdefghijklmnopqrstuvwxyz"


def key_slot(key: bytes) -> int:
    """Return the slot, 0..16383, in which Redis Cluster puts `key`.

    CRC16/XMODEM mod 16384 of the key, or of what is between its first `{` and the next `}` if that is not empty.
    Source: Redis Cluster specification, "Hash tags".
    """
    opened = key.find(b"{")
    if opened >= 0:
        closed = key.find(b"}", opened + 1)
        if closed > opened + 1:
            key = key[opened + 1 : closed]
    return crc_hqx(key, 0) % SLOTS


def tag_for_slot(slot: int) -> str:
    """Return the hash tag, 1 to 4 characters of [0-9a-z], whose slot is `slot` (0..16383).

    It is the first with that slot when tags are listed shortest first and, within a length, in ASCII order
    (0, 1, .., 9, a, .., z, 00, 01, ..). Raises UsageError when there is no such slot.
    """
    if not 0 <= slot < SLOTS:
        raise UsageError(f"there is no hash slot {slot}; a Redis Cluster has the slots 0 to {SLOTS - 1}")
    return _tags()[slot]


def slot_of_range(low: int, high: int) -> int:
    """Return the slot that sits where the middle of the hash range `[low, high)` sits in the 32-bit hash space."""
    return ((low + high) // 2 * SLOTS) >> 32


@cache
def _tags() -> tuple[str, ...]:
    found: dict[int, bytes] = {}
    for tag in _candidates():
        found.setdefault(crc_hqx(tag, 0) % SLOTS, tag)
        if len(found) == SLOTS:
            break
    return tuple(found[slot].decode() for slot in range(SLOTS))


def _candidates() -> Iterator[bytes]:
    for length in count(1):
        yield from map(bytes, product(_ALPHABET, repeat=length))
