"""Deleting one message for good: not handled afterwards, its bytes gone, the rest of its batch as it was."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import anyio
import pytest

import shardq
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.commands import pack_command
from tests.runtime.harness import GROUP, check_equation, drained, running, until

pytestmark = pytest.mark.anyio

SECRET = "secret-4711"


async def dumps(queue: shardq.Queue) -> bytes:
    """Every byte that the queue's keys hold."""
    found = b""
    for keys in queue.shards.values():
        entries = await queue.client.pipes.command(keys.slot, pack_command("XRANGE", keys.stream, "-", "+"))
        found += b"".join(field for _, fields in entries for field in fields)
        for group in (GROUP, "other"):
            for name, command in ((keys.kept(group), "HVALS"), (keys.timed, "HVALS")):
                found += b"".join(await queue.client.pipes.command(keys.slot, pack_command(command, name)))
            letters = await queue.client.pipes.command(keys.slot, pack_command("XRANGE", keys.dead(group), "-", "+"))
            found += b"".join(field for _, fields in letters for field in fields)
    return found


def collecting(queue_name: str, group: str = GROUP, **options: Any) -> tuple[shardq.Worker, dict[Any, list[Any]]]:
    seen: dict[Any, list[Any]] = defaultdict(list)
    worker = shardq.Worker(queue_name, group=group, **options)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        if message.value == "wait":
            await anyio.sleep_forever()
        seen[message.key].append(message.value)

    return worker, seen


async def ids(queue: shardq.Queue) -> dict[Any, str]:
    return {record.value: record.id async for record in queue.history()}


async def test_a_message_that_nobody_handled_yet_is_never_handled(cluster: LocalCluster, queue_name: str) -> None:
    worker, seen = collecting(queue_name)
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            await producer.send_many([("k", "a"), ("k", SECRET), ("k", "b")])
        assert await queue.delete_message((await ids(queue))[SECRET]) is False
        async with running(client, worker):
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert seen == {"k": ["a", "b"]}
        assert SECRET.encode() not in await dumps(queue)
        await check_equation(queue)


async def test_one_that_waits_in_a_workers_hands_is_not_handled_when_delete_returned(
    cluster: LocalCluster, queue_name: str
) -> None:
    worker, seen = collecting(queue_name, concurrency=1)
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer, anyio.create_task_group() as tasks:
            await producer.send_many([("k", "a"), ("k", "wait"), ("k", SECRET), ("k", "b")])
            tasks.start_soon(worker.run, client)
            await until(lambda: seen["k"] == ["a"], 20, "the first")
            assert await queue.delete_message((await ids(queue))[SECRET]) is False
            tasks.cancel_scope.cancel()
        worker, rest = collecting(queue_name, timeout=0.1, retry=shardq.Retry(attempts=1))
        async with running(client, worker):
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert rest == {"k": ["b"]}
        await check_equation(queue)


async def test_a_finished_one_leaves_a_kept_batch_at_once_and_the_others_keep_their_ids(
    cluster: LocalCluster, queue_name: str
) -> None:
    worker, _ = collecting(queue_name)
    late, seen = collecting(queue_name, "late")
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1, retention="1d")
        async with queue.producer() as producer:
            for turn in range(3):
                await producer.send_many([("k", f"a{turn}"), ("k", f"{SECRET}{turn}"), ("k", f"b{turn}")])
        async with running(client, worker):
            await until(lambda: drained(queue), 20, "an empty backlog")
        before = await ids(queue)
        assert await queue.delete_message(before[f"{SECRET}1"]) is True
        assert f"{SECRET}1".encode() not in await dumps(queue)
        after = await ids(queue)
        assert after == {value: name for value, name in before.items() if value != f"{SECRET}1"}
        await queue.open_group("late")
        async with running(client, late):
            await until(lambda: len(seen["k"]) == 8, 20, "a group that begins later")
        assert f"{SECRET}1" not in seen["k"]
        await check_equation(queue, "late")
        with pytest.raises(shardq.UsageError, match="not stored"):
            await queue.delete_message("0/1-1/0")


async def test_retries_and_dead_letters_of_a_deleted_message_go_with_it(cluster: LocalCluster, queue_name: str) -> None:
    tries: list[str] = []

    def failing(group: str, retry: shardq.Retry) -> shardq.Worker:
        worker = shardq.Worker(queue_name, group=group, retry=retry)

        @worker.handler
        async def handle(message: shardq.Message) -> None:
            tries.append(group)
            raise ValueError("no")

        return worker

    waits = failing(GROUP, shardq.Retry(attempts=3, base=1.5, jitter=0))
    dies = failing("other", shardq.Retry(attempts=1))
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        await queue.open_group(GROUP)
        await queue.open_group("other")
        async with queue.producer() as producer, running(client, waits), running(client, dies):
            message_id = await producer.send(SECRET, key="k")

            async def both() -> bool:
                groups = (await queue.counters())[0].groups
                return groups[GROUP].waiting == 1 and groups["other"].dead_letters == 1

            await until(both, 20, "a retry that waits and a dead letter")
            assert await queue.delete_message(message_id) is True
            assert SECRET.encode() not in await dumps(queue)
            await until(lambda: drained(queue), 20, "the retry to be given up")
        assert sorted(tries) == [GROUP, "other"]
