"""Reads one queue twice for its checks. Every call has a time limit; what can't be read is left out or named, and only
a queue whose routing table can't be read raises.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import anyio

from shardq.core.findings import Finding
from shardq.core.hot import KeySample
from shardq.errors import ShardqError, StoreUnavailable
from shardq.ops.doctor.facts import HotShard, Limits, QueueFacts, Stray
from shardq.ops.doctor.queues import hot_between
from shardq.ops.inspect import QueueView, read_queue
from shardq.runtime.autosplit import newest_keys
from shardq.runtime.client import Client
from shardq.runtime.queue import Queue
from shardq.storage.cluster import Cluster
from shardq.storage.commands import pack_command
from shardq.storage.control import Member, control_state
from shardq.storage.keys import Keys, ShardKeys, queue_of_key
from shardq.storage.node_facts import is_denied, keys_under
from shardq.storage.queues import stored_queue
from shardq.storage.reply import shape
from shardq.storage.trouble import Trouble

CALL_S, CALL_WHEN_AWAY_S = 3.0, 1.0  # a master that is known to be away is not waited for at every step
ROUTING_S = 6.0
_INSPECTS = "+fcall +hmget +hget +xlen +xrange +xpending +zcard"  # and what the function itself calls
OWNER = "owner"  # the consumer's name in every group of ours (scripts/step.lua)
_GONE = "is gone"  # so a shard whose keys are not there says (storage/calls.py); others are away with their master

Members = dict[str, dict[str, Member]]


@dataclass(slots=True)
class Look:
    """A queue at one moment; what is None could not be read."""

    queue: Queue
    view: QueueView
    members: Members
    call_s: float
    plan: bytes = b""
    sealing: bool = False
    denied: set[str] = field(default_factory=set)


async def look(client: Client, name: str, call_s: float = CALL_S) -> Look:
    """One look. Raises ShardqError when the routing table can't be read, UnknownQueue when there is none."""
    try:
        with anyio.fail_after(ROUTING_S):
            queue = await client.queue(name)
    except TimeoutError:
        node = client.cluster.node_of(Keys(client.prefix, name).control_slot)
        raise StoreUnavailable(
            f"its routing table can't be read: {node.name if node else 'its master'} is away"
        ) from None
    view = await read_queue(client, name, timeout_s=call_s)
    found = Look(queue, view, {}, call_s)
    await _look_at_plan(client, found)
    if any("NOPERM" in why for why in view.unreadable.values()):
        found.denied.add(f"{_INSPECTS} ~{client.prefix}:*")
    groups = sorted({group for shard in view.shards.values() for group in shard.groups})

    async def look_at_members(group: str) -> None:
        try:
            state = await control_state(client.pipes, queue.keys, group, timeout_s=call_s)
            found.members[group] = state.members
        except ShardqError as error:
            if is_denied(error):
                found.denied.add(f"+hgetall ~{client.prefix}:*")

    async with anyio.create_task_group() as tasks:
        for group in groups:
            tasks.start_soon(look_at_members, group)
    return found


async def _look_at_plan(client: Client, found: Look) -> None:
    with contextlib.suppress(ShardqError):  # the table was read: this is seldom refused, and said of the queue then
        stored = await stored_queue(client.pipes, found.queue.keys)
        if stored is not None:
            found.plan, found.sealing = stored.reshard, stored.committed


async def look_again(client: Client, earlier: Look, over_s: float, limits: Limits, user: str) -> QueueFacts:
    """The second look, and what is asked only once. Raises like `look`."""
    later = await look(client, earlier.queue.name, earlier.call_s)
    queue, groups = later.queue, sorted(later.members)
    masters = len(client.cluster.primaries())
    facts = QueueFacts(
        queue.name, queue.settings, len(queue.table.shards), masters, earlier.view, later.view, over_s, user=user
    )
    members = {group: (earlier.members.get(group, {}), later.members[group]) for group in groups}
    denied = earlier.denied | later.denied
    missing = await _missing_keys(client, queue, later.view, denied)
    strays, foreign = await _strays(client, queue, later.view, denied)
    hot = [await _with_keys(queue, shard) for shard in hot_between(earlier.view, later.view, limits)]
    return replace(
        facts,
        members=members,
        missing=missing,
        strays=strays,
        foreign_groups=foreign,
        hot=hot,
        reshard=("sealing" if later.sealing else "opening") if later.plan and later.plan == earlier.plan else "",
        denied=frozenset(denied),
    )


