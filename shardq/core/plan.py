"""The plan: which worker should own each shard, and who stands by for it. Pure data and its bytes; decides nothing
(core/assignment.py does)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from shardq.core.assignment import assign, standby
from shardq.errors import CorruptData


@dataclass(frozen=True, slots=True)
class Plan:
    """`owners` and `standby` map shard ids to worker names; a shard that nobody is there for is in neither."""

    owners: Mapping[int, str] = field(default_factory=dict)
    standby: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def make(cls, shards: Iterable[int], members: Iterable[str], before: Plan, retired: Collection[int] = ()) -> Plan:
        """The plan that follows `before` for these members: balanced, sticky, fewest moves.

        retired   those of `shards` that take no messages any more: balanced by themselves, for with little to do they
                  are no match for the others
        """
        members, old = list(members), set(retired)
        owners: dict[int, str] = {}
        heirs: dict[int, str] = {}
        for kind in _parted(shards, old):
            own = assign(kind, members, before.owners)
            owners |= own
            heirs |= standby(own, members)
        return cls(dict(sorted(owners.items())), dict(sorted(heirs.items())))

    def to_bytes(self) -> bytes:
        """Equal plans give equal bytes."""
        return msgspec.msgpack.encode([sorted(self.owners.items()), sorted(self.standby.items())])

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """Raises CorruptData."""
        try:
            owners, others = msgspec.msgpack.decode(data, type=tuple[list[tuple[int, str]], list[tuple[int, str]]])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            msg = f"a plan does not decode: {error}"
            raise CorruptData(msg) from error
        return cls(dict(owners), dict(others))


def _parted(shards: Iterable[int], old: Collection[int]) -> list[Iterable[int]]:
    if not old:
        return [shards]
    shards = list(shards)
    return [[shard for shard in shards if shard not in old], [shard for shard in shards if shard in old]]
