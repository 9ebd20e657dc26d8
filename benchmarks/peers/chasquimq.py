"""ChasquiMQ's own engine, without the layer that packs values: `Producer.add_bulk` in chunks and `Consumer`, no results
(the default), no events. Finished: its stream is empty, as it deletes what it acknowledges. Needs Redis 8.6 (IDMP)."""

import asyncio

from chasquimq import Consumer, Producer
from redis.asyncio import Redis

from benchmarks.peers import protocol

CONCURRENCY, CHUNK, QUEUE = int(protocol.setting("100")), 1000, "pipeline"

role, url, count = protocol.arguments()
tally = protocol.Tally()


async def handle(_job: object) -> None:
    tally.add()


async def work() -> None:
    redis, stream = Redis.from_url(url), Producer(url, QUEUE).stream_key()
    consumer = Consumer(url, QUEUE, concurrency=CONCURRENCY, read_count=500, events_enabled=False)
    running = asyncio.ensure_future(consumer.run(handle))
    await protocol.watch(tally, count, lambda: redis.xlen(stream))
    await running


async def produce() -> None:
    producer = Producer(url, QUEUE)

    async def send(values: list[bytes]) -> None:
        for first in range(0, len(values), CHUNK):
            await producer.add_bulk(values[first : first + CHUNK])

    await protocol.produce(count, send, made_of=lambda values: [value.encode() for value in values])


asyncio.run(work() if role == "work" else produce())
