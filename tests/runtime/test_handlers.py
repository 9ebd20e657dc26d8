"""Handlers of every shape: plain functions, middleware, hooks, types, time limits. On a real server."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import pytest

import shardq
from shardq.ops.local_cluster import LocalCluster
from tests.runtime.harness import GROUP, check_equation, drained, running, until

pytestmark = pytest.mark.anyio


class Order(msgspec.Struct):
    sku: str
    amount: int


async def test_a_plain_function_runs_in_threads_one_message_a_key(cluster: LocalCluster, queue_name: str) -> None:
    main, seen, running_keys, overlaps = threading.get_ident(), [], set(), []
    worker = shardq.Worker(queue_name, group=GROUP, concurrency=4, retry=shardq.Retry(attempts=2, base=0.05))

    @worker.handler
    def handle(message: shardq.Message) -> None:
        if message.key in running_keys:
            overlaps.append(message.key)
        running_keys.add(message.key)
        time.sleep(0.002)
        running_keys.discard(message.key)
        assert threading.get_ident() != main
        if message.value == 7 and message.attempt == 1:
            raise ValueError("no")
        seen.append((message.key, message.value))

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        async with queue.producer() as producer:
            await producer.send_many((f"k{number % 5}", number) for number in range(100))
        async with running(client, worker):
            await until(lambda: drained(queue), 30, "an empty backlog")
        assert overlaps == []
        for key in range(5):
            values = [value for name, value in seen if name == f"k{key}"]
            assert values == [number for number in range(100) if number % 5 == key]
        await check_equation(queue)


async def test_a_plain_function_that_takes_too_long_has_failed(cluster: LocalCluster, queue_name: str) -> None:
    tries: list[int] = []
    worker = shardq.Worker(queue_name, group=GROUP, timeout=0.1, retry=shardq.Retry(attempts=2, base=0.05))

    @worker.handler
    def handle(message: shardq.Message) -> None:
        tries.append(message.attempt)
        time.sleep(0.3)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            await producer.send("x")
        async with running(client, worker):
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert tries == [1, 2]
        (letter,) = [letter async for letter in queue.dead_letters(GROUP)]
        assert "timeout of 0.1 s" in letter.error


async def test_a_plain_batch_function_and_one_that_comes_as_a_partial(cluster: LocalCluster, queue_name: str) -> None:
    seen: list[int] = []

    def take(target: list[int], messages: Sequence[shardq.Message]) -> None:
        target.extend(message.value for message in messages)

    worker = shardq.Worker(queue_name, group=GROUP)
    worker.batch_handler(functools.partial(take, seen))
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            await producer.send_many(("k", number) for number in range(300))
        async with running(client, worker):
            await until(lambda: drained(queue), 20, "an empty backlog")
    assert seen == list(range(300))


async def test_hooks_and_middleware_wrap_the_handler_in_order(cluster: LocalCluster, queue_name: str) -> None:
    said: list[str] = []
    worker = shardq.Worker(queue_name, group=GROUP)

    @worker.on_start
    async def start(client: shardq.Client) -> None:
        said.append(f"start {await client.queue_names() != []}")

    @worker.on_stop
    def stop(client: shardq.Client) -> None:
        said.append("stop")

    @worker.middleware
    async def outer(message: shardq.Message, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
        said.append("outer in")
        result = await call_next(message)
        said.append(f"outer out {result}")
        return result

    @worker.middleware
    async def inner(message: shardq.Message, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
        said.append("inner")
        return await call_next(message)

    @worker.handler
    async def handle(message: shardq.Message) -> str:
        said.append("handler")
        return "result"

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            await producer.send("x")
        async with running(client, worker):
            await until(lambda: drained(queue), 20, "an empty backlog")
    assert said == ["start True", "outer in", "inner", "handler", "outer out result", "stop"]


async def test_a_hook_that_fails_ends_the_worker_before_it_takes_anything(
    cluster: LocalCluster, queue_name: str
) -> None:
    worker = shardq.Worker(queue_name, group=GROUP)

    @worker.on_start
    async def start(client: shardq.Client) -> None:
        raise RuntimeError("no database")

    @worker.handler
    async def handle(message: shardq.Message) -> None: ...

    async with shardq.connect(cluster.url) as client:
        await client.queue(queue_name, shards=1)
        with pytest.raises(RuntimeError, match="no database"):
            await worker.run(client)


async def test_values_have_their_type_and_what_does_not_fit_is_a_dead_letter(
    cluster: LocalCluster, queue_name: str
) -> None:
    seen: list[Order] = []
    worker = shardq.Worker(queue_name, group=GROUP, type=Order)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        assert isinstance(message.value, Order)
        seen.append(message.value)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            await producer.send(Order("a", 1), key="k")
            await producer.send({"sku": "b", "amount": "many"}, key="k")
            await producer.send({"sku": "c", "amount": 3}, key="k")
        async with running(client, worker):
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert seen == [Order("a", 1), Order("c", 3)]
        (letter,) = [letter async for letter in queue.dead_letters(GROUP)]
        assert letter.value == {"sku": "b", "amount": "many"}
        assert letter.attempts == 1
        assert "amount" in letter.error


async def test_what_is_no_handler_no_hook_and_no_middleware() -> None:
    worker = shardq.Worker("q", group=GROUP)
    with pytest.raises(shardq.UsageError, match="async function"):
        worker.middleware(lambda message, call_next: None)
    with pytest.raises(shardq.UsageError, match="2 arguments"):
        worker.middleware(lambda message: None)
    with pytest.raises(shardq.UsageError, match="1 arguments"):
        worker.on_start(lambda: None)
    bad: list[dict[str, Any]] = [
        {"timeout": 0},
        {"ordering": "lifo"},
        {"retry": 3},
        {"retry": shardq},
        {"timeout": -1.0},
    ]
    for wrong in bad:
        with pytest.raises(shardq.UsageError):
            shardq.Worker("q", group=GROUP, **wrong)
