"""A worker whose every message has effects, for the tests that kill it: what it did can be read from Redis alone.

Settings come by environment: QUEUE, GROUP, LEASE, HANDLER_S, KIND ("async", "plain" or "batch" handler), ORDERING,
COPIES (a queue that every message is sent on to) and MENDED (a file: once it is there, nothing is rejected any more). A
value is [number, times to fail, "ok" | "reject" | "kill"]. Effects: the list `done:<group>:<key>` gets
"<number>:<Unix ms>" of each message, `total:<group>` their sum.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import anyio

import shardq
from shardq.core.effects import Atomic

_pause_s = float(os.environ.get("HANDLER_S", "0"))
_kind = os.environ.get("KIND", "async")
_group = os.environ.get("GROUP", "g")
_copies = os.environ.get("COPIES", "")
_mended = Path(os.environ.get("MENDED", "/nowhere"))

worker = shardq.Worker(
    os.environ.get("QUEUE", "unset"),
    group=_group,
    name=f"w{os.getpid()}",
    lease=float(os.environ.get("LEASE", "3")),
    retry=shardq.Retry(attempts=4, base=0.05, factor=2),
    ordering="none" if os.environ.get("ORDERING") == "none" else "key",
)
copies: list[shardq.Queue] = []


@worker.on_start
async def start(client: shardq.Client) -> None:
    if _copies:
        copies.append(await client.queue(_copies))


def write(message: shardq.Message, tx: Atomic) -> None:
    number = message.value[0]
    tx.rpush(message.local_key(f"done:{_group}:{message.key!s}"), f"{number}:{time.time_ns() // 1_000_000}")
    tx.incrby(message.local_key(f"total:{_group}"), number)
    for queue in copies:
        tx.send(queue, number, key=message.key)


def end(message: shardq.Message) -> int:
    number, fails, how = message.value
    if message.attempt <= fails:
        raise ValueError(f"try {message.attempt} of {number} fails")
    if how == "reject" and not _mended.exists():
        # Of a list all would be dead: there the one bad message fails until it is alone.
        raise ValueError("this one is bad") if _kind == "batch" else shardq.Reject("this one is refused")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return int(number)


# Effects come first, so that a handler that raises or dies behind them shows that nothing of them remains.


async def handle(message: shardq.Message) -> int:
    async with message.atomic() as tx:
        write(message, tx)
    await anyio.sleep(random.uniform(0, _pause_s))
    return end(message)


async def handle_list(messages: Sequence[shardq.Message]) -> None:
    for message in messages:
        async with message.atomic() as tx:
            write(message, tx)
    await anyio.sleep(random.uniform(0, _pause_s))
    for message in messages:
        end(message)


def handle_in_thread(message: shardq.Message) -> int:
    with message.atomic() as tx:
        write(message, tx)
    time.sleep(random.uniform(0, _pause_s))
    return end(message)


if _kind == "batch":
    worker.batch_handler(handle_list)
elif _kind == "plain":
    worker.handler(handle_in_thread)
else:
    worker.handler(handle)
