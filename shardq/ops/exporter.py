"""Prometheus metrics of every queue under a prefix. Keeps no count of its own: the counters live in Redis beside the
data, so any exporter shows the same totals and a restarted one has lost none. Writes nothing.

A scrape reads Redis: the HTTP server's thread hops into the event loop, which reads all shards unless what it read last
is younger than `interval_s`. Nothing runs between scrapes, no value is older than it looks, and two scrapes at once
share one reading. What can't be read keeps its last values, and shardq_exporter_errors_total rises.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
from anyio.from_thread import BlockingPortal
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shardq.core.hot import hot_of
from shardq.core.lease import Watch
from shardq.core.load import Counts, LoadMeter
from shardq.errors import ShardqError
from shardq.ops.http import serving
from shardq.ops.inspect import GroupView, QueueView, ShardView, read_queue
from shardq.ops.waits import waiting_shards
from shardq.runtime.client import Client

# A scrape stays below Prometheus' own limit of 10 s, also when a master is away.
NAMES_TIMEOUT_S, SHARD_TIMEOUT_S, QUEUE_TIMEOUT_S = 2.0, 3.0, 6.0

_SHARD = ["queue", "shard"]
_GROUP = ["queue", "shard", "group"]

_OF_SHARDS: list[tuple[type[Metric], str, str, Callable[[ShardView], float]]] = [
    (CounterMetricFamily, "shardq_messages_appended", "Messages stored.", lambda shard: shard.appended),
    (CounterMetricFamily, "shardq_appended_bytes", "Bytes of record batches stored.", lambda shard: shard.bytes),
    (GaugeMetricFamily, "shardq_stream_entries", "Entries in the stream.", lambda shard: shard.entries),
    (GaugeMetricFamily, "shardq_delayed_messages", "Messages that are not due yet.", lambda shard: shard.delayed),
    (
        GaugeMetricFamily,
        "shardq_shard_retired",
        "1 when a reshard put other shards in its place: it takes no messages and goes when nothing of it is needed.",
        lambda shard: shard.state != "open",
    ),
    (
        CounterMetricFamily,
        "shardq_messages_dropped",
        "Messages dropped unfinished because the queue was full.",
        lambda shard: shard.dropped,
    ),
]
_OF_GROUPS: list[tuple[type[Metric], str, str, Callable[[GroupView], float]]] = [
    (CounterMetricFamily, "shardq_messages_delivered", "Messages handed to a worker.", lambda group: group.delivered),
    (CounterMetricFamily, "shardq_messages_acked", "Messages handled and acknowledged.", lambda group: group.acked),
    (CounterMetricFamily, "shardq_messages_retried", "Handlings that failed and are repeated.", lambda g: g.retried),
    (CounterMetricFamily, "shardq_messages_dead", "Messages that became dead letters.", lambda group: group.dead),
    (
        CounterMetricFamily,
        "shardq_messages_replayed",
        "Dead letters handed back to be handled again.",
        lambda group: group.replayed,
    ),
    (
        CounterMetricFamily,
        "shardq_messages_lost",
        "Messages dropped because the queue was full, before the group got them.",
        lambda group: group.lost,
    ),
    (GaugeMetricFamily, "shardq_dead_letters", "Dead letters kept now.", lambda group: group.dead_letters),
    (
        GaugeMetricFamily,
        "shardq_waiting_messages",
        "Messages waiting for their next try, or behind one of their key.",
        lambda group: group.waiting,
    ),
    (GaugeMetricFamily, "shardq_pel_entries", "Entries in the Pending Entries List.", lambda group: group.pel_entries),
    (
        GaugeMetricFamily,
        "shardq_pel_messages",
        "Messages delivered and not finished.",
        lambda group: group.pel_messages,
    ),
    (GaugeMetricFamily, "shardq_backlog_messages", "Messages stored and not finished.", lambda group: group.backlog),
    (
        GaugeMetricFamily,
        "shardq_oldest_pending_age_seconds",
        "Age of the oldest entry that is delivered and not finished, 0 without one.",
        lambda group: group.oldest_pending_age_s or 0,
    ),
    (
        GaugeMetricFamily,
        "shardq_oldest_unread_age_seconds",
        "Age of the oldest entry that is not delivered, 0 without one.",
        lambda group: group.oldest_unread_age_s or 0,
    ),
    (
        GaugeMetricFamily,
        "shardq_lease_owned",
        "1 when a worker has the lease, also one that died and was not replaced yet.",
        lambda group: group.held,
    ),
    (GaugeMetricFamily, "shardq_lease_epoch", "Rises at every change of owner.", lambda group: group.epoch),
]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was read last. `read_monotonic_s` is when all of it could be read; `failed` holds if that was not now,
    `blind` if not even the queues' names could be; `whole` has the queues that could be read wholly now. `still_s` has,
    by queue, shard and group, for how long this exporter has seen a held lease without a renewal; `hot` has, by queue,
    the shards that this exporter has seen get far more than the others."""

    queues: dict[str, QueueView] = field(default_factory=dict)
    errors: int = 0
    blind: bool = True
    failed: bool = True
    whole: frozenset[str] = frozenset()
    tried_monotonic_s: float = float("-inf")
    read_monotonic_s: float = float("-inf")
    read_took_s: float = 0.0
    still_s: dict[tuple[str, str, str], float] = field(default_factory=dict)
    hot: dict[str, frozenset[int]] = field(default_factory=dict)


