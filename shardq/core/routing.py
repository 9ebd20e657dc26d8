"""The routing table: which shard owns which range of the 32-bit key-hash space, and its wire format.

A table is immutable and always whole: its shards cover [0, 2**32) without gap or overlap. A change of shards is a
new table with a higher version. Never hashes a key (`hashing` does) and never says who owns a shard (leases do).

Wire format: byte 0x01 (the format version), then msgpack `[version, [[id, low, high], ...]]` ordered by `low`.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Self

import msgspec

from shardq.core.slots import HASH_SPACE, SLOTS, slot_of_range, tag_for_slot
from shardq.errors import CorruptData, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_SHARDS = SLOTS
"""Most shards of one queue: with more, shards would have to share a hash slot."""

MAX_SHARD_ID = (1 << 32) - 1
"""Largest shard id."""

MAX_VERSION = (1 << 53) - 1
"""Largest table version: numbers in server-side functions are doubles, exact up to here."""

_FORMAT = b"\x01"
_ShardRows = Annotated[list[tuple[int, int, int]], msgspec.Meta(max_length=MAX_SHARDS)]
_DECODER = msgspec.msgpack.Decoder(tuple[int, _ShardRows])


@dataclass(frozen=True)
class Shard:
    """One half-open range `[low, high)` of key hashes, 0 <= low < high <= 2**32, under an id 0..2**32-1.

    Raises UsageError when made with numbers outside these.
    """

    id: int
    low: int
    high: int

    def __post_init__(self) -> None:
        if not 0 <= self.id <= MAX_SHARD_ID:
            raise UsageError(f"shard id {self.id} is outside 0..{MAX_SHARD_ID}")
        if not 0 <= self.low < self.high <= HASH_SPACE:
            raise UsageError(f"shard {self.id} needs 0 <= low < high <= 2**32, got [{self.low}, {self.high})")

    @cached_property
    def slot(self) -> int:
        """The hash slot, 0..16383, of all of the shard's keys."""
        return slot_of_range(self.low, self.high)

    @cached_property
    def tag(self) -> str:
        """The hash tag, without braces, that puts a key in the shard's slot."""
        return tag_for_slot(self.slot)


@dataclass(frozen=True)
class RoutingTable:
    """The shards of a queue, ordered by range (given in any order), and the table's version, 1..2**53-1.

    Raises UsageError when made with shards that do not cover [0, 2**32) exactly once, with an id twice, or with
    a number of shards outside 1..16384.
    """

    version: int
    shards: tuple[Shard, ...]
    _lows: list[int] = field(init=False, repr=False, compare=False)
    # Number of shards if they are the equal cut, which needs no search; else 0.
    _equal: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shards = tuple(sorted(self.shards, key=lambda shard: shard.low))
        lows = [shard.low for shard in shards]
        object.__setattr__(self, "shards", shards)
        object.__setattr__(self, "_lows", lows)
        object.__setattr__(self, "_equal", len(lows) if lows == _equal_lows(len(lows)) else 0)
        self._check()

    @classmethod
    def equal(cls, count: int, version: int = 1) -> Self:
        """Return the table of a new queue: `count` (1..16384) equal ranges with the ids 0..count-1, in order.

        The shard of hash `h` is `(h * count) >> 32`. Raises UsageError for any other count.
        """
        _check_count(count)
        bounds = [*_equal_lows(count), HASH_SPACE]
        return cls(version, tuple(Shard(i, low, high) for i, (low, high) in enumerate(pairwise(bounds))))

    @cached_property
    def by_id(self) -> Mapping[int, Shard]:
        """The shards by id; not to be changed."""
        return {shard.id: shard for shard in self.shards}

    @property
    def equal_shards(self) -> int:
        """The number of shards when they cut the hash space evenly, else 0; then index_for(h) is h * it >> 32."""
        return self._equal

    def index_for(self, hash_: int) -> int:
        """Return the position in `shards` of the shard that owns the key hash `hash_`.

        Raises UsageError when `hash_` is not in 0..2**32-1.
        """
        if hash_ >> 32:
            raise UsageError(f"{hash_} is not a key hash; pass the result of key_hash(), 0 to 2**32-1")
        if self._equal:
            return (hash_ * self._equal) >> 32
        return bisect_right(self._lows, hash_) - 1

    def shard_for(self, hash_: int) -> Shard:
        """Return the shard that owns the key hash `hash_`; raises UsageError when it is not in 0..2**32-1."""
        return self.shards[self.index_for(hash_)]

    def to_bytes(self) -> bytes:
        """Return the table as it is stored; equal tables give equal bytes."""
        rows = [(shard.id, shard.low, shard.high) for shard in self.shards]
        return _FORMAT + msgspec.msgpack.encode((self.version, rows))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return the table stored as `data`; raises CorruptData for anything `to_bytes` could not have meant."""
        if data[:1] != _FORMAT:
            raise CorruptData(
                f"the routing table starts with {data[:1]!r}, this version reads format {_FORMAT!r}: "
                "a newer shardq may have written it (upgrade this one), or the key was overwritten"
            )
        try:
            version, rows = _DECODER.decode(memoryview(data)[1:])
            return cls(version, tuple(Shard(*row) for row in rows))
        except (msgspec.DecodeError, UsageError) as error:
            raise CorruptData(f"the stored routing table is damaged ({error}); restore it from a backup") from error

    def _check(self) -> None:
        if not 1 <= self.version <= MAX_VERSION:
            raise UsageError(f"a routing table's version is 1 to 2**53-1, not {self.version}")
        _check_count(len(self.shards))
        if len(self.by_id) != len(self.shards):
            raise UsageError("a shard id is used twice in one routing table; ids must be unique")
        if self._lows[0] != 0 or self.shards[-1].high != HASH_SPACE:
            raise UsageError("the shards do not reach from 0 to 2**32; every key hash needs an owner")
        for left, right in pairwise(self.shards):
            if left.high != right.low:
                raise UsageError(f"shards {left.id} and {right.id} overlap or leave a gap: {left.high} != {right.low}")


def _check_count(count: int) -> None:
    if not 1 <= count <= MAX_SHARDS:
        raise UsageError(f"a queue has 1 to {MAX_SHARDS} shards, not {count}")


def _equal_lows(count: int) -> list[int]:
    # Rounded up: (h * count) >> 32 >= i holds exactly from h = ceil(i * 2**32 / count) on.
    return [-(-i * HASH_SPACE // count) for i in range(count)]
