"""`message.atomic()`: writes with the acknowledgement, and what is refused. Crashes are in test_crashes.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import anyio
import pytest

import shardq
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.commands import pack_command
from tests.runtime.harness import GROUP, check_equation, drained, running, until

pytestmark = pytest.mark.anyio

ONCE = shardq.Retry(attempts=1)


async def read(queue: shardq.Queue, command: str, name: str, key: str, *args: str | int) -> Any:
    packed = pack_command(command, queue.local_key(name, key), *args)
    return await queue.client.pipes.command(queue.place_of(key).slot, packed)


async def test_every_kind_of_write_is_there_once_the_message_is_finished(
    cluster: LocalCluster, queue_name: str
) -> None:
    worker = shardq.Worker(queue_name, group=GROUP)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        own = message.local_key
        async with message.atomic() as tx:
            tx.set(own("text"), "ä", ttl=100)
            tx.incrby(own("count"), -3)
            tx.incrbyfloat(own("float"), 1.5)
            tx.append(own("log"), b"\xff")
            tx.hset(own("hash"), {"a": 1, "b": "x"})
            tx.hdel(own("hash"), "b")
            tx.hincrby(own("hash"), "n", 7)
            tx.hincrbyfloat(own("hash"), "f", 0.5)
            tx.sadd(own("set"), "a", "b")
            tx.srem(own("set"), "a")
            tx.zadd(own("zset"), {"m": 2, "n": 3})
            tx.zincrby(own("zset"), 1, "m")
            tx.zrem(own("zset"), "n")
            tx.lpush(own("list"), "x")
            tx.rpush(own("list"), "y", "z")
            tx.set(own("gone"), 1)
            tx.delete(own("gone"))
            tx.expire(own("list"), 1000)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        async with queue.producer() as producer:
            await producer.send("x", key="k")
        async with running(client, worker):
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert await read(queue, "GET", "text", "k") == "ä".encode()
        assert 90_000 < await read(queue, "PTTL", "text", "k") <= 100_000
        assert await read(queue, "GET", "count", "k") == b"-3"
        assert await read(queue, "GET", "float", "k") == b"1.5"
        assert await read(queue, "GET", "log", "k") == b"\xff"
        flat = await read(queue, "HGETALL", "hash", "k")
        assert dict(zip(flat[::2], flat[1::2], strict=True)) == {b"a": b"1", b"n": b"7", b"f": b"0.5"}
        assert await read(queue, "SMEMBERS", "set", "k") == [b"b"]
        assert await read(queue, "ZRANGE", "zset", "k", 0, -1, "WITHSCORES") == [b"m", b"3"]
        assert await read(queue, "LRANGE", "list", "k", 0, -1) == [b"x", b"y", b"z"]
        assert await read(queue, "EXISTS", "gone", "k") == 0
        assert await read(queue, "PTTL", "list", "k") > 900_000


async def test_a_handler_that_fails_leaves_no_effect_and_one_that_works_at_last_leaves_one(
    cluster: LocalCluster, queue_name: str
) -> None:
    worker = shardq.Worker(queue_name, group=GROUP, retry=shardq.Retry(attempts=3, base=0.05))

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        async with message.atomic() as tx:
            tx.incrby(message.local_key("tries"), 1)
        if message.attempt < 3 or message.value == "dead":
            raise ValueError("no")

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            await producer.send("works at last", key="k")
            await producer.send("dead", key="k")
        async with running(client, worker):
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert await read(queue, "GET", "tries", "k") == b"1"


async def test_a_plain_function_has_effects_too(cluster: LocalCluster, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group=GROUP, retry=shardq.Retry(attempts=2, base=0.05))

    @worker.handler
    def handle(message: shardq.Message) -> None:
        with message.atomic() as tx:
            tx.incrby(message.local_key("total"), message.value)
        if message.attempt == 1:
            raise ValueError("no")

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            await producer.send_many((f"k{number}", number) for number in range(100))
        async with running(client, worker):
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert int(await read(queue, "GET", "total", "k")) == sum(range(100))


async def test_a_batch_handler_has_effects_too(cluster: LocalCluster, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group=GROUP)

    @worker.batch_handler
    async def handle(messages: Sequence[shardq.Message]) -> None:
        for message in messages:
            async with message.atomic() as tx:
                tx.incrby(message.local_key("total"), message.value)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            await producer.send_many((f"k{number % 7}", number) for number in range(2000))
        async with running(client, worker):
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert int(await read(queue, "GET", "total", "k")) == sum(range(2000))
        await check_equation(queue)


async def test_an_effect_that_redis_refuses_makes_its_message_a_dead_letter_and_undoes_the_rest_of_it(
    cluster: LocalCluster, queue_name: str
) -> None:
    worker = shardq.Worker(queue_name, group=GROUP)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        async with message.atomic() as tx:
            tx.incrby(message.local_key("total"), 1)
            if message.value == "bad":
                tx.sadd(message.local_key("total"), "not a set")

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            for value in ("a", "b", "bad", "c", "bad", "d"):
                await producer.send(value, key=value)
        async with running(client, worker):
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert await read(queue, "GET", "total", "k") == b"4"
        letters = [letter async for letter in queue.dead_letters(GROUP)]
        assert [letter.value for letter in letters] == ["bad", "bad"]
        assert "WRONGTYPE" in letters[0].error
        await check_equation(queue)


async def test_what_is_refused_before_anything_runs(cluster: LocalCluster, queue_name: str) -> None:
    errors: list[str] = []
    worker = shardq.Worker(queue_name, group=GROUP, retry=ONCE)
    others: list[shardq.Queue] = []

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        async with message.atomic() as tx:
            attempts: list[Callable[[], None]] = [
                lambda: tx.incrby("elsewhere", 1),
                lambda: tx.incrby(message.local_key("x"), 2**63),
                lambda: tx.set(message.local_key("x"), True),
                lambda: tx.sadd(message.local_key("x")),
                lambda: tx.send(others[0], 1, key=message.key),
                lambda: tx.send(others[1], object(), key=message.key),
            ]
            for try_it in attempts:
                with pytest.raises(shardq.UsageError) as raised:
                    try_it()
                errors.append(str(raised.value))
        with pytest.raises(shardq.UsageError, match="inside"):
            tx.incrby(message.local_key("x"), 1)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=4)
        others.append(await client.queue(f"{queue_name}-other", shards=3))
        others.append(await client.queue(f"{queue_name}-same", shards=4))
        async with queue.producer() as producer:
            await producer.send(1, key="key-2")
        async with running(client, worker):
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert [letter async for letter in queue.dead_letters(GROUP)] == []
        assert "local_key" in errors[0]
        assert "64 bits" in errors[1]
        assert "bool" in errors[2]
        assert "nothing" in errors[3]
        assert "equal shards" in errors[4]
        assert "can't be carried" in errors[5]
        assert await read(queue, "EXISTS", "x", "key-2") == 0


async def test_a_full_queue_that_is_sent_to_makes_the_sender_wait_and_nothing_is_lost(
    cluster: LocalCluster, queue_name: str
) -> None:
    worker = shardq.Worker(queue_name, group=GROUP)
    targets: list[shardq.Queue] = []

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        async with message.atomic() as tx:
            tx.incrby(message.local_key("total"), 1)
            tx.send(targets[0], message.value, key=message.key)

    sink = shardq.Worker(f"{queue_name}-small", group=GROUP)
    got: list[int] = []

    @sink.handler
    async def take(message: shardq.Message) -> None:
        got.append(message.value)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        targets.append(await client.queue(f"{queue_name}-small", shards=1, max_backlog=10))
        await targets[0].open_group(GROUP)
        async with targets[0].producer() as filler:
            for number in range(-10, 0):
                await filler.send(number, key="k")
        async with queue.producer() as producer:
            await producer.send_many(("k", number) for number in range(100))
        async with running(client, worker):
            taken = queue.shards[0].group(GROUP)

            async def delivered() -> bool:
                got_so_far = await client.pipes.command(queue.shards[0].slot, pack_command("HGET", taken, "delivered"))
                return bool(got_so_far == b"100")

            await until(delivered, 20, "all to be handled")
            await anyio.sleep(0.5)
            assert (await targets[0].counters())[0].appended == 10
            assert await read(queue, "GET", "total", "k") is None
            async with running(client, sink):
                await until(lambda: drained(queue), 30, "an empty backlog")
                await until(lambda: drained(targets[0]), 20, "an empty backlog behind it")
        assert got == list(range(-10, 100))
        assert await read(queue, "GET", "total", "k") == b"100"
