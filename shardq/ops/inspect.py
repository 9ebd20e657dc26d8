"""The read model: what queues, shards and groups are at one moment, for status, exporter and demo. Writes nothing.

Counts are messages unless named otherwise. A shard that can't be read (its master is away) is missing from `shards` and
named in `unreadable`: the others are shown all the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import anyio

from shardq.core.ids import entry_key
from shardq.errors import ShardqError, UsageError
from shardq.runtime.client import Client
from shardq.runtime.queue import Queue
from shardq.storage.control import control_state
from shardq.storage.counters import GroupCounters, ShardCounters, inspect
from shardq.storage.keys import ShardKeys
from shardq.storage.queues import reshard_phase

_QUEUES_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class GroupView:
    """One group on one shard.

    backlog        stored and not finished
    pel_messages   of these, delivered: in an entry of the Pending Entries List, and not finished
    waiting        of these, retries and what they hold back
    dead           all that became dead letters; `dead_letters` is what is kept of them now
    lost           dropped by a full queue before the group got it
    oldest_*_age   seconds since the oldest pending or unread entry was stored, by its node's clock; None: there is
                   none. Of what waits for a retry, the message that was put off first counts
    """

    delivered: int
    acked: int
    retried: int
    dead: int
    dead_letters: int
    replayed: int
    waiting: int
    lost: int
    backlog: int
    pel_messages: int
    pel_entries: int
    oldest_pending_age_s: float | None
    oldest_unread_age_s: float | None
    oldest_waiting_age_s: float | None
    owner: str
    held: bool
    moving: bool
    epoch: int
    renewals: str

    @property
    def oldest_age_s(self) -> float | None:
        """Seconds since the oldest entry that is not finished was stored, that of a message put off included."""
        return _oldest((self.oldest_pending_age_s, self.oldest_unread_age_s, self.oldest_waiting_age_s))


@dataclass(frozen=True, slots=True)
class ShardView:
    """One shard; `node` is the master that serves it as far as this client knows, '' while there is none. Its keys'
    hashes are from `low` to below `high`, of 2**32."""

    shard: int
    low: int
    high: int
    slot: int
    node: str
    state: str
    time_ms: int
    appended: int
    bytes: int
    delayed: int
    dropped: int
    entries: int
    groups: Mapping[str, GroupView]


@dataclass(frozen=True, slots=True)
class GroupState:
    """What a group is beyond its shards: `members` may hold workers that died a moment ago."""

    leader: str
    members: tuple[str, ...]
    rebalances: int
    paused: bool = False


@dataclass(frozen=True, slots=True)
class QueueView:
    """One queue. Its shards are not read in the same instant, but each is consistent in itself.

    reshard   a change of shards that was begun and is not done: "opening", or "sealing" when producers may wait for it
    """

    queue: str
    shards: Mapping[int, ShardView]
    groups: Mapping[str, GroupState]
    unreadable: Mapping[int, str] = field(default_factory=dict)
    reshard: str = ""

    @property
    def appended(self) -> int:
        return sum(shard.appended for shard in self.shards.values())

    @property
    def delayed(self) -> int:
        """Messages that are not due yet; they count as appended once they are."""
        return sum(shard.delayed for shard in self.shards.values())

    @property
    def dropped(self) -> int:
        return sum(shard.dropped for shard in self.shards.values())

    def total(self, group: str) -> GroupView | None:
        """The group over all shards (sums, and the oldest ages); None when no shard has it."""
        parts = [shard.groups[group] for shard in self.shards.values() if group in shard.groups]
        return _sum(parts) if parts else None


async def read_queue(
    client: Client, name: str, groups: Sequence[str] | None = None, *, timeout_s: float = 5.0
) -> QueueView:
    """Reads one queue and the groups named (default: every registered one); each shard gets `timeout_s` to answer.

    Raises UnknownQueue for a queue that does not exist, UsageError for a group that does not, StoreError when not even
    the queue's routing table can be read.
    """
    queue = await client.queue(name)
    wanted = await _groups(queue, groups, timeout_s)
    shards: dict[int, ShardView] = {}
    unreadable: dict[int, str] = {}
    states: dict[str, GroupState] = {}

    async def look(shard: int) -> None:
        try:
            counters = await inspect(client.pipes, queue.shards[shard], wanted, timeout_s=timeout_s)
            shards[shard] = shard_view(queue, shard, counters)
        except ShardqError as error:
            unreadable[shard] = str(error)

    async def look_at_group(group: str) -> None:
        try:
            state = await control_state(client.pipes, queue.keys, group, timeout_s=timeout_s)
        except ShardqError:
            return  # its members stay unknown; what is in the queue is worth more than an error
        states[group] = GroupState(state.leader, tuple(sorted(state.members)), state.rebalances, state.paused)

    reshard = ""

    async def look_at_reshard() -> None:
        nonlocal reshard
        with contextlib.suppress(ShardqError):  # it stays unknown, as above
            reshard = await reshard_phase(client.pipes, queue.keys, timeout_s=timeout_s)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look_at_reshard)
        for shard in queue.shards:
            tasks.start_soon(look, shard)
        for group in wanted:
            tasks.start_soon(look_at_group, group)
    found = dict(sorted(shards.items())), dict(sorted(states.items())), dict(sorted(unreadable.items()))
    return QueueView(name, *found, reshard)


async def read_queues(
    client: Client, names: Iterable[str], *, timeout_s: float = 5.0
) -> tuple[dict[str, QueueView], dict[str, str]]:
    """Reads several queues, each as `read_queue` does; and why, of those that can't be read at all, by their names."""
    views: dict[str, QueueView] = {}
    unreadable: dict[str, str] = {}
    limit = anyio.CapacityLimiter(_QUEUES_AT_ONCE)

    async def look(name: str) -> None:
        async with limit:
            try:
                views[name] = await read_queue(client, name, timeout_s=timeout_s)
            except ShardqError as error:
                unreadable[name] = str(error)

    async with anyio.create_task_group() as tasks:
        for name in names:
            tasks.start_soon(look, name)
    return dict(sorted(views.items())), dict(sorted(unreadable.items()))


