"""docket (pydocket): `add_many` in chunks; results not kept (execution_ttl 0), no OpenTelemetry exporter, full slots
looked at again after 5 ms, not 250; fewer than 100 at a time, as redis-py's pool has 100 connections: with 100 a task
was left for its redelivery five minutes later. Finished: acknowledged and deleted from its stream."""

import asyncio
from datetime import timedelta

import uvloop
from docket import Docket, Worker

from benchmarks.peers import protocol

CONCURRENCY, CHUNK, CHECK_EVERY = int(protocol.setting("50")), 1000, timedelta(milliseconds=5)

role, url, count = protocol.arguments()
tally = protocol.Tally()


async def handle(value: str) -> None:
    tally.add()


async def main() -> None:
    async with Docket(name="pipeline", url=url, execution_ttl=timedelta(0)) as docket:
        docket.register(handle)
        await (work(docket) if role == "work" else protocol.produce(count, lambda values: send(docket, values)))


async def work(docket: Docket) -> None:
    async def left() -> int:
        async with docket.redis() as redis:
            return await redis.xlen(docket.stream_key)

    worker = Worker(docket, concurrency=CONCURRENCY, minimum_check_interval=CHECK_EVERY)
    async with worker, asyncio.TaskGroup() as tasks:
        tasks.create_task(worker.run_forever())
        await protocol.watch(tally, count, left)


async def send(docket: Docket, values: list[str]) -> None:
    for first in range(0, len(values), CHUNK):
        await docket.add_many([docket.call(handle)(value) for value in values[first : first + CHUNK]])


uvloop.run(main())
