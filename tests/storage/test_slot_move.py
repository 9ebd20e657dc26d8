"""A slot moves the classic way, key by key, while producers send at once, later and once, and an owner handles, puts
off and writes effects: nothing lost, nothing twice.

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
from shardq.core.effects import Effect
from shardq.core.step import FIRST, NEW, Put
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime.queue import Queue
from shardq.storage.pipes import Pipes
from tests.faults.slots import Move
from tests.storage.rig import Rig, ids, one, rig, until

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def own_cluster(server_binary: Path) -> Iterator[LocalCluster]:
    with LocalCluster(masters=2, port=None, server=server_binary) as made:
        yield made


def move_of(cluster: LocalCluster, slot: int) -> Move:
    """From the node that has the slot to the other one."""
    first, second = cluster.processes
    return Move(slot, first, second) if slot < 8192 else Move(slot, second, first)


class Traffic:
    """Three producers' messages of all kinds, and an owner that handles them, over pipes that note each retry."""

    def __init__(self, made: Rig) -> None:
        self.made = made
        self.counter = made.shard.data("handled")
        self.retries: list[str] = []
        self.sent = self.appended = self.conditional = 0
        self.fetched: list[str] = []
        self.handled: list[str] = []
        self.stopping = self.ended = False
        self.senders = 0

    async def appends(self, producer: str) -> None:
        sequence = 0
        while not self.stopping:
            sequence += 1
            answer = await self.made.append(producer, sequence, f"{producer}-{sequence}")
            assert answer.status == "OK"
            self.appended += 1
        self.senders -= 1

    async def appends_each(self, producer: str) -> None:
        """Each call sends one message now and one later, and one of the call before again."""
        sequence, window = 0, 3_600_000
        while not self.stopping:
            sequence += 1
            now, later, before = (
                f"{producer}-{number}" for number in (2 * sequence, 2 * sequence + 1, 2 * sequence - 2)
            )
            items = [one(now, once=now, window_ms=window), one(later, when="in:5", job=later, job_ms=1)]
            answer = await self.made.append_each(producer, sequence, *items, one(before, once=before, window_ms=window))
            assert answer.status == "OK"
            self.conditional += 3 if sequence == 1 else 2
        self.senders -= 1

    async def sends(self, queue: Queue) -> None:
        async with queue.producer() as producer:
            while not self.stopping:
                await producer.send_many((None, f"sent-{self.sent + index}") for index in range(10))
                self.sent += 10
        self.senders -= 1

    async def promotes(self) -> None:
        """What is due comes, what has had its time goes, until nothing is left to come."""
        while self.senders or (await self.made.inspect()).delayed:
            await self.made.promote(20)
            await self.made.tidy()
            await anyio.sleep(0.005)

    async def handles(self, token: str) -> None:
        """Steps of an owner that is rung when something comes; every reply lost on the way is read again. Each third
        message is put off and comes back as an item; each step writes how many messages it finished."""
        done: list[str] = []
        finished: list[str] = []
        puts: list[Put] = []
        drops: list[int] = []
        items: dict[int, None] = {}
        known, cursor, seen = 0, NEW, set[str]()
        while True:
            gets = list(items)[:20]
            step = await self.made.step(
                token,
                limit=20,
                cursor=cursor,
                acked=len(done),
                finished=finished,
                puts=puts,
                drops=drops,
                gets=gets,
                known=known,
                effects=[Effect(self.counter, "INCRBY", (str(len(done)),))] if done else [],
                wait=True,
            )
            self.handled += done
            done, finished, puts, drops = [], [], [], []
            if step.status == "REPEAT":
                cursor = FIRST
                continue
            assert step.status == "OK"
            if cursor != NEW:
                cursor = NEW if not step.fetched.entries else ids(step)[-1]
            for item, record in zip(gets, step.fetched.records, strict=True):
                del items[item]
                drops.append(item)
                done.append(record.decode())
            for member in step.fetched.items or ():
                known = int(member.split(b":")[0])
                items[known] = None
            for entry, fields in step.fetched.entries:
                if entry.decode() not in seen:
                    seen.add(entry.decode())
                    finished.append(entry.decode())
                    for value in records.decode(fields[3]).values:
                        self.fetched.append(value)
                        if len(self.fetched) % 3:
                            done.append(value)
                        else:
                            puts.append(Put(0, 0, 0, b"", value.encode()))
            if self.ended and not (done or finished or puts or drops or items or cursor != NEW):
                return


