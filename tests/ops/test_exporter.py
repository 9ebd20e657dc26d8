"""The exporter over HTTP: what a scrape says is what was sent and handled, whichever exporter is asked and when."""

from __future__ import annotations

import dataclasses
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from prometheus_client.parser import text_string_to_metric_families

import shardq
from shardq.ops import exporter
from shardq.ops.exporter import QueueReader, serve_metrics, with_last_values
from shardq.ops.inspect import QueueView, ShardView
from shardq.ops.local_cluster import LocalCluster, LocalServer, find_server
from shardq.ops.queue_metrics import Snapshot, families
from shardq.storage.commands import pack_command
from shardq.storage.nodes import free_ports
from tests.cli.support import Command, Start, commands, until
from tests.runtime import harness
from tests.runtime.outages_rig import KEPT

pytestmark = pytest.mark.anyio

REQUIRED = {
    "shardq_messages_appended_total": "counter",
    "shardq_messages_delivered_total": "counter",
    "shardq_messages_acked_total": "counter",
    "shardq_messages_retried_total": "counter",
    "shardq_messages_dead_total": "counter",
    "shardq_messages_replayed_total": "counter",
    "shardq_messages_lost_total": "counter",
    "shardq_messages_dropped_total": "counter",
    "shardq_dead_letters": "gauge",
    "shardq_waiting_messages": "gauge",
    "shardq_delayed_messages": "gauge",
    "shardq_shard_retired": "gauge",
    "shardq_pel_entries": "gauge",
    "shardq_pel_messages": "gauge",
    "shardq_backlog_messages": "gauge",
    "shardq_oldest_pending_age_seconds": "gauge",
    "shardq_oldest_unread_age_seconds": "gauge",
    "shardq_oldest_waiting_age_seconds": "gauge",
    "shardq_lease_owned": "gauge",
    "shardq_lease_epoch": "gauge",
    "shardq_shard_hot": "gauge",
    "shardq_reshard_under_way": "gauge",
    "shardq_retired_unfinished_messages": "gauge",
    "shardq_waiting_shards": "gauge",
    "shardq_rebalances_total": "counter",
    "shardq_queue_up": "gauge",
    "shardq_exporter_up": "gauge",
    "shardq_nodes_away": "gauge",
    "shardq_exporter_errors_total": "counter",
}
SENT, DEAD, RETRIES, HELD = 120, 3, 2, 2


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


@dataclasses.dataclass
class Scrape:
    """One scrape: the text, and the value of every sample by name and labels."""

    text: str

    def __post_init__(self) -> None:
        self.samples: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
        for family in text_string_to_metric_families(self.text):
            for sample in family.samples:
                self.samples[sample.name].append((sample.labels, sample.value))

    def values(self, name: str, queue: str) -> list[float]:
        """By shard, where there are shards."""
        found = [(labels, value) for labels, value in self.samples[name] if labels["queue"] == queue]
        return [value for _, value in sorted(found, key=lambda sample: int(sample[0].get("shard", 0)))]

    def total(self, name: str, queue: str) -> float:
        return sum(self.values(name, queue))

    def one(self, name: str) -> float:
        ((_, value),) = self.samples[name]
        return value

    def totals(self, queue: str) -> dict[str, list[float]]:
        return {name: self.values(name, queue) for name in self.samples if "_total" in name and "exporter" not in name}


async def scrape(url: str) -> Scrape:
    return Scrape(await anyio.to_thread.run_sync(fetch, url))


@asynccontextmanager
async def exporting(client: shardq.Client) -> AsyncIterator[str]:
    """An exporter in this process; gives its URL."""
    listening, urls = anyio.Event(), list[str]()

    def on_listening(url: str) -> None:
        urls.append(url)
        listening.set()

    async def serve() -> None:
        await serve_metrics(client, 0, interval_s=0, on_listening=on_listening)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve)
        await listening.wait()
        yield urls[0]
        tasks.cancel_scope.cancel()


