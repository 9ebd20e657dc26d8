"""`reader URL STREAMS GROUP FILE`: redis-py's asyncio client as its users use it, a task for each stream: a blocked
XREADGROUP, a handler called for each entry, which notes when it starts, then one XACK of what was read.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from redis.asyncio.cluster import RedisCluster

from benchmarks.programs.handled import Notes
from shardq.ops.bench_peers import entries_of
from shardq.ops.processes import die_with_parent

COUNT, BLOCK_MS = 100, 2000


async def main(url: str, streams: str, group: str, path: str) -> None:
    notes = Notes(Path(path))
    async with RedisCluster.from_url(url) as redis, asyncio.TaskGroup() as tasks:

        async def handle(at: int, value: bytes) -> None:
            notes.add(at, value)

        async def read(at: int, stream: str) -> None:
            while True:
                reply = await redis.xreadgroup(group, "reader", {stream: ">"}, count=COUNT, block=BLOCK_MS)
                if reply:
                    entries = entries_of(reply)
                    for _, fields in entries:
                        await handle(at, fields[b"v"])
                    await redis.xack(stream, group, *[entry_id for entry_id, _ in entries])

        for at, stream in enumerate(streams.split(",")):
            await redis.xgroup_create(stream, group, "0", mkstream=True)
            tasks.create_task(read(at, stream))
        print("ready", flush=True)


if __name__ == "__main__":
    die_with_parent(os.getppid())
    asyncio.run(main(*sys.argv[1:]))
