"""Every metric that the exporter shows of the queues, made from what was read of them. Reads nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from shardq.ops.inspect import GroupView, QueueView, ShardView
from shardq.ops.waits import waiting_shards

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
        "shardq_oldest_waiting_age_seconds",
        "Age of the message that waits for a retry and was put off first, 0 without one.",
        lambda group: group.oldest_waiting_age_s or 0,
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
    the shards that this exporter has seen get far more than the others. `nodes_away` own no slot and can't be
    reached."""

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
    nodes_away: int = 0


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
    text = "Nodes of the cluster that are down and own no slot: they count as replicas until they are forgotten."
    yield GaugeMetricFamily("shardq_nodes_away", text, value=snapshot.nodes_away)
    yield GaugeMetricFamily("shardq_exporter_up", "1 when all was read at this scrape.", value=not snapshot.failed)
    yield CounterMetricFamily("shardq_exporter_errors", "Queues and shards that could not be read.", snapshot.errors)
    age_s = now - snapshot.read_monotonic_s
    yield GaugeMetricFamily("shardq_exporter_age_seconds", "Seconds since everything could be read.", value=age_s)
    took = "Seconds that the last reading took."
    yield GaugeMetricFamily("shardq_exporter_read_seconds", took, value=snapshot.read_took_s)
