"""Callers that go away at any moment: what was sent is stored once, in order, and every connection stays in step."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import anyio
import pytest

import shardq
from shardq.core.slots import SLOTS
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.commands import pack_command
from tests.runtime.harness import until
from tests.runtime.outages_rig import breakable, connected

pytestmark = pytest.mark.anyio

KEYS, ROUNDS = 40, 75


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[LocalCluster]:
    with breakable() as made:
        yield made


class Chaos:
    """Each key's calls follow one another; most are cancelled. Notes what was sent and what returned."""

    def __init__(self, seed: int, client: shardq.Client, queue: shardq.Queue, producer: shardq.Producer) -> None:
        self.chance = random.Random(seed)
        self.client, self.queue, self.producer = client, queue, producer
        self.next: dict[str, int] = defaultdict(int)
        self.returned: set[tuple[str, int]] = set()
        self.calls = self.cancelled = 0

    def numbers(self, key: str, count: int) -> list[int]:
        first = self.next[key]
        self.next[key] += count
        return list(range(first, first + count))

    async def send(self, key: str) -> None:
        (number,) = self.numbers(key, 1)
        await self.producer.send([key, number], key=key)
        self.returned.add((key, number))

    async def send_once(self, key: str) -> None:
        (number,) = self.numbers(key, 1)
        await self.producer.send([key, number], key=key, dedupe_id=f"{key}-{number}")
        self.returned.add((key, number))

    async def submit(self, key: str) -> None:
        (number,) = self.numbers(key, 1)
        job = await self.producer.submit([key, number], key=key)
        self.returned.add((key, number))
        assert (await job.state()).id == job.id

    async def send_many(self, key: str) -> None:
        numbers = self.numbers(key, 5)
        assert await self.producer.send_many((key, [key, number]) for number in numbers) == 5
        self.returned.update((key, number) for number in numbers)

    async def counters(self, key: str) -> None:
        assert len(await self.queue.counters()) == len(self.queue.shards)

    async def groups(self, key: str) -> None:
        assert [group.name for group in await self.queue.groups()] == ["g"]

    async def once(self, key: str) -> None:
        texts = [f"{key}-{self.chance.random()}" * self.chance.choice([1, 500]) for _ in range(2)]
        replies = await self.client.pipes.commands_once(
            self.chance.randrange(SLOTS), [pack_command("ECHO", text) for text in texts]
        )
        assert replies == [text.encode() for text in texts]

    async def tell(self, key: str) -> None:
        await self.client.broadcast("nobody", key)

    async def key(self, key: str) -> None:
        sends = (self.send, self.send, self.send_once, self.submit, self.send_many)
        for _ in range(ROUNDS):
            do = self.chance.choice((*sends, *sends, self.counters, self.groups, self.once, self.tell))
            self.calls += 1
            done = await self.chance.choice((self.in_scope, self.in_task))(do, key)
            self.cancelled += not done

    async def in_scope(self, do: Callable[[str], Awaitable[None]], key: str) -> bool:
        with anyio.move_on_after(self.chance.choice((0, 0.0005, 0.002, 0.01, 1))) as limit:
            await do(key)
        return not limit.cancelled_caught

    async def in_task(self, do: Callable[[str], Any], key: str) -> bool:
        """Cancelled before it has begun, or after some steps of the event loop; sometimes twice."""
        task = asyncio.ensure_future(do(key))
        for _ in range(self.chance.choice((0, 1, 2, 3, 5, 8, 13, 200))):
            await asyncio.sleep(0)
        task.cancel()
        if self.chance.random() < 0.3:
            await asyncio.sleep(0)
            task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return not task.cancelled()


async def stored(queue: shardq.Queue) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    async for record in queue.history():
        key, number = record.value
        assert record.key == key
        found[key].append(number)
    return found


async def test_calls_cancelled_anywhere(own_cluster: LocalCluster, queue_name: str) -> None:
    seed = int(os.environ.get("SHARDQ_TEST_SEED", random.randrange(10**6)))
    print(f"SHARDQ_TEST_SEED={seed}")
    tasks_before = len(asyncio.all_tasks())
    clients_before = [connected(own_cluster, node) for node in range(3)]
    async with shardq.connect(own_cluster.url) as client:
        queue = await client.queue(queue_name, shards=8)
        await queue.open_group("g")
        async with queue.producer(max_batch_messages=7) as producer:
            chaos = Chaos(seed, client, queue, producer)
            tasks_open = len(asyncio.all_tasks())
            async with anyio.create_task_group() as tasks:
                for number in range(KEYS):
                    tasks.start_soon(chaos.key, f"key-{number}")
            await producer.flush()
            assert producer.buffered_bytes == 0
            await until(lambda: len(asyncio.all_tasks()) <= tasks_open + 3, 20, "only the nodes' senders to be left")
        check_stored(chaos, await stored(queue))
        await check_in_step(client, chaos.chance)
        for node in client.cluster._nodes.nodes_cache.values():
            assert len(node._free) == len(node._connections), "a connection was not given back"
            assert len(node._connections) < 20
    assert len(asyncio.all_tasks()) == tasks_before

    def none_left() -> bool:
        return [connected(own_cluster, node) for node in range(3)] == clients_before

    await until(none_left, 20, "the last connection to be closed")


def check_stored(chaos: Chaos, found: dict[str, list[int]]) -> None:
    assert chaos.calls == KEYS * ROUNDS
    assert chaos.cancelled > 500, "too few were cancelled to prove anything"
    assert len(chaos.returned) > 500, "too few returned to prove anything"
    for key, numbers in found.items():
        assert max(Counter(numbers).values()) == 1, f"{key}: stored twice"
        assert numbers == sorted(numbers), f"{key}: out of order"
        assert max(numbers) < chaos.next[key], f"{key}: never sent"
    lost = [(key, number) for key, number in chaos.returned if number not in set(found[key])]
    assert not lost


async def check_in_step(client: shardq.Client, chance: random.Random) -> None:
    async def ask(number: int) -> None:
        text = f"after-{number}"
        assert await client.pipes.command(chance.randrange(SLOTS), pack_command("ECHO", text)) == text.encode()

    async with anyio.create_task_group() as tasks:
        for number in range(500):
            tasks.start_soon(ask, number)


async def test_a_client_cancelled_while_it_connects_or_closes_leaves_nothing(
    own_cluster: LocalCluster, queue_name: str
) -> None:
    before = [connected(own_cluster, node) for node in range(3)]
    tasks_before = len(asyncio.all_tasks())
    chance = random.Random(5)
    entered = 0
    for _ in range(60):
        with anyio.move_on_after(chance.uniform(0, 0.06)):
            async with shardq.connect(own_cluster.url) as client:
                entered += 1
                await client.queue(queue_name, shards=2)
    assert 0 < entered < 60

    def none_left() -> bool:
        return [connected(own_cluster, node) for node in range(3)] == before

    await until(none_left, 20, "the last connection to be closed")
    await until(lambda: len(asyncio.all_tasks()) == tasks_before, 20, "no task to be left")