async def test_every_figure_is_what_was_sent_and_handled(cluster: LocalCluster, queue_name: str) -> None:
    """Messages that wait, are held, fail and are handled, seen by two exporters, one of them started at the end."""
    async with shardq.connect(cluster.url) as client, exporting(client) as url:
        queue = await client.queue(queue_name, shards=4)
        await queue.open_group("g")
        async with queue.producer() as producer:
            await producer.send_many((f"k{number}", number) for number in range(SENT))
        sent = await scrape(url)
        assert sent.total("shardq_messages_appended_total", queue_name) == SENT
        assert sent.total("shardq_backlog_messages", queue_name) == SENT
        assert sent.total("shardq_messages_delivered_total", queue_name) == 0
        assert sent.values("shardq_lease_owned", queue_name) == [0, 0, 0, 0]
        assert all(age > 0 for age in sent.values("shardq_oldest_unread_age_seconds", queue_name))

        go = anyio.Event()
        retry = shardq.Retry(attempts=1 + RETRIES, base=0.05)
        worker = shardq.Worker(queue_name, group="g", name="w", lease=2, retry=retry)

        @worker.handler
        async def handle(message: shardq.Message) -> None:
            if message.value < DEAD:
                raise ValueError("never works")
            if message.value >= SENT - HELD:
                await go.wait()

        async def settled(acked: int) -> Scrape:
            deadline = anyio.current_time() + 30
            while True:
                seen = await scrape(url)
                if seen.total("shardq_messages_acked_total", queue_name) == acked and (
                    seen.total("shardq_messages_dead_total", queue_name) == DEAD
                ):
                    return seen
                assert anyio.current_time() < deadline, seen.text

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run, client)
            held = await settled(SENT - DEAD - HELD)
            assert held.total("shardq_backlog_messages", queue_name) == HELD
            assert held.total("shardq_pel_messages", queue_name) == HELD
            assert held.total("shardq_messages_delivered_total", queue_name) == SENT
            assert held.total("shardq_messages_retried_total", queue_name) == DEAD * RETRIES
            assert max(held.values("shardq_oldest_pending_age_seconds", queue_name)) > 0
            assert held.total("shardq_oldest_unread_age_seconds", queue_name) == 0
            pending = [
                (await client.pipes.command(keys.slot, pack_command("XPENDING", keys.stream, "g")))[0]
                for _, keys in sorted(queue.shards.items())
            ]
            assert held.values("shardq_pel_entries", queue_name) == pending
            assert sum(pending) > 0
            assert held.values("shardq_lease_owned", queue_name) == [1, 1, 1, 1]
            views = await queue.counters(["g"])
            assert held.values("shardq_lease_epoch", queue_name) == [view.groups["g"].epoch for view in views.values()]
            assert held.values("shardq_rebalances_total", queue_name) == [1]
            assert held.values("shardq_members", queue_name) == [1]
            go.set()
            done = await settled(SENT - DEAD)
            worker.stop()
        assert done.total("shardq_backlog_messages", queue_name) == 0
        assert done.total("shardq_pel_messages", queue_name) == 0
        assert done.total("shardq_pel_entries", queue_name) == 0
        assert done.values("shardq_queue_up", queue_name) == [1]
        async with shardq.connect(cluster.url) as other, exporting(other) as second:
            assert (await scrape(second)).totals(queue_name) == (await scrape(url)).totals(queue_name)
            assert (await scrape(second)).total("shardq_messages_acked_total", queue_name) == SENT - DEAD


async def test_help_and_type_of_every_metric(cluster: LocalCluster) -> None:
    async with shardq.connect(cluster.url) as client, exporting(client) as url:
        text = (await scrape(url)).text
    for name, kind in REQUIRED.items():
        assert f"# TYPE {name} {kind}\n" in text
        assert f"# HELP {name} " in text


