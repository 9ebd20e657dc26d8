"""What the checks know: the limits they hold things to, and one queue as it was read twice. Reads nothing itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shardq.core.hot import FACTOR, LEAST_BYTES_PER_S, LEAST_PER_S, KeySample
from shardq.core.queue_settings import QueueSettings
from shardq.ops.inspect import QueueView
from shardq.storage.control import Member

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """From where on something is worth saying.

    clock_s             a node's clock apart from this machine's
    old_pending_s       age of a message that was delivered and is not finished
    memory, memory_full used of maxmemory; clients of maxclients likewise
    backlog_bytes       least repl-backlog-size
    fragmented_bytes    memory that the allocator holds and nobody uses, beyond half as much again
    hot_factor          a shard's rate, beside the median of the queue's shards
    hot_per_s, hot_bytes_per_s   a rate below is never called hot
    slow_s              how long a slow call is spoken of
    orphans             keys that are looked at on each master
    """

    clock_s: float = 1.0
    old_pending_s: float = 600.0
    memory: float = 0.8
    memory_full: float = 0.95
    backlog_bytes: int = 64 * MIB
    fragmented_bytes: int = 256 * MIB
    hot_factor: float = FACTOR
    hot_per_s: float = LEAST_PER_S
    hot_bytes_per_s: float = LEAST_BYTES_PER_S
    slow_s: int = 3600
    orphans: int = 100_000


@dataclass(frozen=True, slots=True)
class Stray:
    """A consumer of one of our groups that shardq did not make; `pending` entries are given to it."""

    shard: int
    group: str
    consumer: str
    pending: int


@dataclass(frozen=True, slots=True)
class HotShard:
    """A shard that gets far more than the others, in words, the keys of its newest messages (None: they could not be
    read), and the groups whose backlog grew there between the two looks."""

    shard: int
    text: str
    keys: KeySample | None = None
    falls_behind: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class QueueFacts:
    """One queue, read twice with `over_s` seconds in between.

    shards, masters  how many it has, and over how many masters with slots they could spread
    members          of each group, before and after
    reshard          a reshard that was under way in both looks: "opening", or "sealing" when producers wait for it
    missing          keys that are not there, by shard; `denied` are rights that were missing on the way
    """

    name: str
    settings: QueueSettings
    shards: int
    masters: int
    before: QueueView
    after: QueueView
    over_s: float
    members: Mapping[str, tuple[Mapping[str, Member], Mapping[str, Member]]] = field(default_factory=dict)
    missing: Mapping[int, Sequence[str]] = field(default_factory=dict)
    strays: Sequence[Stray] = ()
    foreign_groups: Sequence[tuple[int, str]] = ()
    hot: Sequence[HotShard] = ()
    denied: frozenset[str] = frozenset()
    user: str = ""
    reshard: str = ""

    def alive(self, group: str) -> dict[str, Member]:
        """Members that beat in between, or came; coordinators too."""
        before, after = self.members.get(group, ({}, {}))
        return {name: member for name, member in after.items() if _moved(before.get(name), member)}

    def paused_groups(self) -> set[str]:
        return {name for name, state in self.after.groups.items() if state.paused}

    def workers(self, group: str) -> list[str]:
        """Of the members that are alive, those that take shards."""
        return sorted(name for name, member in self.alive(group).items() if not member.leaving)


def _moved(before: Member | None, after: Member) -> bool:
    return before is None or (before.nonce, before.beats) != (after.nonce, after.beats)
