"""Serves Prometheus the metrics (ops/queue_metrics.py) of every queue under a prefix. Keeps no count of its own: the
counters live in Redis beside the data, so any exporter shows the same totals and a restarted one has lost none. Writes
nothing.

A scrape reads Redis: the HTTP server's thread hops into the event loop, which reads all shards unless what it read last
is younger than `interval_s`. Nothing runs between scrapes, no value is older than it looks, and two scrapes at once
share one reading. What can't be read keeps its last values, and shardq_exporter_errors_total rises.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace

import anyio
from anyio.from_thread import BlockingPortal
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from shardq.core.backoff import backoff_s
from shardq.core.hot import hot_of
from shardq.core.lease import Watch
from shardq.core.load import Counts, LoadMeter
from shardq.errors import ShardqError, StoreError
from shardq.ops.http import serving
from shardq.ops.inspect import QueueView, read_queue
from shardq.ops.queue_metrics import Snapshot, families
from shardq.runtime.client import Client

_log = logging.getLogger("shardq")

# A scrape stays below Prometheus' own limit of 10 s, also when a master is away.
NAMES_TIMEOUT_S, SHARD_TIMEOUT_S, QUEUE_TIMEOUT_S = 2.0, 3.0, 6.0
TRY_FIRST_S, TRY_LAST_S = 0.2, 5.0  # between two tries to reach a cluster that is away at the start


class QueueReader:
    """Holds the last snapshot and reads a new one when it is asked and the last is old. Lives in the event loop.

    `client` is open, or None while no node of the cluster was reached yet; `why` says what was tried last."""

    def __init__(self, client: Client | None, interval_s: float) -> None:
        self.client, self._interval_s = client, interval_s
        self.why = "Redis was not reached yet"
        self._lock = anyio.Lock()
        self._watches: dict[tuple[str, str, str], Watch] = {}
        self._loads: dict[str, LoadMeter] = {}
        self.last = Snapshot()

    async def snapshot(self) -> Snapshot:
        async with self._lock:
            if anyio.current_time() - self.last.tried_monotonic_s >= self._interval_s:
                self.last = await self._read()
        return self.last

    async def ready(self) -> str:
        """Why Redis can't be read, empty when it can."""
        blind = (await self.snapshot()).blind
        if self.client is None:
            return self.why
        return "Redis can't be read" if blind else ""

    async def _read(self) -> Snapshot:
        started, errors = anyio.current_time(), self.last.errors
        queues: dict[str, QueueView] = {}
        whole: set[str] = set()

        async def look(name: str) -> None:
            nonlocal errors
            before = self.last.queues.get(name)
            view = await self._read_one(name)
            errors += 1 if view is None else len(view.unreadable)
            if view is not None and not view.unreadable:
                whole.add(name)
            if view is not None and before is not None:
                view = with_last_values(view, before)
            kept = view or before
            if kept is not None:
                queues[name] = kept

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._count_away)
            names = await self._names()
            blind = names is None
            if names is None:
                errors += 1
                names = list(self.last.queues)
            for name in names:
                tasks.start_soon(look, name)
        now, failed = anyio.current_time(), errors > self.last.errors
        read_at = self.last.read_monotonic_s if failed else now
        return Snapshot(
            queues=dict(sorted(queues.items())),
            errors=errors,
            blind=blind,
            failed=failed,
            whole=frozenset(whole),
            tried_monotonic_s=now,
            read_monotonic_s=read_at,
            read_took_s=now - started,
            still_s=self._still(queues),
            hot=self._hot(queues),
            nodes_away=self.client.cluster.replicas.away if self.client is not None else 0,
        )

    def _still(self, queues: dict[str, QueueView]) -> dict[tuple[str, str, str], float]:
        """A lease says who took it, not whether they live: only renewals do, and their standing still."""
        now = anyio.current_time()
        leases = {
            (queue.queue, str(shard.shard), name): group
            for queue in queues.values()
            for shard in queue.shards.values()
            for name, group in shard.groups.items()
        }
        self._watches = {key: self._watches.get(key, Watch()) for key in leases}
        seen = {key: self._watches[key].see(now, group.epoch, group.renewals) for key, group in leases.items()}
        return {key: seen[key] if group.held else 0.0 for key, group in leases.items()}

    def _hot(self, queues: dict[str, QueueView]) -> dict[str, frozenset[int]]:
        """By rates over the last minute or so, as far as there were readings. No keys are looked at."""
        now = anyio.current_time()
        self._loads = {name: self._loads.get(name, LoadMeter()) for name in queues}
        for name, meter in self._loads.items():
            takes = {number: shard for number, shard in queues[name].shards.items() if shard.state == "open"}
            meter.keep(takes)
            for number, shard in takes.items():
                meter.see(number, now, Counts(shard.appended, shard.bytes))
        return {name: hot_of(meter.details()) for name, meter in self._loads.items()}

    async def _count_away(self) -> None:
        if self.client is not None:
            with anyio.move_on_after(NAMES_TIMEOUT_S):
                await self.client.cluster.count_away()

    async def _names(self) -> list[str] | None:
        if self.client is None:
            return None
        with anyio.move_on_after(NAMES_TIMEOUT_S):
            try:
                return await self.client.queue_names()
            except ShardqError:
                return None
        return None

    async def _read_one(self, name: str) -> QueueView | None:
        assert self.client is not None, "names are known from a client"
        with anyio.move_on_after(QUEUE_TIMEOUT_S):
            try:
                return await read_queue(self.client, name, timeout_s=SHARD_TIMEOUT_S)
            except ShardqError:
                return None
        return None


