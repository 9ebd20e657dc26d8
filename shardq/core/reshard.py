"""Plans for changing the number of shards while the queue is in use: which shards go, which take their place. Pure:
what is done in Redis, and in which order, is runtime/reshard.py's.

A split or merge is in place: children keep the slot of the shard they descend from (their home), so that all it has to
move lies in one slot. It spreads workers, not Redis.

Invariants: a plan's table covers the hash space like the one before it. Parents and children cover the same hashes; a
child has keys of parents of its own home only. What a plan does not name stays as it is.

Wire format of a plan: byte 0x01, then msgpack `[[id of a parent, ...], the routing table that follows]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Self

import msgspec

from shardq.core.routing import MAX_SHARDS, RetiredShard, RoutingTable, Shard
from shardq.errors import CorruptData, UsageError

_FORMAT = b"\x01"
_Ids = Annotated[list[int], msgspec.Meta(min_length=1, max_length=MAX_SHARDS)]
_DECODER = msgspec.msgpack.Decoder(tuple[_Ids, bytes])

Range = tuple[int, int]


@dataclass(frozen=True)
class Reshard:
    """One change of shards: the ids of those that are sealed, and the table that follows, in which they are retired.

    Raises UsageError when these do not belong together.
    """

    parents: tuple[int, ...]
    table: RoutingTable

    def __post_init__(self) -> None:
        if not self.parents or len(set(self.parents)) != len(self.parents):
            raise UsageError("a reshard names the shards it seals, each once")
        if missing := [parent for parent in self.parents if parent not in self.table.retired_by_id]:
            raise UsageError(f"shard {missing[0]} is to be sealed, but its table has it not among the retired ones")
        active = {shard.id for shard in self.table.shards}
        if any(child not in active for parent in self.parents for child in self.children_of(parent)):
            raise UsageError("a child of the reshard is not among the active shards of its table")

    @property
    def version(self) -> int:
        """The version of the table that it was planned on."""
        return self.table.version - 1

    @cached_property
    def children(self) -> tuple[Shard, ...]:
        """The new shards, by range."""
        new = {child for parent in self.parents for child in self.children_of(parent)}
        return tuple(shard for shard in self.table.shards if shard.id in new)

    def children_of(self, parent: int) -> tuple[int, ...]:
        """The new shards that take over keys of a parent."""
        return self.table.retired_by_id[parent].children

    def parents_of(self, child: int) -> tuple[int, ...]:
        """The sealed shards that a new one takes keys over from."""
        return tuple(parent for parent in self.parents if child in self.children_of(parent))

    def given_up(self) -> RoutingTable:
        """The table that follows instead when nothing was sealed yet: the old shards, and the ids of the new ones are
        never given again."""
        parents = [self.table.by_id[parent] for parent in self.parents]
        new = {child.id for child in self.children}
        kept = [shard for shard in self.table.shards if shard.id not in new]
        retired = tuple(each for each in self.table.retired if each.shard.id not in set(self.parents))
        removed = (*self.table.removed, *((child.id, child.home_id) for child in self.children))
        return RoutingTable(self.table.version, (*kept, *parents), retired, removed)

    def to_bytes(self) -> bytes:
        """The plan as it is stored; equal plans give equal bytes."""
        return _FORMAT + msgspec.msgpack.encode((self.parents, self.table.to_bytes()))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The plan stored as `data`. Raises CorruptData."""
        if data[:1] != _FORMAT:
            raise CorruptData(
                f"the plan of a reshard starts with {data[:1]!r}, this version reads format {_FORMAT!r}: "
                "a newer shardq may have written it (upgrade this one), or the key was overwritten"
            )
        try:
            parents, table = _DECODER.decode(memoryview(data)[1:])
            plan = cls(tuple(parents), RoutingTable.from_bytes(table))
            plan.given_up()  # raises where the new shards do not take over exactly what the sealed ones had
        except (msgspec.DecodeError, UsageError) as error:
            raise CorruptData(f"the stored plan of a reshard is damaged: {error}") from error
        return plan


# -- plans -------------------------------------------------------------------------------------------------------------


def split(table: RoutingTable, shard: int, into: int = 2) -> Reshard:
    """Cuts one active shard into equal ranges. Raises UsageError with the reason where that can't be."""
    own = _active(table, shard)
    if into < 2:
        raise UsageError(f"a shard is split into 2 or more, not {into}")
    return _follow(table, [own.id], {own.home_id: _cut(own.low, own.high, into)})


