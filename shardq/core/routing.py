"""The routing table: which shard owns which range of the 32-bit key-hash space, and its wire format.

A table is immutable and always whole: its shards cover [0, 2**32) without gap or overlap. A change of shards is a
new table with a higher version (core/reshard.py makes it). Never hashes a key (`hashing` does) and never says who owns
a shard (leases do).

Every shard has a home: the shard of the declared queue that it descends from, whose hash slot it keeps. An original is
its own home. A shard that was sealed for a reshard is retired: it owns no range any more and is drained; when it is
gone, its id and home are remembered, for the ids of messages and jobs that name it.

Invariants: the shards of a home lie side by side, and no reshard changes what they cover together. An id is never given
twice, and a shard's id is larger than those of the shards that it came of.

Wire format, as long as the queue was never resharded: byte 0x01, then msgpack `[version, [[id, low, high], ...]]`
ordered by `low`. Then: byte 0x02, and msgpack `[version, shards, retired, removed]`, shards as
`[id, low, high, home, slot]` ordered by `low`, retired as `[id, low, high, home, slot, [id of a child, ...]]`, removed
as `[id, home]`, both by id.
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

MAX_PAST = 4 * MAX_SHARDS
"""Most retired shards, and most removed ones that are remembered: beyond, the oldest are forgotten."""

_FORMAT, _RESHARDED = b"\x01", b"\x02"
_ShardRows = Annotated[list[tuple[int, int, int]], msgspec.Meta(max_length=MAX_SHARDS)]
_DECODER = msgspec.msgpack.Decoder(tuple[int, _ShardRows])
_ChildIds = Annotated[list[int], msgspec.Meta(max_length=MAX_SHARDS)]
_HomeRows = Annotated[list[tuple[int, int, int, int, int]], msgspec.Meta(max_length=MAX_SHARDS)]
_RetiredRows = Annotated[list[tuple[int, int, int, int, int, _ChildIds]], msgspec.Meta(max_length=MAX_PAST)]
_RemovedRows = Annotated[list[tuple[int, int]], msgspec.Meta(max_length=MAX_PAST)]
_RESHARDED_DECODER = msgspec.msgpack.Decoder(tuple[int, _HomeRows, _RetiredRows, _RemovedRows])


@dataclass(frozen=True)
class Shard:
    """One half-open range `[low, high)` of key hashes, 0 <= low < high <= 2**32, under an id 0..2**32-1.

    home        the shard it descends from; None for an original, which is its own
    home_slot   that shard's hash slot, 0..16383; None for an original

    Raises UsageError when made with numbers outside these.
    """

    id: int
    low: int
    high: int
    home: int | None = None
    home_slot: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.id <= MAX_SHARD_ID:
            raise UsageError(f"shard id {self.id} is outside 0..{MAX_SHARD_ID}")
        if not 0 <= self.low < self.high <= HASH_SPACE:
            raise UsageError(f"shard {self.id} needs 0 <= low < high <= 2**32, got [{self.low}, {self.high})")
        if (self.home is None) != (self.home_slot is None) or self.home == self.id:
            raise UsageError(f"shard {self.id} needs a home of another id with its slot, or none")
        if self.home is not None and not 0 <= self.home < self.id:
            raise UsageError(f"shard {self.id} can't descend from shard {self.home}: ids rise from parent to child")
        if self.home_slot is not None and not 0 <= self.home_slot < SLOTS:
            raise UsageError(f"shard {self.id} has its home in slot {self.home_slot}; slots are 0 to {SLOTS - 1}")

    @property
    def home_id(self) -> int:
        """The id of its home, its own for an original."""
        return self.id if self.home is None else self.home

    @cached_property
    def slot(self) -> int:
        """The hash slot, 0..16383, of all of the shard's keys."""
        return slot_of_range(self.low, self.high) if self.home_slot is None else self.home_slot

    def overlaps(self, other: Shard) -> bool:
        """Whether some key hash is in both ranges."""
        return self.low < other.high and other.low < self.high

    @cached_property
    def tag(self) -> str:
        """The hash tag, without braces, that puts a key in the shard's slot."""
        return tag_for_slot(self.slot)


@dataclass(frozen=True)
class RetiredShard:
    """A shard that takes no messages any more, and the shards that took its place when it was sealed."""

    shard: Shard
    children: tuple[int, ...]


