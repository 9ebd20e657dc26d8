"""shardq as a user has it: `send_many`, a worker with `handler` or, with LISTS set, `batch_handler`; keys of 10,000
users; asyncio's own loop unless UVLOOP is set. Finished: counted as acknowledged in Redis."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

import anyio

import shardq
from benchmarks.peers import protocol

KEYS, SHARDS, GROUP, QUEUE = 10_000, 12, "workers", os.environ.get("QUEUE", "pipeline")


async def work(url: str, count: int) -> None:
    tally = protocol.Tally()
    worker = shardq.Worker(QUEUE, group=GROUP)

    async def handle(_message: shardq.Message) -> None:
        tally.handled += 1

    async def handle_list(messages: Sequence[shardq.Message]) -> None:
        tally.handled += len(messages)

    if os.environ.get("LISTS"):
        worker.batch_handler(handle_list)
    else:
        worker.handler(handle)
    async with shardq.connect(url) as client, anyio.create_task_group() as tasks:
        queue = await client.queue(QUEUE, shards=SHARDS)
        tasks.start_soon(worker.run, client)

        async def left() -> int:
            counters = await queue.counters([GROUP])
            acked = sum(group.acked for shard in counters.values() for group in shard.groups.values())
            return sum(shard.appended for shard in counters.values()) - acked

        await protocol.watch(tally, count, left)


async def produce(url: str, count: int) -> None:
    users = [f"user:{number}" for number in range(KEYS)]

    def keyed(values: list[str]) -> list[tuple[str, bytes]]:
        keys = random.Random(2).choices(users, k=len(values))
        return [(key, value.encode()) for key, value in zip(keys, values, strict=True)]

    async with shardq.connect(url) as client:
        queue = await client.queue(QUEUE, shards=SHARDS)
        async with queue.producer() as producer:
            await protocol.produce(count, producer.send_many, made_of=keyed)


if __name__ == "__main__":
    role, url, count = protocol.arguments()
    backend = {"use_uvloop": bool(os.environ.get("UVLOOP"))}
    anyio.run(work if role == "work" else produce, url, count, backend_options=backend)
