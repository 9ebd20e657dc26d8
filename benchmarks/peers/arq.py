"""arq: many `enqueue_job` side by side, as it has no bulk call; results not kept (keep_result 0), not logged; polls
without a pause. Finished: gone from its sorted set."""

import asyncio

import uvloop
from arq import create_pool
from arq.connections import RedisSettings
from arq.worker import Worker, func

from benchmarks.peers import protocol

JOBS, SIDE_BY_SIDE, POLL_S = int(protocol.setting("100")), 10, 0.001

role, url, count = protocol.arguments()
tally = protocol.Tally()


async def handle(ctx: dict, value: str) -> None:
    tally.add()


async def work() -> None:
    pool = await create_pool(RedisSettings.from_dsn(url))
    one = func(handle, keep_result=0)
    worker = Worker([one], redis_pool=pool, max_jobs=JOBS, poll_delay=POLL_S, log_results=False, handle_signals=False)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(worker.async_run())
        await protocol.watch(tally, count, lambda: pool.zcard(worker.queue_name))


async def produce() -> None:
    pool = await create_pool(RedisSettings.from_dsn(url))

    async def send(values: list[str]) -> None:
        shared = iter(values)

        async def some() -> None:
            for value in shared:
                await pool.enqueue_job("handle", value)

        await asyncio.gather(*(some() for _ in range(SIDE_BY_SIDE)))

    await protocol.produce(count, send)


uvloop.run(work() if role == "work" else produce())
