"""A reliable queue: a worker is killed in the middle of its work, and nothing is lost.

The naive version pops an item from a list and then works on it: what it was working on when it died is gone. Here a
message is finished only when its handler has returned; what a dead worker left goes to another one within seconds.

    python -m examples.reliable_queue
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
from examples.common import GROUP, check, finished, run, unique, until, workers

import shardq

TASKS = 200
done = Path(os.environ.get("DONE", "."))

worker = shardq.Worker(os.environ.get("QUEUE", "unset"), group=GROUP, lease=2.0, concurrency=4)


@worker.handler
async def work(message: shardq.Message) -> None:
    await anyio.sleep(0.02)
    (done / str(message.value)).touch()


async def main(url: str) -> None:
    name = unique("tasks")
    with TemporaryDirectory() as folder:
        async with shardq.connect(url) as client:
            queue = await client.queue(name, shards=6)
            await queue.open_group(GROUP)
            async with queue.producer() as producer:
                await producer.send_many((f"customer-{number % 20}", number) for number in range(TASKS))
            with workers(url, "examples.reliable_queue:worker", 2, QUEUE=name, DONE=folder) as running:

                async def half() -> bool:
                    return len(os.listdir(folder)) >= TASKS // 2

                await until(half, "half of the tasks")
                running.kill_one()
                print(f"killed a worker after {len(os.listdir(folder))} of {TASKS} tasks")
                await until(lambda: finished(queue), "the rest")
        check(len(os.listdir(folder)) == TASKS, f"all {TASKS} tasks are done, though a worker died")


if __name__ == "__main__":
    run(main, __doc__)