class QueueReader:
    """Holds the last snapshot and reads a new one when it is asked and the last is old. Lives in the event loop."""

    def __init__(self, client: Client, interval_s: float) -> None:
        self._client, self._interval_s = client, interval_s
        self._lock = anyio.Lock()
        self._watches: dict[tuple[str, str, str], Watch] = {}
        self._loads: dict[str, LoadMeter] = {}
        self.last = Snapshot()

    async def snapshot(self) -> Snapshot:
        async with self._lock:
            if anyio.current_time() - self.last.tried_monotonic_s >= self._interval_s:
                self.last = await self._read()
        return self.last

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
                # A shard whose master is away keeps its last values, like a whole queue that can't be read.
                view = replace(view, shards={**before.shards, **view.shards}, groups={**before.groups, **view.groups})
            kept = view or before
            if kept is not None:
                queues[name] = kept

        names = await self._names()
        blind = names is None
        if names is None:
            errors += 1
            names = list(self.last.queues)
        async with anyio.create_task_group() as tasks:
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

    async def _names(self) -> list[str] | None:
        with anyio.move_on_after(NAMES_TIMEOUT_S):
            try:
                return await self._client.queue_names()
            except ShardqError:
                return None
        return None

    async def _read_one(self, name: str) -> QueueView | None:
        with anyio.move_on_after(QUEUE_TIMEOUT_S):
            try:
                return await read_queue(self._client, name, timeout_s=SHARD_TIMEOUT_S)
            except ShardqError:
                return None
        return None


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


def families(snapshot: Snapshot, now: float) -> Iterator[Metric]:
    """Every metric of the exporter; `now` on the clock of the snapshot's `_monotonic_s`."""
    yield from _of_shards(snapshot.queues.values())
    yield from _of_groups(snapshot.queues.values())
    yield from _of_queues(snapshot)
    yield from _of_exporter(snapshot, now)


def _of_queues(snapshot: Snapshot) -> Iterator[Metric]:
    text = "Seconds since this exporter saw the lease renewed, 0 when nobody holds it."
    still = GaugeMetricFamily("shardq_lease_still_seconds", text, labels=_GROUP)
    for labels, seconds in snapshot.still_s.items():
        still.add_metric(labels, seconds)
    yield still
    text = "1 while the shard gets over five times what the median shard of its queue gets (shardq doctor says why)."
    hot = GaugeMetricFamily("shardq_shard_hot", text, labels=_SHARD)
    for name, queue in snapshot.queues.items():
        for shard in queue.shards:
            hot.add_metric([name, str(shard)], shard in snapshot.hot.get(name, ()))
    yield hot
    text = "1 while a change of shards is begun and not done: where it lasts nobody carries it on (shardq queue show)."
    under_way = GaugeMetricFamily("shardq_reshard_under_way", text, labels=["queue"])
    for name, queue in snapshot.queues.items():
        under_way.add_metric([name], bool(queue.reshard))
    yield under_way
    up = GaugeMetricFamily("shardq_queue_up", "1 when all of the queue was read at this scrape.", labels=["queue"])
    for name in snapshot.queues:
        up.add_metric([name], name in snapshot.whole)
    yield up


