"""A program that uses the whole client and ends leaves nothing behind: no warning of asyncio's debug mode, no coroutine
that was never awaited, no open connection; also where the URL has a host's name, and where it was cut short."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from shardq.ops.local_cluster import LocalCluster
from tests.runtime.harness import ROOT
from tests.runtime.outages_rig import breakable

PROGRAM = """
import asyncio, gc, logging, random, sys
import anyio
import shardq

url, name = sys.argv[1:]
chance = random.Random(3)
logging.getLogger("shardq").setLevel(logging.CRITICAL)  # it tells of messages that were cut short, as it should
# A busy machine is slow; the loop of SyncProducer's thread has its own idea of how slow is worth a word.
logging.getLogger("asyncio").addFilter(lambda record: record.msg != "Executing %s took %.3f seconds")

async def use_all():
    async with shardq.connect(url) as client:
        queue = await client.queue(name, shards=2)
        async with queue.producer() as producer:
            await producer.send("x", key="k")
            await producer.send_many([("k", 1), ("l", 2)])
            job = await producer.submit("x", key="k")
        async with client.listen("a", patterns=["b*"]) as notices:
            await client.broadcast("a", "x")
            await anext(notices)
        worker = shardq.Worker(name, group="g")

        @worker.handler
        async def handle(message):
            pass

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run, client)
            await job.wait(timeout=30)
            worker.stop()

async def main():
    shardq.connect(url)  # never entered
    await use_all()
    try:
        async with shardq.connect(url) as client:
            raise KeyError
    except KeyError:
        pass
    for _ in range(25):
        with anyio.move_on_after(chance.uniform(0, 0.15)):
            await use_all()

anyio.run(main)
gc.collect()
shardq.SyncProducer(url, name).send("x")  # not closed: the program's end does that
print("ended")
"""


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[LocalCluster]:
    with breakable() as made:
        yield made


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1"])  # the last is a name to all but the resolver
def test_a_program_ends_without_a_word_in_debug_mode(own_cluster: LocalCluster, queue_name: str, host: str) -> None:
    url = f"redis://{host}:{own_cluster.ports[0]}"
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM, url, queue_name],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONASYNCIODEBUG": "1"},
        timeout=120,
        check=False,
    )
    assert ended.stderr == ""
    assert ended.stdout == "ended\n"
    assert ended.returncode == 0
