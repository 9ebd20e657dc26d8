"""A real-time counter whose totals are exact although workers crash and messages are delivered again.

The naive version does INCR and then acknowledges: what was between the two when the worker died is counted twice. (The
other way round it is not counted at all.) Here the increment is carried out with the acknowledgement, in one step on
the shard's slot: `message.atomic()`. The naive counter runs beside it, in the same handler, and shows what it is worth.

    python -m examples.counter
"""

from __future__ import annotations

import os
import random
from collections import Counter

import anyio
from redis.asyncio import RedisCluster

import shardq
from examples.common import GROUP, LEASE_S, check, finished, plain_redis, run, unfinished, unique, until, workers

CLICKS = 3000
PAGES = [f"/page/{number}" for number in range(40)]

worker = shardq.Worker(os.environ.get("QUEUE", "unset"), group=GROUP, lease=LEASE_S)
redis: list[RedisCluster] = []


@worker.on_start
def connect(_: shardq.Client) -> None:
    redis.append(RedisCluster.from_url(os.environ["REDIS"]))


@worker.handler
async def count(message: shardq.Message) -> None:
    await redis[0].incr(f"{message.queue}-naive")
    await anyio.sleep(0.005)  # whatever else there is to do for a click
    async with message.atomic() as tx:
        tx.incrby(message.local_key(f"clicks:{message.value['page']}"), 1)
        tx.hincrby(message.local_key("by-country"), message.value["country"], 1)


async def main(url: str) -> None:
    name = unique("clicks")
    clicks = [{"page": random.choice(PAGES), "country": random.choice("abc")} for _ in range(CLICKS)]
    async with shardq.connect(url) as client, plain_redis(url) as redis:
        queue = await client.queue(name, shards=8, key="page")
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            await producer.send_many(clicks)
        with workers(url, "examples.counter:worker", 2, QUEUE=name, REDIS=url) as running:

            async def half() -> bool:
                return await unfinished(queue) <= CLICKS // 2

            await until(half, "half of the clicks to be counted")
            running.kill_one()
            print(f"killed a worker after {CLICKS // 2} of {CLICKS} clicks")
            await until(lambda: finished(queue), "every click to be counted")

        naive = int(await redis.get(f"{name}-naive"))
        pages = {page: int(await redis.get(queue.local_key(f"clicks:{page}", page)) or 0) for page in PAGES}
        countries: Counter[str] = Counter()
        for hash_key in {queue.local_key("by-country", page) for page in PAGES}:  # one for each shard
            countries.update({country: int(n) for country, n in (await redis.hgetall(hash_key)).items()})
    check(
        pages == {page: sum(click["page"] == page for click in clicks) for page in PAGES}, "every page's total is exact"
    )
    check(countries == Counter(click["country"] for click in clicks), "so is that of every country")
    check(naive > CLICKS, f"INCR and then the acknowledgement counted {naive - CLICKS} clicks twice")


if __name__ == "__main__":
    run(main, __doc__)