async def read_group_names(queue: Queue, *, timeout_s: float = 5.0) -> list[str]:
    """Every registered group, of what answers: one shard of every master is asked, so that no single one has to be up.
    Raises StoreError when none answers."""
    answers, errors = await _probe(queue, timeout_s)
    if errors and not answers:
        raise errors[0]
    return sorted({group for answer in answers for group in answer})


async def _groups(queue: Queue, asked: Sequence[str] | None, timeout_s: float) -> Sequence[str]:
    """The groups to read: those asked for, if they exist, or all."""
    answers, _ = await _probe(queue, timeout_s)  # errors are said of each shard when it is read in earnest
    there = sorted({group for answer in answers for group in answer})
    if asked is None:
        return there
    if answers and (unknown := sorted(set(asked) - set(there))):
        instead = f"its groups are {', '.join(there)}" if there else "it has none yet, its first worker makes one"
        raise UsageError(f"queue {queue.name!r} has no group {unknown[0]!r}: {instead}")
    return asked


async def _probe(queue: Queue, timeout_s: float) -> tuple[list[tuple[str, ...]], list[ShardqError]]:
    """The groups that one shard of each master has, and the errors of those that don't answer."""
    client = queue.client
    probes: dict[str, ShardKeys] = {}
    for shard in queue.shards.values():
        node = client.cluster.node_of(shard.slot)
        probes.setdefault(node.name if node is not None else "", shard)
    answers: list[tuple[str, ...]] = []
    errors: list[ShardqError] = []

    async def probe(shard: ShardKeys) -> None:
        try:
            answers.append((await inspect(client.pipes, shard, (), timeout_s=timeout_s)).registered)
        except ShardqError as error:
            errors.append(error)

    async with anyio.create_task_group() as tasks:
        for shard in probes.values():
            tasks.start_soon(probe, shard)
    return answers, errors


def shard_view(queue: Queue, shard: int, counters: ShardCounters) -> ShardView:
    """One shard's counters, as `Queue.counters()` gives them, with where it lies."""
    routed = queue.table.by_id[shard]
    slot = queue.shards[shard].slot
    node = queue.client.cluster.node_of(slot)
    return ShardView(
        shard=shard,
        low=routed.low,
        high=routed.high,
        slot=slot,
        node=node.name if node is not None else "",
        state=counters.state,
        time_ms=counters.time_ms,
        appended=counters.appended,
        bytes=counters.bytes,
        delayed=counters.delayed,
        dropped=counters.dropped,
        entries=counters.entries,
        groups={name: group_view(group, counters) for name, group in sorted(counters.groups.items())},
    )


def group_view(group: GroupCounters, shard: ShardCounters) -> GroupView:
    """One group's counters on a shard. Entries that other clients wrote count from the moment they are delivered."""
    finished = group.acked + group.dead - group.replayed
    return GroupView(
        delivered=group.delivered + group.given_up,
        acked=group.acked,
        retried=group.retried,
        dead=group.dead,
        dead_letters=group.dead_letters,
        replayed=group.replayed,
        waiting=group.waiting,
        lost=group.lost + group.skip,
        backlog=shard.appended + group.foreign - group.base - finished - group.skip,
        pel_messages=max(0, group.delivered - finished - group.waiting),
        pel_entries=group.pending_entries,
        oldest_pending_age_s=_age_s(group.oldest_pending, shard.time_ms),
        oldest_unread_age_s=_age_s(group.oldest_unread, shard.time_ms),
        oldest_waiting_age_s=_age_s(group.oldest_waiting, shard.time_ms),
        owner=group.owner,
        held=group.held,
        moving=bool(group.heir),
        epoch=group.epoch,
        renewals=group.renewals,
    )


def _age_s(entry: str, now_ms: int) -> float | None:
    # An entry id never falls behind the one before it, so after a clock stepped back it may lie in the future.
    return max(0, now_ms - entry_key(entry)[0]) / 1000 if entry else None


def _oldest(ages: Iterable[float | None]) -> float | None:
    return max((age for age in ages if age is not None), default=None)


def _sum(parts: Sequence[GroupView]) -> GroupView:
    return GroupView(
        delivered=sum(part.delivered for part in parts),
        acked=sum(part.acked for part in parts),
        retried=sum(part.retried for part in parts),
        dead=sum(part.dead for part in parts),
        dead_letters=sum(part.dead_letters for part in parts),
        replayed=sum(part.replayed for part in parts),
        waiting=sum(part.waiting for part in parts),
        lost=sum(part.lost for part in parts),
        backlog=sum(part.backlog for part in parts),
        pel_messages=sum(part.pel_messages for part in parts),
        pel_entries=sum(part.pel_entries for part in parts),
        oldest_pending_age_s=_oldest(part.oldest_pending_age_s for part in parts),
        oldest_unread_age_s=_oldest(part.oldest_unread_age_s for part in parts),
        oldest_waiting_age_s=_oldest(part.oldest_waiting_age_s for part in parts),
        owner="",
        held=all(part.held for part in parts),
        moving=any(part.moving for part in parts),
        epoch=max(part.epoch for part in parts),
        renewals="",
    )
