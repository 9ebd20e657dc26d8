"""What a process serves of its own: figures that equal what it did, probes that tell the truth, nothing else."""

from __future__ import annotations

import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from subprocess import run
from sys import executable

import anyio
import anyio.to_thread
import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

import shardq
from shardq.core.slots import SLOTS
from shardq.ops.http import serving
from shardq.ops.local_cluster import LocalCluster, find_server
from shardq.ops.metrics_page import page
from tests.cli.support import Command, Start, commands, until
from tests.runtime.harness import until as settled
from tests.runtime.outages_rig import KEPT

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with commands(tmp_path) as start:
        yield start


def get(url: str, method: str = "GET") -> tuple[int, str]:
    """Status and text."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def read(text: str) -> dict[tuple[str, str], float]:
    """Values by name and by outcome, bucket bound or action, one queue and one group being all there is."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            which = sample.labels.get("outcome") or sample.labels.get("action") or ""
            found[sample.name, sample.labels.get("le", which)] = sample.value
    return found


async def test_a_program_shows_its_sends_and_handlings(cluster: LocalCluster, queue_name: str) -> None:
    meters = shardq.Meters()
    registry = prometheus_client.CollectorRegistry()
    registry.register(shardq.MetersCollector(meters))
    worker = shardq.Worker(queue_name, group="g", retry=shardq.Retry(attempts=2, base=0.01))
    seen, go = [], anyio.Event()

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        seen.append(message.value)
        if message.value == 0:
            raise ValueError("never works")
        if message.value == 1:
            await go.wait()

    def now() -> dict[tuple[str, str], float]:
        return read(prometheus_client.generate_latest(registry).decode())

    async with shardq.connect(cluster.url, meters=meters) as client:
        queue = await client.queue(queue_name, shards=3)
        async with queue.producer() as producer:
            await producer.send_many((f"k{number}", number) for number in range(50))
            assert now()["shardq_send_buffer_bytes", ""] == 0
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run, client)
            await settled(lambda: len(seen) == 51 and now()["shardq_handler_seconds_count", "done"] == 48, 30, "most")
            held = now()
            go.set()
            await settled(lambda: now()["shardq_handler_seconds_count", "done"] == 49, 30, "the last one")
            worker.stop()
    assert held["shardq_in_flight_messages", ""] == 1
    assert held["shardq_worker_shards", ""] == 3
    after = now()
    assert after["shardq_in_flight_messages", ""] == after["shardq_worker_shards", ""] == 0
    assert after["shardq_sent_messages_total", "stored"] == 50
    assert after["shardq_sent_messages_total", "failed"] == 0
    assert 0 < after["shardq_send_seconds_count", ""] <= 50
    assert after["shardq_handler_seconds_count", "failed"] == 2
    assert after["shardq_end_to_end_seconds_count", ""] == 49
    assert after["shardq_step_seconds_count", ""] > 0
    assert after["shardq_fenced_commits_total", ""] == 0


async def test_a_batch_handler_counts_lists(cluster: LocalCluster, queue_name: str) -> None:
    meters = shardq.Meters()
    worker = shardq.Worker(queue_name, group="g")
    lists: list[int] = []

    @worker.batch_handler
    async def handle(messages: list[shardq.Message]) -> None:
        lists.append(len(messages))

    async with shardq.connect(cluster.url, meters=meters) as client:
        queue = await client.queue(queue_name, shards=3)
        async with queue.producer() as producer:
            await producer.send_many((f"k{number}", number) for number in range(500))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run, client)
            await settled(lambda: sum(lists) == 500, 30, "all messages")
            worker.stop()
    found = meters.group(queue_name, "g")
    assert found.done.count == found.end_to_end.count == len(lists)
    assert (found.failed.count, found.in_flight) == (0, 0)


@pytest.mark.server_kinds("redis8")  # a program shows its figures above on every kind, and a command the same
async def test_the_worker_command_serves_metrics_and_probes(
    cluster: LocalCluster, queue_name: str, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "serving_app.py").write_text(
        f"import shardq\nworker = shardq.Worker({queue_name!r}, group='g', shards=2)\n"
        "@worker.handler\nasync def handle(message): pass\n"
    )
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        async with queue.producer() as producer:
            await producer.send_many((f"k{number}", number) for number in range(20))
    command = start("work", "serving_app:worker", "--metrics-port", "0", "--url", cluster.url)
    base = listening(command)
    until(lambda: get(f"{base}/readyz") == (200, "ok\n"), "it is ready")
    until(lambda: read(get(f"{base}/metrics")[1])["shardq_handler_seconds_count", "done"] == 20, "all is handled")
    assert get(f"{base}/livez") == (200, "ok\n")
    assert get(f"{base}/anything")[0] == 404
    assert get(f"{base}/metrics", "POST")[0] == 405
    assert "process_resident_memory_bytes" in get(f"{base}/metrics")[1]
    assert command.stop() == 0


