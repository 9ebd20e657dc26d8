"""The producer against trouble: lost replies, failover, outages, full buffers, bad input. Each message stored once."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import pytest

import shardq
from shardq.core.ids import MessageId
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.commands import pack_command
from shardq.storage.nodes import node_command
from tests.runtime.harness import Traffic, stored, until
from tests.runtime.proxy import proxied

pytestmark = pytest.mark.anyio


async def check_stored_once(queue: shardq.Queue, traffic: Traffic) -> None:
    """Each acknowledged message is there once, under the id its send returned, in order per key; nothing else is."""
    found = await stored(queue)
    assert [value for value, times in Counter((key, value) for _, key, value in found).items() if times > 1] == []
    ids = {id_ for id_, _, _ in found}
    assert {id_ for of_key in traffic.sent.values() for id_ in of_key} <= ids
    for key in traffic.sent:
        numbers = [value for _, found_key, value in found if found_key == key]
        assert numbers == sorted(numbers)
    counters = await queue.counters([])
    assert sum(shard.appended for shard in counters.values()) == len(found)


async def test_a_lost_reply_stores_each_message_once(server_binary: Path, queue_name: str) -> None:
    with LocalCluster(port=None, server=server_binary) as own:
        async with proxied(own, 0) as proxy, shardq.connect(own.url) as client:
            queue = await client.queue(queue_name, shards=6)
            traffic = Traffic()
            async with queue.producer() as producer, anyio.create_task_group() as tasks:
                tasks.start_soon(traffic.keep_sending, producer, 0.001)
                for _ in range(10):
                    before = proxy.dropped
                    proxy.drop_replies = 1
                    await until(lambda before=before: proxy.dropped > before, 20, "a reply to be dropped")
                traffic.stopped = True
            assert traffic.total > 100
            await check_stored_once(queue, traffic)
            assert proxy.dropped >= 10


async def test_failover_under_load_loses_nothing_that_was_acknowledged(server_binary: Path, queue_name: str) -> None:
    with LocalCluster(replicas=1, port=None, server=server_binary) as own:
        async with shardq.connect(own.url) as client:
            queue = await client.queue(queue_name, shards=6)
            traffic = Traffic()
            async with queue.producer() as producer, anyio.create_task_group() as tasks:
                assert producer.confirm is not None, "replicas are there, so they are waited for by default"
                tasks.start_soon(traffic.keep_sending, producer)
                await until(lambda: traffic.total > 500, 20, "traffic")
                victim = own.processes[0]
                victim.kill()
                await until(lambda: promoted(own, victim.port), 20, "the replica to take over")
                # With one replica each, the promise needs the old master back as the new one's replica.
                await anyio.to_thread.run_sync(victim.restart)
                at_kill = {key: len(ids) for key, ids in traffic.sent.items()}
                await until(
                    lambda: all(len(ids) > at_kill[key] + 5 for key, ids in traffic.sent.items()),
                    40,
                    "every key to go on after the failover",
                )
                traffic.stopped = True
            await check_stored_once(queue, traffic)


def promoted(own: LocalCluster, dead: int) -> bool:
    """Whether every slot has a living master again, by what a surviving node says."""
    alive = next(port for port in own.ports if port != dead)
    return all(dead != int(shard[2][1]) for shard in node_command("127.0.0.1", alive, "CLUSTER", "SLOTS"))


async def test_flush_and_close_say_what_is_not_stored(server_binary: Path, queue_name: str) -> None:
    with LocalCluster(masters=3, port=None, server=server_binary) as own:
        async with shardq.connect(own.url) as client:
            queue = await client.queue(queue_name, shards=3)
            async with queue.producer(delivery_timeout=1.0) as producer:
                assert await producer.send_many((f"k{i}", b"x") for i in range(100)) == 100
                for server in own.processes:
                    server.kill()
                with pytest.raises(shardq.NotStored, match=r"messages of shards .* are not") as caught:
                    await producer.send_many((f"k{i}", b"y") for i in range(100))
                assert caught.value.failed == 100
                assert isinstance(caught.value.__cause__, shardq.StoreError)
                with pytest.raises(shardq.StoreError):
                    await producer.send(b"z", key="k")
                with anyio.move_on_after(0):
                    await producer.send(b"cancelled", key="k")
                with pytest.raises(shardq.NotStored, match="1 messages"):
                    await producer.close()


async def test_every_sender_hears_of_its_own_failures(cluster: LocalCluster, queue_name: str) -> None:
    """Senders side by side, and a send in the same batch: none of them takes another's bad news away."""
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        keys = queue.shards[0]
        await client.pipes.command(keys.slot, pack_command("DEL", keys.stream, keys.meta))
        outcomes: list[str] = []

        async def many(producer: shardq.Producer) -> None:
            try:
                await producer.send_many([("k", b"x")] * 10)
                outcomes.append("stored")
            except shardq.NotStored as error:
                outcomes.append(f"lost {error.failed >= 10}")

        async def one(producer: shardq.Producer) -> None:
            with pytest.raises(shardq.UnknownQueue, match=r"client\.queue"):
                await producer.send(b"y", key="k")
            outcomes.append("told")

        async with queue.producer() as producer, anyio.create_task_group() as tasks:
            for task in (many, one, many):
                tasks.start_soon(task, producer)
        assert sorted(outcomes) == ["lost True", "lost True", "told"]


