"""Retries, dead letters and what holds a key back: seen from handlers in this process, on real servers."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import anyio
import msgspec
import pytest

import shardq
from shardq.core.lease import Trust
from shardq.core.message import Batch, Message
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime.list_runners import BatchRunners
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.shard import OwnedShard
from shardq.storage.commands import pack_command
from shardq.storage.keys import Keys
from tests.runtime.harness import GROUP, check_equation, drained, running, until

pytestmark = pytest.mark.anyio

FAST = shardq.Retry(attempts=3, base=0.1, factor=2, jitter=0)


async def letters(queue: shardq.Queue) -> list[shardq.DeadLetter]:
    return [letter async for letter in queue.dead_letters(GROUP)]


async def test_a_failing_message_holds_back_its_key_and_no_other(cluster: LocalCluster, queue_name: str) -> None:
    seen: list[tuple[str, str, int]] = []
    worker = shardq.Worker(queue_name, group=GROUP, retry=FAST)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        seen.append((str(message.key), message.value, message.attempt))
        if message.value == "bad" or (message.value == "flaky" and message.attempt == 1):
            raise ValueError("no")

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            for value in ("a", "flaky", "b", "bad", "c"):
                await producer.send(value, key="held")
            async with running(client, worker):
                await until(lambda: ("held", "flaky", 1) in seen, 10, "the first failure")
                for value in ("x", "y"):
                    await producer.send(value, key="free")
                await until(lambda: drained(queue), 20, "an empty backlog")
        held = [(value, attempt) for key, value, attempt in seen if key == "held"]
        assert held == [("a", 1), ("flaky", 1), ("flaky", 2), ("b", 1), ("bad", 1), ("bad", 2), ("bad", 3), ("c", 1)]
        assert seen.index(("free", "y", 1)) < seen.index(("held", "c", 1)), "other keys go on"
        await check_equation(queue)
        (letter,) = await letters(queue)
        assert (letter.key, letter.value, letter.attempts, letter.messages) == ("held", "bad", 3, 1)
        assert "ValueError('no')" in letter.error
        assert "in handle" in letter.traceback


async def test_with_ordering_none_nothing_waits(cluster: LocalCluster, queue_name: str) -> None:
    seen: list[tuple[Any, int]] = []
    worker = shardq.Worker(queue_name, group=GROUP, retry=FAST, ordering="none", concurrency=4)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        seen.append((message.value, message.attempt))
        if message.value == 0:
            raise ValueError("no")
        if message.value == 1:  # runs beside the others of its key
            await until(lambda: (9, 1) in seen, 10, "the last one")

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            await producer.send_many(("key", number) for number in range(10))
        async with running(client, worker):
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert [attempt for value, attempt in seen if value == 0] == [1, 2, 3]
        assert seen.index((9, 1)) < seen.index((0, 2))
        await check_equation(queue)


async def test_retry_later_and_reject_and_a_timeout(cluster: LocalCluster, queue_name: str) -> None:
    times: dict[str, list[float]] = defaultdict(list)
    worker = shardq.Worker(queue_name, group=GROUP, retry=FAST, timeout=0.2)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        times[message.value].append(time.monotonic())
        match message.value:
            case "later" if message.attempt == 1:
                raise shardq.RetryLater(0.7)
            case "reject":
                raise shardq.Reject("never")
            case "slow":
                await anyio.sleep(60)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        async with queue.producer() as producer:
            for value in ("later", "reject", "slow"):
                await producer.send(value, key=value)
        async with running(client, worker):
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert len(times["later"]) == 2
        assert times["later"][1] - times["later"][0] >= 0.7
        assert len(times["reject"]) == 1
        assert len(times["slow"]) == 3
        found = {letter.value: letter for letter in await letters(queue)}
        assert set(found) == {"reject", "slow"}
        assert "never" in found["reject"].error
        assert "timeout of 0.2 s" in found["slow"].error


async def test_a_batch_that_fails_is_taken_apart_until_the_one_bad_message_is_alone(
    cluster: LocalCluster, queue_name: str
) -> None:
    sizes: list[int] = []
    done: dict[Any, list[int]] = defaultdict(list)
    worker = shardq.Worker(queue_name, group=GROUP, retry=shardq.Retry(attempts=5, base=0.02, factor=1))

    @worker.batch_handler
    async def handle(messages: Sequence[shardq.Message]) -> None:
        sizes.append(len(messages))
        if any(message.value == 250 for message in messages):
            raise ValueError("one of these is bad")
        for message in messages:
            done[message.key].append(message.value)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            await producer.send_many((f"k{number % 100}", number) for number in range(500))
        async with running(client, worker):
            await until(lambda: drained(queue), 30, "an empty backlog")
        assert [letter.value for letter in await letters(queue)] == [250]
        for key in range(100):
            assert done[f"k{key}"] == [number for number in range(500) if number % 100 == key and number != 250]
        await check_equation(queue)


async def test_the_last_try_of_a_message_is_alone_in_its_list_whatever_waits_with_it() -> None:
    async def handle(messages: Sequence[shardq.Message]) -> None: ...

    runners = BatchRunners(WorkerSettings(), handle)
    keys, trust = Keys("p", "q").shard(0, "t"), Trust(5, 0.0)
    shard = OwnedShard("q", "g", 0, 1, "n", keys=keys, step=0, trust=trust, ready=None, by_key=True)
    tries = [2, 2, 3, 4, 4, 2, 1]
    batches = [
        [Message(None, number, None, 0, 0, Batch(shard, "1-0", 1, item=number + 1), attempt)]
        for number, attempt in enumerate(tries)
    ]
    runners.deliver(shard, batches)
    lists = []
    while runners._waiting[shard]:
        lists.append([message.attempt for batch in runners._take(shard) for message in batch])
    assert lists == [[2, 2, 3], [4], [4], [2, 1]]


async def test_a_retry_belongs_to_its_group_alone(cluster: LocalCluster, queue_name: str) -> None:
    seen: dict[str, list[int]] = defaultdict(list)

    def make(group: str, *, fails: bool) -> shardq.Worker:
        worker = shardq.Worker(queue_name, group=group, retry=FAST)

        @worker.handler
        async def handle(message: shardq.Message) -> None:
            seen[group].append(message.attempt)
            if fails and message.attempt < 3:
                raise ValueError("no")

        return worker

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer, anyio.create_task_group() as tasks:
            workers = [make("fails", fails=True), make("works", fails=False)]
            for worker in workers:
                tasks.start_soon(worker.run, client)
            await producer.send("message", key="k")
            await until(lambda: len(seen["fails"]) == 3 and len(seen["works"]) >= 1, 20, "three tries")
            for worker in workers:
                worker.stop()
        assert seen == {"fails": [1, 2, 3], "works": [1]}


async def test_what_a_handler_did_to_a_value_is_not_seen_by_the_next_try(
    cluster: LocalCluster, queue_name: str
) -> None:
    seen: list[Any] = []
    worker = shardq.Worker(queue_name, group=GROUP, retry=FAST)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        seen.append(dict(message.value))
        message.value["changed"] = object()
        raise ValueError("no")

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            await producer.send({"n": 1}, key=b"\xff", headers={"trace": "x"})
        async with running(client, worker):
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert seen == [{"n": 1}] * 3
        (letter,) = await letters(queue)
        assert (letter.value, letter.key, letter.headers) == ({"n": 1}, b"\xff", {"trace": "x"})


async def test_replay_hands_dead_letters_back_once_in_order_and_purge_forgets_them(
    cluster: LocalCluster, queue_name: str
) -> None:
    broken, seen = True, []
    worker = shardq.Worker(queue_name, group=GROUP, retry=shardq.Retry(attempts=1))

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        if broken:
            raise ValueError(f"no {message.value}")
        seen.append(message.value)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        async with queue.producer() as producer:
            for number in range(12):
                await producer.send(number, key=f"k{number % 2}")
            async with running(client, worker):
                await until(lambda: drained(queue), 20, "an empty backlog")
                found = await letters(queue)
                assert len(found) == 12
                broken = False
                dead = queue.dead_letters(GROUP)
                assert await dead.purge(error="no 11") == 1
                assert await dead.replay(key="k0") == 6
                ids = [letter.id for letter in found if letter.key == "k1" and letter.value != 11]
                assert await dead.replay(ids) == 5
                assert await dead.replay(ids) == 0, "safe to repeat"
                await until(lambda: drained(queue), 20, "an empty backlog")
        assert [number for number in seen if number % 2 == 0] == [0, 2, 4, 6, 8, 10]
        assert [number for number in seen if number % 2 == 1] == [1, 3, 5, 7, 9]
        assert await letters(queue) == []
        await check_equation(queue)
        with pytest.raises(shardq.UsageError, match="not both"):
            await dead.replay(["0/1-0"], key="k0")
        with pytest.raises(shardq.UsageError, match="id of a dead letter"):
            await dead.get("nonsense")
        with pytest.raises(shardq.UnknownGroup):
            await queue.dead_letters("nobody").replay()


async def test_workers_that_stop_in_good_order_make_nobody_a_suspect(cluster: LocalCluster, queue_name: str) -> None:
    handled = 0
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        async with queue.producer() as producer:
            await producer.send_many((f"k{number % 50}", number) for number in range(5000))
        for _ in range(6):
            worker = shardq.Worker(queue_name, group=GROUP, concurrency=4)

            @worker.handler
            async def handle(message: shardq.Message) -> None:
                nonlocal handled
                handled += 1
                await anyio.sleep(0.001)

            async with running(client, worker):
                more = handled + 60
                await until(lambda more=more: handled >= more, 20, "some more")
            for shard in (await queue.counters()).values():
                assert shard.groups[GROUP].waiting == 0, "nothing was set aside"


async def test_a_dead_letter_that_can_not_be_read_stays_and_says_so(cluster: LocalCluster, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group=GROUP)

    @worker.handler
    async def handle(message: shardq.Message) -> None: ...

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        await queue.open_group(GROUP)
        keys = queue.shards[0]
        bad = b"\x01\x00\x00\x03" + msgspec.msgpack.encode(["not", "a", "batch"])
        await client.pipes.command(keys.slot, pack_command("XADD", keys.stream, "*", "at", "0", "batch", bad))
        async with running(client, worker):
            dead = queue.dead_letters(GROUP)

            async def buried() -> bool:
                return len(await letters(queue)) == 1

            await until(buried, 20, "the dead letter")
            with pytest.raises(shardq.CorruptData, match="stay"):
                await dead.replay()
        (letter,) = await letters(queue)
        assert (letter.messages, letter.raw) == (3, bad)
