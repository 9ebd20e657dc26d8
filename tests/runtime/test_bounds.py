"""Bounded memory: full queues that block, reject or drop their oldest; retention; and an idle queue back at its
base."""

from __future__ import annotations

from math import inf
from typing import Any

import anyio
import pytest

import shardq
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime import buffers
from shardq.storage.cluster import Cluster
from shardq.storage.commands import pack_command
from shardq.storage.pipes import Pipes
from shardq.storage.requests import Request
from tests.runtime.harness import GROUP, check_equation, drained, running, until

pytestmark = pytest.mark.anyio


def collecting(queue_name: str, group: str = GROUP) -> tuple[shardq.Worker, list[int]]:
    seen: list[int] = []
    worker = shardq.Worker(queue_name, group=group)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        seen.append(message.value)

    return worker, seen


async def stored(queue: shardq.Queue) -> int:
    return sum(shard.appended for shard in (await queue.counters()).values())


async def test_a_full_queue_makes_its_senders_wait_and_loses_nothing(cluster: LocalCluster, queue_name: str) -> None:
    worker, seen = collecting(queue_name)
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1, max_backlog=100)
        await queue.open_group(GROUP)
        async with queue.producer() as producer, anyio.create_task_group() as tasks:
            tasks.start_soon(producer.send_many, [("k", number) for number in range(1000)])

            async def full() -> bool:
                return await stored(queue) == 100

            await until(full, 20, "a full queue")
            await anyio.sleep(0.3)
            assert await stored(queue) == 100
            async with running(client, worker):
                await until(lambda: len(seen) == 1000, 30, "all of them")
        assert seen == list(range(1000))
        await check_equation(queue)


async def test_a_full_queue_that_rejects_says_so_and_takes_more_when_there_is_room(
    cluster: LocalCluster, queue_name: str
) -> None:
    worker, seen = collecting(queue_name)
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1, max_backlog=5, overflow="reject")
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            for number in range(5):
                await producer.send(number, key="k")
            with pytest.raises(shardq.QueueFull, match="max_backlog") as raised:
                await producer.send(5, key="k")
            assert raised.value.retryable
            with pytest.raises(shardq.QueueFull):
                await producer.send(5, key="k", delay=60)
            async with running(client, worker):
                await until(lambda: drained(queue), 20, "an empty backlog")
                await producer.send(6, key="k")
                await until(lambda: len(seen) == 6, 20, "the last one")
        assert seen == [0, 1, 2, 3, 4, 6]


async def test_a_blocked_send_gives_up_at_its_delivery_timeout(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1, max_backlog=1)
        async with queue.producer(delivery_timeout=0.5) as producer:
            await producer.send(0, key="k")
            with pytest.raises(shardq.QueueFull):
                await producer.send(1, key="k")
        assert await stored(queue) == 1


async def test_a_blocked_send_says_so_though_its_last_try_came_too_late(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_time = Pipes._submit_after

    async def too_late(pipes: Pipes, request: Request, pause_s: float) -> None:
        await in_time(pipes, request, pause_s + buffers.FULL_TRY_S)

    monkeypatch.setattr(Pipes, "_submit_after", too_late)
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1, max_backlog=1)
        async with queue.producer(delivery_timeout=0.5) as producer:
            await producer.send(0, key="k")
            with pytest.raises(shardq.QueueFull) as raised:
                await producer.send(1, key="k")
            assert isinstance(raised.value.__cause__, shardq.StoreUnavailable)
        assert await stored(queue) == 1


