"""The client processes of a run: `python -m tests.faults.clients ROLE URL QUEUE NAME FOLDER ...`. Each
writes what it does to FOLDER/NAME.jsonl (history.py) until SIGTERM. Starts no process and judges nothing.

They outlive every outage, as shardq says they do: only before a client has begun its work may an unreachable cluster
end it, then it tries again, as a supervisor would. Any other error ends the process, which is a finding.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal
from unittest import mock

import anyio

import shardq
from shardq.errors import NotStored, ShardqError, StoreError, UsageError
from shardq.ops.processes import run_async, until_stopped
from shardq.ops.work import log_to_stderr
from shardq.runtime import owner
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.shard import OwnedShard
from shardq.runtime.standalone import coordinate
from tests.faults.history import SUFFIX, Handle, Journal, Lease, Send

GROUP = "g"
_TRY_AGAIN_S = 0.5
_FAILS = ((0, 1, 2), (94, 4, 2))  # how often a handler fails before it does its work, and of a hundred how many
_ALWAYS_FAILS = 0.003


def effects_key(key: str) -> str:
    """What the list of a key's effects is called on its shard."""
    return f"seen:{key}"


def key_name(index: int) -> str:
    return f"key-{index}"


# -- the producer ------------------------------------------------------------------------------------------------------


class Sender:
    """Sends numbered messages of every key, each key's one after the other, until `stopping`."""

    def __init__(self, options: argparse.Namespace, journal: Journal) -> None:
        self.options, self.journal = options, journal
        self.stopping = False
        self._chance = random.Random(options.name)
        self._number = 0

    async def run(self, client: shardq.Client, begun: Callable[[], None]) -> None:
        options = self.options
        queue = await client.queue(options.queue)
        try:
            async with queue.producer(
                durability=options.durability, delivery_timeout=options.delivery_timeout
            ) as producer:
                begun()
                async with anyio.create_task_group() as senders:
                    for index in range(options.keys):
                        senders.start_soon(self._send_key, producer, key_name(index))
        except NotStored:
            pass  # says once more what each send said

    async def _send_key(self, producer: shardq.Producer, key: str) -> None:
        while not self.stopping:
            await self._send(producer, key)
            await anyio.sleep(self._chance.uniform(0, 2 * self.options.pause))

    async def _send(self, producer: shardq.Producer, key: str) -> None:
        self._number += 1
        number, name, journal = self._number, self.options.name, self.journal
        always = self._chance.random() < _ALWAYS_FAILS
        value = [name, number, -1 if always else self._chance.choices(*_FAILS)[0]]
        journal.write(Send("invoke", journal.clock(), name, key, number, always))
        try:
            id_ = await producer.send(value, key=key)
        except ShardqError as error:
            unknown = isinstance(error, StoreError) and error.outcome_unknown
            text = f"{type(error).__name__}: {error}"
            journal.write(Send("unknown" if unknown else "fail", journal.clock(), name, key, number, always, "", text))
        else:
            journal.write(Send("ok", journal.clock(), name, key, number, always, id_))


async def produce(options: argparse.Namespace, journal: Journal) -> None:
    sender = Sender(options, journal)

    def stop() -> bool:
        sender.stopping = True
        return begun.is_set()

    begun = anyio.Event()
    await until_stopped(lambda: _begin(options, sender.run, begun), stop)


# -- the worker --------------------------------------------------------------------------------------------------------


def make_worker(options: argparse.Namespace, journal: Journal) -> shardq.Worker:
    """Its handler leaves one effect, after a while; some messages fail once or twice, some always."""
    worker = shardq.Worker(
        options.queue,
        group=GROUP,
        name=options.name,
        lease=options.lease,
        retry=shardq.Retry(attempts=4, base=0.05, factor=2),
    )
    chance = random.Random(options.name)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        key, (producer, number, fails) = str(message.key), message.value
        place = (options.name, message.shard, message.fence, message.id, key, producer, number, message.attempt)
        journal.write(Handle("start", journal.clock(), *place))
        how: Literal["ok", "failed", "cancelled"] = "cancelled"
        try:
            async with message.atomic() as tx:
                item = f"{producer}:{number}:{message.fence}:{options.name}:{message.id}"
                tx.rpush(message.local_key(effects_key(key)), item)
            await anyio.sleep(chance.uniform(0, options.handler))
            how = "failed"
            if fails < 0:
                raise shardq.Reject("this one is refused")
            if message.attempt <= fails:
                raise ValueError(f"try {message.attempt} fails")
            how = "ok"
        finally:
            journal.write(Handle("end", journal.clock(), *place, how))

    return worker


