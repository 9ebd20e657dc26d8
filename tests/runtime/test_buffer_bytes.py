"""What one worker holds in memory, however many shards it has and however large the messages are."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import anyio
import anyio.lowlevel
import pytest

import shardq
from shardq.core.retry import Retry
from shardq.errors import UsageError
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime import owner
from shardq.runtime.shard import OwnedShard
from tests.runtime.harness import until

# What a worker holds is counted in the worker; what it reads from each kind of server is tested in tests/storage.
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis8")]

GROUP = "g"
KIB = 1024
SLACK = 1.5  # an entry may be larger than those before it led to expect


class Held:
    """The shards of the workers in this process, and the most that they held at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shards: list[OwnedShard] = []
        self.most = self.most_of_one = 0
        held = self

        class Watched(OwnedShard):
            def __init__(self, *args: object, **kwargs: object) -> None:
                super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # handed on as they came
                held.shards.append(self)

        monkeypatch.setattr(owner, "OwnedShard", Watched)

    def now(self) -> int:
        return sum(shard.hand.held_bytes for shard in self.shards if not shard.lost)

    def look(self) -> None:
        sizes = [shard.hand.held_bytes for shard in self.shards if not shard.lost]
        assert all(size >= 0 for size in sizes)
        self.most, self.most_of_one = max(self.most, sum(sizes)), max(self.most_of_one, *sizes)