async def test_a_blocked_send_says_so_though_its_last_answer_takes_longer_than_it_has(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is stored is worth more than an end in time."""
    exchange = Cluster.exchange

    async def slow(cluster: Cluster, *args: Any, within_s: float = inf, **rest: Any) -> Any:
        with anyio.move_on_after(within_s):
            await anyio.sleep(0.15)
        return await exchange(cluster, *args, within_s=max(0.0, within_s - 0.15), **rest)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1, max_backlog=1)
        async with queue.producer(delivery_timeout=0.5) as producer:
            await producer.send(0, key="k")
            monkeypatch.setattr(Cluster, "exchange", slow)
            monkeypatch.setattr(buffers, "backoff_s", lambda *_: 0.3)  # the second try has 0.05 s
            with pytest.raises(shardq.QueueFull):
                await producer.send(1, key="k")
            monkeypatch.undo()
        assert await stored(queue) == 1


async def test_drop_oldest_keeps_the_newest_and_counts_what_it_lost(cluster: LocalCluster, queue_name: str) -> None:
    worker, seen = collecting(queue_name)
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1, max_backlog=50, overflow="drop-oldest")
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            for number in range(200):
                await producer.send(number, key="k")
        counters = (await queue.counters())[0]
        assert counters.appended == 200
        assert counters.dropped == 150
        async with running(client, worker):
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert seen == list(range(150, 200))
        group = (await queue.counters())[0].groups[GROUP]
        assert group.lost + group.skip == 150
        await check_equation(queue)


async def test_settings_change_while_it_runs(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2, max_backlog=2, overflow="reject")
        async with queue.producer() as producer:
            await producer.send(0, key="k")
            with pytest.raises(shardq.QueueFull):
                await producer.send(1, key="k")
            await queue.change(max_backlog=None, overflow="block")
            await producer.send(1, key="k")


async def test_what_is_kept_for_replay_stays_until_it_is_trimmed_and_what_is_unfinished_always(
    cluster: LocalCluster, queue_name: str
) -> None:
    worker, _ = collecting(queue_name)
    again, replayed = collecting(queue_name, "again")
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2, retention="7d")
        async with queue.producer() as producer:
            for number in range(40):
                await producer.send(number, key=f"k{number % 3}")
        async with running(client, worker):
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert sum(shard.entries for shard in (await queue.counters()).values()) == 40
        async with running(client, again):
            await until(lambda: len(replayed) == 40, 20, "all of them for another group")
        await queue.open_group("slow")
        assert await queue.trim("latest") == 0, "a group has not finished them"
        await queue.delete_group("slow")
        assert await queue.trim("latest") == 40
        assert sum(shard.entries for shard in (await queue.counters()).values()) == 0


async def test_an_idle_queue_takes_no_more_memory_than_before_it_was_used(
    cluster: LocalCluster, queue_name: str
) -> None:
    worker = shardq.Worker(queue_name, group=GROUP, retry=shardq.Retry(attempts=2, base=0.05))

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        if message.value == "flaky" and message.attempt == 1:
            raise ValueError("no")

    async def memory(queue: shardq.Queue) -> int:
        total = 0
        for keys in queue.shards.values():
            names = [keys.stream, keys.meta, keys.delayed, keys.expiring, keys.timed, *keys.of_group(GROUP)]
            for name in names:
                packed = pack_command("MEMORY", "USAGE", name, "SAMPLES", 0)
                total += await queue.client.pipes.command(keys.slot, packed) or 0
        return total

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        async with queue.producer() as producer, running(client, worker):
            await producer.send("first", key="k")
            await until(lambda: drained(queue), 20, "an empty backlog")
            base = await memory(queue)
            for turn in range(300):
                await producer.send("flaky" if turn % 3 == 0 else b"x" * 1000, key=f"k{turn % 9}")
            await producer.send_many((f"k{number % 9}", b"x" * 1000) for number in range(5000))
            for turn in range(50):
                await producer.send("x", key="k", dedupe_id=f"id {turn}", dedupe_window=0.05)
                await producer.send("x", key="k", delay=0.05)
            await until(lambda: drained(queue), 30, "an empty backlog")

            async def back() -> bool:
                for keys in queue.shards.values():
                    tidy = ("FCALL", "shardq_1_tidy", 4, keys.stream, keys.meta, keys.expiring, keys.timed)
                    await client.pipes.command(keys.slot, pack_command(*tidy))
                return await memory(queue) < base + 4096

            await until(back, 20, "memory back at its base")
