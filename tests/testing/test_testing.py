"""shardq.testing, as its users meet it: a worker drained in a test, a cluster for the run, fixtures in a project."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

import shardq
from shardq.ops.local_cluster import LocalCluster, find_server
from shardq.storage.commands import pack_command
from shardq.testing import Drained, NotDrained, drain, drain_sync, local_cluster, unique_queue_name

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parents[2]
QUICK = shardq.Retry(attempts=3, base=0.05)


@pytest.fixture(scope="session")
def url(shared_clusters: Callable[[Path], LocalCluster]) -> str:
    """One kind of server: nothing here depends on it."""
    return shared_clusters(find_server(None)).url


async def send(client: shardq.Client, name: str, *values: object) -> None:
    queue = await client.queue(name, shards=4)
    async with queue.producer() as producer:
        await producer.send_many((f"key-{number % 5}", value) for number, value in enumerate(values))


async def test_a_worker_is_drained_as_often_as_one_likes(url: str, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group="g", shards=4)
    handled: list[object] = []

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        handled.append(message.value)

    async with shardq.connect(url) as client:
        assert await drain(worker, client) == Drained(0, 0), "the worker declares the queue"
        await send(client, queue_name, *range(100))
        assert await drain(worker, client) == Drained(100, 0)
        await send(client, queue_name, *range(100, 103))
        assert await drain(worker, client) == Drained(3, 0)
        assert await drain(worker, client) == Drained(0, 0)
    assert sorted(map(str, handled)) == sorted(map(str, range(103)))


async def test_what_a_handler_sends_to_its_own_queue_is_drained_too(url: str, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group="g")
    async with shardq.connect(url) as client:
        await send(client, queue_name, 5)
        async with (await client.queue(queue_name)).producer() as producer:

            @worker.handler
            async def handle(message: shardq.Message) -> None:
                if message.value:
                    await producer.send(message.value - 1, key="k")

            assert await drain(worker, client) == Drained(6, 0)


async def test_a_batch_handler_and_entries_of_other_clients(url: str, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group="g")
    handled: list[object] = []

    @worker.batch_handler
    async def handle(messages: Sequence[shardq.Message]) -> None:
        handled.extend(message.value for message in messages)

    async with shardq.connect(url) as client:
        queue = await client.queue(queue_name, shards=4)
        shard = queue.shards[0]
        await queue.client.pipes.command(shard.slot, pack_command("XADD", shard.stream, "*", "field", "text"))
        assert (await drain(worker, client)).dead == 0
    assert handled == [{"field": b"text"}]


async def test_retries_are_waited_for_and_dead_letters_counted(url: str, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group="g")

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        if message.value == "bad" or (message.value == "second time" and message.attempt == 1):
            raise ValueError(message.value)

    async with shardq.connect(url) as client:
        await send(client, queue_name, "good", "second time", "bad")
        assert await drain(worker, client, retry=QUICK) == Drained(handled=2, dead=1)
    assert worker.settings.retry == shardq.Retry()


async def test_retries_are_left_alone_on_request(url: str, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group="g", retry=shardq.Retry(base=3.0))
    tries = 0

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        nonlocal tries
        if message.value == "bad":
            tries += 1
            raise ValueError(message.value)

    async with shardq.connect(url) as client:
        await send(client, queue_name, "good", "bad")
        assert await drain(worker, client, wait_for_retries=False) == Drained(handled=1, dead=0)
        with pytest.raises(NotDrained, match="1 of them wait to be tried again") as caught:
            await drain(worker, client, timeout=0.2)
        assert (caught.value.left, caught.value.waiting) == (1, 1)
        assert await drain(worker, client, retry=QUICK) == Drained(handled=0, dead=1)
    assert tries == QUICK.attempts


async def test_delayed_messages_are_waited_for_on_request(url: str, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group="g")

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        await anyio.lowlevel.checkpoint()

    async with shardq.connect(url) as client:
        queue = await client.queue(queue_name, shards=4)
        async with queue.producer() as producer:
            await producer.send("later", delay=2.0)
            assert await drain(worker, client) == Drained(0, 0)
            with pytest.raises(NotDrained, match="1 more are not due") as caught:
                await drain(worker, client, timeout=0.3, wait_for_delayed=True)
            assert (caught.value.left, caught.value.delayed) == (0, 1)
            assert await drain(worker, client, wait_for_delayed=True) == Drained(1, 0)


async def test_what_is_left_is_told_and_nothing_runs_on(url: str, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group="g", concurrency=100)
    stuck, cancelled = 0, 0

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        nonlocal stuck, cancelled
        if message.value == "stuck":
            stuck += 1
            try:
                await anyio.sleep_forever()
            finally:
                cancelled += 1

    async with shardq.connect(url) as client:
        await send(client, queue_name, "fine", "stuck", "fine", "stuck")
        tasks = len(anyio.get_running_tasks())
        for done in (Drained(2, 0), Drained(0, 0)):
            with pytest.raises(NotDrained, match=r"2 messages unfinished.*longer timeout=") as caught:
                await drain(worker, client, timeout=1.5)
            error = caught.value
            assert (error.left, error.waiting, error.delayed, error.done) == (2, 0, 0, done)
            assert len(anyio.get_running_tasks()) == tasks
            assert stuck == cancelled
        assert stuck == 4
        with anyio.move_on_after(0.5) as scope:
            await drain(worker, client)
        assert scope.cancelled_caught
        assert len(anyio.get_running_tasks()) == tasks
        assert cancelled == stuck


async def test_a_worker_that_stops_itself_is_not_waited_for(url: str, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group="g", drain_limit=0.1)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        worker.stop()
        await anyio.sleep_forever()

    async with shardq.connect(url) as client:
        await send(client, queue_name, 1)
        with pytest.raises(NotDrained, match="when the worker was stopped"):
            await drain(worker, client)


async def test_wrong_uses_have_their_errors(url: str, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group="g")
    async with shardq.connect(url) as client:
        with pytest.raises(shardq.UsageError, match="no handler"):
            await drain(worker, client)

        @worker.handler
        async def handle(message: shardq.Message) -> None:
            await anyio.sleep_forever()

        with pytest.raises(shardq.UnknownQueue, match="shards=N"):
            await drain(worker, client)
        for timeout in (0, -1, float("nan")):
            with pytest.raises(shardq.UsageError, match="above 0"):
                await drain(worker, client, timeout=timeout)
        await send(client, queue_name, 1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run, client)
            await anyio.lowlevel.checkpoint()
            with pytest.raises(shardq.ClosedError, match="runs already"):
                await drain(worker, client)
            tasks.cancel_scope.cancel()


def test_plain_tests_drain_without_async(url: str, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group="g")

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        if message.value == 7:
            await anyio.sleep_forever()

    with shardq.SyncProducer(url, queue_name, shards=4) as producer:
        producer.send_many(("k", number) for number in range(7))
        assert drain_sync(worker, url) == Drained(7, 0)
        producer.send(7)
    with pytest.raises(NotDrained, match="1 messages unfinished"):
        drain_sync(worker, url, timeout=0.5)


def test_queue_names_are_unique() -> None:
    assert len({unique_queue_name() for _ in range(100)}) == 100
    assert unique_queue_name("orders").startswith("orders-")


def test_a_cluster_without_pytest() -> None:
    script = """
