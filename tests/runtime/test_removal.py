"""Deleting a queue: nothing is left, what is in use is refused, what was cut short is completed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import shardq
from shardq.core.slots import key_slot
from shardq.errors import GroupInUse, UnknownQueue
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime.deletion import standing_of
from shardq.storage import calls, removal
from shardq.storage.commands import pack_command
from shardq.storage.groups import Standing
from shardq.storage.nodes import node_command
from shardq.storage.pipes import Pipes
from tests.runtime.harness import GROUP, owners, running, until, workers
from tests.runtime.judge import read_journal

pytestmark = pytest.mark.anyio

SHARDS = 4


def keys_of(cluster: LocalCluster, queue: str) -> list[str]:
    """Every key that names the queue, on every node."""
    return sorted(str(name) for port in cluster.ports for name in node_command("127.0.0.1", port, "KEYS", f"*{queue}*"))


async def filled(client: shardq.Client, name: str) -> shardq.Queue:
    """A queue with messages, groups with members of their own, and a schedule."""
    queue = await client.queue(name, shards=SHARDS)
    async with queue.producer() as producer:
        for number in range(20):
            await producer.send(number, key=f"k{number}")
        await producer.send("later", key="k", delay=600)
    for group in ("a", "b"):
        await queue.open_group(group)
        await client.pipes.command(queue.keys.control_slot, pack_command("HSET", queue.keys.control(group), "term", 1))
    await client.schedule(name, "nightly", "0 3 * * *")
    return queue


async def test_nothing_is_left_of_a_deleted_queue(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        other = await filled(client, f"other-{queue_name}-kept")
        before = keys_of(cluster, queue_name)
        queue = await filled(client, queue_name)
        async with queue.producer() as producer:
            await producer.send(1, key="k")
            await queue.delete()
            with pytest.raises(UnknownQueue):
                await producer.send(2, key="k")
        assert keys_of(cluster, queue_name) == before
        assert queue_name not in await client.queue_names()
        with pytest.raises(UnknownQueue, match="does not exist"):
            await queue.delete()
        with pytest.raises(UnknownQueue):
            await client.queue(queue_name)
        assert [info.backlog for info in await other.groups()] == [20, 20]
        again = await client.queue(queue_name, shards=2)
        assert await again.groups() == []
        assert await client.schedules(queue_name) == []
        async with again.producer() as producer:
            assert await producer.send(1, key="k")


async def test_what_handlers_keep_stays(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await filled(client, queue_name)
        place = queue.place_of("k")
        await client.pipes.command(place.slot, pack_command("SET", place.data("total"), "7"))
        await queue.delete()
        assert keys_of(cluster, queue_name) == [place.data("total")]


async def test_a_queue_in_use_is_not_deleted(cluster: LocalCluster, queue_name: str, tmp_path: Path) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await filled(client, queue_name)
        with workers(cluster.url, queue_name, tmp_path) as start:
            worker = start()

            async def has_all() -> bool:
                return len(await owners(queue)) == SHARDS

            await until(lambda: len(read_journal(tmp_path)) >= 40, 20, "all to be handled")
            await until(has_all, 20, "the worker to have every shard")
            with pytest.raises(
                GroupInUse, match=f"nothing was changed: worker {worker.name} holds shard 0 for group 'g'"
            ):
                await queue.delete()
            assert [info.name for info in await queue.groups()] == ["a", "b", GROUP]
            worker.send(signal.SIGKILL)
            await worker.wait()
        with pytest.raises(GroupInUse, match="holds shard 0"):
            await queue.delete()
        for keys in queue.shards.values():
            fields = ("token", "", "owner", "")
            await client.pipes.command(keys.slot, pack_command("HSET", keys.group(GROUP), *fields))
        with pytest.raises(GroupInUse, match=f"{worker.name} is a member of group 'g'"):
            await queue.delete()
        await queue.delete(force=True)
        assert keys_of(cluster, queue_name) == []


@pytest.mark.parametrize("removed", range(SHARDS + 1))
@pytest.mark.parametrize("unlisted", [False, True])
async def test_what_was_cut_short_is_completed(
    cluster: LocalCluster, queue_name: str, removed: int, unlisted: bool
) -> None:
    """A client that is killed has noted the groups and done some shards, or all, and perhaps the list of queues."""
    async with shardq.connect(cluster.url) as client:
        queue = await filled(client, queue_name)
        await removal.mark_groups(client.pipes, queue.keys, ["a", "b"])
        for shard in range(removed):
            await removal.remove_shard(client.pipes, queue.shards[shard], ["a", "b"], force=False)
        if unlisted:
            await client.pipes.command(key_slot(b"shardq:queues"), pack_command("SREM", "shardq:queues", queue_name))
        await (await client.queue(queue_name)).delete()
        assert keys_of(cluster, queue_name) == []
        assert queue_name not in await client.queue_names()


async def test_a_worker_that_comes_in_between_is_named(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await filled(client, queue_name)

        async def take_a_shard(*_: object) -> None:
            await calls.acquire(client.pipes, queue.shards[2], "b", "late", "n", 0, None, timeout_s=5, confirm=None)

        monkeypatch.setattr("shardq.runtime.removal._refuse_if_used", take_a_shard)
        with pytest.raises(GroupInUse, match=r"3 of 4 shards are gone, worker late holds shard 2 for group 'b'"):
            await queue.delete()
        assert keys_of(cluster, queue_name) != []
        await queue.delete(force=True)
        assert keys_of(cluster, queue_name) == []


@pytest.mark.parametrize("keeps_coming", [False, True])
async def test_a_group_that_comes_in_between_is_seen_at_the_next_look(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch, keeps_coming: bool
) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await filled(client, queue_name)
        looks = 0

        async def open_another(*_: object) -> None:
            nonlocal looks
            looks += 1
            if keeps_coming or looks == 1:
                await queue.open_group(f"new-{looks}")

        monkeypatch.setattr("shardq.runtime.removal._refuse_if_used", open_another)
        if keeps_coming:
            with pytest.raises(GroupInUse, match="gets new groups all the time"):
                await queue.delete()
        await queue.delete(force=True)
        assert keys_of(cluster, queue_name) == []


async def test_workers_that_run_on_make_nothing_of_a_deleted_queue_and_go_on_with_a_new_one(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left, however they end: that they are stopped, or killed at any moment."""
    seen: list[int] = []
    looked = 0

    async def look(pipes: Pipes, queue: shardq.Queue, group: str) -> Standing | None:
        nonlocal looked
        looked += 1
        return await standing_of(pipes, queue, group)

    monkeypatch.setattr("shardq.runtime.member.standing_of", look)
    worker = shardq.Worker(queue_name, group=GROUP, lease=1.0, limit="1000/s")

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        seen.append(message.value)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        async with running(client, worker):

            async def has_all() -> bool:
                return len(await owners(queue)) == SHARDS

            await until(has_all, 20, "the worker to have every shard")
            await queue.delete(force=True)
            await until(lambda: looked >= 3, 20, "heartbeats that find nothing")
            assert keys_of(cluster, queue_name) == []
            again = await client.queue(queue_name, shards=SHARDS)
            async with again.producer() as producer:
                await producer.send_many((f"k{number}", number) for number in range(20))
            await until(lambda: len(seen) == 20, 30, "the new one's messages to be handled")
            await again.delete(force=True)
        assert keys_of(cluster, queue_name) == []
