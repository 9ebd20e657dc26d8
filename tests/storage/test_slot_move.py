"""A slot moves the classic way, key by key, while producers send and an owner steps: nothing lost, nothing twice.

The stages are told apart by what calls meet: TRYAGAIN while a shard's keys are on two nodes, ASK when all are on the
new one, MOVED when the slot is its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from shardq.core import records
from shardq.core.session import FIRST, NEW
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime.client import Queue
from shardq.storage.nodes import node_command
from shardq.storage.pipes import Pipes
from tests.storage.rig import Rig, ids, messages_of_ours, rig, until

pytestmark = pytest.mark.anyio
HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def own_cluster(server_binary: Path) -> Iterator[LocalCluster]:
    with LocalCluster(masters=2, port=None, server=server_binary) as made:
        yield made


class Move:
    """The slot of one shard on its way from the node that has it to the other one."""

    def __init__(self, cluster: LocalCluster, slot: int) -> None:
        self.slot = slot
        self.ports = cluster.ports
        first, second = cluster.ports
        owns_first = bool(slot < 8192)
        self.source, self.target = (first, second) if owns_first else (second, first)
        self.ids = {port: str(node_command(HOST, port, "CLUSTER", "MYID")) for port in cluster.ports}

    def begin(self) -> list[str]:
        """Opens both ends; returns the keys that must move, the stream first."""
        self._set(self.target, "IMPORTING", self.ids[self.source])
        self._set(self.source, "MIGRATING", self.ids[self.target])
        keys: list[str] = node_command(HOST, self.source, "CLUSTER", "GETKEYSINSLOT", self.slot, 1000)
        return sorted(keys, key=lambda key: not key.endswith(":stream"))

    def move(self, key: str) -> None:
        node_command(HOST, self.source, "MIGRATE", HOST, self.target, key, 0, 5000)

    def end(self) -> None:
        for port in (self.target, self.source):
            self._set(port, "NODE", self.ids[self.target])

    def _set(self, port: int, *args: str) -> None:
        node_command(HOST, port, "CLUSTER", "SETSLOT", self.slot, *args)


class Traffic:
    """A producer's messages, appends of our own, and an owner that handles both, over pipes that note each retry."""

    def __init__(self, made: Rig) -> None:
        self.made = made
        self.retries: list[str] = []
        self.sent = self.appended = 0
        self.handled: list[str] = []
        self.stopping = False

    async def appends(self, producer: str) -> None:
        sequence = 0
        while not self.stopping:
            sequence += 1
            answer = await self.made.append(producer, sequence, f"{producer}-{sequence}")
            assert answer.status == "OK"
            self.appended += 1

    async def sends(self, queue: Queue) -> None:
        async with queue.producer() as producer:
            while not self.stopping:
                await producer.send_many((None, f"sent-{self.sent + index}") for index in range(10))
                self.sent += 10

    async def handles(self, token: str) -> None:
        """Steps of an owner that is rung when something comes; every reply lost on the way is read again."""
        finished: list[str] = []
        count, cursor, handled = 0, NEW, set[str]()
        while True:
            step = await self.made.step(token, limit=20, cursor=cursor, acked=count, finished=finished, wait=True)
            entries = [(entry.decode(), fields) for entry, fields in step.entries if entry.decode() not in handled]
            handled |= {entry for entry, _ in entries}
            if step.repeated:
                cursor = FIRST
            elif cursor != NEW:
                cursor = NEW if not step.entries else ids(step)[-1]
            finished = [entry for entry, _ in entries]
            count = sum(messages_of_ours(fields) for _, fields in entries)
            self.handled += [value for _, fields in entries for value in records.decode(fields[3]).values]
            if self.stopping and not entries and not step.repeated and cursor == NEW:
                return


@asynccontextmanager
async def traffic(made: Rig, queue: Queue) -> AsyncIterator[Traffic]:
    """Runs until the block ends, then to the end of what was sent."""
    async with anyio.create_task_group() as senders:
        running = Traffic(made)
        made.pipes = Pipes(made.client.cluster, senders, running.retries.append)
        token = await made.own()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(running.handles, token)
            tasks.start_soon(running.sends, queue)
            for producer in ("p", "q", "r"):
                tasks.start_soon(running.appends, producer)
            yield running
            running.stopping = True
        made.pipes = made.client.pipes
        senders.cancel_scope.cancel()


async def test_a_slot_moves_under_load(own_cluster: LocalCluster, queue_name: str) -> None:
    async with rig(own_cluster.url, f"{queue_name}-unused") as made:
        queue = await made.client.queue(queue_name, shards=1)
        await queue.open_group("g")
        made.keys, made.shard = queue.keys, queue.shards[0]
        move = Move(own_cluster, made.shard.slot)
        async with traffic(made, queue) as running:

            async def flows() -> None:
                more = running.appended + 20, running.sent + 20, len(running.handled) + 60

                async def flowed() -> bool:
                    now = running.appended, running.sent, len(running.handled)
                    return all(reached >= wanted for reached, wanted in zip(now, more, strict=True))

                await until(flowed, "messages sent and handled")

            async def meets(action: str) -> None:
                async def met() -> bool:
                    return action in running.retries

                await until(met, f"a call that meets {action}")

            async def moved() -> bool:
                node = made.client.cluster.node_of(move.slot)
                return node is not None and int(node.port) == move.target

            await flows()
            assert not running.retries
            first, *others = move.begin()
            move.move(first)
            await meets("again")
            for key in others:
                move.move(key)
            await meets("ask")
            await flows()
            move.end()
            await until(moved, "a client that learns from MOVED where the slot is")
            await flows()
        assert await made.entries() == [], "everything was handled, so everything was trimmed"
        assert await made.backlog() == 0
    counts = Counter(running.handled)
    assert set(counts.values()) == {1}, "stored twice"
    assert len(counts) == running.sent + running.appended, "lost"
    for producer in ("p", "q", "r"):
        own = [value for value in running.handled if value.startswith(f"{producer}-")]
        assert own == [f"{producer}-{number}" for number in range(1, len(own) + 1)], "out of order"
