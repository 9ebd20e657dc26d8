"""A reliable queue: a worker is killed in the middle of its work, and nothing is lost.

The naive version pops an item from a list and then works on it: what it was working on when it died is gone. Here a
message is finished only when its handler has returned; what a dead worker left goes to another one within seconds. The
naive worker does the same tasks beside it, is killed too, and shows what is missing then.

    python -m examples.reliable_queue
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio

import shardq
from examples.common import GROUP, LEASE_S, check, finished, plain_redis, programs, run, unique, until, workers

TASKS = 200
HANDS = 4  # tasks that a worker does at a time
done = Path(os.environ.get("DONE", "."))

worker = shardq.Worker(os.environ.get("QUEUE", "unset"), group=GROUP, lease=LEASE_S, concurrency=HANDS)


async def do(task: int, folder: Path) -> None:
    await anyio.sleep(0.02)
    (folder / str(task)).touch()


@worker.handler
async def work(message: shardq.Message) -> None:
    await do(message.value, done / "queue")


async def naive(url: str) -> None:
    """The process that is not to be imitated."""
    async with plain_redis(url) as redis:

        async def hand() -> None:
            while task := await redis.lpop(os.environ["QUEUE"]):
                await do(int(task), done / "naive")

        async with anyio.create_task_group() as tasks:
            for _ in range(HANDS):
                tasks.start_soon(hand)


async def main(url: str) -> None:
    name = unique("tasks")
    async with shardq.connect(url) as client, plain_redis(url) as redis:
        queue = await client.queue(name, shards=6)
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            await producer.send_many((f"customer-{number % 20}", number) for number in range(TASKS))
        await redis.rpush(name, *range(TASKS))
        with TemporaryDirectory() as folder:
            by_queue, by_list = Path(folder, "queue"), Path(folder, "naive")
            for each in (by_queue, by_list):
                each.mkdir()

            async def half(of: Path) -> bool:
                return len(os.listdir(of)) >= TASKS // 2

            async def list_is_done() -> bool:
                return bad.alive() == 0

            with (
                workers(url, "examples.reliable_queue:worker", 2, QUEUE=name, DONE=folder) as good,
                programs(url, "examples.reliable_queue", QUEUE=name, DONE=folder, PART="naive") as bad,
            ):
                for processes, of in ((good, by_queue), (bad, by_list)):
                    await until(partial(half, of), "half of the tasks")
                    processes.kill_one()
                    print(f"killed a worker after {len(os.listdir(of))} of {TASKS} tasks")
                bad.start()
                await until(lambda: finished(queue), "the rest")
                await until(list_is_done, "the rest of the list")
            kept, lost = len(os.listdir(by_queue)), TASKS - len(os.listdir(by_list))
    check(kept == TASKS, f"all {TASKS} tasks are done, though a worker died")
    check(lost > 0, f"popped from a list and then worked on, {lost} are lost")


if __name__ == "__main__":
    run(naive if os.environ.get("PART") == "naive" else main, __doc__)
