"""Pipes while nodes are away: no reconnect storm, no sender and no connection kept for a node that has left, no call
lost to a connection that the server had closed. Chance is fixed where it matters."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest
from redis.asyncio.cluster import ClusterNode

import shardq
from shardq.core.backoff import backoff_s
from shardq.core.slots import SLOTS
from shardq.errors import StoreError, StoreUnavailable
from shardq.ops.local_cluster import LocalCluster
from shardq.storage import topology
from shardq.storage.cluster import MOST_STRANGERS
from shardq.storage.commands import pack_command
from shardq.storage.nodes import node_command
from shardq.storage.pipes import BACKOFF_FIRST_S, BACKOFF_LAST_S, Pipes
from shardq.storage.requests import Pipe
from tests.runtime.harness import until
from tests.runtime.outages_rig import HOST, breakable, connected, gone, reached, stopped

pytestmark = pytest.mark.anyio
LAST = SLOTS - 1  # a slot of the last node
PING = pack_command("PING")


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[LocalCluster]:
    with breakable() as made:
        yield made


# -- pauses ----------------------------------------------------------------------------------------------------


def test_pauses_double_up_to_their_bound_and_chance_takes_at_most_half_away() -> None:
    whole = [backoff_s(tries, 0.02, 0.5, 1.0) for tries in range(1, 9)]
    assert whole == [0.02, 0.04, 0.08, 0.16, 0.32, 0.5, 0.5, 0.5]
    assert [backoff_s(tries, 0.02, 0.5, 0.0) for tries in range(1, 9)] == [pause / 2 for pause in whole]
    assert backoff_s(10**6, 0.02, 0.5, 1.0) == 0.5


def test_the_pauses_of_pipes_are_spread_by_the_chance_they_are_given() -> None:
    given = iter([0.0, 0.5, 0.999])
    pipes = Pipes(cast("Any", None), cast("Any", None), chance=lambda: next(given))
    assert [pipes._pause(50) for _ in range(3)] == pytest.approx([0.25, 0.375, 0.5], abs=0.001)
    assert backoff_s(1, BACKOFF_FIRST_S, BACKOFF_LAST_S, 0.0) > 0


# -- the topology -----------------------------------------------------------------------------------------------


def nodes(*names: str) -> list[ClusterNode]:
    return cast("list[ClusterNode]", [SimpleNamespace(name=name) for name in names])


def test_a_reply_agrees_when_it_names_the_same_master_and_replicas_of_every_slot() -> None:
    left, right = nodes("a:1", "b:2", "c:3"), nodes("d:4")
    table = {0: left, 1: left, 2: right}
    said: list[Any] = [[0, 1, [b"a", 1, b"id"], [b"c", 3, b"id"], [b"b", 2, b"id"]], [2, 2, [b"", 4, b"id", []]]]
    assert topology.agrees(said, table, "d")
    assert not topology.agrees(said, table, "e"), "a node that gives no host means its own"
    assert not topology.agrees(said[:1], table, "d")
    assert not topology.agrees([*said, [3, 3, [b"a", 1]]], table, "d")
    assert not topology.agrees([[0, 1, [b"b", 2], [b"a", 1], [b"c", 3]], said[1]], table, "d")
    assert not topology.agrees([[0, 1, [b"a", 1], [b"b", 2]], said[1]], table, "d")
    for unreadable in (None, 7, [b"x"], [[0, 1]], [[0, 1, 5]], [[b"0", 1, [b"a", 1]]], [[0, 1, [None, None]]]):
        assert not topology.agrees(unreadable, table, "d")


async def test_looking_at_an_unchanged_topology_keeps_the_connections(own_cluster: LocalCluster) -> None:
    async with shardq.connect(own_cluster.url) as client:
        for slot in (0, SLOTS // 2, LAST):
            await client.pipes.command(slot, PING)
        version, before = client.cluster.topology_version, [reached(own_cluster, node)[0] for node in range(3)]
        for _ in range(5):
            client.cluster._refresh_from_monotonic_s = -1e9
            await client.cluster.refresh()
            for slot in (0, SLOTS // 2, LAST):
                await client.pipes.command(slot, PING)
        made = [reached(own_cluster, node)[0] - count for node, count in enumerate(before)]
        assert client.cluster.topology_version == version
        # Each of these counts is taken over a connection of its own; asking for the topology may open a second one, and
        # a call a third: it ends when its reply is there, which is before its connection is back in the pool.
        assert all(count <= 3 for count in made), made


async def test_those_who_ask_while_the_topology_is_read_wait_for_the_one_reading(own_cluster: LocalCluster) -> None:
    async with shardq.connect(own_cluster.url) as client:
        asked = 0
        read = client.cluster._read_topology

        async def counting(failed: str | None) -> bool:
            nonlocal asked
            asked += 1
            return await read(failed)

        client.cluster._read_topology = counting  # type: ignore[method-assign]  # to count
        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(client.cluster.refresh)
        assert asked == 1


# -- nodes that are away ------------------------------------------------------------------------------------------


async def test_thousands_of_calls_to_a_node_that_is_gone_make_few_connects(
    own_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    connects = 0
    async with shardq.connect(own_cluster.url) as client:
        exchange = client.cluster.exchange

        async def counting(node: ClusterNode, *args: Any, **kwargs: Any) -> list[Any]:
            nonlocal connects
            connects += node.port == own_cluster.ports[2]
            return await exchange(node, *args, **kwargs)

        async def ask() -> None:
            with pytest.raises(StoreError):
                await client.pipes.command(LAST, PING, timeout_s=2.0)

        with gone(own_cluster, 2):
            monkeypatch.setattr(client.cluster, "exchange", counting)
            async with anyio.create_task_group() as tasks:
                for _ in range(5000):
                    tasks.start_soon(ask)
        # A node that is away is tried by one write at a time, each with a pause of its own: in two seconds about ten,
        # and as often asked for the topology.
        assert 2 <= connects < 60, f"{connects} writes for 5000 calls"
        assert await client.pipes.command(LAST, PING) == b"PONG"


async def test_callers_that_come_and_go_leave_nothing_in_the_queue_of_a_hanging_node(own_cluster: LocalCluster) -> None:
    async with shardq.connect(own_cluster.url) as client:
        await client.pipes.command(LAST, PING)
        most = 0
        with stopped(own_cluster, 2):
            for _ in range(20):
                with anyio.move_on_after(0.02):
                    async with anyio.create_task_group() as tasks:
                        for _ in range(100):
                            tasks.start_soon(client.pipes.command, LAST, PING)
                most = max(most, max(len(pipe.waiting) for pipe in client.pipes._pipes.values()))
        assert most <= 300, "2000 callers went away"
        assert await client.pipes.command(LAST, PING) == b"PONG"


async def test_a_node_that_has_left_leaves_no_sender_and_no_connection(own_cluster: LocalCluster) -> None:
    """Redirects to one address after the other, each in the guise of the last node."""
    async with shardq.connect(own_cluster.url) as client, anyio.create_task_group() as tasks:
        pipes = Pipes(client.cluster, tasks)
        before = connected(own_cluster, 2)
        for number in range(100):
            stranger = client.cluster.node_at((f"127.0.1.{number + 1}", own_cluster.ports[2]))
            pipes._pipes[stranger.name] = pipe = Pipe(stranger)
            tasks.start_soon(pipes._send_all, pipe)
            await pipes.command(0, PING)
        assert len(client.cluster._strangers) == MOST_STRANGERS
        assert len(pipes._pipes) <= MOST_STRANGERS + 3
        assert connected(own_cluster, 2) <= before + MOST_STRANGERS
        tasks.cancel_scope.cancel()


async def test_a_connection_that_the_server_closed_while_idle_costs_no_call(own_cluster: LocalCluster) -> None:
    """A call that must not be sent twice would have to be given up with its outcome unknown."""
    async with shardq.connect(own_cluster.url) as client:
        for turn in range(20):
            assert await client.pipes.commands_once(LAST, [PING, PING]) == [b"PONG", b"PONG"]
            ids = [
                line.partition(" ")[0].removeprefix("id=")
                for line in str(node_command(HOST, own_cluster.ports[2], "CLIENT", "LIST")).splitlines()
                if "cmd=ping" in line
            ]
            assert ids, "a connection to close"
            for each in ids:
                node_command(HOST, own_cluster.ports[2], "CLIENT", "KILL", "ID", each)
            if turn % 2:
                await anyio.sleep(0.01)  # so that the event loop has heard of the end; else nobody has yet


async def test_a_call_that_was_carried_out_in_part_has_an_unknown_outcome(
    own_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shardq.connect(own_cluster.url) as client:
        with pytest.raises(StoreError) as raised:
            await client.pipes.commands_once(LAST, [PING, pack_command("NO-SUCH-COMMAND")])
        assert raised.value.outcome_unknown
        with pytest.raises(StoreError) as raised:
            await client.pipes.commands_once(LAST, [pack_command("NO-SUCH-COMMAND"), pack_command("NOR-THIS")])
        assert not raised.value.outcome_unknown


async def test_what_waits_for_a_node_that_hangs_goes_where_its_slots_went(own_cluster: LocalCluster) -> None:
    """A topology that changes while more calls wait than one write takes."""
    async with shardq.connect(own_cluster.url) as client:
        await client.pipes.command(LAST, PING)
        answered: list[Any] = []

        async def ask() -> None:
            answered.append(await client.pipes.command(LAST, PING, timeout_s=9.0))

        other = client.cluster.node_of(0)
        assert other is not None
        with stopped(own_cluster, 2):
            async with anyio.create_task_group() as tasks:
                for _ in range(400):
                    tasks.start_soon(ask)
                await until(lambda: any(pipe.waiting for pipe in client.pipes._pipes.values()), 5, "a queue")
                client.cluster._nodes.slots_cache[LAST] = [other]
                client.cluster._refresh_from_monotonic_s = float("inf")  # the others still name the one that hangs
        assert answered == [b"PONG"] * 400


async def test_an_unreachable_cluster_says_so_within_the_time_of_the_call(own_cluster: LocalCluster) -> None:
    async with shardq.connect(own_cluster.url) as client:
        with gone(own_cluster), anyio.fail_after(10):
            with pytest.raises(StoreUnavailable, match="can't connect"):
                await client.pipes.command(LAST, PING, timeout_s=0.7)
