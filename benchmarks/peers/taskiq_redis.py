"""taskiq with taskiq-redis' RedisStreamBroker, the one that acknowledges: uvloop, no result backend (the default), many
`kiq` side by side, as it has no bulk call. Finished: its group has nothing pending."""

import asyncio

import uvloop
from redis.asyncio import Redis
from taskiq.api import run_receiver_task
from taskiq_redis import RedisStreamBroker

from benchmarks.peers import protocol

TASKS, PREFETCH, SIDE_BY_SIDE, READ = int(protocol.setting("100")), 100, 10, 500

role, url, count = protocol.arguments()
tally = protocol.Tally()
broker = RedisStreamBroker(url, consumer_id="0", xread_count=READ, max_connection_pool_size=200)


@broker.task(task_name="handle")
async def handle(value: str) -> None:
    tally.add()


async def work() -> None:
    broker.is_worker_process = True
    await broker.startup()
    redis = Redis.from_url(url)

    async def left() -> int:
        return int((await redis.xpending(broker.queue_name, broker.consumer_group_name))["pending"])

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(
            run_receiver_task(broker, max_async_tasks=TASKS, max_prefetch=PREFETCH, validate_params=False)
        )
        await protocol.watch(tally, count, left)


async def send(values: list[str]) -> None:
    shared = iter(values)

    async def some() -> None:
        for value in shared:
            await handle.kiq(value)

    await asyncio.gather(*(some() for _ in range(SIDE_BY_SIDE)))


async def produce() -> None:
    await broker.startup()
    await protocol.produce(count, send)


uvloop.run(work() if role == "work" else produce())