@dataclass(frozen=True)
class RoutingTable:
    """The shards of a queue, ordered by range (given in any order), and the table's version, 1..2**53-1.

    retired   shards that are drained, by id; removed   (id, id of its home) of those that are gone, by id

    Raises UsageError when made with shards that do not cover [0, 2**32) exactly once, with an id twice, with a number
    of shards outside 1..16384, or with homes that do not fit.
    """

    version: int
    shards: tuple[Shard, ...]
    retired: tuple[RetiredShard, ...] = ()
    removed: tuple[tuple[int, int], ...] = ()
    _lows: list[int] = field(init=False, repr=False, compare=False)
    # Number of shards if they are the equal cut, which needs no search; else 0.
    _equal: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shards = tuple(sorted(self.shards, key=lambda shard: shard.low))
        lows = [shard.low for shard in shards]
        object.__setattr__(self, "shards", shards)
        object.__setattr__(self, "_lows", lows)
        object.__setattr__(self, "retired", tuple(sorted(self.retired, key=lambda each: each.shard.id)))
        object.__setattr__(self, "removed", tuple(sorted(self.removed)))
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
        """Every shard that has keys by id, those that are active, by range, and then the retired; not to be changed."""
        return {shard.id: shard for shard in (*self.shards, *(each.shard for each in self.retired))}

    @cached_property
    def retired_by_id(self) -> Mapping[int, RetiredShard]:
        """The retired shards by id; not to be changed."""
        return {each.shard.id: each for each in self.retired}

    @cached_property
    def homes(self) -> Mapping[int, tuple[Shard, ...]]:
        """The active shards of each home, by range; as many homes as the queue was declared with shards."""
        found: dict[int, list[Shard]] = {}
        for shard in self.shards:
            found.setdefault(shard.home_id, []).append(shard)
        return {home: tuple(shards) for home, shards in found.items()}

    @cached_property
    def _retired_of_home(self) -> Mapping[int, tuple[Shard, ...]]:
        found: dict[int, list[Shard]] = {}
        for each in self.retired:
            found.setdefault(each.shard.home_id, []).append(each.shard)
        return {home: tuple(shards) for home, shards in found.items()}

    @property
    def next_id(self) -> int:
        """An id above all that were ever given."""
        return 1 + max((*self.by_id, *(id_ for id_, _ in self.removed)))

    def home_of(self, shard: int) -> int | None:
        """The home of any shard that is or was; None for what never was."""
        if shard in self.by_id:
            return self.by_id[shard].home_id
        return dict(self.removed).get(shard)

    def relatives(self, shard: int) -> tuple[Shard, ...]:
        """Every shard there is of the home of a shard that is or was; none for what never was."""
        home = self.home_of(shard)
        return () if home is None else (*self.homes[home], *self._retired_of_home.get(home, ()))

    def ancestors(self, shard: int) -> tuple[Shard, ...]:
        """The retired shards, by id, that held keys of this one before it, of every generation: a child that was empty
        when it was sealed says nothing of what its own parents still hold."""
        own = self.by_id[shard]
        older = self._retired_of_home.get(own.home_id, ())
        return tuple(each for each in older if each.id < shard and each.overlaps(own))

    def holding(self, hash_: int) -> tuple[Shard, ...]:
        """The shards that may hold messages of a key hash, retired ones first, by id."""
        own = self.shard_for(hash_)
        older = self._retired_of_home.get(own.home_id, ())
        return (*(each for each in older if each.low <= hash_ < each.high), own)

    @cached_property
    def generations(self) -> tuple[tuple[int, ...], ...]:
        """The ids of all shards that have keys, so that those before a shard in time are in an earlier row."""
        depth: dict[int, int] = {}
        for shard in sorted(self.by_id):
            depth[shard] = 1 + max((depth[each.id] for each in self.ancestors(shard)), default=-1)
        return tuple(
            tuple(shard for shard, own in depth.items() if own == row) for row in range(max(depth.values()) + 1)
        )

    def without(self, shard: int) -> Self:
        """The table that follows when a retired shard is gone. Raises UsageError for one that is not retired."""
        if shard not in self.retired_by_id:
            raise UsageError(f"shard {shard} is not retired; only a retired shard can go")
        rest = tuple(each for each in self.retired if each.shard.id != shard)
        removed = sorted((*self.removed, (shard, self.by_id[shard].home_id)))[-MAX_PAST:]
        return type(self)(self.version + 1, self.shards, rest, tuple(removed))

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
        if not self.resharded:
            rows = [(shard.id, shard.low, shard.high) for shard in self.shards]
            return _FORMAT + msgspec.msgpack.encode((self.version, rows))
        retired = [(*_row(each.shard), each.children) for each in self.retired]
        content = (self.version, [_row(shard) for shard in self.shards], retired, self.removed)
        return _RESHARDED + msgspec.msgpack.encode(content)

    @property
    def resharded(self) -> bool:
        """Whether the shards are other ones than the queue was declared with."""
        return bool(self.retired or self.removed or any(shard.home is not None for shard in self.shards))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return the table stored as `data`; raises CorruptData for anything `to_bytes` could not have meant."""
        if data[:1] not in (_FORMAT, _RESHARDED):
            raise CorruptData(
                f"the routing table starts with {data[:1]!r}, this version reads the formats {_FORMAT!r} and "
                f"{_RESHARDED!r}: a newer shardq may have written it (upgrade this one), or the key was overwritten"
            )
        try:
            if data[:1] == _FORMAT:
                version, rows = _DECODER.decode(memoryview(data)[1:])
                return cls(version, tuple(Shard(*row) for row in rows))
            version, active, past, removed = _RESHARDED_DECODER.decode(memoryview(data)[1:])
            retired = tuple(RetiredShard(_shard(*row[:5]), tuple(row[5])) for row in past)
            return cls(version, tuple(_shard(*row) for row in active), retired, tuple(removed))
        except (msgspec.DecodeError, UsageError) as error:
            raise CorruptData(f"the stored routing table is damaged ({error}); restore it from a backup") from error

    def _check(self) -> None:
        if not 1 <= self.version <= MAX_VERSION:
            raise UsageError(f"a routing table's version is 1 to 2**53-1, not {self.version}")
        _check_count(len(self.shards))
        ids = {*self.by_id, *(id_ for id_, _ in self.removed)}
        if len(ids) != len(self.shards) + len(self.retired) + len(self.removed):
            raise UsageError("a shard id is used twice in one routing table; ids must be unique")
        if self._lows[0] != 0 or self.shards[-1].high != HASH_SPACE:
            raise UsageError("the shards do not reach from 0 to 2**32; every key hash needs an owner")
        for left, right in pairwise(self.shards):
            if left.high != right.low:
                raise UsageError(f"shards {left.id} and {right.id} overlap or leave a gap: {left.high} != {right.low}")
        if self.resharded:
            self._check_homes()

    def _check_homes(self) -> None:
        homes = self.homes
        if len(homes) != 1 + sum(left.home_id != right.home_id for left, right in pairwise(self.shards)):
            raise UsageError("the shards of one home do not lie side by side")
        for shard in self.by_id.values():
            if shard.home_id not in homes or shard.slot != homes[shard.home_id][0].slot:
                raise UsageError(f"shard {shard.id} has a home without active shards, or with another slot")
        if any(home not in homes or not home <= id_ <= MAX_SHARD_ID for id_, home in self.removed):
            raise UsageError("a removed shard has a home that is not there")
        for each in self.retired:
            self._check_retired(each)

    def _check_retired(self, each: RetiredShard) -> None:
        own, relatives = each.shard, self.homes[each.shard.home_id]
        if not relatives[0].low <= own.low or not own.high <= relatives[-1].high:
            raise UsageError(f"retired shard {own.id} reaches beyond its home")
        homes_of_children = {self.home_of(child) for child in each.children}
        if homes_of_children != {own.home_id} or min(each.children) <= own.id:
            raise UsageError(f"retired shard {own.id} names children that are not there, or not its own")
        if len(set(each.children)) != len(each.children):
            raise UsageError(f"retired shard {own.id} names a child twice")


def _row(shard: Shard) -> tuple[int, int, int, int, int]:
    return shard.id, shard.low, shard.high, shard.home_id, shard.slot


def _shard(id_: int, low: int, high: int, home: int, slot: int) -> Shard:
    if home != id_:
        return Shard(id_, low, high, home, slot)
    own = Shard(id_, low, high)
    if own.slot != slot:
        raise UsageError(f"shard {id_} is its own home, in slot {own.slot}, not {slot}")
    return own


def _check_count(count: int) -> None:
    if not 1 <= count <= MAX_SHARDS:
        raise UsageError(f"a queue has 1 to {MAX_SHARDS} shards, not {count}")


def _equal_lows(count: int) -> list[int]:
    # Rounded up: (h * count) >> 32 >= i holds exactly from h = ceil(i * 2**32 / count) on.
    return [-(-i * HASH_SPACE // count) for i in range(count)]