def _of_shards(queues: Iterable[QueueView]) -> Iterator[Metric]:
    for kind, name, text, value in _OF_SHARDS:
        metric: Any = kind(name, text, labels=_SHARD)  # type: ignore[call-arg]
        for queue in queues:
            for shard in queue.shards.values():
                metric.add_metric([queue.queue, str(shard.shard)], value(shard))
        yield metric


def _of_groups(queues: Iterable[QueueView]) -> Iterator[Metric]:
    for kind, name, text, value in _OF_GROUPS:
        metric: Any = kind(name, text, labels=_GROUP)  # type: ignore[call-arg]
        for queue in queues:
            for shard in queue.shards.values():
                for group, view in shard.groups.items():
                    metric.add_metric([queue.queue, str(shard.shard), group], value(view))
        yield metric
    yield from _of_retired(queues)
    rebalances = CounterMetricFamily("shardq_rebalances", "Plans that the coordinator made.", labels=["queue", "group"])
    members = GaugeMetricFamily("shardq_members", "Workers and coordinators in the group.", labels=["queue", "group"])
    paused = GaugeMetricFamily("shardq_group_paused", "1 while the group is paused.", labels=["queue", "group"])
    for queue in queues:
        for group, state in queue.groups.items():
            paused.add_metric([queue.queue, group], state.paused)
            rebalances.add_metric([queue.queue, group], state.rebalances)
            members.add_metric([queue.queue, group], len(state.members))
    yield from (rebalances, members, paused)


def _of_retired(queues: Iterable[QueueView]) -> Iterator[Metric]:
    """Of retired shards alone: what the group waits for, and what waits for the group."""
    text = "Messages to finish on a retired shard; the group begins on the shards that took its keys over only then."
    left = GaugeMetricFamily("shardq_retired_unfinished_messages", text, labels=_GROUP)
    text = "Shards that the group may not begin on before it has finished retired ones."
    waiting = GaugeMetricFamily("shardq_waiting_shards", text, labels=["queue", "group"])
    for queue in queues:
        for shard in queue.shards.values():
            for group, view in shard.groups.items() if shard.state != "open" else ():
                left.add_metric([queue.queue, str(shard.shard), group], view.backlog)
        for group in queue.groups:
            waiting.add_metric([queue.queue, group], len(waiting_shards(queue, group)))
    yield from (left, waiting)


def _of_exporter(snapshot: Snapshot, now: float) -> Iterator[Metric]:
    yield GaugeMetricFamily("shardq_exporter_up", "1 when all was read at this scrape.", value=not snapshot.failed)
    yield CounterMetricFamily("shardq_exporter_errors", "Queues and shards that could not be read.", snapshot.errors)
    age_s = now - snapshot.read_monotonic_s
    yield GaugeMetricFamily("shardq_exporter_age_seconds", "Seconds since everything could be read.", value=age_s)
    took = "Seconds that the last reading took."
    yield GaugeMetricFamily("shardq_exporter_read_seconds", took, value=snapshot.read_took_s)


async def serve_metrics(
    client: Client,
    port: int,
    *,
    host: str = "127.0.0.1",
    interval_s: float = 1.0,
    on_listening: Callable[[str], None] | None = None,
) -> None:
    """Serves /metrics until it is cancelled; port 0 takes a free one. `on_listening` is told the URL."""
    reader = QueueReader(client, interval_s)
    collector = QueueCollector(reader)
    registry = CollectorRegistry()
    registry.register(collector)

    async def ready() -> str:
        return "Redis can't be read" if (await reader.snapshot()).blind else ""

    async with serving(registry, port, host=host, ready=ready) as (url, collector.portal):
        if on_listening is not None:
            on_listening(url)
        await anyio.sleep_forever()
