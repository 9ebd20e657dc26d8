"""What replicas confirm late: of a master that was none in between or has an unknown history, or while they load."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from shardq.ops.local_cluster import LocalCluster, LocalServer
from shardq.storage import appends, exchange
from shardq.storage.commands import Confirm, pack_command
from shardq.storage.mastership import Histories, parsed, replicas_confirming
from shardq.storage.nodes import bus_port, free_ports, node_command, node_info
from shardq.storage.pipes import Pipes
from shardq.storage.requests import Call
from tests.storage.rig import Rig, batch_of, rig, until

pytestmark = pytest.mark.anyio
LONG_S = 60
REPLICA = Confirm(pack_command("WAIT", 1, LONG_S * 1000), 1)


def replication(server: LocalServer) -> dict[str, str]:
    return node_info(server.host, server.port, "replication")


def command(server: LocalServer, *args: str | int) -> object:
    return node_command(server.host, server.port, *args)


class Sender:
    """Appends to one shard. `retries`: what was done before a call was sent again."""

    def __init__(self, shard: Rig) -> None:
        self.shard, self.retries = shard, list[str]()

    async def append(self, sequence: int, value: str) -> None:
        """Returns when it is stored, and confirmed by the replica."""
        packed = appends.pack_append(self.shard.shard, "p", sequence, 1, batch_of(value), REPLICA)
        async with anyio.create_task_group() as tasks:
            pipes = Pipes(self.shard.client.cluster, tasks, self.retries.append)
            call = Call(self.shard.shard.slot, packed, anyio.current_time() + LONG_S)
            pipes.submit(call)
            await call.wait()
            assert appends.read_append(call.outcome()).status == "OK"
            tasks.cancel_scope.cancel()


class Pair:
    """The node with the first slots, and its replica."""

    def __init__(self, made: LocalCluster) -> None:
        self.master = made.processes[0]
        (self.replica,) = (
            server for server in made.processes if replication(server).get("master_port") == str(self.master.port)
        )

    async def part(self) -> None:
        """The replica hears nothing of its master any more, until it is promoted; the master waits for it."""
        command(self.master, "ACL", "SETUSER", "default", "-psync", "-sync")
        command(self.master, "CLIENT", "KILL", "TYPE", "replica")

        async def gone() -> bool:
            return replication(self.master)["connected_slaves"] == "0"

        await until(gone, "the replica to be cut off")

    async def promote_and_follow(self) -> None:
        """The replica takes over without what it has not heard; its old master takes over its data."""
        command(self.replica, "CLUSTER", "FAILOVER", "FORCE")
        await is_master(self.replica)
        command(self.master, "ACL", "SETUSER", "default", "+psync", "+sync")

        async def follows() -> bool:
            return replication(self.master).get("master_link_status") == "up"

        await until(follows, "the old master to follow")

    async def hand_back(self) -> None:
        async def asked() -> bool:
            if replication(self.master)["role"] == "slave":
                command(self.master, "CLUSTER", "FAILOVER")
                await anyio.sleep(0.2)
            return replication(self.master)["role"] == "master"

        await until(asked, "the first master to be one again")


async def is_master(server: LocalServer) -> None:
    async def promoted() -> bool:
        return replication(server)["role"] == "master"

    await until(promoted, f"{server.port} to be promoted")


@pytest.fixture(scope="module")
def own_cluster(server_binary: Path) -> Iterator[LocalCluster]:
    with LocalCluster(3, 1, None, server_binary) as made:
        yield made


# Both ways to treat who waits while a master is demoted: Valkey lets it wait on, Redis says UNBLOCKED.
@pytest.mark.server_kinds("redis8", "valkey9")
async def test_a_master_that_was_none_in_between_confirms_nothing(
    own_cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "ANSWER_TIMEOUT_S", LONG_S)
    pair = Pair(own_cluster)
    async with rig(own_cluster.url, queue_name) as shard, anyio.create_task_group() as tasks:
        sender, stream, settled = Sender(shard), shard.shard.stream, anyio.Event()

        async def append() -> None:
            await sender.append(2, "b")
            settled.set()

        async def taken() -> bool:
            return command(pair.master, "XLEN", stream) == 2

        await sender.append(1, "a")
        await pair.part()
        tasks.start_soon(append)
        await until(taken, "the master to have what its replica has not")
        counted = int(replication(pair.master)["master_repl_offset"])
        await pair.promote_and_follow()
        assert command(pair.replica, "XLEN", stream) == 1, "the new master lacks it"
        while int(replication(pair.replica)["master_repl_offset"]) <= counted:
            command(pair.replica, "HSET", shard.shard.meta, "unused", "x" * 10_000)
        await pair.hand_back()
        with anyio.fail_after(LONG_S):
            await settled.wait()
        assert await shard.values() == ["a", "b"]
        assert sender.retries, "what was said of the other history was not believed"


@pytest.mark.server_kinds("redis7", "valkey9")
async def test_a_replica_that_still_loads_confirms_nothing(
    server_binary: Path, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one that a master without an append-only file ever has: what was written before stands at byte 0."""
    monkeypatch.setattr(exchange, "ANSWER_TIMEOUT_S", LONG_S)
    settings = {"appendonly": "no"}
    with LocalCluster(1, 0, None, server_binary, settings=settings) as made, joined(made) as replica:
        for setting, value in (("key-load-delay", 1000), ("loading-process-events-interval-bytes", 1024)):
            command(replica, "CONFIG", "SET", setting, value)
        async with rig(made.url, queue_name) as shard, anyio.create_task_group() as tasks:
            sender, stream, settled = Sender(shard), shard.shard.stream, anyio.Event()
            await shard.command("MSET", *(part for n in range(1000) for part in (f"{stream}:{n}", "x" * 100)))

            async def append() -> None:
                await sender.append(1, "a")
                assert command(replica, "DBSIZE") == command(made.processes[0], "DBSIZE")  # an error while it loads
                settled.set()

            async def taken() -> bool:
                return command(made.processes[0], "XLEN", stream) == 1

            tasks.start_soon(append)
            await until(taken, "the master to have it")
            command(replica, "CLUSTER", "REPLICATE", str(command(made.processes[0], "CLUSTER", "MYID")))
            with anyio.fail_after(LONG_S):
                await settled.wait()