async def test_scrapes_at_once_share_a_reading(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        await client.queue(queue_name, shards=2)
        reader = exporter.QueueReader(client, interval_s=3600)
        got: list[Snapshot] = []

        async def look() -> None:
            got.append(await reader.snapshot())

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(look)
        assert len({id(snapshot) for snapshot in got}) == 1
        assert got[0].queues[queue_name].appended == 0


async def test_a_queue_that_cannot_be_read_takes_no_other_down(cluster: LocalCluster, queue_name: str) -> None:
    bad = f"{queue_name}-bad"
    async with shardq.connect(cluster.url) as client, exporting(client) as url:
        await client.queue(queue_name, shards=2)
        queue = await client.queue(bad, shards=2)
        packed = pack_command("HSET", queue.keys.routing, "table", b"\xc1 no table")
        assert (await scrape(url)).values("shardq_queue_up", bad) == [1]
        await client.pipes.command(queue.keys.control_slot, packed)
        seen = await scrape(url)
        assert seen.values("shardq_queue_up", bad) == [0]
        assert seen.values("shardq_queue_up", queue_name) == [1]
        assert seen.values("shardq_messages_appended_total", queue_name) == [0, 0]
        assert seen.one("shardq_exporter_up") == 0
        mended = pack_command("HSET", queue.keys.routing, "table", queue.table.to_bytes())
        await client.pipes.command(queue.keys.control_slot, mended)
        await queue.delete()


async def test_an_outage_keeps_the_last_values_and_counts_errors(
    queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NAMES_TIMEOUT_S", "SHARD_TIMEOUT_S", "QUEUE_TIMEOUT_S"):
        monkeypatch.setattr(exporter, name, 0.3)
    with LocalCluster(1, 0, None, find_server(None), settings=KEPT) as cluster:
        async with shardq.connect(cluster.url) as client, exporting(client) as url:
            queue = await client.queue(queue_name, shards=2)
            async with queue.producer() as producer:
                await producer.send_many((None, number) for number in range(7))
            before = await scrape(url)
            assert (before.one("shardq_exporter_up"), before.one("shardq_exporter_errors_total")) == (1, 0)
            await anyio.to_thread.run_sync(cluster.processes[0].kill)
            down, later = await scrape(url), await scrape(url)
            assert down.totals(queue_name) == later.totals(queue_name) == before.totals(queue_name)
            assert (down.one("shardq_exporter_up"), later.one("shardq_exporter_up")) == (0, 0)
            assert 0 < down.one("shardq_exporter_errors_total") < later.one("shardq_exporter_errors_total")
            assert down.one("shardq_exporter_age_seconds") < later.one("shardq_exporter_age_seconds")
            await anyio.to_thread.run_sync(cluster.processes[0].restart)
            deadline = anyio.current_time() + 30
            while (after := await scrape(url)).one("shardq_exporter_up") == 0:
                assert anyio.current_time() < deadline
            assert after.totals(queue_name) == before.totals(queue_name)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with commands(tmp_path) as start:
        yield start


# The command and its signals are the same whatever it reads; its figures are above, on every kind.
@pytest.mark.server_kinds("redis8")
async def test_the_command_listens_stops_and_loses_nothing(
    cluster: LocalCluster, queue_name: str, start: Start
) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        async with queue.producer() as producer:
            await producer.send_many((None, number) for number in range(11))

    def listening() -> Command:
        command = start("exporter", "--port", "0", "--url", cluster.url)
        until(lambda: command.stdout.endswith("/metrics\n"), "it prints its URL")
        return command

    command = listening()
    first = (await scrape(command.stdout.strip())).totals(queue_name)
    assert sum(first["shardq_messages_appended_total"]) == 11
    assert command.stop() == 0
    command = listening()
    assert (await scrape(command.stdout.strip())).totals(queue_name) == first
    assert command.stop() == 0


async def readiness(url: str) -> tuple[int, str]:
    def ask() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(url.replace("/metrics", "/readyz"), timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await anyio.to_thread.run_sync(ask)


@pytest.mark.server_kinds("valkey9")
async def test_the_command_starts_while_redis_is_away_and_finds_it_later(start: Start, server_binary: Path) -> None:
    """Started first, it says that it reads nothing, and why; then it shows the cluster that came up."""
    (port,) = free_ports("127.0.0.1", 1)
    command = start("exporter", "--port", "0", "--url", f"redis://127.0.0.1:{port}")
    until(lambda: command.stdout.endswith("/metrics\n"), "it prints its URL")
    url = command.stdout.strip()
    until(lambda: "no cluster node answers" in command.stderr, "it says what is wrong")
    before = await scrape(url)
    assert before.one("shardq_exporter_up") == 0
    assert before.one("shardq_exporter_errors_total") >= 1
    status, why = await readiness(url)
    assert status == 503
    assert "no cluster node answers" in why
    with LocalCluster(1, 0, port, server_binary) as cluster:
        async with shardq.connect(cluster.url) as client:
            await client.queue("late", shards=2)

        async def recovered() -> bool:
            seen = await scrape(url)
            return seen.one("shardq_exporter_up") == 1 and seen.values("shardq_queue_up", "late") == [1]

        await harness.until(recovered, 30, "the exporter to read the queue")
        assert await readiness(url) == (200, "ok\n")
        said = [line.partition("WARNING ")[2] for line in command.stderr.splitlines()]
        assert f"no cluster node answers at 127.0.0.1:{port}: is it up" in said[0]
        assert len(set(said)) == len(said), "each cause is said once, not at every try"
        assert not any("answers at :" in line for line in said), "where is said, too"
        assert command.stop() == 0


def test_the_command_ends_at_once_where_waiting_mends_nothing(
    start: Start, server_binary: Path, tmp_path: Path
) -> None:
    (port,) = free_ports("127.0.0.1", 1)
    server = LocalServer(server_binary, port, tmp_path / "server", "", {"cluster-enabled": "no"})
    server.launch()
    try:
        server.wait_until_answering(time.monotonic() + 30)
        command = start("exporter", "--port", "0", "--url", f"redis://127.0.0.1:{port}")
        assert command.wait() == 1
        assert "cluster-enabled yes" in command.stderr
    finally:
        server.kill()


async def test_a_port_in_use_is_said(cluster: LocalCluster) -> None:
    async with shardq.connect(cluster.url) as client, exporting(client) as url:
        port = int(url.split(":")[2].split("/")[0])
        with pytest.raises(shardq.UsageError, match=f"can't listen on 127.0.0.1:{port} .*another port"):
            await serve_metrics(client, port)


async def test_a_hot_shard_is_named_by_every_exporter_that_read_twice(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client, exporting(client) as url:
        queue = await client.queue(queue_name, shards=4)
        keys = [f"k{n}" for n in range(400) if queue.place_of(f"k{n}") == queue.shards[1]]
        assert (await scrape(url)).values("shardq_shard_hot", queue_name) == [0, 0, 0, 0]
        async with queue.producer() as producer:

            async def hot() -> bool:
                await producer.send_many((key, 1) for key in keys * 10)
                return (await scrape(url)).values("shardq_shard_hot", queue_name) == [0, 1, 0, 0]

            await harness.until(hot, 20, "shard 1 to be named")


async def test_what_was_removed_or_deleted_is_not_shown_any_more(cluster: LocalCluster, queue_name: str) -> None:
    def named(snapshot: Snapshot) -> set[tuple[str, str]]:
        samples = (sample for family in families(snapshot, 0.0) for sample in family.samples)
        return {
            (sample.labels.get("shard", ""), sample.labels.get("group", ""))
            for sample in samples
            if sample.labels.get("queue") == queue_name
        }

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        for group in ("g", "late"):
            await queue.open_group(group)
        reader = QueueReader(client, 0.0)
        assert ("", "late") in named(await reader.snapshot())
        assert ("1", "g") in named(await reader.snapshot())
        # So it is after a reshard, once nothing of the old shard is needed.
        before = reader.last.queues[queue_name]
        retired = dataclasses.replace(before.shards[0], shard=7, state="sealed")
        shown = dataclasses.replace(before, shards={**before.shards, 7: retired})
        reader.last = dataclasses.replace(reader.last, queues={queue_name: shown})
        await queue.delete_group("late")
        after = named(await reader.snapshot())
        assert {shard for shard, _ in after} == {"", "0", "1"}
        assert {group for _, group in after} == {"", "g"}


async def test_a_shard_that_can_not_be_read_keeps_its_last_values() -> None:
    shard = ShardView(0, 0, 1 << 32, 0, "n:1", "open", 0, 0, 0, 0, 0, 0, {})
    before = QueueView("q", {0: shard, 1: dataclasses.replace(shard, shard=1, appended=5)}, {})
    shown = with_last_values(QueueView("q", {0: shard}, {}, {1: "away"}), before)
    assert {number: each.appended for number, each in shown.shards.items()} == {0: 0, 1: 5}
