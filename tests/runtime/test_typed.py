"""Typed queues on real clusters: what a producer takes and refuses, where keys come from, what handlers are given."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import msgspec
import pytest

import shardq
from shardq.core import records
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.commands import pack_command

pytestmark = pytest.mark.anyio


class Order(msgspec.Struct):
    order_id: str
    amount: int = 0


ORDERS = [Order("a", 1), Order("b", 2), Order("a", 3)]


def id_of(order: Order) -> str:
    return order.order_id


async def stored(queue: shardq.Queue) -> list[tuple[Any, Any]]:
    """Every (key, value) that was stored, in the order of the keys."""
    found: list[tuple[Any, Any]] = []
    for keys in queue.shards.values():
        entries = await queue.client.pipes.command(keys.slot, pack_command("XRANGE", keys.stream, "-", "+"))
        for _, fields in entries:
            batch = records.decode(fields[3])
            found += zip(batch.keys, batch.values, strict=True)
    return sorted(found, key=lambda pair: repr(pair[0]))


def carried(*orders: Order) -> list[tuple[str, Any]]:
    found = [(order.order_id, msgspec.to_builtins(order)) for order in orders]
    return sorted(found, key=lambda pair: repr(pair[0]))


async def test_values_bring_their_keys(cluster: LocalCluster, queue_name: str) -> None:
    async def source() -> AsyncIterator[Order]:
        yield Order("e")
        yield Order("f")

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=3, type=Order, key="order_id")
        async with queue.producer() as producer:
            await producer.send(Order("c"))
            await producer.send(Order("d"), key="mine")
            assert await producer.send_many([Order("a"), Order("b")]) == 2
            assert await producer.send_many(source()) == 2
        found = await stored(queue)
        assert [key for key, _ in found] == ["a", "b", "c", "e", "f", "mine"]
        assert found[-1][1] == {"order_id": "d", "amount": 0}


async def test_values_of_another_type_are_refused(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=3, type=Order, key="order_id")
        async with queue.producer() as producer:
            with pytest.raises(shardq.InvalidValue, match="type dict is no Order"):
                await producer.send({"order_id": "a"})
            with pytest.raises(shardq.InvalidValue, match="type dict is no Order"):
                await producer.submit({"order_id": "a"})
            with pytest.raises(shardq.InvalidValue, match=r"takes values, not \(key, value\) pairs"):
                await producer.send_many([("a", Order("a"))])
            with pytest.raises(shardq.InvalidValue, match="type int is no Order") as caught:
                await producer.send_many([*ORDERS, 5])
            assert "3 messages before it were sent" in "".join(caught.value.__notes__)
        assert await stored(queue) == carried(*ORDERS)


async def test_a_type_without_a_key_takes_pairs(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=3, type=Order)
        async with queue.producer() as producer:
            await producer.send_many((order.order_id, order) for order in ORDERS)
            with pytest.raises(shardq.InvalidValue, match=r"takes \(key, value\) pairs"):
                await producer.send_many(ORDERS)
            with pytest.raises(shardq.InvalidValue, match="type str is no Order"):
                await producer.send_many([("k", "text")])
        assert await stored(queue) == carried(*ORDERS)


async def test_a_key_without_a_type_is_looked_up_in_any_value(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=3, key="order_id")
        async with queue.producer() as producer:
            await producer.send_many([{"order_id": 7}, Order("a")])
            with pytest.raises(shardq.InvalidKey, match="give the key with key="):
                await producer.send({"id": 7})
            await producer.send({"id": 7}, key="mine")
            job = await producer.submit({"order_id": "j"})
        assert [key for key, _ in await stored(queue)] == ["7", "a", "j", "mine"]
        assert job.message_id


async def test_wrong_declarations_are_refused_before_anything_is_stored(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        with pytest.raises(shardq.UsageError, match="Order has no such field"):
            await client.queue(queue_name, shards=3, type=Order, key="id")
        with pytest.raises(shardq.UsageError, match="can't be the type"):
            await client.queue(queue_name, shards=3, type="Order")
        with pytest.raises(shardq.UnknownQueue):
            await client.queue(queue_name)


async def test_the_declaration_is_this_clients_own(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        await client.queue(queue_name, shards=3, type=Order, key="order_id")
        again = await client.queue(queue_name)
        assert again.convert is not None
        assert again.convert({"order_id": "a", "amount": 1}) == Order("a", 1)
        async with again.producer() as producer:
            await producer.send_many(ORDERS)
    async with shardq.connect(cluster.url) as client:
        plain = await client.queue(queue_name)
        assert plain.convert is None
        async with plain.producer() as producer:
            await producer.send({"any": "value"}, key="k")


async def test_handlers_get_values_of_the_type(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1, type=Order, key="order_id")
        async with queue.producer() as producer:
            await producer.send_many(ORDERS)
        worker, got = shardq.Worker(queue_name, group="g", lease=1), []

        @worker.handler
        async def take(message: shardq.Message) -> None:
            got.append(message.value)
            if len(got) == len(ORDERS):
                worker.stop()

        with anyio.fail_after(30):
            await worker.run(client)
        assert sorted(got, key=id_of) == sorted(ORDERS, key=id_of), "those of a key in the order sent"
