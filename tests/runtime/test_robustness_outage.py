"""Outages of one master and of all: producers wait, workers resume by themselves, nothing is lost or done twice, no
storm of tries, and a log that stays short."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import pytest

import shardq
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime.outages import AGAIN_FIRST_S, AGAIN_LAST_S, Outages
from shardq.storage.commands import pack_command
from tests.runtime.harness import GROUP, check_equation, drained, until
from tests.runtime.outages_rig import HOST, breakable, gone, reached, stopped

pytestmark = pytest.mark.anyio

KEYS, SHARDS = 20, 8


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[LocalCluster]:
    with breakable() as made:
        yield made


@pytest.fixture(scope="module")
def each_kind(server_binary: Path) -> Iterator[LocalCluster]:
    with breakable(server_binary) as made:
        yield made


class Traffic:
    """Sends numbers by key, one after another; a worker writes each down with an effect."""

    def __init__(self) -> None:
        self.sent: dict[str, list[int]] = {f"key-{key}": [] for key in range(KEYS)}
        self.handled_s: list[float] = []
        self.stopped = False

    async def send(self, producer: shardq.Producer) -> None:
        async with anyio.create_task_group() as tasks:
            for key in self.sent:
                tasks.start_soon(self._send_key, producer, key)

    async def _send_key(self, producer: shardq.Producer, key: str) -> None:
        number = 0
        while not self.stopped:
            await producer.send(number, key=key)
            self.sent[key].append(number)
            number += 1
            await anyio.sleep(0.02)

    def worker(self, queue_name: str, lease: float = 2.0) -> shardq.Worker:
        worker = shardq.Worker(queue_name, group=GROUP, lease=lease)

        @worker.handler
        async def handle(message: shardq.Message) -> None:
            async with message.atomic() as tx:
                tx.rpush(message.local_key(f"done:{message.key!s}"), message.value)
            self.handled_s.append(time.monotonic())

        return worker

    async def check(self, queue: shardq.Queue) -> None:
        """Each once, in order."""
        for key, numbers in self.sent.items():
            packed = pack_command("LRANGE", queue.local_key(f"done:{key}", key), 0, -1)
            done = [int(each) for each in await queue.client.pipes.command(queue.place_of(key).slot, packed)]
            assert done == numbers, key


@asynccontextmanager
async def at_work(url: str, queue_name: str, traffic: Traffic, workers: int) -> AsyncIterator[shardq.Queue]:
    """Workers with connections of their own, until the block ends."""
    async with shardq.connect(url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        made = [traffic.worker(queue_name) for _ in range(workers)]

        async def run(worker: shardq.Worker) -> None:
            async with shardq.connect(url) as own:
                await worker.run(own)

        async with anyio.create_task_group() as tasks:
            for worker in made:
                tasks.start_soon(run, worker)
            yield queue
            for worker in made:
                worker.stop()


@pytest.mark.parametrize("broken", [stopped, gone])
async def test_everything_resumes_by_itself_when_the_cluster_is_back(
    each_kind: LocalCluster, queue_name: str, broken: Callable[[LocalCluster], AbstractContextManager[None]]
) -> None:
    traffic = Traffic()
    async with at_work(each_kind.url, queue_name, traffic, 2) as queue:
        async with queue.producer() as producer, anyio.create_task_group() as tasks:
            tasks.start_soon(traffic.send, producer)
            await until(lambda: len(traffic.handled_s) > 100, 30, "messages handled")
            with broken(each_kind):
                before = len(traffic.handled_s)
                await anyio.sleep(3)  # longer than the leases
                assert len(traffic.handled_s) - before < 100, "nothing can be committed now"
                before = len(traffic.handled_s)
            resumed_s = await until(lambda: len(traffic.handled_s) > before, 30, "the first message after the return")
            before = len(traffic.handled_s)
            await until(lambda: len(traffic.handled_s) > before + 500, 30, "traffic as before")
            traffic.stopped = True
        print(f"first message {resumed_s:.2f} s after the return")
        await until(lambda: drained(queue), 30, "an empty backlog")
        await traffic.check(queue)
        await check_equation(queue)


# -- the log -----------------------------------------------------------------------------------------------------


def test_an_outage_is_told_at_its_begin_then_ever_more_rarely_and_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    outages = Outages(lambda: now)
    with caplog.at_level(logging.WARNING, "shardq"):
        outages.well("it beats")
        for second in range(3600):
            now = float(second)
            outages.failed("it beats", "no answer")
        lines = [record.getMessage() for record in caplog.records]
        assert lines[0] == "it beats: no answer"
        assert lines[1] == f"it beats: no answer [16 failures in {AGAIN_FIRST_S:.0f} s]"
        assert len(lines) < 15
        outages.well("it beats")
        assert caplog.records[-1].getMessage() == "over: it beats [3600 failures in 3599 s]"
        caplog.clear()
        outages.well("it beats")
        assert not caplog.records
        outages.failed("it beats", "no answer")
        assert caplog.records[-1].getMessage() == "it beats: no answer", "a new outage begins anew"
    assert AGAIN_LAST_S < 3600


def test_shards_share_the_lines_of_an_outage_and_it_is_over_when_the_last_is_well(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 0.0
    outages = Outages(lambda: now)
    with caplog.at_level(logging.WARNING, "shardq"):
        for shard in range(1000):
            outages.failed("no lease", "no answer", shard)
        assert [record.getMessage() for record in caplog.records] == ["no lease (shard 0): no answer"]
        now = AGAIN_FIRST_S + 1
        outages.failed("no lease", "no answer", 3)
        assert caplog.records[-1].getMessage().endswith("[1001 failures in 16 s, 1000 shards now]")
        for shard in range(1000):
            assert len(caplog.records) == 2
            outages.well("no lease", shard)
        assert caplog.records[-1].getMessage() == "over: no lease [1001 failures in 16 s]"


async def test_a_long_outage_makes_few_lines(
    own_cluster: LocalCluster, queue_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The first worker leads, so that it has everything to complain of; eight shards are all away."""
    traffic = Traffic()
    with caplog.at_level(logging.INFO, "shardq"):
        async with at_work(own_cluster.url, queue_name, traffic, 1) as queue, queue.producer() as producer:
            await producer.send_many((key, 0) for key in traffic.sent)
            await until(lambda: len(traffic.handled_s) == KEYS, 30, "messages handled")
            caplog.clear()
            with gone(own_cluster):
                await anyio.sleep(6)
                during = [record.getMessage() for record in caplog.records]
            before = len(traffic.handled_s)
            await producer.send_many((key, 1) for key in traffic.sent)
            await until(lambda: len(traffic.handled_s) == before + KEYS, 30, "messages handled again")
            await until(lambda: drained(queue), 30, "an empty backlog")
            lines = [record.getMessage() for record in caplog.records]
    print(*lines, sep="\n")
    assert 2 <= len(during) <= 8, "\n".join(during)
    begun = {line.split(":", 1)[0] for line in during}
    assert any(line.startswith("over: ") for line in lines)
    assert len(lines) <= 3 * len(begun) + 8, "\n".join(lines)


