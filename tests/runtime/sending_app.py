"""A producer for the tests that kill it: sends messages in order per key, each under a dedupe id, so that one that was
killed and starts from the beginning stores nothing twice. Arguments: URL, queue, file with {key: [numbers]} as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import anyio

import shardq


async def send(producer: shardq.Producer, key: str, numbers: list[int]) -> None:
    for number in numbers:
        await producer.send([number, 0, "ok"], key=key, dedupe_id=str(number))


async def main(url: str, name: str, sent: dict[str, list[int]]) -> None:
    async with shardq.connect(url) as client:
        queue = await client.queue(name)
        async with queue.producer() as producer, anyio.create_task_group() as tasks:
            for key, numbers in sent.items():
                tasks.start_soon(send, producer, key, numbers)


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], sys.argv[2], json.loads(Path(sys.argv[3]).read_text()))