def watched(name: str, journal: Journal) -> type[OwnedShard]:
    """A shard that writes down when it is owned, and when not any more."""

    class Watched(OwnedShard):
        def __init__(self, queue: str, group: str, shard: int, epoch: int, nonce: str, **rest: object) -> None:
            super().__init__(queue, group, shard, epoch, nonce, **rest)  # type: ignore[arg-type] # handed on as they are
            journal.write(Lease("taken", journal.clock(), name, shard, epoch))

        def lose(self) -> None:
            journal.write(Lease("lost", journal.clock(), name, self.shard, self.epoch))
            super().lose()

    return Watched


async def work(options: argparse.Namespace, journal: Journal) -> None:
    worker = make_worker(options, journal)
    begun = anyio.Event()

    async def run(client: shardq.Client, began: Callable[[], None]) -> None:
        @worker.on_start
        async def start(_: shardq.Client) -> None:
            began()

        await worker.run(client)

    def stop() -> bool:
        worker.stop()
        return begun.is_set()

    with mock.patch.object(owner, "OwnedShard", watched(options.name, journal)):
        await until_stopped(lambda: _begin(options, run, begun), stop)


# -- the coordinator ---------------------------------------------------------------------------------------------------


async def stand_by(options: argparse.Namespace, journal: Journal) -> None:
    begun, stopping = anyio.Event(), anyio.Event()
    settings = WorkerSettings(lease_s=options.lease, leader_lease_s=min(3.0, 0.6 * options.lease))

    async def run(client: shardq.Client, began: Callable[[], None]) -> None:
        await client.queue(options.queue)
        began()
        await coordinate(client, options.queue, GROUP, settings, stopping)

    def stop() -> bool:
        stopping.set()
        return begun.is_set()

    await until_stopped(lambda: _begin(options, run, begun), stop)


# -- all ---------------------------------------------------------------------------------------------------------------


async def _begin(
    options: argparse.Namespace,
    run: Callable[[shardq.Client, Callable[[], None]], Awaitable[None]],
    begun: anyio.Event,
) -> None:
    """Connects and runs, again and again until it has begun."""
    while True:
        try:
            async with shardq.connect(options.url) as client:
                await run(client, begun.set)
            return
        except (StoreError, UsageError) as error:  # replicas that are away for now are a UsageError
            if begun.is_set():
                raise
            print(f"not begun yet: {error}", file=sys.stderr, flush=True)
        await anyio.sleep(_TRY_AGAIN_S)


ROLES = {"producer": produce, "worker": work, "coordinator": stand_by}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.faults.clients", description=__doc__)
    made.add_argument("role", choices=list(ROLES))
    for name in ("url", "queue", "name"):
        made.add_argument(name)
    made.add_argument("folder", type=Path)
    made.add_argument("--keys", type=int, default=24)
    made.add_argument("--durability", choices=["leader", "replica", "fsync"])
    made.add_argument("--delivery-timeout", type=float, default=10.0, help="seconds")
    made.add_argument("--pause", type=float, default=0.1, help="seconds between two messages of a key, on average")
    made.add_argument("--lease", type=float, default=2.0, help="seconds")
    made.add_argument("--handler", type=float, default=0.02, help="seconds that a handler takes at most")
    return made


def main() -> None:
    options = parser().parse_args()
    log_to_stderr("info")
    journal = Journal(options.folder / f"{options.name}{SUFFIX}")
    run_async(lambda: ROLES[options.role](options, journal))


if __name__ == "__main__":
    main()
