"""Every key and channel name shardq uses in Redis. Nothing else builds one.

    <prefix>:queues                               set     names of the queues on this cluster
    <prefix>:{<queue>}:routing                    hash    version, table
    <prefix>:{<queue>}:group:<group>              hash    members, leader, plan            (control)
    <prefix>:{<queue>}:bell:<group>               sharded Pub/Sub channel: the plan or the leader changed
    <prefix>:<queue>:{<tag>}:<shard>:stream       stream  the record batches
    <prefix>:<queue>:{<tag>}:<shard>:meta         hash    state, counters, producers' sequences, groups' floors
    <prefix>:<queue>:{<tag>}:<shard>:group:<group>  hash    lease, counters, progress inside batches
    <prefix>:<queue>:{<tag>}:<shard>:dead:<group>   stream  dead letters
    <prefix>:<queue>:{<tag>}:<shard>:bell         sharded Pub/Sub channel: a message came, or the lease moved

Inside the braces stands the shard's tag alone, so that equal shards of two queues share their slot (DESIGN 3).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shardq.core.slots import key_slot
from shardq.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def check_name(kind: str, name: str) -> str:
    """Returns `name`; raises UsageError unless it fits [A-Za-z0-9_.-]{1,64}."""
    if not _NAME.fullmatch(str(name)):
        msg = f"{kind} name {name!r} is not valid: use 1 to 64 of the characters A-Z a-z 0-9 _ . -"
        raise UsageError(msg)
    return name


@dataclass(frozen=True, slots=True)
class ShardKeys:
    """Names of one shard's keys; `slot` is the hash slot of all of them."""

    stream: str
    meta: str
    bell: str
    slot: int
    _base: str

    def group(self, group: str) -> str:
        return f"{self._base}:group:{group}"

    def dead(self, group: str) -> str:
        return f"{self._base}:dead:{group}"


@dataclass(frozen=True, slots=True)
class Keys:
    """Names of one queue's keys under one prefix."""

    prefix: str
    queue: str

    def __post_init__(self) -> None:
        check_name("prefix", self.prefix)
        check_name("queue", self.queue)

    @property
    def routing(self) -> str:
        return f"{self.prefix}:{{{self.queue}}}:routing"

    @property
    def control_slot(self) -> int:
        return key_slot(self.routing.encode())

    def control(self, group: str) -> str:
        return f"{self.prefix}:{{{self.queue}}}:group:{group}"

    def control_bell(self, group: str) -> str:
        return f"{self.prefix}:{{{self.queue}}}:bell:{group}"

    def shard(self, shard: int, tag: str) -> ShardKeys:
        base = f"{self.prefix}:{self.queue}:{{{tag}}}:{shard}"
        return ShardKeys(f"{base}:stream", f"{base}:meta", f"{base}:bell", key_slot(f"{{{tag}}}".encode()), base)


def registry(prefix: str) -> str:
    """The set that names every queue under `prefix`."""
    return f"{prefix}:queues"
