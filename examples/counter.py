"""A real-time counter whose totals are exact although workers crash and messages are delivered again.

The naive version does INCR and then acknowledges: a crash in between counts twice (or, the other way round, not at all).
Here the increment is carried out with the acknowledgement, in one step on the shard's slot: `message.atomic()`.

    python -m examples.counter
"""

from __future__ import annotations

import os
import random
from collections import Counter

from examples.common import GROUP, check, finished, run, unique, until, workers
from redis.asyncio import RedisCluster

import shardq

CLICKS = 5000
PAGES = [f"/page/{number}" for number in range(40)]

worker = shardq.Worker(os.environ.get("QUEUE", "unset"), group=GROUP, lease=2.0)


@worker.handler
async def count(message: shardq.Message) -> None:
    async with message.atomic() as tx:
        tx.incrby(message.local_key(f"clicks:{message.key}"), 1)
        tx.hincrby(message.local_key("by-country"), message.value["country"], 1)


async def main(url: str) -> None:
    name = unique("clicks")
    clicks = [(random.choice(PAGES), {"country": random.choice("abc")}) for _ in range(CLICKS)]
    async with shardq.connect(url) as client:
        queue = await client.queue(name, shards=8)
        await queue.open_group(GROUP)
        with workers(url, "examples.counter:worker", 2, QUEUE=name) as running:
            async with queue.producer() as producer:
                for start in range(0, CLICKS, 500):
                    await producer.send_many(clicks[start : start + 500])
                    if start in (1500, 3000):
                        running.start()
                        running.kill_one()
                        print(f"killed a worker after {start + 500} clicks")
            await until(lambda: finished(queue), "every click to be counted")

        redis = RedisCluster.from_url(url)
        pages = {page: int(await redis.get(queue.local_key(f"clicks:{page}", page)) or 0) for page in PAGES}
        countries: Counter[str] = Counter()
        for hash_key in {queue.local_key("by-country", page) for page in PAGES}:
            countries.update({country.decode(): int(n) for country, n in (await redis.hgetall(hash_key)).items()})
        await redis.aclose()
    check(pages == {page: sum(p == page for p, _ in clicks) for page in PAGES}, "the total of every page is exact")
    check(countries == Counter(click["country"] for _, click in clicks), "so is that of every country")


if __name__ == "__main__":
    run(main, __doc__)