async def test_a_closed_producer_leaves_nobody_waiting(server_binary: Path, queue_name: str) -> None:
    ends: list[str] = []

    async def send(producer: shardq.Producer) -> None:
        try:
            await producer.send(b"x" * 1000, key="k")
        except shardq.ShardqError as error:
            ends.append(type(error).__name__)

    with LocalCluster(port=None, server=server_binary) as own:
        async with shardq.connect(own.url) as client:
            queue = await client.queue(queue_name, shards=1)
            async with anyio.create_task_group() as tasks:
                producer = queue.producer(max_buffered_bytes=1500)

                async def program() -> None:
                    async with producer:
                        for server in own.processes:
                            server.kill()
                        for _ in range(5):
                            tasks.start_soon(send, producer)
                        await until(lambda: producer.buffered_bytes > 1500, 10, "a full buffer")
                        raise KeyError("the program's own")

                with pytest.raises(KeyError, match="the program's own"):
                    await program()
                await until(lambda: len(ends) == 5, 10, "every send to end")
    assert set(ends) == {"StoreTimeout", "ClosedError"}


async def test_memory_stays_bounded_while_the_store_is_away(server_binary: Path, queue_name: str) -> None:
    with LocalCluster(masters=3, port=None, server=server_binary) as own:
        async with shardq.connect(own.url) as client:
            queue = await client.queue(queue_name, shards=3)
            limit = 64 * 1024
            async with queue.producer(max_buffered_bytes=limit) as producer:
                count = 0

                def endless() -> Any:
                    nonlocal count
                    for count in range(20_000):
                        yield f"k{count}", b"x" * 100

                async with anyio.create_task_group() as tasks:
                    pauses = [int(server.pid) for server in own.processes]
                    for pid in pauses:
                        _signal(pid, "STOP")
                    tasks.start_soon(producer.send_many, endless())
                    await until(lambda: producer.buffered_bytes > limit, 10, "a full buffer")
                    taken = count
                    with anyio.move_on_after(0.5):
                        await producer.send(b"waits", key="k")
                        pytest.fail("a send went past the limit")
                    assert count == taken, "nothing more is taken while the buffer is full"
                    assert producer.buffered_bytes < limit + 2 * 1024 * 1024
                    for pid in pauses:
                        _signal(pid, "CONT")
                assert producer.buffered_bytes == 0
            assert sum(shard.appended for shard in (await queue.counters([])).values()) == 20_000


def _signal(pid: int, name: str) -> None:
    import os
    import signal

    os.kill(pid, getattr(signal, f"SIG{name}"))


