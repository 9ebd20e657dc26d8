"""`flood URL QUEUE BYTES`: sends as fast as the queue takes it, in one send_many, until `stop` on stdin. Says `full`
once its producer holds about as many bytes as it may, so that it waits for the queue, and `sent NUMBER` once all is
stored. A process of its own: nothing that the case does can hold it up.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator

import anyio
from anyio import to_thread

import shardq
from benchmarks.programs.handled import value_of
from shardq.ops.processes import die_with_parent, run_async

KEYS, STRETCH = 1000, 500
FULL = 0.75


class Flood:
    """Messages without end, numbered from 0."""

    def __init__(self, producer: shardq.Producer, full_bytes: float) -> None:
        self._producer, self._full_bytes = producer, full_bytes
        self.stopped = self._full = False

    def pairs(self) -> Iterator[tuple[str, bytes]]:
        for first in itertools.count(0, STRETCH):
            if self.stopped:
                return
            if not self._full and self._producer.buffered_bytes > self._full_bytes:
                self._full = True
                print("full", flush=True)
            now_ns = time.monotonic_ns()
            for number in range(first, first + STRETCH):
                yield f"key-{number % KEYS}", value_of(number, now_ns)

    async def stop_when_told(self) -> None:
        await told()
        self.stopped = True


async def told() -> None:
    """Until there is a line on stdin, or its end."""
    await to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)


async def main(url: str, queue: str, most_bytes: str) -> None:
    async with (
        shardq.connect(url) as client,
        (await client.queue(queue)).producer(max_buffered_bytes=int(most_bytes)) as producer,
    ):
        flood = Flood(producer, FULL * int(most_bytes))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(flood.stop_when_told)
            print("ready", flush=True)
            sent = await producer.send_many(flood.pairs())
    print("sent", sent, flush=True)
    await told()  # whoever started it ends it


if __name__ == "__main__":
    die_with_parent(os.getppid())
    run_async(lambda: main(*sys.argv[1:]))
