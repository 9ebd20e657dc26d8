"""Setting, removing and listing the schedules of a queue. Sends no tick (runtime/scheduler.py does).

A schedule whose key changes moves to another shard, and must send no tick from both. So, in this order: the old shard
is closed to it, for longer than any leader goes by a definition it read; the new shard learns the last tick sent; the
definition changes. Whoever is cut off in between leaves a schedule that sends nothing for that long; then its leader
undoes the move. A definition changes only from the very one that was seen, which its `turn` sets apart from all before.
"""

from __future__ import annotations

import time
from typing import Any

import anyio
import msgspec

from shardq.core import records
from shardq.core.hashing import key_hash
from shardq.core.records import Headers, Key
from shardq.core.routing import RoutingTable
from shardq.core.schedule import MISSED, Missed, Schedule
from shardq.errors import CorruptData, InvalidValue, MessageTooLarge, StoreRefused, UsageError
from shardq.runtime.cron import Cron
from shardq.runtime.reshard import read_table
from shardq.storage import schedules
from shardq.storage.commands import Confirm
from shardq.storage.keys import Keys, ShardKeys, check_name
from shardq.storage.pipes import Pipes

MAX_BYTES = 64 * 1024
CLOSED_FOR_S = 60  # far longer than a leader goes by what it read (scheduler.py), and than clocks should differ
TRIES = 50
SEALED_PAUSE_S = 0.1
OWN_HEADERS = "shardq-"


def make_schedule(
    name: str,
    cron: str,
    *,
    key: Key = None,
    value: Any = None,
    headers: Headers | None = None,
    timezone: str = "UTC",
    missed: Missed = "last",
) -> Schedule:
    """A schedule that can be set. Raises UsageError, InvalidKey, InvalidValue or MessageTooLarge."""
    check_name("schedule", name)
    if missed not in MISSED:
        msg = f"missed={missed!r} is not one of {', '.join(map(repr, MISSED))}"
        raise UsageError(msg)
    if Cron(cron, timezone).after(int(time.time())) is None:
        msg = f"{cron!r} names no moment of the next 50 years: the schedule would never send"
        raise UsageError(msg)
    if key is not None:
        key_hash(key)
    schedule = Schedule(
        name=str(name),
        cron=cron,
        timezone=timezone,
        key=key,
        value=_carried(value),
        headers=_checked(headers),
        missed=missed,
    )
    size = len(schedule.to_bytes())
    if size > MAX_BYTES:
        msg = f"a schedule of {size} bytes is larger than {MAX_BYTES}: store the value elsewhere and send a reference"
        raise MessageTooLarge(msg)
    return schedule


def _carried(value: Any) -> Any:
    """The value as a handler will see it."""
    packed = records.pack_value(value)
    return packed if isinstance(packed, str | bytes) else msgspec.msgpack.decode(packed)


def _checked(headers: Headers | None) -> dict[str, str | bytes] | None:
    if headers is None:
        return None
    own = [name for name in records.check_headers(headers) if name.startswith(OWN_HEADERS)]
    if own:
        msg = f"header {own[0]!r}: names that begin with {OWN_HEADERS!r} are for shardq's own"
        raise InvalidValue(msg)
    return dict(headers)


def home(keys: Keys, table: RoutingTable, schedule: Schedule) -> ShardKeys:
    """The shard that its messages go to."""
    shard = schedule.shard_in(table)
    return keys.of(shard)


async def put(pipes: Pipes, keys: Keys, table: RoutingTable, schedule: Schedule, confirm: Confirm | None) -> Schedule:
    """Sets a schedule and returns it as it stands; one that stands already is left alone."""
    to = home(keys, table, schedule)
    for _ in range(TRIES):
        seen = await schedules.read_one(pipes, keys, schedule.name)
        before = _known(schedule.name, seen)
        wanted = schedule.over(before, int(time.time() * 1000))
        if wanted.to_bytes() == seen:
            return wanted
        come_from = home(keys, table, before) if before is not None else None
        if come_from != to:
            last_s: int | None = 0
            if come_from is not None:
                last_s = await schedules.close_ticks(pipes, come_from, schedule.name, _closed_until(), confirm)
            if last_s is None or not await schedules.open_ticks(pipes, to, schedule.name, last_s, confirm):
                table = await _newer(pipes, keys)
                to = home(keys, table, schedule)
                continue
        newest = await read_table(pipes, keys)
        if newest != table:  # what lay on one shard lies on two by now, perhaps
            table, to = newest, home(keys, newest, schedule)
            continue
        if await schedules.swap(pipes, keys, schedule.name, seen, wanted.to_bytes(), confirm):
            return wanted
    raise _contested(schedule.name)


async def remove(pipes: Pipes, keys: Keys, table: RoutingTable, name: str, confirm: Confirm | None) -> bool:
    """Removes a schedule; false when there is none. When this returned, it sends nothing any more."""
    check_name("schedule", name)
    for _ in range(TRIES):
        seen = await schedules.read_one(pipes, keys, name)
        if not seen:
            return False
        before = _known(name, seen)
        if before is not None:
            shard = home(keys, table, before)
            if await schedules.close_ticks(pipes, shard, name, _closed_until(), confirm) is None:
                table = await _newer(pipes, keys)
                continue
        if await schedules.swap(pipes, keys, name, seen, b"", confirm):
            return True
    raise _contested(name)


async def _newer(pipes: Pipes, keys: Keys) -> RoutingTable:
    """A shard was sealed: the table that says who took its keys over, once it is published."""
    await anyio.sleep(SEALED_PAUSE_S)
    return await read_table(pipes, keys)


async def read(pipes: Pipes, keys: Keys) -> list[Schedule]:
    """Every schedule of the queue, by name. Raises CorruptData."""
    _, stored = await schedules.read_all(pipes, keys)
    return [Schedule.from_bytes(name, stored[name]) for name in sorted(stored)]


def _known(name: str, stored: bytes) -> Schedule | None:
    """None also for what can't be read: set or removed again, it is mended."""
    try:
        return Schedule.from_bytes(name, stored) if stored else None
    except CorruptData:
        return None


def _closed_until() -> int:
    return int(time.time()) + CLOSED_FOR_S


def _contested(name: str) -> StoreRefused:
    return StoreRefused(f"schedule {name!r} was changed by others each of {TRIES} times: set it from one place")
