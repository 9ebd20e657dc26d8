"""NATS JetStream by nats-py: `publish_async`, each confirmed by the server; a durable consumer that is pushed to or
fetches, and acknowledges up to 500 messages at once with the last of them (ack policy "all"). A stream on disk, one
subject: it knows no keys. Finished: the consumer has nothing pending and nothing unacknowledged."""

import asyncio

import nats
import uvloop
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig

from benchmarks.peers import protocol

WAY, BATCH, STREAM, GROUP = protocol.setting("push"), 500, "pipeline", "workers"
# A fetch that gets fewer than BATCH waits so long for the rest: at the end of a round too.
FETCH_S = 0.05

role, url, count = protocol.arguments()
tally = protocol.Tally()


async def work() -> None:
    js = (await nats.connect(url)).jetstream()
    await js.add_stream(name=STREAM, subjects=[STREAM])
    config = ConsumerConfig(ack_policy=AckPolicy.ALL, max_ack_pending=20_000)

    async def one(message: Msg) -> None:
        await handle(message.data)
        if tally.handled % BATCH == 0 or not subscription.pending_msgs:
            await message.ack()

    async def fetch() -> None:
        while True:
            try:
                messages = await subscription.fetch(BATCH, timeout=FETCH_S)
            except TimeoutError:
                continue
            for message in messages:
                await handle(message.data)
            if messages:
                await messages[-1].ack()

    async def left() -> int:
        info = await subscription.consumer_info()
        return int(info.num_pending or 0) + int(info.num_ack_pending or 0)

    async with asyncio.TaskGroup() as tasks:
        if WAY == "push":
            subscription = await js.subscribe(STREAM, durable=GROUP, config=config, cb=one, manual_ack=True)
        else:
            subscription = await js.pull_subscribe(STREAM, durable=GROUP, config=config)
            tasks.create_task(fetch())
        await protocol.watch(tally, count, left)


async def handle(_value: bytes) -> None:
    tally.add()


async def produce() -> None:
    js = (await nats.connect(url)).jetstream()

    async def send(values: list[bytes]) -> None:
        for value in values:
            await js.publish_async(STREAM, value)
        await js.publish_async_completed()

    await protocol.produce(count, send, made_of=lambda values: [value.encode() for value in values])


uvloop.run(work() if role == "work" else produce())
