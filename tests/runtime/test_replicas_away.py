"""Replicas that are away: the default durability does not go without them in silence, and no lease changes hands on the
word of a master that may be cut off. What a client sees of a cluster is the same for every kind of server.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

import shardq
from shardq.core.servers import nodes_away
from shardq.ops.exporter import QueueReader
from shardq.ops.local_cluster import LocalCluster, LocalServer
from shardq.runtime import grants, replica_watch
from shardq.storage.nodes import node_command, node_info
from tests.runtime.harness import GROUP, owners, running, until

pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis8")]


@pytest.fixture
def cluster(server_binary: Path) -> Iterator[LocalCluster]:
    with LocalCluster(3, 1, None, server_binary) as made:
        yield made


def is_replica(server: LocalServer) -> bool:
    return node_info(server.host, server.port, "replication")["role"] == "slave"


def replicas(cluster: LocalCluster) -> list[LocalServer]:
    return [server for server in cluster.processes if is_replica(server)]


async def test_who_comes_while_replicas_are_down_waits_for_them(cluster: LocalCluster, queue_name: str) -> None:
    down = replicas(cluster)
    for server in down:
        server.kill()

    def are_away() -> bool:
        return all("connected_slaves:0" in str(info) for info in (text(cluster, 0), text(cluster, 1), text(cluster, 2)))

    await until(are_away, 30, "the masters to know it")
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=3)
        assert client.confirm(None) is not None
        async with queue.producer() as producer, anyio.create_task_group() as tasks:
            stored: list[str] = []

            async def send() -> None:
                stored.append(await producer.send("x", key="k"))

            tasks.start_soon(send)
            with anyio.move_on_after(3):
                await until(lambda: bool(stored), 60, "what must not come")
            assert not stored
            for server in down:
                await anyio.to_thread.run_sync(server.restart)
            await until(lambda: bool(stored), 60, "the send to return")


async def test_replicas_that_are_gone_for_good_are_waited_for_until_they_are_forgotten(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A client and its producer live on after that, and go without them; one that asked for replicas does not."""
    monkeypatch.setattr(replica_watch, "COUNT_REPLICAS_EVERY_S", 0.2)
    masters = [server for server in cluster.processes if not is_replica(server)]
    gone = replicas(cluster)
    names = [str(node_command(server.host, server.port, "CLUSTER", "MYID")) for server in gone]
    for server in gone:
        server.kill()

    def are_away() -> bool:
        listed = [str(node_command(each.host, each.port, "CLUSTER", "NODES")) for each in masters]
        return all(nodes_away(text) == 3 for text in listed)

    await until(are_away, 30, "the masters to know it")
    async with shardq.connect(cluster.url) as client:
        await until(lambda: "CLUSTER FORGET" in caplog.text, 10, "the warning")
        queue = await client.queue(queue_name, shards=3)
        async with queue.producer(delivery_timeout=2.5) as producer:
            with pytest.raises(shardq.StoreTimeout, match="CLUSTER FORGET"):
                await producer.send("x", key="k")
            assert (await QueueReader(client, 0.0).snapshot()).nodes_away == 3
            for server in masters:
                for name in names:
                    node_command(server.host, server.port, "CLUSTER", "FORGET", name)
            await until(lambda: client.confirm(None) is None, 60, "the client to see it")
            assert not waits(producer)
            await producer.send("y", key="k")
        assert (await QueueReader(client, 0.0).snapshot()).nodes_away == 0
        assert "were forgotten" in caplog.text
        with pytest.raises(shardq.UsageError, match="add replicas"):
            queue.producer(durability="replica")


def text(cluster: LocalCluster, node: int) -> object:
    server = cluster.processes[node]
    return node_command(server.host, server.port, "INFO", "replication")


async def test_the_first_replica_is_waited_for_from_then_on(
    server_binary: Path, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_watch, "COUNT_REPLICAS_EVERY_S", 0.2)
    with LocalCluster(2, 0, None, server_binary) as cluster:
        first, second = cluster.processes
        await anyio.to_thread.run_sync(give_all_slots, first, second)
        async with shardq.connect(cluster.url) as client:
            assert client.confirm(None) is None
            queue = await client.queue(queue_name, shards=1)
            async with queue.producer() as producer:
                await producer.send("x")
                assert not waits(producer)
                own = node_command(first.host, first.port, "CLUSTER", "MYID")
                node_command(second.host, second.port, "CLUSTER", "REPLICATE", str(own))
                await until(lambda: client.confirm(None) is not None, 60, "the client to see the replica")
                await producer.send("y")
                assert waits(producer)
                explicit = queue.producer(durability="leader")
                assert not waits(explicit)


def waits(producer: shardq.Producer) -> bool:
    return producer.confirm is not None


def give_all_slots(first: LocalServer, second: LocalServer) -> None:
    """The second master is left without any."""
    for server in (second, first):
        node_command(server.host, server.port, "CLUSTER", "DELSLOTSRANGE", 8192, 16383)
    node_command(first.host, first.port, "CLUSTER", "ADDSLOTSRANGE", 8192, 16383)
    node_command(first.host, first.port, "CLUSTER", "BUMPEPOCH")
    deadline = time.monotonic() + 30
    while any(
        "cluster_state:ok" not in state(server) or "cluster_size:1" not in state(server) for server in (first, second)
    ):
        assert time.monotonic() < deadline, "the slots did not move"
        time.sleep(0.05)


def state(server: LocalServer) -> str:
    return str(node_command(server.host, server.port, "CLUSTER", "INFO"))


@pytest.mark.parametrize(("patience_s", "granted"), [(600.0, False), (0.0, True)])
async def test_no_lease_is_granted_on_the_word_of_a_master_that_may_be_cut_off(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch, patience_s: float, granted: bool
) -> None:
    """Its replica is silent, not gone: as when the network is split."""
    monkeypatch.setattr(grants, "PATIENCE_S", patience_s)
    worker, meters = idle_worker(queue_name), shardq.Meters()

    async def takes() -> bool:  # what it believes: a lease in Redis alone may be one that nobody was told of
        return meters.group(queue_name, GROUP).shards == 1

    async with shardq.connect(cluster.url, meters=meters) as client:
        queue = await client.queue(queue_name, shards=1)
        await queue.open_group(GROUP)
        silent = replicas(cluster)
        for server in silent:
            os.kill(server.pid, signal.SIGSTOP)
        try:
            async with running(client, worker):
                if granted:
                    await until(takes, 60, "the lease to be taken")
                else:
                    with anyio.move_on_after(6):
                        await until(takes, 60, "what must not come")
                    assert not await takes()
                for server in silent:
                    os.kill(server.pid, signal.SIGCONT)
                await until(takes, 60, "the lease to be taken")
                assert await owners(queue)
        finally:
            for server in silent:
                os.kill(server.pid, signal.SIGCONT)


async def test_a_lease_is_granted_at_once_where_no_replica_is_left(cluster: LocalCluster, queue_name: str) -> None:
    worker, meters = idle_worker(queue_name), shardq.Meters()

    async def takes_all() -> bool:
        return meters.group(queue_name, GROUP).shards == 3

    async with shardq.connect(cluster.url, meters=meters) as client:
        queue = await client.queue(queue_name, shards=3)
        await queue.open_group(GROUP)
        for server in replicas(cluster):
            server.kill()
        async with running(client, worker):
            await until(takes_all, grants.PATIENCE_S - 5, "the leases to be taken")


def idle_worker(queue_name: str) -> shardq.Worker:
    worker = shardq.Worker(queue_name, group=GROUP, lease=1.0)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        return None

    return worker
