"""Listeners against trouble: connections cut, slots moved, nodes silent, masters dead. What was lost is announced, what
is broadcast afterwards comes, and nothing comes twice.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

import shardq
from shardq import Missed, Notice
from shardq.core.slots import SLOTS
from shardq.errors import StoreTimeout, StoreUnavailable
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.commands import Packed
from shardq.storage.keys import CastNames
from shardq.storage.nodes import node_command, node_info
from shardq.storage.trouble import Trouble
from tests.runtime.harness import until
from tests.runtime.listening import DEADLINE_S, HOST, by_node, read, read_gaps, read_until, subscribers

# The oldest and the newest: between them Pub/Sub has not changed.
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis7", "valkey9")]
NAMES = CastNames("shardq")


@pytest.fixture(scope="module")
def own_cluster(server_binary: Path) -> Iterator[LocalCluster]:
    """Three masters without replicas; one that is paused is not declared dead."""
    with LocalCluster(masters=3, port=None, server=server_binary, settings={"cluster-node-timeout": "60000"}) as made:
        yield made


def kill_subscribers(cluster: LocalCluster) -> int:
    return sum(int(node_command(HOST, port, "CLIENT", "KILL", "TYPE", "pubsub")) for port in cluster.ports)


class Judge:
    """Numbers broadcast on one channel: each at most once, in order, every hole announced before what follows it."""

    def __init__(self) -> None:
        self.next = 0
        self.holes = self.gaps = 0
        self.announced = False

    def see(self, item: Notice | Missed) -> None:
        if isinstance(item, Missed):
            self.announced = True
            self.gaps += 1
            return
        assert item.value >= self.next, f"{item.value} came again, or late: {self.next} was next"
        if item.value > self.next:
            assert self.announced, f"{self.next} to {item.value - 1} are missing and nobody was told"
            self.holes += 1
        self.announced = False
        self.next = item.value + 1


# -- the listener's side ------------------------------------------------------------------------------------


async def test_killed_connections_are_made_again_and_reported(own_cluster: LocalCluster, queue_name: str) -> None:
    channels, pattern = list(by_node(own_cluster, queue_name).values()), f"{queue_name}*"
    async with (
        shardq.connect(own_cluster.url) as client,
        client.listen(*channels) as exact,
        client.listen(patterns=[pattern]) as matched,
    ):
        for turn in range(3):
            assert kill_subscribers(own_cluster) == 4
            assert await read_gaps(exact, *channels) == []
            assert await read_gaps(matched, pattern) == []
            assert exact.complete
            assert matched.complete
            for channel in channels:
                await client.broadcast(channel, turn)
            wanted = {(channel, turn) for channel in channels}
            for notices in (exact, matched):
                came = await read(notices, 3)
                assert {(item.channel, item.value) for item in came if isinstance(item, Notice)} == wanted
    assert subscribers(own_cluster) == 0


async def test_every_hole_is_announced(own_cluster: LocalCluster, queue_name: str) -> None:
    """Under load, with connections killed again and again."""
    channels, judges, stop = list(by_node(own_cluster, queue_name).values()), [Judge() for _ in range(6)], anyio.Event()

    async def send(client: shardq.Client, channel: str) -> None:
        number = 0
        while not stop.is_set():
            await client.broadcast(channel, number)
            number += 1
        await client.broadcast(channel, number)

    async def listen(notices: shardq.Notices, by_channel: dict[str, Judge]) -> None:
        async for item in notices:
            concerned = [*by_channel.values()] if isinstance(item, Missed) else [by_channel[item.channel]]
            for judge in concerned:
                judge.see(item)

    async with (
        shardq.connect(own_cluster.url) as client,
        client.listen(*channels) as exact,
        client.listen(patterns=[f"{queue_name}*"]) as matched,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(listen, exact, dict(zip(channels, judges[:3], strict=True)))
        tasks.start_soon(listen, matched, dict(zip(channels, judges[3:], strict=True)))
        for channel in channels:
            tasks.start_soon(send, client, channel)
        for round_ in range(1, 9):
            await until(lambda: exact.complete and matched.complete, DEADLINE_S, "all subscriptions to stand")
            seen = [judge.next for judge in judges]
            await until(
                lambda seen=seen: all(judge.next > was + 20 for judge, was in zip(judges, seen, strict=True)),
                DEADLINE_S,
                "notices to flow",
            )
            kill_subscribers(own_cluster)
            await until(
                lambda round_=round_: all(judge.gaps >= round_ for judge in judges), DEADLINE_S, "the gap to be told"
            )
        await until(lambda: exact.complete and matched.complete, DEADLINE_S, "all subscriptions to stand")
        stop.set()
        await until(lambda: len({judge.next for judge in judges}) <= 3, DEADLINE_S, "the last notices")
        tasks.cancel_scope.cancel()
    assert all(judge.holes for judge in judges), "nothing was ever lost, so nothing is proven"


async def test_a_slot_moves(own_cluster: LocalCluster, queue_name: str) -> None:
    """The old owner serves until the end of the move; only that last step is a gap, and only for its channel."""
    source, target = own_cluster.ports[:2]
    channels = by_node(own_cluster, queue_name)
    moving, *others = (channels.pop(source), *channels.values())
    slot = NAMES.exact_slot(moving)
    node_ids = {port: str(node_command(HOST, port, "CLUSTER", "MYID")) for port in (source, target)}
    async with (
        shardq.connect(own_cluster.url) as client,
        shardq.connect(own_cluster.url) as other,
        client.listen(moving, *others) as notices,
    ):
        node_command(HOST, target, "CLUSTER", "SETSLOT", slot, "IMPORTING", node_ids[source])
        node_command(HOST, source, "CLUSTER", "SETSLOT", slot, "MIGRATING", node_ids[target])
        for number in range(10):
            await client.broadcast(moving, number)
        assert await read(notices, 10) == [Notice(moving, number) for number in range(10)]
        for port in (target, source):
            node_command(HOST, port, "CLUSTER", "SETSLOT", slot, "NODE", node_ids[target])
        assert await read(notices, 1) == [Missed((moving,), 0)]
        await other.broadcast(moving, "by who does not know yet")
        await client.broadcast(moving, "by who knows")
        assert await read(notices, 2) == [Notice(moving, "by who does not know yet"), Notice(moving, "by who knows")]
        for channel in others:
            await client.broadcast(channel, 1)
        assert len(await read(notices, 2)) == 2
    # Back, for the other tests.
    for port in (source, target):
        node_command(HOST, port, "CLUSTER", "SETSLOT", slot, "NODE", node_ids[source])
    await until(lambda: owners(own_cluster, slot) == {source}, DEADLINE_S, "the slot to be back")


async def test_a_slot_that_nobody_serves_holds_up_no_other(own_cluster: LocalCluster, queue_name: str) -> None:
    port = own_cluster.ports[0]
    here = [f"{queue_name}-{number}" for number in range(60)]
    here = [channel for channel in here if NAMES.exact_slot(channel) < SLOTS // 3]
    without, *others = here
    slot = NAMES.exact_slot(without)
    async with shardq.connect(own_cluster.url) as client, client.listen(*here) as notices:
        node_command(HOST, port, "CLUSTER", "DELSLOTS", slot)
        try:
            await until(lambda: not notices.complete, DEADLINE_S, "the end of the one subscription")
            await anyio.sleep(1)  # it is tried again and again, on the connection that the others have
            assert not notices.complete
            for channel in others:
                await client.broadcast(channel, 1)
            assert await read(notices, len(others)) == [Notice(channel, 1) for channel in others]
        finally:
            node_command(HOST, port, "CLUSTER", "ADDSLOTS", slot)
        assert await read(notices, 1) == [Missed((without,), 0)]
        await client.broadcast(without, 2)
        assert await read(notices, 1) == [Notice(without, 2)]
    await until(lambda: owners(own_cluster, slot) == {port}, DEADLINE_S, "the slot to be back")


def owners(cluster: LocalCluster, slot: int) -> set[int]:
    """The port that owns the slot, as each node sees it."""
    found: set[int] = set()
    for port in cluster.ports:
        for first, last, master, *_ in node_command(HOST, port, "CLUSTER", "SLOTS"):
            if int(first) <= slot <= int(last):
                found.add(int(master[1]))
    return found


async def test_a_silent_node_is_noticed(
    own_cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections stay open, so nothing but the missing answers tells. The other nodes go on."""
    monkeypatch.setattr("shardq.runtime.subscriptions.ROUND_S", 0.1)
    monkeypatch.setattr("shardq.storage.bells.CONNECT_TIMEOUT_S", 0.3)
    ports_channels = by_node(own_cluster, queue_name)
    silent, fine = own_cluster.ports[0], own_cluster.ports[1]
    async with (
        shardq.connect(own_cluster.url) as client,
        client.listen(*ports_channels.values()) as notices,
        client.listen(patterns=[f"{queue_name}*"]) as matched,
    ):
        os.kill(own_cluster.processes[0].pid, signal.SIGSTOP)
        try:
            await until(lambda: not notices.complete, DEADLINE_S, "the silence to be noticed")
            await client.broadcast(ports_channels[fine], 1)
            assert await read(notices, 1) == [Notice(ports_channels[fine], 1)]
            await until(lambda: matched.complete, DEADLINE_S, "the patterns to be at another node")
            await client.broadcast(ports_channels[fine], 2)
            await read_until(matched, lambda item: item == Notice(ports_channels[fine], 2))
        finally:
            os.kill(own_cluster.processes[0].pid, signal.SIGCONT)
        await read_gaps(notices, ports_channels[silent])
        await client.broadcast(ports_channels[silent], 3)
        await read_until(notices, lambda item: item == Notice(ports_channels[silent], 3))