def split_all(table: RoutingTable, into: int = 2) -> Reshard:
    """Cuts every active shard into equal ranges. Raises UsageError as `split`."""
    if into < 2:
        raise UsageError(f"a shard is split into 2 or more, not {into}")
    ranges = {
        home: [piece for own in shards for piece in _cut(own.low, own.high, into)]
        for home, shards in table.homes.items()
    }
    return _follow(table, [shard.id for shard in table.shards], ranges)


def merge(table: RoutingTable, shards: Iterable[int]) -> Reshard:
    """Makes one of several active shards that lie side by side in one home. Raises UsageError with the reason where
    that can't be."""
    own = sorted((_active(table, shard) for shard in set(shards)), key=lambda each: each.low)
    if len(own) < 2:
        raise UsageError("a merge takes two or more shards")
    for left, right in pairwise(own):
        if left.home_id != right.home_id:
            raise UsageError(
                f"shards {left.id} and {right.id} can't be merged: they lie in different hash slots, {left.slot} and "
                f"{right.slot}; only what a split made of one shard can become one again"
            )
        if left.high != right.low:
            raise UsageError(f"shards {left.id} and {right.id} can't be merged: their ranges do not touch")
    return _follow(table, [each.id for each in own], {own[0].home_id: [(own[0].low, own[-1].high)]})


def scale(table: RoutingTable, count: int) -> Reshard | None:
    """Brings the queue to `count` active shards, as even as its homes allow; None when it is like that already. Shards
    whose range stays are kept. Raises UsageError for a number that can't be."""
    homes = table.homes
    if not len(homes) <= count <= MAX_SHARDS:
        raise UsageError(
            f"the queue can have {len(homes)} to {MAX_SHARDS} shards, not {count}: it was declared with {len(homes)}, "
            "and shards that were declared apart lie in different hash slots and can't be merged"
        )
    parents: list[int] = []
    ranges: dict[int, list[Range]] = {}
    for index, (home, shards) in enumerate(homes.items()):
        share = (index + 1) * count // len(homes) - index * count // len(homes)
        wanted = _cut(shards[0].low, shards[-1].high, share)
        kept = {(shard.low, shard.high) for shard in shards} & set(wanted)
        parents += [shard.id for shard in shards if (shard.low, shard.high) not in kept]
        ranges[home] = [piece for piece in wanted if piece not in kept]
    return _follow(table, parents, ranges) if parents else None


def _active(table: RoutingTable, shard: int) -> Shard:
    if shard in table.retired_by_id:
        raise UsageError(f"shard {shard} is retired already: its keys went to other shards")
    if shard not in table.by_id:
        raise UsageError(f"there is no shard {shard}: see `shardq queue show`")
    return table.by_id[shard]


def _cut(low: int, high: int, into: int) -> list[Range]:
    if high - low < into:
        raise UsageError(f"the hashes from {low} to {high} can't be cut into {into} ranges")
    return list(pairwise(low + (high - low) * index // into for index in range(into + 1)))


def _follow(table: RoutingTable, parents: Sequence[int], ranges: dict[int, list[Range]]) -> Reshard:
    """The plan in which the parents make way for these ranges of their homes."""
    pieces = sorted((low, high, home) for home, own in ranges.items() for low, high in own)
    slots = {home: shards[0].slot for home, shards in table.homes.items()}
    first = table.next_id
    children = [Shard(first + n, low, high, home, slots[home]) for n, (low, high, home) in enumerate(pieces)]
    of_home: dict[int, list[Shard]] = {}
    for child in children:
        of_home.setdefault(child.home_id, []).append(child)
    gone = set(parents)
    kept = [shard for shard in table.shards if shard.id not in gone]
    retired = [_retire(table.by_id[parent], of_home) for parent in parents]
    after = RoutingTable(table.version + 1, (*kept, *children), (*table.retired, *retired), table.removed)
    return Reshard(tuple(parents), after)


def _retire(own: Shard, of_home: Mapping[int, Sequence[Shard]]) -> RetiredShard:
    return RetiredShard(own, tuple(child.id for child in of_home[own.home_id] if child.overlaps(own)))
