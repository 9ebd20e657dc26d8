"""Retries, dead letters, effects, dedupe, jobs and delays while workers are killed at random moments: nothing lost,
order per key, effects once. The whole history is in Redis: each message's effect appends its number to a list of its
key.
"""

from __future__ import annotations

import random
import signal
from collections import defaultdict
from pathlib import Path

import anyio
import pytest

import shardq
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.cluster import pack_command
from tests.runtime.harness import GROUP, WorkerProcess, check_equation, drained, until, workers

pytestmark = pytest.mark.anyio

SHARDS = 6
KEYS = 24
MESSAGES = 1200
APP = "tests.runtime.effects_app:worker"

Sent = dict[str, list[tuple[int, int, str]]]


async def done(queue: shardq.Queue, key: str) -> list[int]:
    """The numbers whose effects are there, in the order they came to be."""
    packed = pack_command("LRANGE", queue.local_key(f"done:{key}", key), 0, -1)
    return [int(number) for number in await queue.client.pipes.command(queue.place_of(key).slot, packed)]


async def history(queue: shardq.Queue, key: str) -> list[int]:
    """What is stored in a queue for a key, in order."""
    return [record.value async for record in queue.history(key=key)]


async def kill_now_and_then(running: list[WorkerProcess], start: object, stop: anyio.Event, seed: int) -> None:
    """Every so often the oldest worker is killed and a new one started."""
    chance = random.Random(seed)
    while not stop.is_set():
        with anyio.move_on_after(chance.uniform(0.3, 1.5)):
            await stop.wait()
            return
        running.append(start())  # type: ignore[operator]
        running.pop(0).send(signal.SIGKILL)


def make_traffic(seed: int) -> Sent:
    chance = random.Random(seed)
    sent: Sent = defaultdict(list)
    for number in range(MESSAGES):
        fails = chance.choices((0, 1, 2), (90, 6, 4))[0]
        end = chance.choices(("ok", "reject"), (98, 2))[0]
        sent[f"key-{chance.randrange(KEYS)}"].append((number, fails, end))
    return sent


async def test_effects_happen_once_and_in_order_however_often_workers_die(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    sent = make_traffic(seed)
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        copies = await client.queue(f"{queue_name}-copies", shards=SHARDS)
        await copies.open_group("keeps")
        with workers(cluster.url, queue_name, tmp_path, lease=1.0, handler_s=0.03, target=APP) as start:
            running, stop = [start(), start(), start()], anyio.Event()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(kill_now_and_then, running, start, stop, seed)
                async with queue.producer() as producer:
                    async with anyio.create_task_group() as senders:
                        for key, values in sent.items():
                            senders.start_soon(send_all, producer, key, values)
                await anyio.sleep(2)  # some more deaths while retries wait
                stop.set()
            await until(lambda: drained(queue), 60, "an empty backlog")
        await check_equation(queue)
        for key, values in sent.items():
            expected = [number for number, _, end in values if end == "ok"]
            assert await done(queue, key) == expected, key
            assert await history(copies, key) == expected, key
        letters = [letter async for letter in queue.dead_letters(GROUP)]
        rejected = {number for values in sent.values() for number, _, end in values if end == "reject"}
        assert {letter.value[0] for letter in letters} == rejected
        for counters in (await queue.counters([GROUP])).values():
            assert counters.groups[GROUP].waiting == 0
            assert counters.entries == 0, "what every group finished is gone from the stream"


async def send_all(producer: shardq.Producer, key: str, values: list[tuple[int, int, str]]) -> None:
    for value in values:
        await producer.send(list(value), key=key)
        await anyio.sleep(0.05)


async def test_a_message_that_kills_its_worker_ends_as_a_dead_letter_and_nothing_else_does(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        await client.queue(f"{queue_name}-copies", shards=2)
        async with queue.producer() as producer:
            for number in range(100):
                end = "kill" if number == 50 else "ok"
                await producer.send([number, 1 if number % 10 == 3 else 0, end], key=f"key-{number % 10}")
        with workers(cluster.url, queue_name, tmp_path, lease=1.0, handler_s=0.005, target=APP) as start:
            running = [start()]

            async def finished() -> bool:
                if running[-1].process.poll() is not None:
                    running.append(start())
                return await drained(queue)

            await until(finished, 90, "an empty backlog")
        for key in range(10):
            expected = [number for number in range(100) if number % 10 == key and number != 50]
            assert await done(queue, f"key-{key}") == expected
        letters = [letter async for letter in queue.dead_letters(GROUP)]
        assert [letter.value[0] for letter in letters] == [50]
        assert "died" in letters[0].error
        assert len(running) <= 7, "killed about four times, not for ever"
