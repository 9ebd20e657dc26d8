"""`sender shardq|redis URL QUEUE SHARDS`: sends at times fixed beforehand, each message in a task of its own, so that
one slow send holds up no other (an open loop). The shards or streams take turns.

`load RATE COUNT` on stdin starts; `sent NUMBER` says how many were sent so far, once all are answered; `stop` ends a
load early. It waits with select(), whose time-outs are exact; epoll's are rounded up to whole milliseconds.
"""

from __future__ import annotations

import asyncio
import gc
import os
import selectors
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio.cluster import RedisCluster

import shardq
from benchmarks.programs.handled import value_of
from shardq.core.hashing import key_hash
from shardq.ops.processes import die_with_parent

KEYS_PER_SHARD = 8

Send = Callable[[int, int], Awaitable[Any]]


def keys_of_shards(shards: int) -> list[list[str]]:
    """So many keys for each shard of a new queue."""
    found: list[list[str]] = [[] for _ in range(shards)]
    number, missing = 0, shards
    while missing:
        key = f"user:{number}"
        number += 1
        own = found[key_hash(key) * shards >> 32]
        if len(own) < KEYS_PER_SHARD:
            own.append(key)
            missing -= len(own) == KEYS_PER_SHARD
    return found


@asynccontextmanager
async def shardq_send(url: str, queue: str, shards: int) -> AsyncIterator[Send]:
    keys = keys_of_shards(shards)
    async with shardq.connect(url) as client, (await client.queue(queue)).producer() as producer:

        async def send(number: int, due_ns: int) -> None:
            key = keys[number % shards][number // shards % KEYS_PER_SHARD]
            await producer.send(value_of(number, due_ns), key=key)

        yield send


@asynccontextmanager
async def redis_send(url: str, queue: str, shards: int) -> AsyncIterator[Send]:
    """`queue` names the streams, with commas between them."""
    streams = queue.split(",")
    async with RedisCluster.from_url(url) as redis:
        await redis.ping()

        async def send(number: int, due_ns: int) -> None:
            await redis.xadd(streams[number % shards], {"v": value_of(number, due_ns)})

        yield send


class Load:
    """Sends, and counts over all loads."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.sent = 0
        self.stopped = False

    async def run(self, rate: float, count: int) -> None:
        start_ns = time.monotonic_ns() + 10_000_000
        async with asyncio.TaskGroup() as tasks:
            for number in range(count):
                if self.stopped:
                    return
                due_ns = start_ns + round(number * 1e9 / rate)
                await asyncio.sleep(max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
                tasks.create_task(self._one(self.sent, due_ns))
                self.sent += 1

    async def _one(self, number: int, due_ns: int) -> None:
        await self._send(number, due_ns)


async def obey(send: Send) -> None:
    """Until stdin ends."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    print("ready", flush=True)
    load, under_way = Load(send), None

    async def run(rate: float, count: int) -> None:
        load.stopped = False
        await load.run(rate, count)
        print("sent", load.sent, flush=True)

    while line := (await lines.readline()).decode().split():
        if line[0] == "stop":
            load.stopped = True
        else:
            if under_way is not None:
                await under_way
            gc.collect()
            under_way = asyncio.create_task(run(float(line[1]), int(line[2])))


async def main(kind: str, url: str, queue: str, shards: str) -> None:
    sides = {"shardq": shardq_send, "redis": redis_send}
    async with sides[kind](url, queue, int(shards)) as send:
        await obey(send)


if __name__ == "__main__":
    die_with_parent(os.getppid())
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(main(*sys.argv[1:]))
