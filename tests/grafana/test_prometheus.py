"""A real Prometheus scrapes a running system: what it then says of throughput, PEL and backlog is what happened, every
query of every panel is answered, and the alerts do what they say.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import prometheus_client
import pytest

import shardq
from shardq.core.hashing import key_hash
from shardq.ops.exporter import serve_metrics
from shardq.ops.http import serving
from shardq.ops.local_cluster import LocalCluster, find_server
from shardq.ops.queue_metrics import Snapshot, families
from shardq.storage.commands import pack_command
from tests.grafana.machine import DEADLINE_S, Prometheus, find, scraping
from tests.runtime.harness import until

pytestmark = pytest.mark.anyio

GRAFANA = Path(__file__).parents[2] / "grafana"
QUEUE, GROUP, SHARDS = "orders", "billing", 4
SENT, HELD, DEAD = 600, 20, 3


@asynccontextmanager
async def watched(client: shardq.Client, meters: shardq.Meters, folder: Path) -> AsyncIterator[Prometheus]:
    """Two exporters and this process' own metrics, all scraped."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(shardq.MetersCollector(meters))
    prometheus_client.ProcessCollector(registry=registry)
    urls: list[str] = []

    async def export() -> None:
        await serve_metrics(client, 0, on_listening=urls.append)

    async with serving(registry, 0) as (own, _), anyio.create_task_group() as tasks:
        tasks.start_soon(export)
        tasks.start_soon(export)
        await until(lambda: len(urls) == 2, DEADLINE_S, "both exporters to listen")
        targets = [url.removeprefix("http://").removesuffix("/metrics") for url in (*urls, own)]
        with scraping(folder, targets) as server:
            yield server
        tasks.cancel_scope.cancel()


async def settles(server: Prometheus, query: str, wanted: float) -> None:
    """Waits until the query's only value is this."""

    async def equal() -> bool:
        return await anyio.to_thread.run_sync(server.one, query) == wanted

    await until(equal, DEADLINE_S, f"{query} to be {wanted}")


async def test_prometheus_sees_what_happened_and_every_panel_has_something_to_show(tmp_path: Path) -> None:
    meters = shardq.Meters()
    go = anyio.Event()
    worker = shardq.Worker(QUEUE, group=GROUP, concurrency=64, retry=shardq.Retry(attempts=2, base=0.01))

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        if message.value < DEAD:
            raise ValueError("never works")
        if message.value >= SENT - HELD:
            await go.wait()

    with LocalCluster(3, 0, None, find_server(None)) as cluster:
        async with shardq.connect(cluster.url, meters=meters) as client, watched(client, meters, tmp_path) as server:
            queue = await client.queue(QUEUE, shards=SHARDS)
            await queue.open_group(GROUP)
            # A rise from 0 needs the 0, of both exporters.
            await settles(server, f"count(shardq_messages_dead_total{LABELS})", 2 * SHARDS)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(worker.run, client)
                # In portions, so that a rate sees the counters rise.
                async with queue.producer() as producer:
                    for first in range(0, SENT, 100):
                        await producer.send_many((f"k{number}", number) for number in range(first, first + 100))
                        await settles(
                            server, f'sum({ONCE} (shardq_messages_appended_total{{queue="{QUEUE}"}}))', first + 100
                        )
                await settles(server, f"sum({ONCE} (shardq_messages_acked_total{LABELS}))", SENT - HELD - DEAD)
                await settles(server, f"sum({ONCE} (shardq_pel_messages{LABELS}))", HELD)
                await settles(server, panel("overview", "Backlog"), HELD)
                await settles(server, panel("queue", "PEL"), HELD)
                stored = await anyio.to_thread.run_sync(server.ask, "max by (shard) (shardq_messages_appended_total)")
                assert stored == by_shard(queue)
                depth = await anyio.to_thread.run_sync(server.ask, "max by (shard) (shardq_pel_entries)")
                assert depth == await pending(queue)
                assert sum(depth.values()) > 0
                go.set()
                await settles(server, f"sum({ONCE} (shardq_backlog_messages{LABELS}))", 0)
                await settles(server, f"sum({ONCE} (shardq_dead_letters{LABELS}))", DEAD)
                await settles(server, 'sum(shardq_handler_seconds_count{outcome="done"})', SENT - DEAD)
                await settles(server, 'count(ALERTS{alertname="ShardqDeadLettersRising", alertstate="firing"})', 1)
                bad = await anyio.to_thread.run_sync(unanswered, server)
                worker.stop()
            assert not bad


