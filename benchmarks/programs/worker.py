"""`worker URL QUEUE GROUP FILE`: a shardq worker whose handler notes when it starts; SIGTERM stops it gracefully."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import shardq
from benchmarks.programs.handled import Notes
from shardq.ops.processes import die_with_parent, run_async, until_stopped


async def main(url: str, queue: str, group: str, path: str) -> None:
    worker = shardq.Worker(queue, group=group)
    notes = Notes(Path(path))

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        notes.add(message.shard, message.value)

    def stop() -> bool:
        worker.stop()
        return True

    async with shardq.connect(url) as client:

        async def work() -> None:
            print("ready", flush=True)  # a signal is heard from now on
            await worker.run(client)

        await until_stopped(work, stop)


if __name__ == "__main__":
    die_with_parent(os.getppid())
    run_async(lambda: main(*sys.argv[1:]))
