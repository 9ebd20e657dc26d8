"""saq: many `enqueue` side by side (its `batch` only cancels together, it sends nothing together); jobs with ttl -1
keep no result. Finished: gone from its set of incomplete jobs."""

import asyncio

import uvloop
from saq import Queue, Worker

from benchmarks.peers import protocol

CONCURRENCY, SIDE_BY_SIDE = int(protocol.setting("10")), 10

role, url, count = protocol.arguments()
tally = protocol.Tally()


async def handle(ctx: dict, *, value: str) -> None:
    tally.add()


async def work() -> None:
    queue = Queue.from_url(url)
    worker = Worker(queue, [handle], concurrency=CONCURRENCY)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(worker.start())
        await protocol.watch(tally, count, lambda: queue.count("incomplete"))


async def produce() -> None:
    queue = Queue.from_url(url)

    async def send(values: list[str]) -> None:
        shared = iter(values)

        async def some() -> None:
            for value in shared:
                await queue.enqueue("handle", value=value, ttl=-1)

        await asyncio.gather(*(some() for _ in range(SIDE_BY_SIDE)))

    await protocol.produce(count, send)


uvloop.run(work() if role == "work" else produce())
