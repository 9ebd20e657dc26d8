"""streaq as its documentation has it fastest: `enqueue_many` (one pipeline), uvloop, tasks that keep no result (ttl 0)
and write no log (silent). Finished: acknowledged and deleted from its stream."""

import asyncio

import uvloop
from streaq import Worker

from benchmarks.peers import protocol

CONCURRENCY, CHUNK = int(protocol.setting("64")), 1000

role, url, count = protocol.arguments()
tally = protocol.Tally()
worker = Worker(redis_url=url, concurrency=CONCURRENCY, handle_signals=False)


@worker.task(ttl=0, silent=True)
async def handle(value: str) -> None:
    tally.add()


async def work() -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(worker.run_async())
        await asyncio.sleep(1)  # its context opens the connection that is asked below
        await protocol.watch(tally, count, worker.queue_size)


async def send(values: list[str]) -> None:
    for first in range(0, len(values), CHUNK):
        await worker.enqueue_many([handle.enqueue(value) for value in values[first : first + CHUNK]])


async def produce() -> None:
    async with worker:
        await protocol.produce(count, send)


uvloop.run(work() if role == "work" else produce())