async def test_a_producer_that_is_left_says_by_what(
    cluster: LocalCluster, queue_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        with anyio.CancelScope() as scope:
            async with queue.producer() as producer:
                scope.cancel()
                await producer.send(1, key="k")
    assert scope.cancelled_caught
    assert "producer left by CancelledError with 1 messages not known to be stored" in caplog.text


async def test_cancelled_sends_leave_the_producer_whole(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=6)
        chance = random.Random(7)
        returned: list[tuple[str, int]] = []
        async with queue.producer() as producer:
            for number in range(2000):
                with anyio.move_on_after(chance.uniform(0, 0.001)):
                    returned.append((await producer.send(number, key=f"k{number % 7}"), number))
            await producer.flush()
        found = {id_: value for id_, _, value in await stored(queue)}
        assert [pair for pair in returned if found.get(pair[0]) != pair[1]] == []
        assert len(set(found.values())) == len(found), "no cancelled send is stored twice"


@pytest.mark.parametrize(
    ("key", "value", "error", "text"),
    [
        (17, b"x", shardq.InvalidKey, "str"),
        (type("UserId", (str,), {})("u"), b"x", shardq.InvalidKey, "convert"),
        ("k", object(), shardq.InvalidValue, "object"),
        ("k", 2**70, shardq.InvalidValue, "can't be carried"),
        ("k", "\ud800", shardq.InvalidValue, "surrogates"),
        ("\ud800", b"x", shardq.InvalidKey, "bytes"),
        ("k", b"x" * 2_000_000, shardq.MessageTooLarge, "max_message_bytes"),
    ],
    ids=[
        "int key",
        "key of a str subclass",
        "object value",
        "huge int",
        "surrogate value",
        "surrogate key",
        "too large",
    ],
)
async def test_bad_messages_are_refused_and_nothing_else_is_lost(
    cluster: LocalCluster, queue_name: str, key: Any, value: Any, error: type[Exception], text: str
) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        async with queue.producer() as producer:
            with pytest.raises(error, match=text):
                await producer.send(value, key=key)
            pairs = [("a", b"1"), ("b", b"2"), (key, value), ("c", b"3")]
            with pytest.raises(error, match=text) as caught:
                await producer.send_many(pairs)
            assert "2 messages before it were sent" in "".join(caught.value.__notes__)
            await producer.send(b"after", key="a")
        assert sorted(value for _, _, value in await stored(queue)) == [b"1", b"2", b"after"]


async def test_bad_settings_and_uses_have_their_errors(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        with pytest.raises(shardq.UnknownQueue, match="shards=N"):
            await client.queue(queue_name)
        with pytest.raises(shardq.UsageError, match="valid"):
            await client.queue("no spaces", shards=1)
        queue = await client.queue(queue_name, shards=4)
        with pytest.raises(shardq.QueueMismatch, match="has 4 shards"):
            await client.queue(queue_name, shards=5)
        with pytest.raises(shardq.UsageError, match="replicas"):
            queue.producer(durability="replica")
        with pytest.raises(shardq.UsageError, match="above 0"):
            queue.producer(max_batch_bytes=0)
        with pytest.raises(shardq.UsageError, match="at most 1800"):
            queue.producer(delivery_timeout=4000)
        producer = queue.producer()
        with pytest.raises(shardq.ClosedError, match="async with"):
            await producer.send(b"x")
        async with producer:
            await producer.send(b"x")
        with pytest.raises(shardq.ClosedError, match="async with"):
            await producer.send(b"x")
        with pytest.raises(shardq.ClosedError, match="async with"), anyio.fail_after(30):
            await producer.send_many([("k", b"x")])
    with pytest.raises(shardq.ClosedError, match="async with"):
        await client.queue(queue_name)


async def test_async_iterables_headers_and_every_value_kind_arrive(cluster: LocalCluster, queue_name: str) -> None:
    async def pairs() -> Any:
        yield "k", {"sku": 7, "tags": ["a", b"b"], "price": 1.5, "none": None}
        yield b"k", "text"
        yield None, b"bytes"

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=3)
        async with queue.producer(max_batch_messages=2) as producer:
            assert await producer.send_many(pairs()) == 3
            id_ = await producer.send(1, key="k", headers={"trace": "x", "raw": b"\x00"})
        values = [value for _, _, value in await stored(queue)]
        assert sorted(map(str, values)) == sorted(
            map(str, [{"sku": 7, "tags": ["a", b"b"], "price": 1.5, "none": None}, "text", b"bytes", 1])
        )
        assert MessageId.parse(id_).shard in queue.shards