async def fill(client: shardq.Client, name: str, shards: int, count: int, size: int, **options: str) -> None:
    """In entries of one size, as nearly as messages allow: so none is larger than those before it led to expect."""
    queue = await client.queue(name, shards=shards, **options)  # type: ignore[arg-type]  # as the queue declares them
    await queue.open_group(GROUP)
    async with queue.producer(max_batch_messages=max(1, 4 * KIB // size)) as producer:
        await producer.send_many((f"k{number}", os.urandom(size)) for number in range(count))


@pytest.mark.parametrize(
    ("shards", "count", "size", "budget"),
    [
        (128, 800, 64 * KIB, 4096 * KIB),  # a part of 32 KiB each: less than one message
        (16, 600, 32 * KIB, 1024 * KIB),
        (16, 20_000, 100, 512 * KIB),  # entries of many small messages
        (1, 24, 300 * KIB, 100 * KIB),  # one message is more than all
    ],
    ids=["many-shards", "few-shards", "small-messages", "larger-than-all"],
)
@pytest.mark.parametrize("lists", [False, True], ids=["one-by-one", "lists"])
async def test_a_worker_holds_no_more_than_it_may(
    cluster: LocalCluster,
    queue_name: str,
    monkeypatch: pytest.MonkeyPatch,
    shards: int,
    count: int,
    size: int,
    budget: int,
    lists: bool,
) -> None:
    held, handled = Held(monkeypatch), Counter[str]()
    worker = shardq.Worker(queue_name, group=GROUP, buffer_bytes=budget, concurrency=8)

    def note(*messages: shardq.Message) -> None:
        held.look()
        handled.update(str(message.key) for message in messages)
        if len(handled) == count:
            worker.stop()

    if lists:

        @worker.batch_handler
        async def handle_list(messages: list[shardq.Message]) -> None:
            note(*messages)
            await anyio.lowlevel.checkpoint()

    else:

        @worker.handler
        async def handle(message: shardq.Message) -> None:
            note(message)
            await anyio.lowlevel.checkpoint()

    async with shardq.connect(cluster.url) as client:
        await fill(client, queue_name, shards, count, size)
        with anyio.fail_after(60):
            await worker.run(client)
        counters = await (await client.queue(queue_name)).counters([GROUP])
    assert handled == Counter({f"k{number}": 1 for number in range(count)})
    assert sum(shard.groups[GROUP].acked for shard in counters.values()) == count
    assert 0 < held.most <= 1.1 * max(budget, size)  # the last entry of a shard is smaller, one that follows is not


async def test_no_shard_starves_beside_one_that_is_never_through(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two handlers of one shard never end, so up to half of the room stays with the entries that they came in (256 KiB
    at most): all others go on."""
    held, handled, stuck = Held(monkeypatch), set[str](), set[str]()
    worker = shardq.Worker(queue_name, group=GROUP, buffer_bytes=1024 * KIB, concurrency=8, drain_limit=0.0)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        held.look()
        if message.shard == 0 and len(stuck) < 2:
            stuck.add(str(message.key))
            await anyio.sleep_forever()
        handled.add(str(message.key))
        if len(handled) == 400 - len(stuck):
            worker.stop()

    async with shardq.connect(cluster.url) as client:
        await fill(client, queue_name, 8, 400, 16 * KIB)
        with anyio.fail_after(60):
            await worker.run(client)
    assert len(stuck) == 2
    assert len(handled) == 398
    assert held.most <= SLACK * 1024 * KIB


@pytest.mark.parametrize("hot", [1, 3])
async def test_no_shard_starves_beside_keys_that_are_never_through(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch, hot: int
) -> None:
    """The first handler of a key never ends, and there are more messages of that key than the worker may hold: they
    are fetched, and wait for it. So in some shards, of which none has anything else; all others go on."""
    held, handled, stuck = Held(monkeypatch), set[str](), set[int]()
    worker = shardq.Worker(queue_name, group=GROUP, buffer_bytes=1024 * KIB, concurrency=8, drain_limit=0.0)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        held.look()
        if message.shard < hot:
            stuck.add(message.shard)
            await anyio.sleep_forever()
        handled.add(str(message.key))

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=8)
        await queue.open_group(GROUP)
        keys = [f"k{number}" for number in range(400)]
        stuck_keys = [next(key for key in keys if queue.place_of(key) == queue.shards[shard]) for shard in range(hot)]
        places = [queue.shards[shard] for shard in range(hot)]
        others = [key for key in keys if queue.place_of(key) not in places]
        async with queue.producer(max_batch_bytes=32 * KIB) as producer:
            await producer.send_many((key, os.urandom(16 * KIB)) for key in stuck_keys * 100)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(worker.run, client)
                await until(lambda: len(stuck) == hot, 20, "the handlers that never end")
                await until(lambda: held.now() > 300 * KIB, 20, "the messages behind them to be in hand")
                await producer.send_many((key, os.urandom(16 * KIB)) for key in others)
                await until(lambda: handled == set(others), 10, "all others to be handled")
                worker.stop()
    assert held.most <= SLACK * 1024 * KIB


async def test_entries_larger_than_what_is_left_come_beside_handlers_that_never_end(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time beyond the bound, from two shards; and all others go on, whose handlers do not wait for them."""
    held, handled, stuck, large = Held(monkeypatch), set[tuple[Any, bytes]](), set[int](), 700 * KIB
    worker = shardq.Worker(queue_name, group=GROUP, buffer_bytes=1024 * KIB, concurrency=8, drain_limit=0.0)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        held.look()
        if message.shard < 3:
            stuck.add(message.shard)
            await anyio.sleep_forever()
        handled.add((message.key, message.value[:2]))
        await anyio.lowlevel.checkpoint()

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=8)
        await queue.open_group(GROUP)
        keys = [
            next(f"k{n}" for n in range(999) if queue.place_of(f"k{n}") == queue.shards[shard]) for shard in range(8)
        ]
        async with queue.producer(max_batch_messages=1) as producer, anyio.create_task_group() as tasks:
            await producer.send_many((key, os.urandom(16 * KIB)) for key in keys[:3] * 60)
            tasks.start_soon(worker.run, client)
            await until(lambda: len(stuck) == 3, 20, "the handlers that never end")
            await until(lambda: held.now() > 400 * KIB, 20, "the messages behind them to be in hand")
            for number in range(5):
                await producer.send_many((key, b"%02d" % number + os.urandom(large)) for key in keys[3:5])
                await producer.send_many((key, b"%02d" % number + os.urandom(16 * KIB)) for key in keys[5:])
            await until(lambda: len(handled) == 25, 20, "all others to be handled")
            worker.stop()
    assert held.most <= 1.1 * 1024 * KIB + 2 * large  # the first of a shard was not expected to be so large


async def test_failed_messages_come_again_though_there_is_no_room(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, tries = Held(monkeypatch), Counter[str]()
    retry = Retry(attempts=5, base=0.01)
    worker = shardq.Worker(queue_name, group=GROUP, buffer_bytes=64 * KIB, concurrency=8, retry=retry)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        held.look()
        tries[str(message.key)] += 1
        if message.attempt < 2:
            raise ValueError
        if sum(tries.values()) == 2 * 60:
            worker.stop()

    async with shardq.connect(cluster.url) as client:
        await fill(client, queue_name, 8, 60, 20 * KIB)
        with anyio.fail_after(60):
            await worker.run(client)
    assert set(tries.values()) == {2}
    assert len(tries) == 60
    assert held.most > 0


async def test_compressed_messages_count_as_they_are_unpacked(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, count, size = Held(monkeypatch), 300, 20 * KIB
    left = set(range(count))
    worker = shardq.Worker(queue_name, group=GROUP, buffer_bytes=1024 * KIB, concurrency=8)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        held.look()
        left.discard(int(str(message.key)))
        await anyio.lowlevel.checkpoint()
        if not left:
            worker.stop()

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=4, compression="zlib")
        await queue.open_group(GROUP)
        async with queue.producer(max_batch_messages=10) as producer:
            await producer.send_many((str(number), b"x" * size) for number in range(count))
        with anyio.fail_after(60):
            await worker.run(client)
    assert held.most >= 10 * size, "an entry of ten takes 200 KiB here, and 300 bytes there"


def test_a_worker_without_room_is_refused() -> None:
    with pytest.raises(UsageError, match="buffer_bytes must be at least 1, not 0"):
        shardq.Worker("q", group="g", buffer_bytes=0)