ONCE = "max by (queue, group, shard)"
LABELS = f'{{queue="{QUEUE}", group="{GROUP}"}}'


def by_shard(queue: shardq.Queue) -> dict[tuple[tuple[str, str], ...], float]:
    """How many of the messages sent go to each shard."""
    shards = [queue.table.shards[queue.table.index_for(key_hash(f"k{number}"))].id for number in range(SENT)]
    return {(("shard", str(shard)),): float(count) for shard, count in Counter(shards).items()}


async def pending(queue: shardq.Queue) -> dict[tuple[tuple[str, str], ...], float]:
    """What XPENDING says of each shard."""
    found: dict[tuple[tuple[str, str], ...], float] = {}
    for shard, keys in queue.shards.items():
        reply = await queue.client.pipes.command(keys.slot, pack_command("XPENDING", keys.stream, GROUP))
        found[(("shard", str(shard)),)] = float(reply[0])
    return found


def unanswered(server: Prometheus) -> list[str]:
    """Queries of panels that show nothing over the test's time."""
    bad = []
    for name, title, query in queries():
        if not server.series(filled(query), 120):
            bad.append(f"{name}: {title}: {query}")
    return bad


def filled(query: str) -> str:
    """As Grafana sends it, the variables chosen."""
    for variable, value in (("$__rate_interval", "30s"), ("$queue", QUEUE), ("$group", GROUP)):
        query = query.replace(variable, value)
    assert "$" not in query, query
    return query


def dashboards() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted((GRAFANA / "dashboards").glob("*.json")):
        yield path.stem, json.loads(path.read_text())


def queries() -> Iterator[tuple[str, str, str]]:
    """Dashboard, panel's title, PromQL; of the variables too."""
    for name, page in dashboards():
        for panel in page["panels"]:
            for target in panel.get("targets", []):
                yield name, panel["title"], target["expr"]
        for variable in page["templating"]["list"]:
            if variable["type"] == "query":
                match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"])
                assert match is not None, variable
                yield name, f"variable {variable['name']}", f"count by ({match[2]}) ({match[1]})"


def panel(page: str, title: str) -> str:
    """The query of a panel that shows one number."""
    (query,) = (query for name, other, query in queries() if (name, other) == (page, title))
    return filled(query)


# What each exporter says of itself, and what is only compared with a figure of the same kind.
OF_ITSELF = ("shardq_exporter_", "shardq_group_paused")


def test_every_query_of_what_exporters_say_takes_the_largest_first() -> None:
    """A query that sums or shows what two exporters of one cluster say would count, or show, everything twice."""
    said = {metric.name for metric in families(Snapshot(), 0.0)}
    texts = [query for _, title, query in queries() if not title.startswith("variable ")]
    texts += re.findall(r"expr: (.*?)\n +(?:for|labels):", (GRAFANA / "alerts.yml").read_text(), re.S)
    seen = 0
    for text in texts:
        for match in re.finditer(r"\bshardq_\w+", text):
            if match[0].removesuffix("_total") in said and not match[0].startswith(OF_ITSELF):
                seen += 1
                assert re.search(r"max( by \([\w, ]+\) )?\((\w+\()?$", text[: match.start()]), (match[0], text)
    assert seen > 30


def test_every_metric_of_a_panel_or_an_alert_is_on_the_page() -> None:
    known = set(re.findall(r"`(shardq_\w+)`", (GRAFANA.parent / "docs/metrics.md").read_text()))
    known |= {f"{name}_{part}" for name in known for part in ("bucket", "count", "sum")}
    texts = [query for _, _, query in queries()] + [(GRAFANA / "alerts.yml").read_text()]
    used = {name for text in texts for name in re.findall(r"\bshardq_\w+", text)}
    assert used
    assert used <= known


def test_the_alerts_pass_their_unit_tests() -> None:
    done = subprocess.run(
        [find("promtool"), "test", "rules", str(GRAFANA / "alerts_test.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_and_says_what_to_do() -> None:
    rules = (GRAFANA / "alerts.yml").read_text()
    names = re.findall(r"- alert: (\w+)", rules)
    tested = (GRAFANA / "alerts_test.yml").read_text()
    assert len(names) >= 7
    assert rules.count("runbook: >-") == rules.count("summary: ") == len(names)
    assert all(f'alertname="{name}"' in tested for name in names)


def test_the_example_configuration_is_valid() -> None:
    command = [find("promtool"), "check", "config", str(GRAFANA / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