@asynccontextmanager
async def traffic(made: Rig, queue: Queue) -> AsyncIterator[Traffic]:
    """Runs until the block ends, then to the end of what was sent."""
    async with anyio.create_task_group() as senders:
        running = Traffic(made)
        made.pipes = Pipes(made.client.cluster, senders, running.retries.append)
        token = await made.own()
        await made.command("SET", running.counter, 0)
        async with anyio.create_task_group() as owner:
            owner.start_soon(running.handles, token)
            async with anyio.create_task_group() as tasks:
                running.senders = 5
                tasks.start_soon(running.sends, queue)
                for producer in ("p", "q", "r"):
                    tasks.start_soon(running.appends, producer)
                tasks.start_soon(running.appends_each, "each")
                tasks.start_soon(running.promotes)
                yield running
                running.stopping = True
            running.ended = True
        made.pipes = made.client.pipes
        senders.cancel_scope.cancel()


async def test_a_slot_moves_under_load(own_cluster: LocalCluster, queue_name: str) -> None:
    async with rig(own_cluster.url, f"{queue_name}-unused") as made:
        queue = await made.client.queue(queue_name, shards=1)
        await queue.open_group("g")
        made.keys, made.shard = queue.keys, queue.shards[0]
        move = move_of(own_cluster, made.shard.slot)
        async with traffic(made, queue) as running:

            async def flows() -> None:
                more = running.appended + 20, running.sent + 20, running.conditional + 6, len(running.handled) + 60

                async def flowed() -> bool:
                    now = running.appended, running.sent, running.conditional, len(running.handled)
                    return all(reached >= wanted for reached, wanted in zip(now, more, strict=True))

                await until(flowed, "messages sent and handled")

            async def meets(action: str) -> None:
                async def met() -> bool:
                    return action in running.retries

                await until(met, f"a call that meets {action}")

            async def moved() -> bool:
                node = made.client.cluster.node_of(move.slot)
                return node is not None and int(node.port) == move.target.port

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
        assert await made.command("GET", running.counter) == str(len(running.handled)).encode(), "each effect once"
        assert (await made.inspect("g")).groups["g"].acked == len(running.handled)
    counts = Counter(running.handled)
    assert set(counts.values()) == {1}, "stored twice"
    assert len(counts) == running.sent + running.appended + running.conditional, "lost"
    for producer in ("p", "q", "r"):
        own = [value for value in running.fetched if value.startswith(f"{producer}-")]
        assert own == [f"{producer}-{number}" for number in range(1, len(own) + 1)], "out of order"


async def test_an_effect_on_a_key_that_is_missing_waits_for_the_end_of_the_move(
    own_cluster: LocalCluster, queue_name: str
) -> None:
    """Redis answers TRYAGAIN to a call that names a key which is on neither node: it is sent again until it is over."""
    async with rig(own_cluster.url, queue_name, 100) as made, anyio.create_task_group() as tasks:
        retries: list[str] = []
        made.pipes = Pipes(made.client.cluster, tasks, retries.append)
        await made.open_group()
        await made.append("p", 1, "a")
        token = await made.own()
        entries = await made.fetch(token)
        move = move_of(own_cluster, made.shard.slot)
        for key in move.begin():
            move.move(key)
        ended: list[str] = []

        async def steps() -> None:
            key = made.shard.data("new")
            stepped = await made.step(token, acked=1, finished=entries, effects=[Effect(key, "INCRBY", ("1",))])
            ended.append(stepped.status)
            assert await made.command("GET", key) == b"1"

        async def tried_again() -> bool:
            return retries.count("again") > 1

        tasks.start_soon(steps)
        await until(tried_again, "a step that is sent again")
        assert ended == []
        move.end()

        async def over() -> bool:
            return bool(ended)

        await until(over, "the step")
        assert ended == ["OK"]
        assert await made.backlog() == 0
        tasks.cancel_scope.cancel()
