"""Declaring a queue, joining one, changing its settings: what is asked for against what is stored, then every shard.

A declaration or change that is cut short leaves the stored settings whole and some shards without them; repeating it
completes it. Opens no groups and sends nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shardq.core.queue_settings import QueueSettings, parse
from shardq.core.routing import RoutingTable
from shardq.errors import QueueMismatch, UnknownQueue
from shardq.runtime.tasks import task_group
from shardq.storage import calls, queues
from shardq.storage.keys import Keys, ShardKeys
from shardq.storage.pipes import Pipes

_TRIES = 20


@dataclass(frozen=True, slots=True)
class Known:
    """A queue as it is stored."""

    table: RoutingTable
    settings: QueueSettings
    settings_version: int


async def declare_or_join(pipes: Pipes, keys: Keys, shards: int | None, wanted: Mapping[str, Any]) -> Known:
    """The queue, declared if it does not exist and `shards` is given.

    Raises UnknownQueue, QueueMismatch when the queue exists with other shards or settings, UsageError for settings that
    are none.
    """
    parse(wanted)
    stored = await queues.stored_queue(pipes, keys)
    if stored is None:
        if shards is None:
            msg = f"queue {keys.queue!r} does not exist: declare it with client.queue({keys.queue!r}, shards=N)"
            raise UnknownQueue(msg)
        table, settings = RoutingTable.equal(shards), QueueSettings().changed(wanted)
        stored = await queues.declare(pipes, keys, table.version, table.to_bytes(), settings.to_bytes())
    known = _known(stored)
    _check_match(keys.queue, known, shards, wanted)
    return known


async def change_settings(pipes: Pipes, keys: Keys, shards: Iterable[ShardKeys], wanted: Mapping[str, Any]) -> Known:
    """Changes the settings named in `wanted` and tells every shard. Raises UsageError, UnknownQueue."""
    known = await _put(pipes, keys, wanted)
    limits = known.settings.for_shard(len(known.table.shards))
    async with task_group() as tasks:
        for shard in shards:
            tasks.start_soon(queues.tune, pipes, shard, known.settings_version, limits)
    return known


async def open_shards(pipes: Pipes, shards: Iterable[ShardKeys], known: Known) -> None:
    """Makes every shard's keys where they are missing."""
    limits = known.settings.for_shard(len(known.table.shards))
    async with task_group() as tasks:
        for shard in shards:
            tasks.start_soon(calls.open_shard, pipes, shard, known.settings_version, limits)


async def _put(pipes: Pipes, keys: Keys, wanted: Mapping[str, Any]) -> Known:
    for _ in range(_TRIES):
        stored = await queues.stored_queue(pipes, keys)
        if stored is None:
            msg = (
                f"queue {keys.queue!r} does not exist any more: declare it with client.queue({keys.queue!r}, shards=N)"
            )
            raise UnknownQueue(msg)
        known = _known(stored)
        settings = known.settings.changed(wanted)
        version = await queues.put_settings(pipes, keys, known.settings_version, settings.to_bytes(stored.settings))
        if version is not None:
            return Known(known.table, settings, version)
    msg = f"the settings of queue {keys.queue!r} are being changed by others all the time: try again later"
    raise QueueMismatch(msg)


def _known(stored: queues.Declared) -> Known:
    table, settings = RoutingTable.from_bytes(stored.table), QueueSettings.from_bytes(stored.settings)
    return Known(table, settings, stored.settings_version)


def _check_match(name: str, known: Known, shards: int | None, wanted: Mapping[str, Any]) -> None:
    if shards is not None and len(known.table.shards) != shards:
        msg = f"queue {name!r} has {len(known.table.shards)} shards, not {shards}: join it with client.queue({name!r})"
        raise QueueMismatch(msg)
    difference = known.settings.difference(wanted)
    if difference:
        msg = (
            f"queue {name!r} has {difference}: join it without naming that, or change it for everybody with "
            f"`await queue.change(...)` or `shardq queue change {name}`"
        )
        raise QueueMismatch(msg)
