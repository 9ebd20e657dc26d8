"""A worker whose every message has effects, for the tests that kill it: what it did can be read from Redis alone.

Settings come by environment: QUEUE, LEASE, HANDLER_S, and COPIES, a queue that every message is sent on to. A value is
[number, times to fail, "ok" | "reject" | "kill"].
"""

from __future__ import annotations

import os
import random
import signal

import anyio

import shardq

_pause_s = float(os.environ.get("HANDLER_S", "0"))

worker = shardq.Worker(
    os.environ.get("QUEUE", "unset"),
    group="g",
    name=f"w{os.getpid()}",
    lease=float(os.environ.get("LEASE", "3")),
    retry=shardq.Retry(attempts=4, base=0.05, factor=2),
)
copies: list[shardq.Queue] = []


@worker.on_start
async def start(client: shardq.Client) -> None:
    copies.append(await client.queue(os.environ.get("QUEUE", "unset") + "-copies"))


@worker.handler
async def handle(message: shardq.Message) -> int:
    number, fails, end = message.value
    async with message.atomic() as tx:
        # First, so that a handler that raises or dies behind it shows that nothing of this remains.
        tx.rpush(message.local_key(f"done:{message.key}"), number)
        tx.incrby(message.local_key("total"), number)
        tx.send(copies[0], number, key=message.key)
    await anyio.sleep(random.uniform(0, _pause_s))
    if message.attempt <= fails:
        raise ValueError(f"try {message.attempt} of {number} fails")
    if end == "reject":
        raise shardq.Reject("this one is refused")
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return int(number)
