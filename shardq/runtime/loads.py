"""A leader's look at its group's counters: how heavy each shard is. Reads only, and only while its process leads; what
is made of the loads is core/balance.py's and core/autosplit.py's. It never holds up a heartbeat or a plan: a shard
whose master is away keeps the load it had.

It costs two small reads for each shard every `load_sample_s`, 5 s, and never more than 200 reads a second: with more
than 500 shards the looks come less often. They are spread over that time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic

import anyio

from shardq.core.load import Load, LoadMeter
from shardq.errors import ShardqError
from shardq.runtime.outages import Outages
from shardq.runtime.settings import WorkerSettings
from shardq.storage.counters import work_counts
from shardq.storage.keys import ShardKeys
from shardq.storage.pipes import Pipes

SHARDS_A_SECOND = 100
_AT_ONCE = 100
_TIMEOUT_S = 2.0


class LoadSampler:
    """`run` it beside the heartbeats. `known` and `details` are new objects after each look, None or empty before."""

    def __init__(
        self,
        *,
        pipes: Pipes,
        group: str,
        shards: Mapping[int, ShardKeys],
        settings: WorkerSettings,
        leads: Callable[[], bool],
        outages: Outages,
        label: str,
    ) -> None:
        self._pipes, self._group, self._shards, self._settings = pipes, group, shards, settings
        self._leads, self._outages = leads, outages
        self._cant_read = f"{label}: the load of a shard can't be read"
        self._meter = LoadMeter(settings.load_half_life_s)
        self.known: Mapping[int, float] | None = None
        self.details: Mapping[int, Load] = {}

    @property
    def interval_s(self) -> float:
        return max(self._settings.load_sample_s, len(self._shards) / SHARDS_A_SECOND)

    async def run(self) -> None:
        """Until it is cancelled. Each term starts with nothing: rates from before say little about now."""
        while True:
            if self._leads():
                await self._look()
            else:
                self._forget()
                await anyio.sleep(min(1.0, self._settings.load_sample_s))

    def _forget(self) -> None:
        if self.details or self.known is not None:
            self._meter, self.known, self.details = LoadMeter(self._settings.load_half_life_s), None, {}

    async def _look(self) -> None:
        """One look at all shards; takes `interval_s`."""
        shards, interval_s = sorted(self._shards), self.interval_s
        started = monotonic()
        self._meter.keep(self._shards)
        for first in range(0, len(shards), _AT_ONCE):
            some = shards[first : first + _AT_ONCE]
            await self._read(some)
            due = started + interval_s * (first + len(some)) / len(shards)
            if first + len(some) == len(shards):
                self._publish()
            await anyio.sleep(max(0.0, due - monotonic()))

    def _publish(self) -> None:
        self.details = self._meter.details()
        if self._meter.observed_s() >= self._settings.pace.warmup_s * 0.99:
            self.known = {shard: each.load for shard, each in self.details.items()}

    async def _read(self, shards: Sequence[int]) -> None:
        async with anyio.create_task_group() as tasks:
            for shard in shards:
                tasks.start_soon(self._read_one, shard)

    async def _read_one(self, shard: int) -> None:
        keys = self._shards.get(shard)
        if keys is None:
            return  # it was removed since
        try:
            counts = await work_counts(self._pipes, keys, self._group, timeout_s=_TIMEOUT_S)
        except ShardqError as error:
            if shard in self._shards:
                self._outages.failed(self._cant_read, error, shard)
            else:
                self._outages.well(self._cant_read, shard)  # it was removed since
            return
        self._outages.well(self._cant_read, shard)
        self._meter.see(shard, monotonic(), counts)