@contextmanager
def joined(made: LocalCluster) -> Iterator[LocalServer]:
    """A node without slots."""
    (port,) = free_ports("127.0.0.1", 1)
    new, first = made.new_server(port), made.processes[0]
    new.restart()
    try:
        command(first, "CLUSTER", "MEET", new.host, port, bus_port(port))
        deadline = time.monotonic() + 30
        while node_info(new.host, port, "cluster")["cluster_state"] != "ok":
            assert time.monotonic() < deadline, "the new node does not get to know the cluster"
            time.sleep(0.02)
        yield new
    finally:
        new.kill()


@pytest.mark.parametrize(("known", "again"), [(True, False), (False, True)])
async def test_a_late_confirmation_counts_in_the_history_that_was_known_before(
    cluster_with_replicas: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch, known: bool, again: bool
) -> None:
    monkeypatch.setattr(exchange, "ROLES_CHANGE_S", -1)
    async with rig(cluster_with_replicas.url, queue_name) as shard:
        sender = Sender(shard)
        if not known:
            shard.client.cluster.histories = Histories()
        await sender.append(1, "a")
        assert bool(sender.retries) == again
        sender.retries.clear()
        await sender.append(2, "b")
        assert not sender.retries, "by now it is known"
        assert await shard.values() == ["a", "b"]


async def test_a_confirmation_in_time_asks_nothing(
    cluster_with_replicas: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "ROLES_CHANGE_S", LONG_S)
    async with rig(cluster_with_replicas.url, queue_name) as shard:
        sender = Sender(shard)
        shard.client.cluster.histories = Histories()
        await sender.append(1, "a")
        assert not sender.retries
        assert not shard.client.cluster.histories.of(shard.client.cluster.primaries()[0].name)


def test_a_replica_is_master_of_no_history() -> None:
    histories = Histories()
    assert histories.of("n") == ""
    assert histories.told("n", parsed(b"role:master\r\nmaster_replid:ab\r\n")) == histories.of("n") == "ab"
    assert histories.told("n", parsed(b"role:slave\r\nmaster_replid:ab\r\n")) == histories.of("n") == ""


@pytest.mark.parametrize("reply", [None, 1, [b"role:master"], b"", b"role:master\r\n", b"\xff\xfe"])
def test_what_says_nothing_of_replication_names_no_history(reply: object) -> None:
    histories = Histories()
    assert histories.told("n", parsed(b"role:master\r\nmaster_replid:ab\r\n")) == "ab"
    assert histories.told("n", parsed(reply)) == histories.of("n") == ""


@pytest.mark.parametrize(
    ("said", "confirming"),
    [
        ("ip=127.0.0.1,port=7001,state=online,offset=54,lag=0,type=replica", 1),
        ("ip=127.0.0.1,port=7001,state=online,offset=0,lag=0", 0),
        ("ip=127.0.0.1,port=7001,state=wait_bgsave,offset=54,lag=0", 0),
        ("?", 0),
    ],
)
def test_a_replica_counts_when_it_has_confirmed_something(said: str, confirming: int) -> None:
    other = "slave0:ip=::1,port=7002,state=online,offset=7,lag=1\r\n"
    assert replicas_confirming(parsed(f"role:master\r\n{other}slave1:{said}\r\n".encode())) == 1 + confirming
