"""The doctor on queues that were resharded: what is left undone is found, and gone when it is done."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

import shardq
from shardq.core.findings import Finding
from shardq.core.reshard import split_all
from shardq.ops.doctor.facts import Limits
from shardq.ops.doctor.run import Wanted, examine
from shardq.ops.inspect import read_queue
from shardq.ops.local_cluster import LocalCluster
from shardq.ops.waits import waits_for
from shardq.runtime import reshard as resharding
from tests.runtime.harness import running, until

pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis8")]

GROUP = "g"


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[shardq.Client]:
    async with shardq.connect(cluster.url) as connected:
        yield connected


async def look(cluster: LocalCluster, queue: str, **limits: Any) -> dict[str, Finding]:
    """What was found of this queue, by id."""
    with anyio.fail_after(30):
        findings = await examine(cluster.url, Wanted(queue, 0.2, limits=Limits(**limits)))
    return {each.id: each for each in findings if each.subject.split()[0] == queue}


async def test_a_reshard_that_nobody_carries_on(client: shardq.Client, cluster: LocalCluster, queue_name: str) -> None:
    queue = await client.queue(queue_name, shards=2)
    await queue.open_group(GROUP)
    plan = split_all(queue.table)
    await resharding.begin(client.pipes, queue.keys, plan)
    found = (await look(cluster, queue_name))["reshard.unfinished"]
    assert (found.level, "holds nothing up" in found.what) == ("warning", True)
    work = resharding.Work(client.pipes, queue.keys, plan.to_bytes())
    for step in resharding.STEPS[:3]:
        assert await step(work)
    found = (await look(cluster, queue_name))["reshard.unfinished"]
    assert (found.level, "sends to the shards that it seals wait" in found.what) == ("problem", True)
    assert f"shardq acl worker --queue {queue_name} --reshards" in found.do
    await resharding.carry_on(client.pipes, queue.keys)
    assert "reshard.unfinished" not in await look(cluster, queue_name)


async def test_what_a_retired_shard_waits_for(client: shardq.Client, cluster: LocalCluster, queue_name: str) -> None:
    queue = await client.queue(queue_name, shards=2)
    worker = shardq.Worker(queue_name, group=GROUP, lease=2.0, retry=shardq.Retry(attempts=2, base=600))

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        raise ValueError("not yet")

    await queue.open_group(GROUP)
    key = next(f"k{number}" for number in range(100) if queue.place_of(f"k{number}") == queue.shards[0])
    async with queue.producer() as producer:
        await producer.send(1, key=key)
    await queue.split(0)

    async def waits() -> bool:
        view = await read_queue(client, queue_name)
        return view.shards[0].groups[GROUP].waiting == 1 and view.shards[0].groups[GROUP].held

    async with running(client, worker):
        await until(waits, 30, "the retry to wait")
        assert waits_for(await read_queue(client, queue_name), GROUP) == {2: [0], 3: [0]}
        found = await look(cluster, queue_name)
        assert "shard.no_owner" not in found, "shards that nobody may own yet lack no owner"
        assert "has 1 messages to finish on retired shard 0, of which 1 wait for a" in found["reshard.waits"].what
        assert "begins on shards 2, 3 only then" in found["reshard.waits"].what
    await queue.reset_group(GROUP, "latest", force=True)
    assert "reshard.waits" not in await look(cluster, queue_name)


async def test_messages_that_are_old_are_what_is_waited_for(
    client: shardq.Client, cluster: LocalCluster, queue_name: str
) -> None:
    queue = await client.queue(queue_name, shards=1)
    await queue.open_group(GROUP)
    async with queue.producer() as producer:
        await producer.send(1)
    await queue.split(0)
    assert "reshard.waits" not in await look(cluster, queue_name), "it may be handled in a moment"
    found = await look(cluster, queue_name, old_pending_s=0.05)
    assert "1 messages to finish on retired shard 0, of which 0 wait" in found["reshard.waits"].what


async def test_dead_letters_that_keep_a_retired_shard(
    client: shardq.Client, cluster: LocalCluster, queue_name: str
) -> None:
    queue = await client.queue(queue_name, shards=1)
    worker = shardq.Worker(queue_name, group=GROUP, lease=2.0)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        raise shardq.Reject("never")

    async with running(client, worker):
        async with queue.producer() as producer:
            await producer.send(1)
        await queue.split(0)
        letters = queue.dead_letters(GROUP)

        async def there() -> bool:
            return [letter.shard async for letter in letters] == [0]

        await until(there, 30, "the dead letter")
    found = await look(cluster, queue_name)
    assert "retired shard 0 can't be removed: dead letters kept there: 1" in found["reshard.kept"].what
    assert await letters.purge() == 1
    assert "reshard.kept" not in await look(cluster, queue_name)