import sys
sys.modules["pytest"] = None
import shardq
from shardq.testing import local_cluster
with local_cluster(masters=1) as url:
    with shardq.SyncProducer(url, "orders", shards=2) as producer:
        print(producer.send("x"))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "/" in done.stdout


def test_a_server_that_is_none_is_told() -> None:
    with pytest.raises(shardq.UsageError, match="/nowhere"), local_cluster(server="/nowhere"):
        pass


CONFTEST = """
import shardq.testing
import pytest

pytest_plugins = ["shardq.testing"]

@pytest.fixture
def anyio_backend():
    return "asyncio"
"""

BILLING = """
import shardq

totals = {}
worker = shardq.Worker("orders", group="billing", shards=4)

@worker.handler
async def bill(message):
    totals[message.key] = totals.get(message.key, 0) + message.value["amount"]
"""

TEST_BILLING = """
import billing
import pytest
import shardq
from shardq.testing import Drained, drain, drain_sync

@pytest.mark.anyio
async def test_orders_are_billed(shardq_url):
    async with shardq.connect(shardq_url) as client:
        orders = await client.queue("orders", shards=4)
        async with orders.producer() as producer:
            await producer.send({"amount": 7}, key="user:42")
            await producer.send({"amount": 5}, key="user:42")
        assert await drain(billing.worker, client) == Drained(handled=2, dead=0)
    assert billing.totals == {"user:42": 12}

def test_plain(shardq_cluster, shardq_queue):
    worker = shardq.Worker(shardq_queue, group="g")
    seen = []

    @worker.handler
    async def handle(message):
        seen.append(message.value)

    with shardq.SyncProducer(shardq_cluster.url, shardq_queue, shards=2) as producer:
        producer.send("hello")
    assert drain_sync(worker, shardq_cluster.url).handled == 1
    assert seen == ["hello"]

def test_a_failing_one_says_what_is_left(shardq_url, shardq_queue):
    worker = shardq.Worker(shardq_queue, group="g", shards=1)

    @worker.handler
    async def handle(message):
        raise ValueError("out of stock")

    with shardq.SyncProducer(shardq_url, shardq_queue, shards=1) as producer:
        producer.send("hello")
    drain_sync(worker, shardq_url, timeout=0.5)
"""


def test_a_project_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "billing.py").write_text(BILLING)
    (tmp_path / "test_billing.py").write_text(TEST_BILLING)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-W", "error", "-q"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "NotDrained: queue" in done.stdout
    assert "out of stock" in done.stdout, "the log of the failing handler is shown"
