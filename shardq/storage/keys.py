"""Every key and channel name shardq uses in Redis. Nothing else builds one.

    <prefix>:queues                               set     names of the queues on this cluster
    <prefix>:{<queue>}:routing                    hash    version, table, settings
    <prefix>:{<queue>}:group:<group>              hash    members, leader, plan            (control)
    <prefix>:{<queue>}:schedules                  hash    what the queue sends by the clock, by name
    <prefix>:{<queue>}:bell:<group>               sharded Pub/Sub channel: the plan or the leader changed
    <prefix>:<queue>:{<tag>}:<shard>:stream       stream  the record batches
    <prefix>:<queue>:{<tag>}:<shard>:meta         hash    state, counters, producers' sequences, groups' floors
    <prefix>:<queue>:{<tag>}:<shard>:delayed      zset    messages that are not due yet, by the time they are
    <prefix>:<queue>:{<tag>}:<home>:expiring      zset    what in `timed` goes away by itself, by the time it does
    <prefix>:<queue>:{<tag>}:<home>:timed         hash    delayed batches, dedupe ids, job records
    <prefix>:<queue>:{<tag>}:<shard>:group:<group>  hash    lease, counters, progress inside batches
    <prefix>:<queue>:{<tag>}:<shard>:dead:<group>   stream  dead letters
    <prefix>:<queue>:{<tag>}:<shard>:later:<group>  zset    index of what the group handles later, in order
    <prefix>:<queue>:{<tag>}:<shard>:kept:<group>   hash    the messages it names
    <prefix>:<queue>:{<tag>}:<home>:data:<name>     any     what handlers keep there (message.local_key)
    <prefix>:<queue>:{<tag>}:<shard>:bell         sharded Pub/Sub channel: a message came, or the lease moved
    <prefix>:cast:{<channel>}                     sharded Pub/Sub channel: broadcasts, for who named the channel
    <prefix>:casts:<channel>                      ordinary Pub/Sub channel: the same, for patterns

Inside the braces stands the shard's tag alone, so that equal shards of two queues share their slot (DESIGN 3). <home>
is the shard that it descends from (core/routing.py), the shard itself where the queue was not resharded: shards of one
home share these keys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shardq.core.routing import Shard
from shardq.core.slots import key_slot
from shardq.errors import UsageError

LONGEST_CHANNEL = 256

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
    _home: str

    @property
    def is_child(self) -> bool:
        """Whether it took keys over from other shards of its home."""
        return self._base != self._home

    @property
    def delayed(self) -> str:
        return f"{self._base}:delayed"

    @property
    def expiring(self) -> str:
        return f"{self._home}:expiring"

    @property
    def timed(self) -> str:
        return f"{self._home}:timed"

    def group(self, group: str) -> str:
        return f"{self._base}:group:{group}"

    def dead(self, group: str) -> str:
        return f"{self._base}:dead:{group}"

    def later(self, group: str) -> str:
        return f"{self._base}:later:{group}"

    def kept(self, group: str) -> str:
        return f"{self._base}:kept:{group}"

    def limits(self, group: str) -> str:
        """How much each key may be handled, also after a split or merge; there only while some key has used its
        limit."""
        return f"{self._home}:limits:{group}"

    def of_group(self, group: str) -> list[str]:
        """All keys of one group on this shard."""
        return [self.group(group), self.dead(group), self.later(group), self.kept(group)]

    @property
    def scratch(self) -> str:
        """Where a stream is written anew, within one call."""
        return f"{self._base}:scratch"

    def data(self, name: str) -> str:
        """A key of the user's own, on the shard's slot."""
        return f"{self._home}:data:{name}"


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

    @property
    def schedules(self) -> str:
        return f"{self.prefix}:{{{self.queue}}}:schedules"

    def control(self, group: str) -> str:
        return f"{self.prefix}:{{{self.queue}}}:group:{group}"

    def control_bell(self, group: str) -> str:
        return f"{self.prefix}:{{{self.queue}}}:bell:{group}"

    def shard(self, shard: int, tag: str, home: int | None = None) -> ShardKeys:
        """`home` is the shard it descends from, itself where none is given; both have the tag."""
        family = f"{self.prefix}:{self.queue}:{{{tag}}}"
        base = f"{family}:{shard}"
        slot = key_slot(f"{{{tag}}}".encode())
        own_home = f"{family}:{shard if home is None else home}"
        return ShardKeys(f"{base}:stream", f"{base}:meta", f"{base}:bell", slot, base, own_home)

    def of(self, shard: Shard) -> ShardKeys:
        return self.shard(shard.id, shard.tag, shard.home_id)

    def of_every_shard(self, name: str) -> str:
        """The glob of a key or channel, `stream` or `group:billing`, of every shard of this queue. It is exact: nothing
        of a name is special in a glob, no queue's name holds the `:{` behind this one's, and the digit before the last
        part keeps out what belongs to a group of the name `stream`. (A key of the user's own, `data:7:stream`, is in.)
        """
        return f"{self.prefix}:{self.queue}:{{*}}:*[0-9]:{name}"

    @property
    def whole_queue(self) -> tuple[str, str]:
        """Globs of every key and channel of the queue."""
        return f"{self.prefix}:{{{self.queue}}}:*", f"{self.prefix}:{self.queue}:{{*}}:*"


def check_channel(kind: str, name: object) -> str:
    """Returns `name`; raises UsageError unless it is 1 to 256 printable characters. `kind` is channel or pattern."""
    if not isinstance(name, str) or not 1 <= len(name) <= LONGEST_CHANNEL or not name.isprintable():
        msg = f"{kind} {str(name)[:60]!r} is not valid: use a str of 1 to {LONGEST_CHANNEL} printable characters"
        raise UsageError(msg)
    return name


@dataclass(frozen=True, slots=True)
class CastNames:
    """Where the broadcasts of one prefix go. A channel may hold braces: the slot is that of the whole name, as Redis
    reckons it, and the names stay different for different channels, as the channel stands in them unchanged."""

    prefix: str

    def __post_init__(self) -> None:
        check_name("prefix", self.prefix)

    def exact(self, channel: str) -> str:
        """The sharded Pub/Sub channel."""
        return f"{self.prefix}:cast:{{{channel}}}"

    def exact_slot(self, channel: str) -> int:
        return key_slot(self.exact(channel).encode())

    def ordinary(self, channel: str) -> str:
        """The ordinary Pub/Sub channel; of a pattern, the pattern that matches those of the channels it means. Nothing
        of a prefix is special in a glob, and nothing stands behind for an open bracket to swallow."""
        return f"{self.prefix}:casts:{channel}"

    def channel_of(self, ordinary: str) -> str:
        """The channel whose ordinary name this is."""
        return ordinary.removeprefix(self.ordinary(""))


def registry(prefix: str) -> str:
    """The set that names every queue under `prefix`."""
    return f"{prefix}:queues"


def queue_of_key(prefix: str, key: str) -> str | None:
    """The queue that a key under `prefix` belongs to; None for one that belongs to none."""
    found = re.fullmatch(rf"{re.escape(prefix)}:(?:{{({_NAME.pattern})}}|({_NAME.pattern}):{{[^}}]*}}:[0-9]+):.+", key)
    return (found[1] or found[2]) if found is not None else None
