"""Prometheus metrics of one process: what its producers and workers count themselves (core/meters.py). What lies in
Redis is the exporter's; nothing is shown by both.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import anyio
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from shardq.core.meters import GroupMeters, Histogram, Meters
from shardq.ops.http import serving
from shardq.ops.processes import Listen

READY_WITHIN_S = 10.0  # a few heartbeats

_log = logging.getLogger("shardq")

_GROUP = ["queue", "group"]


class MetersCollector(Collector):
    """Register it where a program's own metrics are: `prometheus_client.REGISTRY.register(MetersCollector(meters))`."""

    def __init__(self, meters: Meters) -> None:
        self._meters = meters

    def collect(self) -> Iterator[Metric]:
        # Counted on in the event loop while this reads, in a thread: a figure may be one message newer than another.
        yield from _of_groups(dict(self._meters.groups))
        yield from self._of_sends()
        retries = CounterMetricFamily(
            "shardq_store_retries",
            "Calls to Redis that were sent again, by why: a redirect, a node that was away (refresh), ...",
            labels=["action"],
        )
        for action, count in sorted(self._meters.retries.items()):
            retries.add_metric([action], count)
        yield retries

    def _of_sends(self) -> Iterator[Metric]:
        seconds = HistogramMetricFamily(
            "shardq_send_seconds",
            "From a record batch's first message to its being stored, by batch.",
            labels=["queue"],
        )
        sent = CounterMetricFamily(
            "shardq_sent_messages", "Messages that this process sent, by outcome.", labels=["queue", "outcome"]
        )
        waiting = GaugeMetricFamily(
            "shardq_send_buffer_bytes", "Messages of this process that are not stored yet.", labels=["queue"]
        )
        for queue, meters in dict(self._meters.sends).items():
            _add(seconds, [queue], meters.batches)
            sent.add_metric([queue, "stored"], meters.stored)
            sent.add_metric([queue, "failed"], meters.failed)
            waiting.add_metric([queue], meters.buffered_bytes())
        yield from (seconds, sent, waiting)


def _of_groups(groups: dict[tuple[str, str], GroupMeters]) -> Iterator[Metric]:
    handler = HistogramMetricFamily(
        "shardq_handler_seconds",
        "How long the handler took, by outcome; a list counts once.",
        labels=[*_GROUP, "outcome"],
    )
    end_to_end = HistogramMetricFamily(
        "shardq_end_to_end_seconds",
        "From a message's sending, by the sender's clock, to its handler's return; of a list, its first message.",
        labels=_GROUP,
    )
    steps = HistogramMetricFamily(
        "shardq_step_seconds", "How long a call to Redis took that fetches and commits.", labels=_GROUP
    )
    in_flight = GaugeMetricFamily("shardq_in_flight_messages", "Messages whose handler runs now.", labels=_GROUP)
    fenced = CounterMetricFamily(
        "shardq_fenced_commits", "Times that another worker had taken a lease this one worked under.", labels=_GROUP
    )
    shards = GaugeMetricFamily("shardq_worker_shards", "Shards that this process consumes now.", labels=_GROUP)
    limited = GaugeMetricFamily(
        "shardq_limited_messages",
        "Messages in this process that wait for a rate limit, by the worker's option that sets it.",
        labels=[*_GROUP, "option"],
    )
    limited_s = CounterMetricFamily(
        "shardq_limited_seconds",
        "Seconds in which messages could have been begun here but for the group's rate limit.",
        labels=_GROUP,
    )
    for key, meters in groups.items():
        labels = list(key)
        limited_s.add_metric(labels, meters.limited_s)
        for option, count in meters.limited().items():
            limited.add_metric([*labels, option], count)
        _add(handler, [*labels, "done"], meters.done)
        _add(handler, [*labels, "failed"], meters.failed)
        _add(end_to_end, labels, meters.end_to_end)
        _add(steps, labels, meters.steps)
        in_flight.add_metric(labels, meters.in_flight)
        fenced.add_metric(labels, meters.fenced)
        shards.add_metric(labels, meters.shards)
    yield from (handler, end_to_end, steps, in_flight, fenced, shards, limited, limited_s)


def _add(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    family.add_metric(labels, histogram.buckets(), sum_value=histogram.sum)


async def ready(meters: Meters) -> str:
    """Why this process is not ready to work, empty when it is: each group's heartbeat was answered a moment ago."""
    if not meters.groups:
        return "not a member of its group yet"
    now = anyio.current_time()
    for (queue, group), found in meters.groups.items():
        if now - found.beaten_monotonic_s > READY_WITHIN_S:
            return f"no heartbeat of {queue}/{group} was answered in the last {READY_WITHIN_S:g} s: is Redis up?"
    return ""


@asynccontextmanager
async def watched(meters: Meters, listen: Listen) -> AsyncIterator[None]:
    """Serves `meters` and the probes while it is entered."""
    registry = CollectorRegistry()
    for collector in (MetersCollector(meters), ProcessCollector(registry=None), PlatformCollector(registry=None)):
        registry.register(collector)
    async with serving(registry, listen.port, host=listen.host, ready=lambda: ready(meters)) as (url, _):
        _log.info("metrics at %s", url)
        yield
