"""Every public call ends within its time limit, with the right error, whatever has become of the cluster."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread
import pytest

import shardq
from shardq.errors import JobTimeout, NotStored, ShardqError, StoreError, StoreTimeout, StoreUnavailable
from shardq.ops.inspect import read_queue
from shardq.ops.install import install
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime.client import OPEN_TIMEOUT_S
from shardq.runtime.jobs import Job
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.standalone import coordinate
from shardq.storage.exchange import ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S
from shardq.storage.pipes import DEFAULT_TIMEOUT_S as CALL_S
from shardq.testing import NotDrained, drain
from tests.runtime.harness import GROUP, until
from tests.runtime.outages_rig import breakable, gone, stopped

pytestmark = pytest.mark.anyio

SLACK_S = 8.0  # for a machine that is busy with all of these at once: the test is for what hangs
TRY_S = CONNECT_TIMEOUT_S + ANSWER_TIMEOUT_S
DELIVERY_S = 2.0


@dataclass
class Scene:
    """What was opened while the cluster was well."""

    url: str
    client: shardq.Client
    queue: shardq.Queue
    producer: shardq.Producer
    sync: shardq.SyncProducer
    closing: shardq.SyncProducer
    job: Job
    message_id: str

    @property
    def dead(self) -> Any:
        return self.queue.dead_letters(GROUP)


Do = Callable[[Scene], Awaitable[Any]]


async def each(found: Any) -> list[Any]:
    return [item async for item in found]


async def hear(scene: Scene) -> None:
    async with scene.client.listen("c", timeout=2):
        pass


async def work(scene: Scene, **options: Any) -> None:
    await worker_of(scene).run(scene.client)


async def drain_it(scene: Scene) -> None:
    await drain(worker_of(scene), scene.client, timeout=1)


def worker_of(scene: Scene) -> shardq.Worker:
    worker = shardq.Worker(scene.queue.name, group=GROUP, lease=1.0, drain_limit=1.0)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        pass

    return worker


async def send_in_own_producer(scene: Scene) -> None:
    async with scene.queue.producer(delivery_timeout=DELIVERY_S) as producer:
        await producer.send("x", key="k")


async def wait_for_room(scene: Scene) -> None:
    """The buffer is full with one message; another finds no room."""
    producer = scene.queue.producer(delivery_timeout=DELIVERY_S, max_buffered_bytes=10)
    results: list[StoreError] = []

    async def send() -> None:
        try:
            await producer.send(b"x" * 100, key="k")
        except StoreError as error:
            results.append(error)

    async with producer, anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        tasks.start_soon(send)
    assert len(results) == 2
    raise results[1]


async def flush(scene: Scene) -> None:
    async with scene.queue.producer(delivery_timeout=DELIVERY_S) as producer:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(producer.send_many, [("k", "x")])
            await until(lambda: producer.buffered_bytes > 0, 10, "a message under way")
            tasks.cancel_scope.cancel()
        await producer.flush()


def in_thread(call: Callable[[Scene], Any]) -> Do:
    async def run(scene: Scene) -> Any:
        return await anyio.to_thread.run_sync(call, scene)

    return run


def close_in_time(scene: Scene) -> None:
    scene.closing.send_soon("x")
    scene.closing.close(timeout=2)


async def sync_from_scratch(scene: Scene) -> None:
    def send() -> None:
        with shardq.SyncProducer(scene.url, scene.queue.name) as producer:
            producer.send("x")

    await anyio.to_thread.run_sync(send)


async def coordinate_it(scene: Scene) -> None:
    await coordinate(scene.client, scene.queue.name, GROUP, WorkerSettings(), anyio.Event())


# call: (limit in seconds as its documentation has it, what it may raise)
CALLS: dict[str, tuple[float, type[ShardqError] | tuple[type[ShardqError], ...], Do]] = {
    "client.queue": (CALL_S, StoreError, lambda s: s.client.queue(s.queue.name)),
    "client.queue declares": (CALL_S, StoreError, lambda s: s.client.queue("new-one", shards=8)),
    "client.queue_names": (CALL_S, StoreError, lambda s: s.client.queue_names()),
    "client.broadcast": (CALL_S, StoreError, lambda s: s.client.broadcast("c", "x")),
    "client.listen": (2, StoreUnavailable, hear),
    "client.schedule": (CALL_S, StoreError, lambda s: s.client.schedule(s.queue.name, "tick", "* * * * *")),
    "client.unschedule": (CALL_S, StoreError, lambda s: s.client.unschedule(s.queue.name, "tick")),
    "client.schedules": (CALL_S, StoreError, lambda s: s.client.schedules(s.queue.name)),
    "queue.change": (CALL_S, StoreError, lambda s: s.queue.change(max_backlog=1000)),
    "queue.delete": (CALL_S, StoreError, lambda s: s.queue.delete(force=True)),
    "queue.open_group": (CALL_S, StoreError, lambda s: s.queue.open_group("other")),
    "queue.groups": (CALL_S, StoreError, lambda s: s.queue.groups()),
    "queue.reset_group": (CALL_S, StoreError, lambda s: s.queue.reset_group(GROUP, "earliest", force=True)),
    "queue.delete_group": (CALL_S, StoreError, lambda s: s.queue.delete_group(GROUP, force=True)),
    "queue.counters": (CALL_S, StoreError, lambda s: s.queue.counters()),
    "queue.history": (2 * CALL_S, StoreError, lambda s: each(s.queue.history())),
    "queue.history by time": (2 * CALL_S, StoreError, lambda s: each(s.queue.history(reverse=True, start=1.0))),
    "queue.peek": (2 * CALL_S, StoreError, lambda s: s.queue.peek()),
    "queue.tail": (2 * CALL_S, StoreError, lambda s: each(s.queue.tail())),
    "queue.trim": (CALL_S, StoreError, lambda s: s.queue.trim("latest")),
    "queue.delete_message": (CALL_S, StoreError, lambda s: s.queue.delete_message(s.message_id, timeout=2)),
    "dead.find": (CALL_S, StoreError, lambda s: each(s.dead.find())),
    "dead.get": (CALL_S, StoreError, lambda s: s.dead.get("0/1-0")),
    "dead.replay": (CALL_S, StoreError, lambda s: s.dead.replay()),
    "dead.replay of ids": (CALL_S, StoreError, lambda s: s.dead.replay(["0/1-0"])),
    "dead.purge": (CALL_S, StoreError, lambda s: s.dead.purge()),
    "job.state": (CALL_S, StoreError, lambda s: s.job.state()),
    "job.wait": (2, (StoreError, JobTimeout), lambda s: s.job.wait(timeout=2)),
    "job.wait without end": (CALL_S, StoreError, lambda s: s.job.wait()),
    "producer.send": (DELIVERY_S + TRY_S, StoreError, lambda s: s.producer.send("x", key="k")),
    "producer.send later": (DELIVERY_S + TRY_S, StoreError, lambda s: s.producer.send("x", key="k", delay=1)),
    "producer.send_many": (DELIVERY_S + TRY_S, NotStored, lambda s: s.producer.send_many([("a", 1), ("b", 2)])),
    "producer.submit": (DELIVERY_S + TRY_S, StoreError, lambda s: s.producer.submit("x", key="k")),
    "producer.flush": (DELIVERY_S + TRY_S, NotStored, flush),
    "producer, left": (DELIVERY_S + TRY_S, StoreError, send_in_own_producer),
    "producer.send without room": (2 * DELIVERY_S + TRY_S, StoreError, wait_for_room),
    "worker.run": (CALL_S, StoreError, work),
    "coordinate": (CALL_S, StoreError, coordinate_it),
    "testing.drain": (1 + CALL_S, (StoreError, NotDrained), drain_it),
    "ops.install": (2 * TRY_S, StoreError, lambda s: install(s.client)),
    "ops.read_queue": (2 * CALL_S, StoreError, lambda s: read_queue(s.client, s.queue.name)),
    "sync.send": (2, StoreTimeout, in_thread(lambda s: s.sync.send("x", timeout=2))),
    "sync.send to its delivery timeout": (DELIVERY_S + TRY_S, StoreError, in_thread(lambda s: s.sync.send("x"))),
    "sync.send_soon": (DELIVERY_S + TRY_S, StoreError, in_thread(lambda s: s.sync.send_soon("x").result())),
    "sync.send_many": (DELIVERY_S + TRY_S, NotStored, in_thread(lambda s: s.sync.send_many([("a", 1)]))),
    "sync.close": (2, StoreTimeout, in_thread(close_in_time)),
    "sync, connecting": (OPEN_TIMEOUT_S, StoreUnavailable, sync_from_scratch),
}


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[LocalCluster]:
    with breakable() as made:
        yield made


@asynccontextmanager
async def scene(url: str, queue_name: str) -> AsyncIterator[Scene]:
    async with shardq.connect(url) as client:
        queue = await client.queue(queue_name, shards=8)
        await queue.open_group(GROUP)
        sync, closing = (shardq.SyncProducer(url, queue_name, delivery_timeout=DELIVERY_S) for _ in range(2))
        async with queue.producer() as first:
            job, message_id = await first.submit("x", key="k"), await first.send("x", key="k")
        for each_sync in (sync, closing):
            await anyio.to_thread.run_sync(lambda made=each_sync: made.send("x"))  # type: ignore[misc]
        producer = queue.producer(delivery_timeout=DELIVERY_S)
        await producer.__aenter__()
        try:
            yield Scene(url, client, queue, producer, sync, closing, job, message_id)
        finally:
            for closed in (producer.close(), close(sync), close(closing)):
                try:
                    await closed
                except ShardqError:
                    pass  # what this was for has been seen by then


async def close(producer: shardq.SyncProducer) -> None:
    await anyio.to_thread.run_sync(lambda: producer.close(timeout=20))


async def check(name: str, scene: Scene, wrong: dict[str, str]) -> None:
    limit_s, expected, do = CALLS[name]
    with anyio.move_on_after(limit_s + SLACK_S) as limit:
        try:
            wrong[name] = f"returned {await do(scene)!r}"
        except expected as error:
            if not str(error):
                wrong[name] = "an error that says nothing"
                return
            wrong.pop(name, None)
        except Exception as error:
            wrong[name] = f"raised {error!r}"
    if limit.cancelled_caught:
        wrong[name] = f"no end within {limit_s + SLACK_S:g} s"


@pytest.mark.parametrize("broken", [stopped, gone])
async def test_every_call_ends_within_its_limit_while_all_masters_are_away(
    own_cluster: LocalCluster, queue_name: str, broken: Callable[[LocalCluster], AbstractContextManager[None]]
) -> None:
    wrong: dict[str, str] = {}
    async with scene(own_cluster.url, queue_name) as opened:
        with broken(own_cluster):
            async with anyio.create_task_group() as tasks:
                for name in CALLS:
                    tasks.start_soon(check, name, opened, wrong)
    assert not wrong


@contextmanager
def deaf_address() -> Iterator[str]:
    """A port whose connections are never accepted nor refused: its queue of connections is full."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        waiting = []
        for _ in range(4):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(listening.getsockname())
            waiting.append(one)
        try:
            yield f"redis://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            for one in waiting:
                one.close()


