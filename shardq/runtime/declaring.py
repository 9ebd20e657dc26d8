"""Declaring a queue, joining one, changing its settings: what is asked for against what is stored, then every shard.

A declaration or change that is cut short leaves the stored settings whole and some shards without them; repeating it
completes it. Opens no groups and sends nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardq.core.queue_settings import QueueSettings, parse
from shardq.core.routing import RoutingTable, Shard
from shardq.errors import QueueMismatch, UnknownQueue
from shardq.runtime.tasks import task_group
from shardq.storage import calls, queues
from shardq.storage.keys import Keys
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


async def change_settings(pipes: Pipes, keys: Keys, wanted: Mapping[str, Any]) -> Known:
    """Changes the settings named in `wanted` and tells every shard. Raises UsageError, UnknownQueue."""
    known = await _put(pipes, keys, wanted)

    async def tune(shard: Shard) -> None:
        limits = known.settings.for_range(shard.low, shard.high)
        try:
            await queues.tune(pipes, keys.of(shard), known.settings_version, limits)
        except UnknownQueue:
            if shard.id not in known.table.retired_by_id:  # a retired one may be gone by now
                raise

    async with task_group() as tasks:
        for shard in known.table.by_id.values():
            tasks.start_soon(tune, shard)
    return known


async def open_shards(pipes: Pipes, keys: Keys, known: Known) -> None:
    """Makes every active shard's keys where they are missing."""
    async with task_group() as tasks:
        for shard in known.table.shards:
            limits = known.settings.for_range(shard.low, shard.high)
            tasks.start_soon(calls.open_shard, pipes, keys.of(shard), known.settings_version, limits)


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
    now, declared = len(known.table.shards), len(known.table.homes)
    if shards is not None and shards not in (now, declared):  # code that declares it goes on after a reshard
        has = f"{now} shards" if now == declared else f"{now} shards (it was declared with {declared})"
        msg = (
            f"queue {name!r} has {has}, not {shards}: join it with client.queue({name!r}), or change their number with "
            f"`shardq queue scale {name} --shards {shards}`"
        )
        raise QueueMismatch(msg)
    difference = known.settings.difference(wanted)
    if difference:
        msg = (
            f"queue {name!r} has {difference}: join it without naming that, or change it for everybody with "
            f"`await queue.change(...)` or `shardq queue change {name}`"
        )
        raise QueueMismatch(msg)
