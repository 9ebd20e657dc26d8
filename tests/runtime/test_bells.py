"""Bells: rung when a message comes and whenever their subscription begins to stand, quiet while it only lives on."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import pytest

import shardq
from shardq.core.slots import key_slot
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime.bells import Bells
from shardq.storage.commands import pack_command
from shardq.storage.nodes import node_command
from tests.runtime.harness import until
from tests.runtime.listening import DEADLINE_S, HOST, subscribers

pytestmark = pytest.mark.anyio


class Rung:
    """Bells on channels `<name>-0`, `<name>-1`, ... and what rang with which payload."""

    def __init__(self, client: shardq.Client, name: str) -> None:
        self.client = client
        self.name = name
        self.bells = Bells(client.cluster)
        self.counts: Counter[tuple[int, str]] = Counter()

    def channel(self, number: int) -> str:
        return f"{self.name}-{number}"

    def slot(self, number: int) -> int:
        return key_slot(self.channel(number).encode())

    def listen(self, number: int) -> None:
        self.bells.listen(self.slot(number), self.channel(number), lambda payload: self.count(number, payload))

    def count(self, number: int, payload: str) -> None:
        self.counts[number, payload] += 1

    async def ring(self, number: int, payload: str) -> None:
        await self.client.pipes.command(self.slot(number), pack_command("SPUBLISH", self.channel(number), payload))

    async def hears(self, *numbers: int) -> None:
        await until(
            lambda: all(self.bells.hears(self.channel(number)) for number in numbers), DEADLINE_S, "bells to be heard"
        )

    async def rings(self, number: int, payload: str, times: int = 1) -> None:
        await until(lambda: self.counts[number, payload] == times, DEADLINE_S, f"bell {number} to ring {payload!r}")


@asynccontextmanager
async def rung(cluster: LocalCluster, name: str) -> AsyncIterator[Rung]:
    async with shardq.connect(cluster.url) as client, anyio.create_task_group() as tasks:
        made = Rung(client, name)
        tasks.start_soon(made.bells.run, tasks)
        yield made
        tasks.cancel_scope.cancel()


async def test_a_bell_rings_when_it_is_heard_and_for_each_message(cluster: LocalCluster, queue_name: str) -> None:
    async with rung(cluster, queue_name) as made:
        for number in range(12):
            made.listen(number)
        await made.hears(*range(12))
        for number in range(12):
            await made.ring(number, "x")
            await made.rings(number, "x")
        assert made.counts == {(number, payload): 1 for number in range(12) for payload in ("", "x")}
        assert subscribers(cluster) == 3, "one connection a node"


async def test_killed_connections_ring_again(cluster: LocalCluster, queue_name: str) -> None:
    async with rung(cluster, queue_name) as made:
        for number in range(12):
            made.listen(number)
        await made.hears(*range(12))
        for port in cluster.ports:
            node_command(HOST, port, "CLIENT", "KILL", "TYPE", "pubsub")
        for number in range(12):
            await made.rings(number, "", times=2)
        await made.hears(*range(12))


async def test_dropped_bells_are_silent_and_disturb_no_other(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardq.runtime.subscriptions.SILENT_ROUNDS", 1)
    async with rung(cluster, queue_name) as made:
        for number in range(30):
            made.listen(number)
        await made.hears(*range(30))
        for number in range(3, 30):
            made.bells.drop(made.channel(number))
            assert not made.bells.hears(made.channel(number))
            await anyio.lowlevel.checkpoint()
        for number in range(30):
            await made.ring(number, "x")
        for number in range(3):
            await made.rings(number, "x")
        assert made.counts == Counter(
            {(number, ""): 1 for number in range(30)} | {(number, "x"): 1 for number in range(3)}
        )
        made.listen(20)
        await made.rings(20, "", times=2)
        for number in (0, 1, 2, 20):
            made.bells.drop(made.channel(number))
        await until(lambda: subscribers(cluster) == 0, DEADLINE_S, "connections nobody needs to be closed")


async def test_a_living_connection_rings_nothing_by_itself(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardq.runtime.subscriptions.ROUND_S", 0.01)
    monkeypatch.setattr("shardq.runtime.subscriptions.SILENT_ROUNDS", 1000)
    async with rung(cluster, queue_name) as made:
        for number in range(12):
            made.listen(number)
        await made.hears(*range(12))
        await anyio.sleep(0.5)
        assert made.counts == {(number, ""): 1 for number in range(12)}