async def test_entering_a_client_ends_when_connects_hang() -> None:
    with deaf_address() as url, anyio.fail_after(OPEN_TIMEOUT_S + SLACK_S):
        with pytest.raises(StoreUnavailable, match="no cluster node answers"):
            async with shardq.connect(url):
                pass


async def test_entering_a_client_does_not_wait_for_each_hanging_master_in_turn(own_cluster: LocalCluster) -> None:
    with stopped(own_cluster, 1, 2), anyio.fail_after(OPEN_TIMEOUT_S + SLACK_S):
        async with shardq.connect(own_cluster.url) as client:
            assert len(client.cluster.primaries()) == 3


async def test_a_worker_that_runs_stops_within_its_limits_while_all_masters_hang(
    own_cluster: LocalCluster, queue_name: str
) -> None:
    started = anyio.Event()
    worker = shardq.Worker(queue_name, group=GROUP, shards=4, lease=1.0, drain_limit=1.0)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        started.set()

    async with shardq.connect(own_cluster.url) as client:
        queue = await client.queue(queue_name, shards=4)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run, client)
            async with queue.producer() as producer:
                await producer.send("x")
            await started.wait()
            with stopped(own_cluster), anyio.fail_after(1.0 + 1.0 + 3.0 + 2 * SLACK_S):
                worker.stop()
                await until(lambda: worker._stop is None, 60, "the worker's end")


