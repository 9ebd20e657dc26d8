"""The worker that the runtime tests start as processes of their own: writes down every start and end of a handler.

Settings come by environment: QUEUE, JOURNAL (folder), LEASE, HANDLER_S, CONCURRENCY, LIMIT, KEY_LIMIT, AWAY_S (instead
of most of an hour, see runtime/contact.py). One line a fact, written with one os.write so that a SIGKILL leaves whole
lines: kind, message id, key, value, CLOCK_MONOTONIC in ns, fence.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import anyio

import shardq
from shardq.runtime import contact

contact.AWAY_S = float(os.environ.get("AWAY_S", contact.AWAY_S))
_pause_s = float(os.environ.get("HANDLER_S", "0"))
_folder = os.environ.get("JOURNAL", "")
_journal = os.open(Path(_folder) / f"{os.getpid()}.jsonl", os.O_CREAT | os.O_APPEND | os.O_WRONLY) if _folder else -1

worker = shardq.Worker(
    os.environ.get("QUEUE", "unset"),
    group="g",
    name=f"w{os.getpid()}",
    lease=float(os.environ.get("LEASE", "3")),
    concurrency=int(os.environ.get("CONCURRENCY", "32")),
    limit=os.environ.get("LIMIT"),
    key_limit=os.environ.get("KEY_LIMIT"),
)


def _write(kind: str, message: shardq.Message) -> None:
    fact = [kind, message.id, message.key, message.value, time.monotonic_ns(), message.fence]
    os.write(_journal, json.dumps(fact).encode() + b"\n")


@worker.handler
async def handle(message: shardq.Message) -> None:
    _write("start", message)
    if message.value == "poison":
        raise ValueError("this one never works")
    if _pause_s:
        await anyio.sleep(_pause_s)
    _write("end", message)


def _one_of_two(name: str) -> shardq.Worker:
    made = shardq.Worker(f"{os.environ.get('QUEUE', 'unset')}-{name}", group="g")
    made.handler(handle)
    return made


workers = shardq.Workers({_one_of_two("a"): 3, _one_of_two("b"): 1})
