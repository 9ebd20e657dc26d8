"""A plan that a master lost, while those who had it live on: nothing of the group stands still for it."""

from __future__ import annotations

from pathlib import Path

import pytest

import shardq
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.commands import pack_command
from shardq.storage.control import control_state
from shardq.storage.counters import inspect
from tests.runtime.harness import GROUP, WorkerProcess, running, until

pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("valkey9")]

LEASE_S = 4.0


async def test_who_comes_again_under_its_name_gets_its_shards(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    """It is killed and started again before anybody missed it: so nobody's shards change."""
    leader = shardq.Worker(queue_name, group=GROUP, name="a", lease=LEASE_S)

    @leader.handler
    async def handle(message: shardq.Message) -> None: ...

    async def epochs(client: shardq.Client, queue: shardq.Queue) -> dict[int, int]:
        """Of the leases that b has."""
        found = [(await inspect(client.pipes, keys, [GROUP])).groups[GROUP] for keys in queue.shards.values()]
        return {shard: each.epoch for shard, each in zip(queue.shards, found, strict=True) if each.owner == "b"}

    def start() -> WorkerProcess:
        target = "tests.runtime.app:worker"
        return WorkerProcess(cluster.url, queue_name, tmp_path, lease=LEASE_S, target=target, options=["--name", "b"])

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=4)

        async def leads() -> bool:
            return (await control_state(client.pipes, queue.keys, GROUP)).leader == "a"

        async def even() -> bool:
            return len(await epochs(client, queue)) == 2

        async with running(client, leader):
            await until(leads, 20, "a leader")
            first = start()
            second = None
            try:
                await until(even, 30, "two shards each")
                before = await epochs(client, queue)
                first.end()
                lost = pack_command("HDEL", queue.keys.control(GROUP), "plan", "plan_version")
                assert await client.pipes.command(queue.keys.control_slot, lost) == 2
                second = start()

                async def again() -> bool:
                    now = await epochs(client, queue)
                    return now.keys() == before.keys() and all(now[shard] > before[shard] for shard in now)

                await until(again, 40, "its shards")
            finally:
                first.end()
                if second is not None:
                    second.end()