async def test_waiting_calls_behind_a_hanging_node_end_at_their_own_limit(
    own_cluster: LocalCluster, queue_name: str
) -> None:
    """Ten times what one write takes, so that most are never written; each had its turn before they ended once."""
    ended: list[StoreError] = []
    async with shardq.connect(own_cluster.url) as client:

        async def ask(number: int) -> None:
            with pytest.raises(StoreError) as raised:
                await client.pipes.command(0, b"*1\r\n$4\r\nPING\r\n", timeout_s=1.0)
            ended.append(raised.value)

        with stopped(own_cluster, 0), anyio.fail_after(1.0 + SLACK_S):
            async with anyio.create_task_group() as tasks:
                for number in range(640):
                    tasks.start_soon(ask, number)
        unknown = [error.outcome_unknown for error in ended]
        assert unknown.count(True) >= 64
        assert unknown.count(False) >= 64, "what was never written is known not to be carried out"
        assert await client.pipes.command(0, b"*1\r\n$4\r\nPING\r\n") == b"PONG"


async def test_batches_behind_one_another_do_not_each_wait_past_the_delivery_timeout(
    own_cluster: LocalCluster, queue_name: str
) -> None:
    async with shardq.connect(own_cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        node = [port for port in own_cluster.ports if client.cluster.node_of(queue.shards[0].slot).port == port]  # type: ignore[union-attr]
        producer = queue.producer(delivery_timeout=1.0, max_batch_messages=1)
        await producer.__aenter__()
        with stopped(own_cluster, own_cluster.ports.index(node[0])), anyio.fail_after(1.0 + TRY_S + SLACK_S):
            with pytest.raises(NotStored) as raised:
                await producer.send_many([("k", number) for number in range(40)])
            with pytest.raises(StoreError):
                await producer.send("one more", key="k")
        assert raised.value.failed > 30
        await producer.close()
