"""Workers as processes, and what happens to them: sharing, joining, leaving, crashing, pausing. Real servers only."""

from __future__ import annotations

import signal
import time
from collections import Counter
from pathlib import Path
from types import MappingProxyType

import anyio
import pytest

import shardq
from shardq.ops.local_cluster import LocalCluster
from tests.runtime.harness import GROUP, Traffic, WorkerProcess, check_equation, drained, owners, until, workers
from tests.runtime.judge import Pauses, Verdict, judge, read_journal

# Workers are what is tested here; tests/faults does it on every kind of server.
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("valkey9")]

SHARDS = 12
LEASE_S = 3.0


def shares(owned: dict[int, str]) -> list[int]:
    return sorted(Counter(owned.values()).values())


async def spread(queue: shardq.Queue, names: set[str], deadline_s: float = 20) -> None:
    """Waits until these workers, and nobody else, hold all shards evenly."""

    async def even() -> bool:
        owned = await owners(queue)
        counts = shares(owned)
        return len(owned) == SHARDS and set(owned.values()) == names and counts[-1] - counts[0] <= 1

    await until(even, deadline_s, f"an even share for {sorted(names)}")


async def verdict_when_drained(
    queue: shardq.Queue, traffic: Traffic, journal: Path, paused: Pauses = MappingProxyType({})
) -> Verdict:
    await until(lambda: drained(queue), 30, "an empty backlog")
    await check_equation(queue)
    verdict = judge(traffic.sent, read_journal(journal), paused)
    assert verdict.lost == set()
    assert verdict.disorder == []
    assert verdict.overlaps == []
    assert verdict.stale == []
    return verdict