def with_last_values(view: QueueView, before: QueueView) -> QueueView:
    """A shard whose master is away keeps its last values, like a whole queue that can't be read. One that was removed,
    or a group that was deleted, keeps none."""
    away = {number: shard for number, shard in before.shards.items() if number in view.unreadable}
    shards = dict(sorted({**away, **view.shards}.items()))
    registered = {name for shard in shards.values() for name in shard.groups}
    states = {name: state for name, state in before.groups.items() if name in registered}
    return replace(view, shards=shards, groups={**states, **view.groups})


class QueueCollector(Collector):
    """What prometheus_client asks at every scrape, in a thread of its own."""

    def __init__(self, reader: QueueReader) -> None:
        self._reader = reader
        self.portal: BlockingPortal | None = None

    def collect(self) -> Iterator[Metric]:
        if self.portal is None:
            return
        try:
            snapshot, now = self.portal.call(self._look)
        except (RuntimeError, concurrent.futures.CancelledError):
            return  # the exporter stops: an empty answer, as from a process that is gone
        yield from families(snapshot, now)

    async def _look(self) -> tuple[Snapshot, float]:
        return await self._reader.snapshot(), anyio.current_time()


async def serve_metrics(
    client: Client,
    port: int,
    *,
    host: str = "127.0.0.1",
    interval_s: float = 1.0,
    on_listening: Callable[[str], None] | None = None,
) -> None:
    """Serves /metrics until it is cancelled; port 0 takes a free one. `on_listening` is told the URL."""
    async with _serving(QueueReader(client, interval_s), port, host) as url:
        if on_listening is not None:
            on_listening(url)
        await anyio.sleep_forever()


async def keep_serving_metrics(
    connect: Callable[[], Client], port: int, *, host: str = "127.0.0.1", on_listening: Callable[[str], None]
) -> None:
    """`serve_metrics` of a cluster that may be away at the start: listens, then tries clients of `connect` until one
    can be entered. `on_listening` is told the URL after the first try. Raises what waiting does not mend, as a wrong
    password."""
    reader = QueueReader(None, 1.0)
    async with _serving(reader, port, host) as url, contextlib.AsyncExitStack() as stack:
        for tries in itertools.count():
            reader.client = await _entered(connect(), stack, reader)
            if tries == 0:
                on_listening(url)
            if reader.client is not None:
                await anyio.sleep_forever()
            await anyio.sleep(backoff_s(tries + 1, TRY_FIRST_S, TRY_LAST_S, random.random()))


@contextlib.asynccontextmanager
async def _serving(reader: QueueReader, port: int, host: str) -> AsyncIterator[str]:
    """Serves while it is entered; gives the URL."""
    collector = QueueCollector(reader)
    registry = CollectorRegistry()
    registry.register(collector)
    async with serving(registry, port, host=host, ready=reader.ready) as (url, collector.portal):
        yield url


async def _entered(client: Client, stack: contextlib.AsyncExitStack, reader: QueueReader) -> Client | None:
    """The client, open; None when the cluster is away, of which every cause is said once."""
    try:
        return await stack.enter_async_context(client)
    except ShardqError as error:
        if not (isinstance(error, StoreError) and error.retryable):
            raise
        if str(error) != reader.why:
            _log.warning("%s Trying again until it answers", error)
        reader.why = str(error)
        return None
