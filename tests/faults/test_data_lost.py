"""A master that keeps nothing on disk restarts: what it had is gone, and shardq says so and goes on with the rest."""

from __future__ import annotations

import contextlib
import random
from functools import partial
from pathlib import Path

import anyio
import pytest

import shardq
from shardq.errors import NotStored, UnknownQueue
from tests.faults.faults import FAULTS
from tests.faults.lab import open_lab
from tests.runtime.crowd import APP, LEASE_S, numbers
from tests.runtime.harness import GROUP, until, workers

pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis7")]


KEYS = [f"key-{index}" for index in range(12)]


async def test_a_master_without_persistence_restarts(server_binary: Path, queue_name: str, tmp_path: Path) -> None:
    """Senders are told what happened and what to do; whoever does it can go on, and the workers never stopped."""
    with open_lab(server_binary, replicas=0, settings={"appendonly": "no"}) as lab:
        async with shardq.connect(lab.url) as client:
            queue = await client.queue(queue_name, shards=6)
            await queue.open_group(GROUP)
            with workers(lab.url, queue_name, tmp_path, lease=LEASE_S, target=APP) as start:
                worker = start()
                assert await send_to_all(queue, 1) == set()
                await handled(queue, 1, set(KEYS))
                heal = await anyio.to_thread.run_sync(FAULTS["data-lost"].strike, lab, random.Random(1))
                await anyio.to_thread.run_sync(heal)
                lost = await send_to_all(queue, 2)
                assert 0 < len(lost) < len(KEYS)
                await handled(queue, 2, set(KEYS) - lost)
                queue = await client.queue(queue_name, shards=6)
                assert await send_to_all(queue, 3) == set()
                await handled(queue, 3, set(KEYS))
                assert worker.process.poll() is None


async def send_to_all(queue: shardq.Queue, number: int) -> set[str]:
    """One message for each key; the keys that were refused because their shards are gone."""
    lost = {}
    with contextlib.suppress(NotStored):  # says at its end again what each send said
        async with queue.producer(delivery_timeout=20) as producer:
            for key in KEYS:
                try:
                    await producer.send([number, 0, "ok"], key=key)
                except UnknownQueue as error:
                    lost[key] = str(error)
    told = "a master lost its data. Declare the queue again with client.queue("
    assert all(told in text for text in lost.values()), lost
    return set(lost)


async def handled(queue: shardq.Queue, number: int, keys: set[str]) -> None:
    for key in sorted(keys):
        await until(partial(is_last, queue, key, number), 30, f"{number} of {key}")


async def is_last(queue: shardq.Queue, key: str, number: int) -> bool:
    found = await numbers(queue, key)
    return bool(found) and found[-1] == number
