"""`shardq coordinator` beside real workers: it leads, assigns, takes no shard, and goes at once when it is told to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

import shardq
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.control import ControlState, control_state
from tests.cli.support import DEADLINE_S, Start, commands

# How a leader comes to be and goes is tested on every kind in tests/storage and tests/runtime; here it is a command.
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("valkey9")]

SHARDS = 6


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with commands(tmp_path) as start:
        yield start


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = anyio.current_time() + DEADLINE_S
    while not await condition():
        assert anyio.current_time() < deadline, "not in time"
        await anyio.sleep(0.02)


@asynccontextmanager
async def running(client: shardq.Client, queue: str, name: str) -> AsyncIterator[None]:
    worker = shardq.Worker(queue, group="g", name=name, lease=2)

    @worker.handler
    async def handle(message: shardq.Message) -> None: ...

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run, client)
        yield
        worker.stop()


async def test_it_leads_assigns_and_hands_over(cluster: LocalCluster, queue_name: str, start: Start) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)

        async def state() -> ControlState:
            return await control_state(client.pipes, queue.keys, "g")

        async def owned(wanted: dict[str, int]) -> bool:
            shards = (await queue.counters(["g"])).values()
            owners = [shard.groups["g"].owner for shard in shards if "g" in shard.groups]
            return {name: owners.count(name) for name in set(owners)} == wanted

        async def led() -> bool:
            return "-coordinator-" in (await state()).leader

        coordinator = start("coordinator", queue_name, "--group", "g", "--lease", "2", "--url", cluster.url)
        await until(led)
        leader = (await state()).leader
        async with running(client, queue_name, "one"):
            await until(lambda: owned({"one": 6}))
            async with running(client, queue_name, "two"):
                await until(lambda: owned({"one": 3, "two": 3}))
                now = await state()
                assert (now.leader, set(now.members)) == (leader, {leader, "one", "two"})
                assert now.rebalances >= 2

                assert await anyio.to_thread.run_sync(coordinator.stop) == 0, coordinator.stderr
                # Nobody waited anything out: by the time it is gone it leads no more and is no member.
                after = await state()
                assert after.leader in ("", "one", "two")
                assert set(after.members) == {"one", "two"}

                async def led_by_a_worker() -> bool:
                    return (await state()).leader in ("one", "two")

                await until(led_by_a_worker)
                assert await owned({"one": 3, "two": 3})


async def test_a_second_one_stands_by(cluster: LocalCluster, queue_name: str, start: Start) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        arguments = ("coordinator", queue_name, "--group", "g", "--url", cluster.url)
        both = [start(*arguments), start(*arguments)]

        async def members() -> bool:
            return len((await control_state(client.pipes, queue.keys, "g")).members) == 2

        async def one_leads() -> bool:
            return sum("leads" in each.stderr for each in both) == 1

        await until(members)
        await until(one_leads)
        leading, other = sorted(both, key=lambda each: "leads" not in each.stderr)
        assert leading.stop() == 0

        async def other_leads() -> bool:
            return "leads" in other.stderr

        await until(other_leads)
        assert other.stop() == 0
        assert (await control_state(client.pipes, queue.keys, "g")).members == {}


async def test_it_ends_when_its_group_or_its_queue_is_deleted(
    cluster: LocalCluster, queue_name: str, start: Start
) -> None:
    """One leads, the other stands by; neither owns a shard that it would miss."""
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)

        async def members() -> int:
            return len((await control_state(client.pipes, queue.keys, "g")).members)

        async def joined(count: int) -> bool:
            return await members() == count

        async def deleted() -> None:
            await queue.open_group("g")
            await queue.delete_group("g", force=True)

        await deleted()  # before they come: that is none of their business
        arguments = ("coordinator", queue_name, "--group", "g", "--url", cluster.url)
        both = [start(*arguments), start(*arguments)]
        await until(lambda: joined(2))
        await deleted()
        for each in both:
            assert await anyio.to_thread.run_sync(each.wait) == 1, each.stderr
            said = f"error: group 'g' of queue '{queue_name}' was deleted while this coordinator ran: start it again"
            assert said in each.stderr.splitlines()[-1]
        assert await members() == 0
        both = [start(*arguments), start(*arguments)]
        await until(lambda: joined(2))
        await queue.delete(force=True)
        for each in both:
            assert await anyio.to_thread.run_sync(each.wait) == 1, each.stderr
            assert each.stderr.splitlines()[-1] == f"error: queue {queue_name!r} does not exist (any more)"
