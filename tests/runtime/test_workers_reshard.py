"""Workers through splits and merges: every group handles every message, those of a key in order, whoever dies. What was
done is read from Redis alone (tests/runtime/effects_app.py): each message's effect appends its number to its key's
list, which stays where it is because it belongs to the shard's home.
"""

from __future__ import annotations

import random
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import anyio
import pytest

import shardq
from shardq.ops.local_cluster import LocalCluster
from tests.runtime.crowd import APP, LEASE_S, Crowd, Sent, make_traffic, numbers, to_be_done
from tests.runtime.harness import GROUP, check_equation, drained, until, workers

pytestmark = pytest.mark.anyio

KEYS = 24
GROUPS = (GROUP, "lists")


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[shardq.Client]:
    async with shardq.connect(cluster.url) as client:
        yield client


async def all_drained(queue: shardq.Queue, groups: Sequence[str] = GROUPS) -> bool:
    await queue.refresh()
    if any(found.delayed for found in (await queue.counters([])).values()):
        return False
    return all([await drained(queue, group) for group in groups])


class Story:
    """What is sent, part by part; a reshard may come between two parts."""

    def __init__(self, queue: shardq.Queue, seed: int) -> None:
        self.queue, self.chance = queue, random.Random(seed)
        self.sent: Sent = defaultdict(list)
        self.later: dict[str, int] = {}
        self.number = 0

    async def send(self, messages: int, *, delayed: int = 5) -> None:
        """Messages of which one in ten fails once or twice, and some that are due within seconds, of keys of their
        own."""
        part = make_traffic(self.chance.randrange(10**9), messages, KEYS, rejected=0.0)
        async with self.queue.producer() as producer, anyio.create_task_group() as senders:
            for key, values in part.items():
                renumbered = [(self.number + number, fails, end) for number, fails, end in values]
                self.sent[key] += renumbered
                senders.start_soon(self._send_key, producer, key, renumbered)
            for _ in range(delayed):
                key, self.number = f"later-{len(self.later)}", self.number + 1
                self.later[key] = 10**6 + len(self.later)
                delay = self.chance.uniform(0.1, 3)
                senders.start_soon(partial(producer.send, [self.later[key], 0, "ok"], key=key, delay=delay))
        self.number += messages

    @staticmethod
    async def _send_key(producer: shardq.Producer, key: str, values: list[tuple[int, int, str]]) -> None:
        for value in values:
            await producer.send(list(value), key=key)

    async def check(self, groups: Sequence[str] = GROUPS) -> None:
        for group in groups:
            for key, values in self.sent.items():
                assert await numbers(self.queue, key, group) == to_be_done(values), (group, key)
            for key, number in self.later.items():
                assert await numbers(self.queue, key, group) == [number], (group, key)
            await check_equation(self.queue, group)


def make_seed() -> int:
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    return seed


async def merge_two(queue: shardq.Queue) -> object:
    """The first two shards of one home that touch."""
    await queue.refresh()
    pairs = [shards for shards in queue.table.homes.values() if len(shards) > 1]
    return await queue.merge([shard.id for shard in pairs[0][:2]]) if pairs else None


async def split_first(queue: shardq.Queue) -> object:
    await queue.refresh()
    return await queue.split(queue.table.shards[0].id)


CHANGES: tuple[Callable[[shardq.Queue], Awaitable[object]], ...] = (
    lambda queue: queue.split_all(),
    merge_two,
    lambda queue: queue.scale(10),
    split_first,
    lambda queue: queue.scale(3),
)


@pytest.mark.server_kinds("redis8")
async def test_two_groups_handle_everything_in_order_through_splits_and_merges(
    client: shardq.Client, cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    queue = await client.queue(queue_name, shards=3)
    for group in GROUPS:
        await queue.open_group(group)
    story = Story(queue, make_seed())
    with workers(cluster.url, queue_name, tmp_path, lease=2.0, handler_s=0.01, target=APP) as start:
        crew = [start(GROUP=GROUP), start(GROUP=GROUP), start(GROUP="lists", KIND="batch")]
        for worker in crew:
            await until(partial(worker.says, "handles"), 30, "a worker to begin")
        for change in CHANGES:
            await story.send(150)
            await change(queue)
        await story.send(150)
        await until(lambda: all_drained(queue), 60, "an empty backlog")
        await story.check()
        for worker in crew:
            worker.send(signal.SIGTERM)
        for worker in crew:
            assert await worker.wait() == 0
            said = [line for line in worker.log.read_text().splitlines() if " WARNING " in line]
            assert [line for line in said if "fail" not in line] == [], "neither a lost lease nor an outage"


@pytest.mark.server_kinds("redis7")
async def test_workers_die_while_shards_come_and_go(
    client: shardq.Client, cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    """Owners of parents, leaders and those who wait at gates: each in its turn, and one sleeps for longer than its
    lease. What a handler's commit writes is there once."""
    seed = make_seed()
    queue = await client.queue(queue_name, shards=3)
    for group in GROUPS:
        await queue.open_group(group)
    story = Story(queue, seed)
    with workers(cluster.url, queue_name, tmp_path, lease=LEASE_S, handler_s=0.02, target=APP) as start:
        starts = [partial(start, GROUP=GROUP), partial(start, GROUP="lists", KIND="batch"), partial(start, GROUP=GROUP)]
        crowd = Crowd(starts, seed, every_s=(0.3, 1.0))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(crowd.thin_out)
            await crowd.deaths(1)
            for change in CHANGES[::2]:
                await story.send(100)
                before = crowd.kills
                await change(queue)
                await crowd.deaths(before + 1)
            await story.send(100)
            crowd.stopped.set()
        await queue.split_all()
        await story.send(100)
        sleeper = crowd.running[0][1]
        sleeper.send(signal.SIGSTOP)
        await anyio.sleep(2.5 * LEASE_S)
        sleeper.send(signal.SIGCONT)
        await story.send(50)
        await until(lambda: all_drained(queue), 60, "an empty backlog")
        await story.check()
