"""FastStream on Redis Streams: a consumer group that acknowledges, `publish` into redis-py pipelines as its page on
pipelines has it, uvloop as its command line uses it. Finished: its group has nothing pending."""

import uvloop
from faststream.redis import RedisBroker, StreamSub

from benchmarks.peers import protocol

CHUNK, STREAM, WORKERS = 1000, "pipeline", int(protocol.setting("1"))

role, url, count = protocol.arguments()
tally = protocol.Tally()
broker = RedisBroker(url, logger=None)


async def work() -> None:
    sub = StreamSub(STREAM, group="workers", consumer="one", max_records=500)

    @broker.subscriber(stream=sub, max_workers=WORKERS)
    async def handle(value: str) -> None:
        tally.add()

    await broker.start()
    redis = broker.config.broker_config.connection.client

    async def left() -> int:
        return int((await redis.xpending(STREAM, "workers"))["pending"])

    await protocol.watch(tally, count, left)


async def send(values: list[str]) -> None:
    redis = broker.config.broker_config.connection.client
    for first in range(0, len(values), CHUNK):
        async with redis.pipeline(transaction=False) as pipeline:
            for value in values[first : first + CHUNK]:
                await broker.publish(value, stream=STREAM, pipeline=pipeline)
            await pipeline.execute()


async def produce() -> None:
    await broker.connect()
    await protocol.produce(count, send)


uvloop.run(work() if role == "work" else produce())
