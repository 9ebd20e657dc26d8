"""Masters that fail while messages with retries and effects flow at durability "replica". Commits of workers are not
waited for, so a failover may take some back; then acknowledgement, effects, retries and what was sent on go back
together, for they lie on one slot, and the messages are handled again: effects stay exactly once.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio
import pytest
from anyio.abc import TaskGroup

import shardq
from shardq.errors import StoreError
from shardq.ops.local_cluster import LocalCluster, LocalServer
from shardq.runtime import reshard as resharding
from shardq.storage.nodes import node_command, node_info
from tests.runtime.crowd import APP, dead, history, make_traffic, numbers, send_slowly, to_be_dead, to_be_done
from tests.runtime.harness import GROUP, check_equation, drained, until, workers

# The other kinds fail over in tests/faults.
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis8")]

HOST = "127.0.0.1"
SHARDS = 6
KEYS = 24
LEASE_S = 2.0

Step = Callable[[resharding.Work], Awaitable[bool]]


def masters(cluster: LocalCluster) -> list[LocalServer]:
    alive = [process for process in cluster.processes if process.alive]
    return [process for process in alive if node_info(HOST, process.port, "replication")["role"] == "master"]


def replica_of(cluster: LocalCluster, master: LocalServer) -> LocalServer:
    for process in cluster.processes:
        if node_info(HOST, process.port, "replication").get("master_port") == str(master.port):
            return process
    raise AssertionError(f"{master.port} has no replica")


def wait_for_promotion(cluster: LocalCluster, replica: LocalServer) -> None:
    deadline = time.monotonic() + 30
    while replica not in masters(cluster):
        assert time.monotonic() < deadline, "waited 30 s for the replica to be promoted"
        time.sleep(0.05)


def hand_over(cluster: LocalCluster, master: LocalServer) -> int:
    """CLUSTER FAILOVER: nothing is lost."""
    replica = replica_of(cluster, master)
    node_command(HOST, replica.port, "CLUSTER", "FAILOVER")
    wait_for_promotion(cluster, replica)
    return 0


def die(cluster: LocalCluster, master: LocalServer) -> int:
    """SIGKILL, at a moment when its replica has heard nearly everything."""
    replica = replica_of(cluster, master)
    master.kill()
    wait_for_promotion(cluster, replica)
    master.restart()
    return 0


def die_unheard(cluster: LocalCluster, master: LocalServer) -> int:
    """SIGKILL, and of the last half second its replica heard nothing; returns how many bytes those are."""

    def written() -> int:
        return int(node_info(HOST, master.port, "replication")["master_repl_offset"])

    replica = replica_of(cluster, master)
    os.kill(replica.pid, signal.SIGSTOP)
    try:
        node_command(HOST, master.port, "CLIENT", "KILL", "TYPE", "replica")
        heard = written()
        time.sleep(0.5)
        unheard = written() - heard
        master.kill()
    finally:
        os.kill(replica.pid, signal.SIGCONT)
    wait_for_promotion(cluster, replica)
    master.restart()
    return unheard


async def test_effects_happen_once_also_when_a_failover_takes_commits_back(
    cluster_with_replicas: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    cluster, seed = cluster_with_replicas, random.randrange(10**9)
    print(f"seed {seed}")
    sent = make_traffic(seed, 3000, KEYS)
    settings = {"COPIES": f"{queue_name}-copies"}
    unheard = 0
    async with shardq.connect(cluster.url) as client:
        assert client.confirm(None) is not None, "sends wait for a replica by default"
        queue = await client.queue(queue_name, shards=SHARDS)
        copies = await client.queue(f"{queue_name}-copies", shards=SHARDS)
        await copies.open_group("keeps")
        await queue.open_group(GROUP)

        async def traffic() -> bool:
            found = await queue.counters([GROUP])
            return sum(shard.groups[GROUP].acked for shard in found.values()) > 100

        with workers(cluster.url, queue_name, tmp_path, lease=LEASE_S, handler_s=0.02, target=APP) as start:
            running = [start(**settings), start(**settings)]
            async with queue.producer() as producer, anyio.create_task_group() as tasks:
                tasks.start_soon(send_slowly, producer, sent, 0.08)
                await until(traffic, 20, "traffic")
                for how in (hand_over, die, die_unheard):
                    await anyio.to_thread.run_sync(cluster.wait_until_ready)
                    victim = random.Random(seed).choice(masters(cluster))
                    unheard += await anyio.to_thread.run_sync(how, cluster, victim)
            await until(lambda: drained(queue), 60, "an empty backlog")
            told = sum(worker.log.read_text().count("moved on") for worker in running)
        await anyio.to_thread.run_sync(cluster.wait_until_ready)
        assert unheard > 0, "something was written that the promoted replica never heard of"
        assert told > 0, "a worker was told that its commits were taken back"
        for key, values in sent.items():
            expected = to_be_done(values)
            assert await numbers(queue, key) == expected, key
            assert await history(copies, key) == expected, key
        assert await dead(queue) == to_be_dead(sent)
        await check_equation(queue)


async def test_masters_die_half_way_through_a_reshard(
    cluster_with_replicas: LocalCluster, queue_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of the master of a shard that is about to be sealed, then of the one that has the routing table, just
    before the new one is published; the replicas take over. Workers handle all the while, and whoever carries the
    reshard out goes on, or a leader does."""
    cluster, seed = cluster_with_replicas, random.randrange(10**9)
    print(f"seed {seed}")
    sent = make_traffic(seed, 1600, KEYS)
    await anyio.to_thread.run_sync(cluster.wait_until_ready)
    async with shardq.connect(cluster.url) as client, shardq.connect(cluster.url) as operator:
        queue = await client.queue(queue_name, shards=SHARDS)
        changing = await operator.queue(queue_name)
        await queue.open_group(GROUP)

        async def handled(more_than: int) -> bool:
            await queue.refresh()
            found = await queue.counters([GROUP])
            return sum(shard.groups[GROUP].acked for shard in found.values()) > more_than

        with workers(cluster.url, queue_name, tmp_path, lease=LEASE_S, handler_s=0.02, target=APP) as start:
            for worker in [start(), start()]:
                await until(partial(worker.says, "handles"), 30, "a worker to begin")
            async with queue.producer() as producer, anyio.create_task_group() as tasks:
                tasks.start_soon(send_slowly, producer, sent, 0.08)
                for before, slot, shards, count in (
                    (resharding.seal, queue.shards[0].slot, 2 * SHARDS, 100),
                    (resharding.publish, queue.keys.control_slot, SHARDS, 500),
                ):
                    await until(partial(handled, count), 30, "traffic")
                    victim = master_of(cluster, slot)
                    deaths: list[anyio.Event] = []
                    with monkeypatch.context() as patched:
                        patched.setattr(resharding, "STEPS", dying(before, cluster, victim, tasks, deaths))
                        with suppress(StoreError):  # it was away for too long: the leader goes on
                            await changing.scale(shards)
                    await deaths[0].wait()

                    async def scaled(shards: int = shards) -> bool:
                        await queue.refresh()
                        return len(queue.table.shards) == shards

                    await until(scaled, 30, "the new routing table")
                    await anyio.to_thread.run_sync(cluster.wait_until_ready)
            await until(lambda: handled(sum(len(to_be_done(values)) for values in sent.values()) - 1), 60, "all of it")
            await until(lambda: drained(queue), 60, "an empty backlog")
        for key, values in sent.items():
            assert await numbers(queue, key) == to_be_done(values), key
        assert await dead(queue) == to_be_dead(sent)
        await check_equation(queue)


def master_of(cluster: LocalCluster, slot: int) -> LocalServer:
    for master in masters(cluster):
        for first, last, owner, *_ in node_command(HOST, master.port, "CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(each for each in masters(cluster) if each.port == owner[1])
    raise AssertionError(f"nobody has slot {slot}")


def dying(
    before: Step, cluster: LocalCluster, victim: LocalServer, tasks: TaskGroup, deaths: list[anyio.Event]
) -> tuple[Step, ...]:
    """The steps of a reshard; the victim dies just before one of them, and comes back when its replica was promoted:
    then the event in `deaths` is set."""

    async def come_back(back: anyio.Event, replica: LocalServer) -> None:
        await anyio.to_thread.run_sync(wait_for_promotion, cluster, replica)
        await anyio.to_thread.run_sync(victim.restart)
        back.set()

    async def kill(_work: resharding.Work) -> bool:
        replica = replica_of(cluster, victim)
        victim.kill()
        deaths.append(anyio.Event())
        tasks.start_soon(come_back, deaths[-1], replica)
        return True

    steps: list[Step] = []
    for step in resharding.STEPS:
        steps += [kill, step] if step is before else [step]
    return tuple(steps)
