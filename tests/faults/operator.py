"""Who changes the number of shards in a run: `python -m tests.faults.operator URL QUEUE NAME FOLDER ACTION SEED CALLS`.
A process of its own, so that it can be cut off: with CALLS above 0 it ends itself by SIGKILL before it makes that many
calls. Writes what it did to FOLDER/NAME.jsonl; judges nothing.

It chooses the shards by the seed, out of those there are. What another one changed meanwhile, or an outage, makes it
choose again.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import anyio

import shardq
from shardq.errors import ReshardUnderWay, StoreError, UnknownQueue, UsageError
from shardq.storage.pipes import Pipes
from tests.faults.history import SUFFIX, Change, Journal

MOST_PER_HOME = 4  # active shards; beyond, a split makes fewer again
_TRY_AGAIN_S, _WITHIN_S = 0.3, 100.0

Act = Callable[[shardq.Queue, random.Random], Awaitable[list[int]]]


async def split_one(queue: shardq.Queue, chance: random.Random) -> list[int]:
    if _many(queue):
        return await queue.scale(len(queue.table.homes))
    return await queue.split(chance.choice(queue.table.shards).id, into=chance.choice((2, 2, 3)))


async def split_every(queue: shardq.Queue, chance: random.Random) -> list[int]:
    return await (queue.scale(len(queue.table.homes)) if _many(queue) else queue.split_all())


async def merge_some(queue: shardq.Queue, chance: random.Random) -> list[int]:
    """Two neighbours; they are made first where there are none."""
    pairs = [pair for shards in queue.table.homes.values() for pair in pairwise(shards)]
    if not pairs:
        return await split_one(queue, chance)
    return await queue.merge(shard.id for shard in chance.choice(pairs))


async def scale(queue: shardq.Queue, chance: random.Random) -> list[int]:
    homes = len(queue.table.homes)
    return await queue.scale(chance.randint(homes, MOST_PER_HOME * homes))


ACTIONS: dict[str, Act] = {"split": split_one, "split-all": split_every, "merge": merge_some, "scale": scale}


def _many(queue: shardq.Queue) -> bool:
    return 2 * len(queue.table.shards) > MOST_PER_HOME * len(queue.table.homes)


def cut_off_before(calls: int) -> Any:
    """Patches the connections: this process is gone before it makes so many calls."""
    call, made = Pipes.call, 0

    async def counted(self: Pipes, *args: Any, **rest: Any) -> Any:
        nonlocal made
        made += 1
        if made >= calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return await call(self, *args, **rest)

    return mock.patch.object(Pipes, "call", counted)


async def operate(options: argparse.Namespace, journal: Journal) -> None:
    chance = random.Random(options.seed)
    with anyio.fail_after(_WITHIN_S):
        while True:
            try:
                async with shardq.connect(options.url) as client:
                    queue = await client.queue(options.queue)
                    before = [shard.id for shard in queue.table.shards]
                    journal.write(Change("begun", journal.clock(), options.name, f"{options.action} of {before}"))
                    new = await ACTIONS[options.action](queue, chance)
                    journal.write(Change("done", journal.clock(), options.name, f"{options.action}: new are {new}"))
                    return
            except (StoreError, UsageError, UnknownQueue, ReshardUnderWay) as error:
                journal.write(Change("again", journal.clock(), options.name, f"{type(error).__name__}: {error}"))
            await anyio.sleep(_TRY_AGAIN_S)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.operator", description=__doc__)
    for name in ("url", "queue", "name"):
        parser.add_argument(name)
    parser.add_argument("folder", type=Path)
    parser.add_argument("action", choices=list(ACTIONS))
    parser.add_argument("seed", type=int)
    parser.add_argument("calls", type=int, help="0: it is not cut off")
    options = parser.parse_args()
    journal = Journal(options.folder / f"{options.name}{SUFFIX}")
    if options.calls:
        cut_off_before(options.calls).start()
    anyio.run(operate, options, journal)


if __name__ == "__main__":
    main()
