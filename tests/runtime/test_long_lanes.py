"""A worker that gives up a shard with very many messages of one key in hand lives: each of them holds the next, and to
end them one inside the other takes more of the C stack than there is. Nor does it keep anything of the shard. In
processes of their own, with threads of little stack. No server.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_APP = """
import gc, sys, threading
from types import SimpleNamespace
import anyio
from shardq.core.gate import KeyGate
from shardq.core.intake import build_messages
from shardq.core.lease import Trust
from shardq.core.message import Batch
from shardq.core.records import RecordBatch
from shardq.runtime.message_runners import MessageRunners
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.shard import OwnedShard

MANY = 20_000

def made(runners, renewed_s=0.0):
    trust = Trust(1e6, renewed_s)
    shard = OwnedShard("q", "g", 0, 1, "n", keys=SimpleNamespace(slot=1), step=0, trust=trust, ready=runners.ready,
                       by_key=True)
    if sys.argv[1] == "gate":
        shard.guard(KeyGate(runners.admit, shard.behind, lambda: 0.0, lambda: None), lambda: None)
    return shard

def batch_of(shard, count=MANY):
    batch = Batch(shard, "1-0", count)
    shard.hand.entries["1-0"] = batch
    shard.hand.outstanding = count
    return build_messages(RecordBatch(1, None, ["k"] * count, list(range(count)), None), batch)

async def main():
    way, begun, other = sys.argv[1], anyio.Event(), anyio.Event()

    async def handle(message):
        begun.set()
        if message.batch.count == 1:
            other.set()
        elif way == "returned":
            shard.lose()
        elif way == "failed":
            shard.lose()
            raise ValueError
        elif way == "stopped":
            await anyio.sleep_forever()

    runners = MessageRunners(WorkerSettings(concurrency=1), handle)
    shard = made(runners, -1e12 if way == "suspended" else 0.0)
    async with anyio.create_task_group() as tasks:
        if way != "ended":
            runners.start(tasks)
            await anyio.sleep(0)
        runners.deliver(shard, [batch_of(shard)])
        if way in ("draining", "lost"):
            shard.drain() if way == "draining" else shard.lose()
        if way in ("returned", "failed", "stopped"):
            await begun.wait()
        if way == "stopped":
            shard.lose()
            runners.interrupt(shard)
        if way not in ("gate", "ended"):
            for _ in range(20):
                await anyio.sleep(0)
            small = made(runners)
            runners.deliver(small, [batch_of(small, 1)])  # the runner takes it, and has let go of the other one
            await other.wait()
        tasks.cancel_scope.cancel()
    if way == "gate":
        shard.gate.clear()
    elif way == "suspended":
        assert len(shard.suspended) == 1
        shard.lose()
    runners.end()
    assert not runners.ready and not shard.suspended
    del shard
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, OwnedShard) and each.lost]

threading.stack_size(256 * 1024)
failed = []
thread = threading.Thread(target=lambda: failed.append(anyio.run(main)))
thread.start()
thread.join()
assert failed == [None]
"""


@pytest.mark.parametrize("way", ["lost", "draining", "returned", "failed", "stopped", "suspended", "gate", "ended"])
def test_a_long_lane_is_given_up(way: str) -> None:
    command = [sys.executable, "-c", _APP, way]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr or f"ended by signal {-done.returncode}"
