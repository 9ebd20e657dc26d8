"""The plan: which worker should own each shard, and who stands by for it. Pure data and its bytes; decides nothing
(core/assignment.py does)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    def make(cls, shards: Iterable[int], members: Iterable[str], before: Plan) -> Plan:
        """The plan that follows `before` for these members: balanced, sticky, fewest moves."""
        members = list(members)
        owners = assign(shards, members, before.owners)
        return cls(owners, standby(owners, members))

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