async def test_two_then_four_workers_share_twelve_shards_and_move_only_what_they_must(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        with workers(cluster.url, queue_name, tmp_path) as start:
            two = [start(), start()]
            await spread(queue, {worker.name for worker in two})
            before = await owners(queue)
            four = [*two, start(), start()]
            await spread(queue, {worker.name for worker in four})
            after = await owners(queue)
            moved = [shard for shard in before if before[shard] != after[shard]]
            assert len(moved) == 6, "six shards go to the two that joined, and no other moves"
            async with queue.producer() as producer:
                traffic = Traffic()
                await traffic.send(producer, 2000)
            verdict = await verdict_when_drained(queue, traffic, tmp_path)
            assert verdict.repeated == set()
            assert len({fact.process for fact in read_journal(tmp_path)}) == 4


async def test_a_killed_worker_is_replaced_within_lease_and_two_seconds(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        traffic = Traffic()
        with workers(cluster.url, queue_name, tmp_path, lease=LEASE_S, handler_s=0.002) as start:
            # The first worker leads, so this kills the leader and a worker in one.
            three = [start()]
            await spread(queue, {three[0].name})
            three += [start(), start()]
            await spread(queue, {worker.name for worker in three})
            async with queue.producer() as producer, anyio.create_task_group() as tasks:
                tasks.start_soon(traffic.keep_sending, producer)
                await until(lambda: len(read_journal(tmp_path)) > 500, 20, "traffic")
                before = await owners(queue)
                three[0].send(signal.SIGKILL)
                orphans = {shard for shard, owner in before.items() if owner == three[0].name}

                async def taken() -> bool:
                    owned = await owners(queue)
                    return all(owned.get(shard) not in (None, three[0].name) for shard in orphans)

                await until(taken, LEASE_S + 2, "the killed worker's shards to be taken")
                after = await owners(queue)
                assert {shard for shard in before if before[shard] != after[shard]} == orphans
                await spread(queue, {worker.name for worker in three[1:]})
                traffic.stopped = True
            await verdict_when_drained(queue, traffic, tmp_path)
            assert {s for s, o in (await owners(queue)).items() if o != after[s]} == set(), (
                "nothing moved a second time"
            )


async def test_a_join_at_the_moment_of_a_crash_does_not_delay_the_takeover(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    """The new plan gives some orphans to the worker that has just come; the standby that watched them takes them."""
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        with workers(cluster.url, queue_name, tmp_path, lease=LEASE_S) as start:
            leader = start()
            await spread(queue, {leader.name})
            other = start()
            await spread(queue, {leader.name, other.name})
            leader.send(signal.SIGKILL)
            joined = start()

            async def taken() -> bool:
                owned = await owners(queue)
                return len(owned) == SHARDS and leader.name not in owned.values()

            await until(taken, LEASE_S + 2, "every shard of the killed worker to be taken")
            await spread(queue, {other.name, joined.name})


async def test_a_graceful_stop_repeats_nothing(cluster: LocalCluster, queue_name: str, tmp_path: Path) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        traffic = Traffic()
        with workers(cluster.url, queue_name, tmp_path, handler_s=0.003) as start:
            first, second = start(), start()
            await spread(queue, {first.name, second.name})
            async with queue.producer() as producer, anyio.create_task_group() as tasks:
                tasks.start_soon(traffic.keep_sending, producer)
                await until(lambda: len(read_journal(tmp_path)) > 300, 20, "traffic")
                first.send(signal.SIGTERM)
                assert await first.wait() == 0
                third = start()
                await spread(queue, {second.name, third.name})
                second.send(signal.SIGINT)
                assert await second.wait() == 0
                await spread(queue, {third.name})
                third.send(signal.SIGTERM)
                assert await third.wait() == 0
                assert await owners(queue) == {}
                last = start()
                traffic.stopped = True
            verdict = await verdict_when_drained(queue, traffic, tmp_path)
            assert verdict.repeated == set()
            last.send(signal.SIGTERM)
            assert await last.wait() == 0


async def test_a_paused_worker_can_not_commit_after_its_lease_was_taken(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        traffic = Traffic()
        with workers(cluster.url, queue_name, tmp_path, lease=2.0, handler_s=0.005) as start:
            zombie, other = start(), start()
            await spread(queue, {zombie.name, other.name})
            async with queue.producer() as producer, anyio.create_task_group() as tasks:
                tasks.start_soon(traffic.keep_sending, producer)
                await until(lambda: len(read_journal(tmp_path)) > 500, 20, "traffic")
                zombie.send(signal.SIGSTOP)
                stopped_ns = time.monotonic_ns()
                await spread(queue, {other.name})
                woken_ns = time.monotonic_ns()
                zombie.send(signal.SIGCONT)
                await until(lambda: "moved on" in zombie.log.read_text(), 20, "the woken worker to be told")
                await spread(queue, {zombie.name, other.name})
                traffic.stopped = True
            paused = {str(zombie.process.pid): (stopped_ns, woken_ns)}
            await verdict_when_drained(queue, traffic, tmp_path, paused)


async def test_leases_go_on_while_a_new_leader_is_found(cluster: LocalCluster, queue_name: str, tmp_path: Path) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        with workers(cluster.url, queue_name, tmp_path, lease=LEASE_S) as start:
            first = start()
            await spread(queue, {first.name})
            leader = await leader_of(queue)
            assert leader == first.name
            others = [start(), start()]
            await spread(queue, {first.name, *(worker.name for worker in others)})
            before = await owners(queue)
            first.send(signal.SIGKILL)

            async def new_leader() -> bool:
                return await leader_of(queue) in {worker.name for worker in others}

            await until(new_leader, 2 * 0.6 * LEASE_S, "a new leader within two leader leases")
            after = await owners(queue)
            kept = {shard: owner for shard, owner in before.items() if owner != first.name}
            assert {shard: after[shard] for shard in kept} == kept, "living owners keep their shards throughout"


async def leader_of(queue: shardq.Queue) -> str:
    from shardq.storage.commands import pack_command

    data = pack_command("HGET", queue.keys.control(GROUP), "leader")
    return (await queue.client.pipes.command(queue.keys.control_slot, data) or b"").decode()


async def test_workers_started_before_any_message_and_two_groups_side_by_side(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        await queue.open_group("other")
        with workers(cluster.url, queue_name, tmp_path) as start:
            worker: WorkerProcess = start()
            await spread(queue, {worker.name})
            traffic = Traffic()
            async with queue.producer() as producer:
                await traffic.send(producer, 500)
            await verdict_when_drained(queue, traffic, tmp_path)
            counters = await queue.counters(["other"])
            assert sum(shard.appended for shard in counters.values()) == 500
            assert sum(shard.groups["other"].acked for shard in counters.values()) == 0
            assert sum(shard.entries for shard in counters.values()) > 0, "the other group has not read them yet"
