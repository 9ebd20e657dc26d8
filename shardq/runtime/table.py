"""How a worker or coordinator learns that the queue's shards changed: it keeps `queue.table` and `queue.shards` the
newest. Decides nothing about shards, and changes none.

It reads when somebody has a reason to: the control bell said 'table', a plan names other shards, a lease is kept back
for a shard that is not known here, a shard's keys are gone. Nobody polls here; the leader does (runtime/upkeep.py), and
its plan tells the others.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

import anyio

from shardq.errors import ShardqError
from shardq.runtime.outages import Outages
from shardq.runtime.queue import Queue

RETRY_S = 1.0
DOUBT_S = 1.0

BELL = "table"
"""What the control bell says when there is another table."""


class TableFollower:
    """`run` it beside the heartbeats. `on_change` is called after each change of `queue.table`, whoever read it."""

    def __init__(self, queue: Queue, *, on_change: Callable[[], None], outages: Outages) -> None:
        self.queue = queue
        self._on_change, self._outages = on_change, outages
        self._cant_read = f"the routing table of {queue.name} can't be read"
        self._known = queue.table
        self._asked = anyio.Event()
        self._reading = anyio.Lock()
        self._read_from_s = -1e9

    def look(self) -> None:
        """There may be another table: it is read at once."""
        self._asked.set()

    def doubt(self) -> None:
        """Something does not fit the table; this may be asked often, and is looked into once a second."""
        if monotonic() - self._read_from_s >= DOUBT_S:
            self.look()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self._asked.wait()
            self._asked = anyio.Event()
            if not await self._try():
                await anyio.sleep(RETRY_S)
                self.look()

    async def read(self) -> None:
        """When it returns, the table is one that was stored after the call. Raises StoreError, CorruptData,
        UnknownQueue."""
        asked_s = monotonic()
        async with self._reading:
            if self._read_from_s <= asked_s:  # else whoever had the lock began after this call
                self._read_from_s = monotonic()
                await self.queue.refresh()
                self._compare()

    async def has(self, shard: int) -> bool:
        """Whether the queue has that shard still; true also when that can't be read now. Waits for Redis only where the
        shard is retired: no other is removed."""
        if shard in self.queue.table.retired_by_id:
            await self._try()
        else:
            self.doubt()
        return shard in self.queue.shards

    async def _try(self) -> bool:
        try:
            await self.read()
        except ShardqError as error:
            self._outages.failed(self._cant_read, error)
            return False
        self._outages.well(self._cant_read)
        return True

    def _compare(self) -> None:
        if self.queue.table is not self._known:
            self._known = self.queue.table
            self._on_change()