async def test_an_idle_listener_stays_whole(
    own_cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Being asked again and again is no gap, rings nothing, and does not add to what is subscribed."""
    monkeypatch.setattr("shardq.runtime.subscriptions.ROUND_S", 0.01)
    monkeypatch.setattr("shardq.runtime.subscriptions.SILENT_ROUNDS", 1000)
    channels = list(by_node(own_cluster, queue_name).values())
    async with (
        shardq.connect(own_cluster.url) as client,
        client.listen(*channels, patterns=[f"{queue_name}?"]) as notices,
    ):
        await anyio.sleep(1)
        assert notices.complete
        for channel in channels:
            await client.broadcast(channel, 1)
        came = await read(notices, 3)
        assert {item for item in came if isinstance(item, Missed)} == set()


async def test_entering_where_a_master_is_down(server_binary: Path, queue_name: str) -> None:
    with LocalCluster(masters=3, port=None, server=server_binary) as cluster:
        ports_channels = by_node(cluster, queue_name)
        down, up = cluster.ports[2], cluster.ports[0]
        async with shardq.connect(cluster.url) as client:
            cluster.processes[2].kill()
            with pytest.raises(StoreUnavailable, match=r"1 of 2 subscriptions did not stand in 0\.5 s"):
                async with client.listen(ports_channels[down], ports_channels[up], timeout=0.5):
                    raise AssertionError("entered")
            async with client.listen(ports_channels[up], patterns=[f"{queue_name}*"]) as notices:
                await client.broadcast(ports_channels[up], 1)
                assert await read(notices, 1) == [Notice(ports_channels[up], 1)]
                with anyio.fail_after(DEADLINE_S):
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(restart_later, cluster)
                        async with client.listen(ports_channels[down], timeout=DEADLINE_S) as late:
                            await client.broadcast(ports_channels[down], 2)
                            assert await read(late, 1) == [Notice(ports_channels[down], 2)]


async def restart_later(cluster: LocalCluster) -> None:
    await anyio.sleep(0.5)
    await anyio.to_thread.run_sync(cluster.processes[2].restart)


async def test_the_whole_cluster_restarts(server_binary: Path, queue_name: str) -> None:
    with LocalCluster(masters=3, port=None, server=server_binary) as cluster:
        channels, pattern = list(by_node(cluster, queue_name).values()), f"{queue_name}*"
        async with (
            shardq.connect(cluster.url) as client,
            client.listen(*channels) as exact,
            client.listen(patterns=[pattern]) as matched,
        ):
            for process in cluster.processes:
                process.kill()
            await until(lambda: not exact.complete and not matched.complete, DEADLINE_S, "the end to be noticed")
            for process in cluster.processes:
                await anyio.to_thread.run_sync(process.restart)
            await anyio.to_thread.run_sync(cluster.wait_until_ready)
            await read_gaps(exact, *channels)
            await read_gaps(matched, pattern)
            await shout(client, channels[0])
            await read_until(exact, lambda item: item == Notice(channels[0], "heard?"))
            await read_until(matched, lambda item: item == Notice(channels[0], "heard?"))


async def shout(client: shardq.Client, channel: str) -> None:
    """Broadcasts until one is known to be out: the first after an outage may find its connection dead."""
    with anyio.fail_after(DEADLINE_S):
        while True:
            try:
                return await client.broadcast(channel, "heard?")
            except StoreTimeout:
                await anyio.sleep(0.05)


@pytest.fixture(scope="module")
def replicated(server_binary: Path) -> Iterator[LocalCluster]:
    with LocalCluster(masters=3, replicas=1, port=None, server=server_binary) as made:
        yield made


def masters(cluster: LocalCluster) -> list[int]:
    """Indices of the servers that are masters now."""
    return [
        index
        for index, process in enumerate(cluster.processes)
        if process.alive and node_info(HOST, process.port, "replication")["role"] == "master"
    ]


def replica_of(cluster: LocalCluster, master: int) -> int:
    for process in cluster.processes:
        if process.alive and node_info(HOST, process.port, "replication").get("master_port") == str(master):
            return process.port
    raise AssertionError(f"{master} has no replica")


def all_channels(name: str) -> list[str]:
    """Enough channels for every node to have some, whichever are masters."""
    return [f"{name}-{number}" for number in range(24)]


@pytest.mark.parametrize("how", ["asked", "killed"])
async def test_failover(replicated: LocalCluster, queue_name: str, how: str) -> None:
    replicated.wait_until_ready()
    channels, pattern = all_channels(queue_name), f"{queue_name}*"
    slot = NAMES.exact_slot(channels[0])
    (old,) = owners(replicated, slot)
    async with (
        shardq.connect(replicated.url) as client,
        client.listen(*channels) as exact,
        client.listen(patterns=[pattern]) as matched,
    ):
        concerned = [channel for channel in channels if owners(replicated, NAMES.exact_slot(channel)) == {old}]
        victim = next(process for process in replicated.processes if process.port == old)
        if how == "killed":
            victim.kill()
        else:
            node_command(HOST, replica_of(replicated, old), "CLUSTER", "FAILOVER")
        assert await read_gaps(exact, *concerned) == []
        assert exact.complete
        await until(lambda: matched.complete, DEADLINE_S, "the patterns to be listened to again")
        for channel in channels:
            await shout(client, channel)
        for notices in (exact, matched):
            came = [item for item in await read(notices, len(channels)) if isinstance(item, Notice)]
            while len(came) < len(channels):
                came += [item for item in await read(notices, 1) if isinstance(item, Notice)]
            assert {item.channel for item in came} == set(channels)
    if how == "killed":
        await anyio.to_thread.run_sync(victim.restart)


# -- the sender's side --------------------------------------------------------------------------------------


class Tampered:
    """Stands before a client's exchanges. `answers` is asked for each write: it carries it out or not."""

    def __init__(self, client: shardq.Client, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writes = 0
        self.lose_answers = self.refuse = 0
        self._exchange: Callable[..., Any] = client.cluster.exchange
        monkeypatch.setattr(client.cluster, "exchange", self.exchange)

    async def exchange(self, node: Any, calls: Sequence[Packed], **limits: Any) -> list[Any]:
        limits.pop("settle", None)  # replies are looked at before anyone is given them
        if any(b"SLOTS" in call.data for call in calls):  # a look at the topology
            return list(await self._exchange(node, calls, **limits))
        self.writes += 1
        if self.refuse:
            self.refuse -= 1
            return [Trouble("refresh", StoreUnavailable("not sent"))] * len(calls)
        replies: list[Any] = await self._exchange(node, calls, **limits)
        if self.lose_answers:
            self.lose_answers -= 1
            return [Trouble("refresh", StoreTimeout("no answer came"))] * len(calls)
        return replies


async def test_a_broadcast_of_unknown_outcome_is_not_repeated(
    own_cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shardq.connect(own_cluster.url) as client, client.listen(queue_name) as notices:
        tampered = Tampered(client, monkeypatch)
        tampered.lose_answers = 1
        with pytest.raises(StoreTimeout, match="no answer came") as caught:
            await client.broadcast(queue_name, 1)
        assert caught.value.outcome_unknown
        assert tampered.writes == 1, "both commands go in one write"
        await client.broadcast(queue_name, 2)
        assert await read(notices, 2) == [Notice(queue_name, 1), Notice(queue_name, 2)]


async def test_a_broadcast_that_was_not_sent_is_tried_again(
    own_cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shardq.connect(own_cluster.url) as client, client.listen(queue_name) as notices:
        tampered = Tampered(client, monkeypatch)
        tampered.refuse = 3
        await client.broadcast(queue_name, 1)
        await client.broadcast(queue_name, 2)
        assert await read(notices, 2) == [Notice(queue_name, 1), Notice(queue_name, 2)]


async def test_a_sender_that_does_not_know_the_owner_is_told(own_cluster: LocalCluster, queue_name: str) -> None:
    async with (
        shardq.connect(own_cluster.url) as client,
        client.listen(queue_name) as exact,
        client.listen(patterns=[f"{queue_name}*"]) as matched,
    ):
        slots = client.cluster._nodes.slots_cache
        slot = NAMES.exact_slot(queue_name)
        slots[slot] = slots[(slot + SLOTS // 2) % SLOTS]
        await client.broadcast(queue_name, 1)
        await client.broadcast(queue_name, 2)
        assert await read(exact, 2) == [Notice(queue_name, 1), Notice(queue_name, 2)]
        # For patterns the first may have gone out at another node, and those of two nodes have no order.
        assert {item.value for item in await read(matched, 2) if isinstance(item, Notice)} == {1, 2}


async def test_closing_the_client_ends_a_broadcast(
    own_cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[BaseException] = []

    async def send(client: shardq.Client) -> None:
        try:
            await client.broadcast(queue_name, 1)
        except shardq.ClosedError as error:
            errors.append(error)

    async with anyio.create_task_group() as tasks:
        async with shardq.connect(own_cluster.url) as client:
            tampered = Tampered(client, monkeypatch)
            tampered.refuse = 1000
            tasks.start_soon(send, client)
            await until(lambda: tampered.writes > 0, DEADLINE_S, "the broadcast to be tried")
        await until(lambda: len(errors) == 1, DEADLINE_S, "the broadcast to end")
