"""Live notifications: who looks at a page is told at once, and whose connection was cut is told that it was.

A broadcast reaches those who listen right now, once at most, and is not stored. What must not be missed goes through a
queue: its worker writes it into the reader's inbox first and broadcasts it then. A listener shows what it is told; when
some of it may be missing a `Missed` stands there, and it reads the inboxes anew. (In this order: what was broadcast
before the listener was back is in the inbox by then. With `message.atomic()` the inbox would be written after the
broadcast.)

The naive version takes Pub/Sub for a queue: after a cut nothing says that something is missing. It listens beside it.

    python -m examples.notifications
"""

from __future__ import annotations

import os
from collections import defaultdict
from functools import partial
from typing import Any

import anyio
from anyio.abc import TaskStatus
from redis.asyncio import RedisCluster

import shardq
from examples.common import GROUP, LEASE_S, check, finished, plain_redis, run, unfinished, unique, until, workers

USERS, EACH = [f"user-{number}" for number in range(40)], 40
TOTAL = len(USERS) * EACH
name = os.environ.get("QUEUE", "unset")

worker = shardq.Worker(name, group=GROUP, lease=LEASE_S, concurrency=64)
connections: list[tuple[shardq.Client, Any]] = []


@worker.on_start
def connect(client: shardq.Client) -> None:
    connections.append((client, RedisCluster.from_url(os.environ["REDIS"])))


@worker.handler
async def deliver(message: shardq.Message) -> None:
    client, redis = connections[0]
    await anyio.sleep(0.02)  # whatever else there is to do for it
    await redis.hset(inbox(name, str(message.key)), message.id, message.value)  # the same however often it is repeated
    await client.broadcast(f"{name}:inbox:{message.key!s}", [message.id, message.value])


def inbox(name: str, user: str) -> str:
    return f"{name}-inbox-{user}"


class Page:
    """What somebody sees who looks at all inboxes, kept up to date by notices alone where nothing is missing."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inboxes: dict[str, dict[str, str]] = defaultdict(dict)
        self.naive: dict[str, dict[str, str]] = defaultdict(dict)
        self.news: list[str] = []
        self.cuts = 0

    async def show(self, client: shardq.Client, redis: Any, *, task_status: TaskStatus[shardq.Notices]) -> None:
        news = f"{self.name}:news"
        async with client.listen(news, patterns=[f"{self.name}:inbox:*"]) as notices:
            task_status.started(notices)
            async for notice in notices:
                if isinstance(notice, shardq.Missed):
                    self.cuts += 1
                    for user in USERS:
                        self.inboxes[user] |= await redis.hgetall(inbox(self.name, user))
                elif notice.channel == news:
                    self.news.append(notice.value)
                else:
                    user, (message_id, text) = notice.channel.rpartition(":")[2], notice.value
                    self.inboxes[user][message_id] = self.naive[user][message_id] = text

    async def shows_all(self) -> bool:
        return count(self.inboxes) == TOTAL and self.news[-1:] == ["after the cut"]


def count(inboxes: dict[str, dict[str, str]]) -> int:
    return sum(map(len, inboxes.values()))


async def main(url: str) -> None:
    name = unique("notices")
    page = Page(name)
    async with shardq.connect(url) as client, plain_redis(url) as redis:
        queue = await client.queue(name, shards=6)
        await queue.open_group(GROUP)

        async def handled(enough: int) -> bool:
            return TOTAL - await unfinished(queue) >= enough

        async def is_complete() -> bool:
            return notices.complete

        await client.broadcast(f"{name}:news", "nobody listens yet")
        async with anyio.create_task_group() as tasks:
            notices: shardq.Notices = await tasks.start(partial(page.show, client, redis))
            await client.broadcast(f"{name}:news", "before the cut")
            async with queue.producer() as producer:
                await producer.send_many((user, f"notice {number}") for number in range(EACH) for user in USERS)
            with workers(url, "examples.notifications:worker", 2, QUEUE=name, REDIS=url) as running:
                for enough in (TOTAL // 5, TOTAL // 2):
                    await until(partial(handled, enough), "some to be delivered")
                    await until(is_complete, "the listener to be back")
                    cut = await redis.client_kill_filter(_type="pubsub", target_nodes=RedisCluster.ALL_NODES)
                    print(f"after {enough} notices: cut {sum(cut.values())} connections that listen")
                running.kill_one()
                print("killed a worker")
                await until(lambda: finished(queue), "the rest")
            await until(is_complete, "the listener to be back")
            await client.broadcast(f"{name}:news", "after the cut")
            await until(page.shows_all, "the page to show all")
            tasks.cancel_scope.cancel()
        stored = {user: await redis.hgetall(inbox(name, user)) for user in USERS}
    check(count(stored) == TOTAL, f"all {TOTAL} notices are in their inboxes, though a worker died")
    check(page.cuts > 0, f"the listener was told {page.cuts} times that some may be missing")
    check(page.inboxes == stored, "having read the inboxes anew each time, it shows them all")
    check(page.news == ["before the cut", "after the cut"], "a broadcast reaches who listens, and nobody later")
    missing = TOTAL - count(page.naive)
    check(missing > 0, f"a listener to whom nobody says so misses {missing}")


if __name__ == "__main__":
    run(main, __doc__)
