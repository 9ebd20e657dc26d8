"""Calls while nodes pause and callers go away: settled once, stored once, and nobody gets another's reply."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

import shardq
from shardq.core.slots import SLOTS
from shardq.errors import StoreTimeout
from shardq.ops.local_cluster import LocalCluster
from shardq.storage import appends, exchange
from shardq.storage.commands import pack_command
from shardq.storage.pipes import Pipes
from tests.storage.rig import Rig, batch_of, rig, until

pytestmark = pytest.mark.anyio
LAST = SLOTS - 1  # a slot of the last node


@pytest.fixture(scope="module")
def own_cluster(server_binary: Path) -> Iterator[LocalCluster]:
    """Three masters that may be paused without being declared dead."""
    with LocalCluster(masters=3, port=None, server=server_binary, settings={"cluster-node-timeout": "60000"}) as made:
        yield made


@contextmanager
def paused(made: LocalCluster, index: int) -> Iterator[None]:
    pid = made.processes[index].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def append_watched(made: Rig, retries: list[str], statuses: list[str]) -> None:
    """One append over pipes of its own that note each retry."""
    async with anyio.create_task_group() as tasks:
        made.pipes = Pipes(made.client.cluster, tasks, retries.append)
        statuses.append((await made.append("p", 1, "a")).status)
        made.pipes = made.client.pipes
        tasks.cancel_scope.cancel()


async def test_a_call_outlasts_a_paused_node(
    own_cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "ANSWER_TIMEOUT_S", 0.3)
    retries: list[str] = []
    statuses: list[str] = []
    async with rig(own_cluster.url, queue_name, LAST) as made, anyio.create_task_group() as tasks:
        with paused(own_cluster, 2):
            tasks.start_soon(append_watched, made, retries, statuses)

            async def tried_again() -> bool:
                return len(retries) >= 2

            await until(tried_again, "two tries without an answer")
            assert not statuses

        async def answered() -> bool:
            return statuses == ["OK"]

        await until(answered, "the answer after the pause")
        assert set(retries) == {"refresh"}
        assert len(await made.entries()) == 1


async def test_others_go_on_while_a_node_is_paused(own_cluster: LocalCluster, queue_name: str) -> None:
    async with rig(own_cluster.url, queue_name, 0) as made:
        with paused(own_cluster, 2):
            assert (await made.append("p", 1, "a")).status == "OK"


async def test_a_deadline_that_passes_leaves_the_outcome_unknown(
    own_cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "ANSWER_TIMEOUT_S", 0.2)
    async with rig(own_cluster.url, queue_name, LAST) as made:
        packed = appends.pack_append(made.shard, "p", 1, 1, batch_of("a"), None)
        with paused(own_cluster, 2):
            with pytest.raises(StoreTimeout, match="did not answer") as caught:
                await made.pipes.command(LAST, packed.data, timeout_s=0.5)
            assert caught.value.outcome_unknown
            assert caught.value.retryable
        assert (await made.send(packed)).status == "OK"
        assert len(await made.entries()) == 1, "sent again, stored once"


async def test_cancelled_calls_leave_their_connections_usable(own_cluster: LocalCluster) -> None:
    chance = random.Random(11)
    cancelled = answered = 0
    async with shardq.connect(own_cluster.url) as client:

        async def ask(pipes: Pipes, slot: int, text: str) -> None:
            nonlocal answered
            assert await pipes.command(slot, pack_command("ECHO", text)) == text.encode()
            answered += 1

        for turn in range(400):
            # In turn: the callers go away, and the senders go away with the reply on its way to them.
            async with anyio.create_task_group() as tasks:
                pipes = client.pipes if turn % 2 else Pipes(client.cluster, tasks)
                texts = [f"{turn}-{index}" * chance.choice([1, 2000]) for index in range(5)]
                before = answered
                for text in texts:
                    tasks.start_soon(ask, pipes, chance.choice([0, LAST]), text)
                for _ in range(chance.randrange(40)):
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
            cancelled += len(texts) - (answered - before)
        assert cancelled > 100, "too few calls were cut short to prove anything"
        assert answered > 100, "too few calls were answered to prove anything"
        async with anyio.create_task_group() as tasks:
            for index in range(500):
                tasks.start_soon(ask, client.pipes, chance.randrange(SLOTS), f"after-{index}")