async def _missing_keys(client: Client, queue: Queue, view: QueueView, denied: set[str]) -> Mapping[int, Sequence[str]]:
    missing: dict[int, list[str]] = {}

    async def look_at(shard: int, keys: ShardKeys) -> None:
        wanted = [keys.stream, keys.meta, keys.delayed, keys.expiring, keys.timed]
        for group in view.shards[shard].groups if shard in view.shards else ():
            wanted += keys.of_group(group)
        try:
            replies = await _commands(client, keys.slot, [("EXISTS", key) for key in wanted])
        except ShardqError as error:
            if is_denied(error):
                denied.add(f"+exists ~{client.prefix}:*")
            return  # said of the shard already
        gone = [key for key, there in zip(wanted, replies, strict=True) if there == 0]
        if gone:
            missing[shard] = gone

    async with anyio.create_task_group() as tasks:
        for shard, keys in queue.shards.items():
            if shard in view.shards or _GONE in view.unreadable.get(shard, ""):
                tasks.start_soon(look_at, shard, keys)
    return dict(sorted(missing.items()))


async def _commands(client: Client, slot: int, commands: Sequence[Sequence[str]]) -> list[object]:
    return [await client.pipes.command(slot, pack_command(*words), timeout_s=CALL_S) for words in commands]


async def _strays(
    client: Client, queue: Queue, view: QueueView, denied: set[str]
) -> tuple[list[Stray], list[tuple[int, str]]]:
    """Consumers in our groups that are not ours, and groups of the streams that are not ours."""
    strays: list[Stray] = []
    foreign: list[tuple[int, str]] = []

    async def look_at(shard: int) -> None:
        keys, ours = queue.shards[shard], view.shards[shard].groups
        try:
            for group in await _named(client, keys, "GROUPS", keys.stream):
                name = group["name"]
                if name not in ours:
                    foreign.append((shard, name))
                    continue
                consumers = await _named(client, keys, "CONSUMERS", keys.stream, name)
                others = [(each["name"], int(each["pending"])) for each in consumers if each["name"] != OWNER]
                strays.extend(Stray(shard, name, consumer, pending) for consumer, pending in others)
        except ShardqError as error:
            if is_denied(error):
                denied.add(f"+xinfo ~{client.prefix}:*")

    async with anyio.create_task_group() as tasks:
        for shard in view.shards:
            tasks.start_soon(look_at, shard)
    return sorted(strays, key=lambda each: (each.shard, each.group, each.consumer)), sorted(foreign)


async def _named(client: Client, keys: ShardKeys, *words: str) -> list[dict[str, str]]:
    """The rows of XINFO GROUPS or CONSUMERS, by their fields' names."""
    rows = await client.pipes.command(keys.slot, pack_command("XINFO", *words), timeout_s=CALL_S)
    with shape("XINFO"):
        texts = [[_text(each) for each in row] for row in rows]
        named = [dict(zip(row[::2], row[1::2], strict=True)) for row in texts]
        return [{"name": row["name"], "pending": row["pending"]} for row in named]


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


async def _with_keys(queue: Queue, shard: HotShard) -> HotShard:
    """With the keys of its newest messages, where they can be read in time."""
    with anyio.move_on_after(CALL_S):
        try:
            newest = await newest_keys(queue, shard.shard, CALL_S / 3)
        except ShardqError:
            return shard
        routed = queue.table.by_id[shard.shard]
        return replace(shard, keys=KeySample.of(newest, routed.low, routed.high))
    return shard


async def orphans(
    cluster: Cluster, masters: Sequence[str], prefix: str, known: Sequence[str], limits: Limits
) -> list[Finding]:
    """Keys under the prefix that belong to no queue that is there (--deep)."""
    found: Counter[str] = Counter()
    findings = []
    for master in masters:
        answer = await keys_under(cluster, master, prefix, limits.orphans)
        if isinstance(answer, Trouble):
            what = "its keys could not be looked through"
            findings.append(Finding("unknown", "orphans.unknown", master, what, "this takes +scan, and the node"))
            continue
        keys, whole = answer
        found.update(queue for key in keys if (queue := queue_of_key(prefix, key)) is not None and queue not in known)
        if not whole:
            what = f"has more than {limits.orphans} keys under {prefix}: the others were not looked at"
            findings.append(
                Finding("unknown", "orphans.unknown", master, what, "give the queues a prefix of their own")
            )
    for queue, count in sorted(found.items()):
        what = f"{count} keys under {prefix} are of no queue that is there"
        do = "left by handlers (message.local_key) or a deletion that was cut short: UNLINK them if nothing reads them"
        findings.append(Finding("advice", "orphans.keys", queue, what, do))
    if masters and not findings:
        findings.append(Finding("ok", "orphans.ok", "cluster", f"no keys of deleted queues under {prefix}"))
    return findings
