"""What the leader of a group does for its queue's shards, beside its plans: it notices another routing table, completes
a reshard that nobody carries on, and removes retired shards that are through. Begins no reshard and gives none up.

Every leader of the queue does this, whatever its group: each step of a reshard is safe to repeat, also by several at
once (runtime/reshard.py). Within one process it is done once at a time for each queue. It has a task of its own:
whatever it waits for holds up neither heartbeats nor plans.

A worker's or coordinator's user need not have the right to it; then it is said once of each plan, and once of retired
shards, with what gives it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import monotonic
from weakref import WeakKeyDictionary

import anyio

from shardq.errors import ShardqError, StoreRefused
from shardq.runtime import reshard
from shardq.runtime.outages import Outages
from shardq.runtime.table import TableFollower
from shardq.storage.cluster import Cluster
from shardq.storage.keys import Keys
from shardq.storage.pipes import Pipes
from shardq.storage.queues import read_changes

LOOK_EVERY_S = 1.0
UNFINISHED_S = 1.0  # whoever began a reshard is done by then, or is slow, or died: that it is carried on twice is safe
LOOK_AFTER_EVERY_S = 15.0
REFUSED_S = 60.0

CANT_COMPLETE = (
    "a reshard was left unfinished, sends to shards that it has sealed wait, and this leader may not complete it"
)
CANT_REMOVE = "this leader may not remove retired shards, so they stay for now"
DO = (
    "Repeat the command that began it, or `shardq queue scale`, with an operator's rights; or give workers "
    "(coordinators) the right to"
)

Pause = Callable[[float], Awaitable[None]]
"""Waits for about so many seconds."""

_log = logging.getLogger("shardq")
_under_way: WeakKeyDictionary[Cluster, set[str]] = WeakKeyDictionary()


@asynccontextmanager
async def alone(cluster: Cluster, what: str) -> AsyncIterator[bool]:
    """False while another task of this process is inside with the same cluster and `what`."""
    busy = _under_way.setdefault(cluster, set())
    if what in busy:
        yield False
        return
    busy.add(what)
    try:
        yield True
    finally:
        busy.discard(what)


class Upkeep:
    """Works while `leads()` says so, until its task is cancelled."""

    def __init__(
        self,
        *,
        pipes: Pipes,
        keys: Keys,
        table: TableFollower,
        leads: Callable[[], bool],
        outages: Outages,
        pause: Pause = anyio.sleep,
    ) -> None:
        self._pipes, self._keys, self._table, self._leads = pipes, keys, table, leads
        self._outages, self._pause = outages, pause
        self._cant_look = f"{keys.queue}: what there is to do for its shards can't be read"
        self._cant_do = f"{keys.queue}: a reshard can't be carried on"
        self._plan, self._plan_since_s = b"", 0.0
        self._version, self._due_s = -1, 0.0
        self._refused_s: dict[str, float] = {}

    async def run(self) -> None:
        while True:
            if self._leads():
                await self._look()
            else:
                self._plan, self._version = b"", -1
            await self._pause(LOOK_EVERY_S * random.uniform(0.8, 1.0))

    async def _look(self) -> None:
        try:
            version, plan = await read_changes(self._pipes, self._keys)
            self._outages.well(self._cant_look)
        except ShardqError as error:
            self._outages.failed(self._cant_look, error)
            return
        now = monotonic()
        if version != self._version:
            self._see_version(version, now)
        if plan != self._plan:
            self._plan, self._plan_since_s = plan, now
            self._refused_s.pop(CANT_COMPLETE, None)
        if plan and now - self._plan_since_s >= UNFINISHED_S:
            await self._do(self._carry_on, CANT_COMPLETE)
        elif not plan and now >= self._due_s:
            await self._do(self._look_after, CANT_REMOVE)

    def _see_version(self, version: int, now: float) -> None:
        """The first look of a term finds what the leader before left, a later one what somebody just changed, who may
        be at it still."""
        self._due_s = now if self._version < 0 else now + UNFINISHED_S
        self._version = version
        if version != self._table.queue.table.version:
            self._table.look()

    async def _do(self, what: Callable[[], Awaitable[None]], refusal: str) -> None:
        """`refusal` is said once while the rights for it are missing."""
        if monotonic() - self._refused_s.get(refusal, -1e9) < REFUSED_S:
            return
        try:
            async with alone(self._pipes.cluster, self._keys.routing) as free:
                if free:
                    await what()
            self._outages.well(self._cant_do)
            self._refused_s.pop(refusal, None)
        except StoreRefused as error:
            if refusal not in self._refused_s:
                queue = self._keys.queue
                _log.warning(
                    "%s: %s (%s). %s: shardq acl worker --queue %s --reshards", queue, refusal, error, DO, queue
                )
            self._refused_s[refusal] = monotonic()
        except ShardqError as error:
            self._outages.failed(self._cant_do, error)

    async def _carry_on(self) -> None:
        if await reshard.carry_on(self._pipes, self._keys):
            _log.warning("%s: completed a reshard that had been left unfinished", self._keys.queue)
            self._due_s = monotonic()
        await self._table.read()

    async def _look_after(self) -> None:
        self._due_s = monotonic() + LOOK_AFTER_EVERY_S * random.uniform(0.8, 1.2)
        await self._table.read()
        before = self._table.queue.table
        if not before.retired and not before.removed:
            return
        stay = await reshard.look_after(self._pipes, self._keys)
        if gone := before.retired_by_id.keys() - stay.keys():
            _log.info("%s: removed retired shards %s", self._keys.queue, ", ".join(map(str, sorted(gone))))
            await self._table.read()