# -- no storm ------------------------------------------------------------------------------------------------------


@contextmanager
def counting(port: int, counts: list[float]) -> Iterator[None]:
    """In the place of a node that is gone: notes each connection and closes it."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, port))
        listening.listen(1000)

        def accept() -> None:
            while True:
                try:
                    listening.accept()[0].close()
                except OSError:
                    return
                counts.append(time.monotonic())

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


async def test_an_outage_of_one_master_brings_no_storm_upon_it_nor_upon_the_others(
    own_cluster: LocalCluster, queue_name: str
) -> None:
    """One producer with 10,000 messages that wait, and three workers: four clients with one connection to each node for
    calls, and three of them with one for bells."""
    traffic, connects = Traffic(), list[float]()
    async with at_work(own_cluster.url, queue_name, traffic, 3) as queue:
        async with queue.producer() as producer, anyio.create_task_group() as tasks:
            await producer.send("warm", key="key-0")
            await until(lambda: len(traffic.handled_s) == 1, 30, "a message handled")
            with gone(own_cluster, 2):
                with counting(own_cluster.ports[2], connects):
                    for number in range(10_000):
                        tasks.start_soon(_send, producer, f"k{number % 500}", number)
                    # What the other nodes have is handled; then it is calm, but for what can't be stored.
                    await until(lambda: time.monotonic() - traffic.handled_s[-1] > 1, 30, "nothing more to handle")
                    assert len(traffic.handled_s) < 9000
                    calm, started_s = [reached(own_cluster, node) for node in range(2)], time.monotonic()
                    begun = len(connects)
                    await anyio.sleep(4)
                    took_s = time.monotonic() - started_s
                    later = [reached(own_cluster, node) for node in range(2)]
                    tried = (len(connects) - begun) / took_s
            returned_s = time.monotonic()
            await until(lambda: len(traffic.handled_s) >= 10_001, 30, "all messages handled")
            resumed_s = time.monotonic() - returned_s
            connections = reached(own_cluster, 2)[0]
        await until(lambda: drained(queue), 30, "an empty backlog")
    made = [(now[0] - then[0]) / took_s for then, now in zip(calm, later, strict=True)]
    asked = [(now[1] - then[1]) / took_s for then, now in zip(calm, later, strict=True)]
    print(f"a second: {tried:.1f} connects to the one away, {made} to the others, {asked} calls to these")
    print(f"all handled {resumed_s:.1f} s after the return, over {connections} connections")
    # Per client at most: a write each quarter of a second, the topology once, and two tries of the bells.
    assert tried < 60
    assert max(made) < 10, "the others are connected to already"
    assert max(asked) < 100, "an idle worker's own calls among them"
    assert connections < 100


async def _send(producer: shardq.Producer, key: str, number: int) -> None:
    await producer.send(number, key=key)