async def test_a_worker_without_redis_is_alive_and_not_ready(start: Start, tmp_path: Path) -> None:
    (tmp_path / "serving_app.py").write_text(
        "import shardq\nworker = shardq.Worker('q', group='g', shards=2)\n"
        "@worker.handler\nasync def handle(message): pass\n"
    )
    with LocalCluster(1, 0, None, find_server(None), settings=KEPT) as own:
        command = start("work", "serving_app:worker", "--metrics-port", "0", "--url", own.url)
        base = listening(command)
        until(lambda: get(f"{base}/readyz")[0] == 200, "it is ready")
        own.processes[0].kill()
        until(lambda: get(f"{base}/readyz")[0] == 503, "it is not ready any more")
        assert "is Redis up?" in get(f"{base}/readyz")[1]
        assert get(f"{base}/livez") == (200, "ok\n")
        own.processes[0].restart()
        until(lambda: get(f"{base}/readyz")[0] == 200, "it is ready again")
        assert command.stop() == 0


def waits(command: Command) -> None:
    until(lambda: "waiting for Redis" in command.stderr, "it says what it waits for")


def is_ready(base: str) -> None:
    until(lambda: get(f"{base}/readyz")[0] == 200, "it is ready")


@pytest.mark.parametrize("masters", [1, 3])
async def test_with_probes_a_process_waits_for_redis(masters: int, start: Start, tmp_path: Path) -> None:
    """Where there is one master no node answers. Where there are three the two that are left serve no key."""
    (tmp_path / "serving_app.py").write_text(
        "import shardq\nworker = shardq.Worker('q', group='g', shards=2)\n"
        "@worker.handler\nasync def handle(message): pass\n"
    )
    with LocalCluster(masters, 0, None, find_server(None), settings=KEPT) as own:
        async with shardq.connect(own.url) as client:
            queue = await client.queue("q", shards=2)
            await queue.open_group("g")
        holder = own.processes[queue.keys.control_slot * masters // SLOTS]
        holder.kill()
        commands = [
            start("work", "serving_app:worker", "--metrics-port", "0", "--url", own.url),
            start("coordinator", "q", "--group", "g", "--metrics-port", "0", "--url", own.url),
        ]
        bases = [listening(command) for command in commands]
        for command, base in zip(commands, bases, strict=True):
            waits(command)
            assert get(f"{base}/livez") == (200, "ok\n")
            assert get(f"{base}/readyz")[0] == 503
        holder.restart()
        for command, base in zip(commands, bases, strict=True):
            try:
                is_ready(base)
            except OSError as gone:
                raise AssertionError(f"it ended instead: {command.stderr}") from gone
        assert [command.stop() for command in commands] == [0, 0]


async def test_a_process_that_waits_for_redis_can_be_stopped(start: Start) -> None:
    command = start("coordinator", "q", "--group", "g", "--metrics-port", "0", "--url", "redis://127.0.0.1:1")
    waits(command)
    assert command.stop() == 0


@pytest.mark.server_kinds("valkey9")  # what it asks the servers is asked by every worker
async def test_a_coordinator_serves_probes(cluster: LocalCluster, queue_name: str, start: Start) -> None:
    async with shardq.connect(cluster.url) as client:
        await (await client.queue(queue_name, shards=2)).open_group("g")
    command = start("coordinator", queue_name, "--group", "g", "--metrics-port", "0", "--url", cluster.url)
    base = listening(command)
    until(lambda: get(f"{base}/readyz") == (200, "ok\n"), "it is ready")
    assert command.stop() == 0


def listening(command: Command) -> str:
    """The address it says it serves at."""
    until(lambda: "metrics at" in command.stderr, "it says where its metrics are")
    match = re.search(r"metrics at (http://127\.0\.0\.1:\d+)/metrics", command.stderr)
    assert match is not None
    return match[1]


def ask_until_it_fails(url: str) -> list[tuple[int, str]]:
    until(lambda: get(url)[0] != 200, "it is not alive")
    return [get(url)]


async def test_a_loop_that_hangs_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardq.ops.http.STILL_S", 0.2)
    registry = prometheus_client.CollectorRegistry()
    async with serving(registry, 0) as (url, _):
        answers: list[tuple[int, str]] = []
        alive = url.replace("/metrics", "/livez")
        assert await anyio.to_thread.run_sync(get, alive) == (200, "ok\n")
        asking = threading.Thread(target=lambda: answers.extend(ask_until_it_fails(alive)))
        asking.start()
        asking.join()  # on purpose: this is the loop that stands still
    assert answers[-1][0] == 503
    assert "stands still" in answers[-1][1]


async def test_a_port_in_use_is_said() -> None:
    registry = prometheus_client.CollectorRegistry()
    async with serving(registry, 0) as (url, _):
        port = int(url.split(":")[2].split("/")[0])
        with pytest.raises(shardq.UsageError, match=f"can't listen on 127.0.0.1:{port} .*another port"):
            async with serving(registry, port):
                pass


def test_the_page_is_the_code() -> None:
    written = run([executable, "-m", "shardq.ops.metrics_page"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert written.stdout == page()
    assert (ROOT / "docs/metrics.md").read_text() == page(), "run: python -m shardq.ops.metrics_page > docs/metrics.md"
