"""What a handler sees: order, retries, dead letters, broken and foreign entries, lists, a lease not renewed."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest

import shardq
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime.serving import Serving
from shardq.storage import calls
from shardq.storage.commands import pack_command
from tests.runtime.harness import backlog, check_equation, drained, running, until
from tests.runtime.proxy import proxied

pytestmark = pytest.mark.anyio

GROUP = "g"
FAST = shardq.Retry(base=0.05, factor=1.5)


async def dead_letters(queue: shardq.Queue) -> list[dict[str, Any]]:
    found = []
    for keys in queue.shards.values():
        entries = await queue.client.pipes.command(keys.slot, pack_command("XRANGE", keys.dead(GROUP), "-", "+"))
        found += [msgspec.msgpack.decode(fields[3]) for _, fields in entries]
    return found


async def total(queue: shardq.Queue, name: str) -> int:
    return sum(getattr(shard.groups[GROUP], name) for shard in (await queue.counters([GROUP])).values())


async def test_a_failing_message_is_tried_again_five_times_and_kept(cluster: LocalCluster, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group=GROUP, retry=FAST)
    seen: dict[Any, list[Any]] = defaultdict(list)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        seen[message.key].append((message.value, message.attempt))
        if message.value == "poison" or (message.value == "flaky" and message.attempt < 3):
            raise ValueError(f"no luck with {message.value}")

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            poison = await producer.send("poison", key="a", headers={"trace": "t1"})
            for key, value in (("a", "after"), ("b", "flaky"), ("b", "last"), ("c", "fine")):
                await producer.send(value, key=key)
        async with running(client, worker):
            await until(lambda: drained(queue), 30, "an empty backlog")
        assert seen["a"] == [*[("poison", attempt) for attempt in range(1, 7)], ("after", 1)]
        assert seen["b"] == [("flaky", 1), ("flaky", 2), ("flaky", 3), ("last", 1)]
        (letter,) = await dead_letters(queue)
        assert letter["id"] == poison
        assert (letter["key"], letter["value"], letter["headers"]) == ("a", "poison", {"trace": "t1"})
        assert letter["attempts"] == 6
        assert "no luck with poison" in letter["error"]
        assert "handle" in letter["traceback"]
        assert await total(queue, "dead") == 1
        assert await total(queue, "acked") == 4
        assert await total(queue, "retried") == 7
        await check_equation(queue)


async def test_handlers_begin_before_the_shards_own_loop_goes_on(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, happened, note = shardq.Worker(queue_name, group=GROUP), [], Serving._note

    def noted(self: Serving, stepped: calls.Stepped, limit: int) -> None:
        if stepped.fetched.entries:
            happened.append("the loop")
        note(self, stepped, limit)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        happened.append(message.value)

    monkeypatch.setattr(Serving, "_note", noted)
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        await queue.open_group(GROUP)
        async with running(client, worker), queue.producer() as producer:
            for value in range(5):
                await producer.send(value)
                await until(lambda value=value: value in happened and happened[-1] == "the loop", 30, "the handler")
    assert happened == [what for value in range(5) for what in (value, "the loop")]


async def test_failures_that_can_not_be_described_become_dead_letters_too(
    cluster: LocalCluster, queue_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "shardq")  # what is logged of them no report can carry
    worker = shardq.Worker(queue_name, group=GROUP, retry=FAST)

    class Unspeakable(Exception):
        def __repr__(self) -> str:
            raise RuntimeError("no words")

        __str__ = __repr__

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        if message.key == "mutated":
            message.value["handle"] = object()
        raise Unspeakable if message.key == "unspeakable" else ValueError("\ud800")

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            for key in ("mutated", "unspeakable", "surrogate"):
                await producer.send({"n": 1}, key=key)
        async with running(client, worker):
            await until(lambda: drained(queue), 30, "an empty backlog")
        assert sorted(letter["key"] for letter in await dead_letters(queue)) == ["mutated", "surrogate", "unspeakable"]
        await check_equation(queue)


async def test_a_queue_declared_anew_is_consumed_again(cluster: LocalCluster, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group=GROUP, retry=FAST, lease=0.6)
    values: list[Any] = []

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        values.append(message.value)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        await queue.open_group(GROUP)
        async with running(client, worker):
            await until(lambda: every_lease_held(queue), 20, "the lease")
            keys = queue.shards[0]
            names = [keys.stream, keys.meta, keys.group(GROUP), keys.dead(GROUP)]
            await client.pipes.command(keys.slot, pack_command("DEL", *names))
            queue = await client.queue(queue_name, shards=1)
            async with queue.producer() as producer:
                await producer.send("again", key="k")
            await until(lambda: values == ["again"], 30, "the message of the new queue")


async def test_garbage_is_set_aside_and_foreign_entries_are_delivered(cluster: LocalCluster, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group=GROUP, retry=FAST)
    values: list[Any] = []

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        values.append(message.value)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        await queue.open_group(GROUP)
        keys = queue.shards[0]

        async def xadd(*fields: str | bytes) -> None:
            await client.pipes.command(keys.slot, pack_command("XADD", keys.stream, "*", *fields))

        async with queue.producer() as producer:
            await producer.send("before", key="a")
            await xadd("at", "1", "batch", b"\xff\x00garbage")
            await xadd("at", "1", "batch", b"\x01\x00\x00\x01not msgpack")
            await xadd("user", "42", b"\xff\xfe", b"\x00\x01")
            await producer.send("after", key="a")
        async with running(client, worker):
            await until(lambda: len(values) == 3, 20, "the sound messages")
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert sorted(map(str, values)) == sorted(["before", "after", str({"user": b"42", b"\xff\xfe": b"\x00\x01"})])
        letters = await dead_letters(queue)
        assert [letter["raw"] for letter in letters] == [b"\xff\x00garbage", b"\x01\x00\x00\x01not msgpack"]
        assert all("record batch" in letter["error"] for letter in letters)


async def test_batch_handlers_get_lists_in_order_and_a_failing_list_is_retried(
    cluster: LocalCluster, queue_name: str
) -> None:
    worker = shardq.Worker(queue_name, group=GROUP, retry=FAST)
    seen: dict[Any, list[Any]] = defaultdict(list)
    failures = 0

    @worker.batch_handler
    async def handle(messages: Sequence[shardq.Message]) -> None:
        nonlocal failures
        assert len({message.shard for message in messages}) == 1
        if failures < 2:
            failures += 1
            raise RuntimeError("not yet")
        await anyio.lowlevel.checkpoint()
        for message in messages:
            seen[message.key].append(message.value)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=4)
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            await producer.send_many((f"k{number % 50}", number) for number in range(20_000))
        async with running(client, worker):
            await until(lambda: drained(queue), 30, "an empty backlog")
        assert sum(map(len, seen.values())) == 20_000
        assert all(numbers == sorted(numbers) for numbers in seen.values())
        await check_equation(queue)


async def test_keys_run_side_by_side_and_each_one_in_order(cluster: LocalCluster, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group=GROUP, retry=FAST, concurrency=8)
    running_now: set[Any] = set()
    seen: dict[Any, list[Any]] = defaultdict(list)
    most = 0

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        nonlocal most
        assert message.key not in running_now, "two messages of one key at a time"
        running_now.add(message.key)
        most = max(most, len(running_now))
        await anyio.sleep(0.001)
        running_now.discard(message.key)
        seen[message.key].append(message.value)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            await producer.send_many((f"k{number % 20}", number) for number in range(2000))
        async with running(client, worker):
            await until(lambda: drained(queue), 30, "an empty backlog")
        assert most == 8, "as many keys at a time as the concurrency allows, in one shard"
        assert all(numbers == sorted(numbers) for numbers in seen.values())


async def test_lost_replies_to_commits_repeat_nothing(server_binary: Any, queue_name: str) -> None:
    """Cuts the worker's connection behind the server's back: each step is applied once however often it is sent."""
    worker = shardq.Worker(queue_name, group=GROUP, retry=FAST)
    handled: dict[str, int] = defaultdict(int)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        await anyio.sleep(0.001)
        handled[message.id] += 1

    with LocalCluster(port=None, server=server_binary) as own:
        async with proxied(own, 0) as proxy, shardq.connect(own.url) as client:
            queue = await client.queue(queue_name, shards=6)
            await queue.open_group(GROUP)
            async with queue.producer() as producer:
                await producer.send_many((f"k{number % 100}", number) for number in range(20_000))
            async with running(client, worker):
                for _ in range(15):
                    before = proxy.dropped
                    proxy.drop_replies = 1
                    await until(lambda before=before: proxy.dropped > before, 20, "a reply to be dropped")
                await until(lambda: drained(queue), 60, "an empty backlog")
            assert len(handled) == 20_000
            assert {id_ for id_, times in handled.items() if times > 1} == set()
            assert await total(queue, "acked") == 20_000
            await check_equation(queue)


async def test_a_worker_that_can_not_renew_stops_its_handlers(server_binary: Any, queue_name: str) -> None:
    """With its node out of reach a worker's own clock ends its trust: handlers stop, and go on when it is back."""
    worker = shardq.Worker(queue_name, group=GROUP, retry=FAST, lease=1.5)
    begun, cancelled = anyio.Event(), anyio.Event()
    finished: list[Any] = []

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        begun.set()
        try:
            await anyio.sleep(0.2 if cancelled.is_set() else 30)
        except anyio.get_cancelled_exc_class():
            cancelled.set()
            raise
        finished.append(message.value)

    with LocalCluster(port=None, server=server_binary) as own:
        async with shardq.connect(own.url) as client:
            queue = await client.queue(queue_name, shards=1)
            await queue.open_group(GROUP)
            async with queue.producer() as producer:
                await producer.send("long", key="a")
            async with running(client, worker):
                await until(begun.is_set, 10, "the handler to begin")
                for server in own.processes:
                    os.kill(int(server.pid), signal.SIGSTOP)
                await until(cancelled.is_set, 10, "the handler to be stopped")
                for server in own.processes:
                    os.kill(int(server.pid), signal.SIGCONT)
                await until(lambda: drained(queue), 30, "the message to be handled again")
            assert finished == ["long"]
            await check_equation(queue)


async def test_one_list_of_a_shard_at_a_time_also_across_renewals(cluster: LocalCluster, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group=GROUP, retry=FAST, lease=0.6)
    at_work: set[int] = set()
    seen: list[Any] = []

    @worker.batch_handler
    async def handle(messages: Sequence[shardq.Message]) -> None:
        assert messages[0].shard not in at_work, "two lists of one shard at a time"
        at_work.add(messages[0].shard)
        await anyio.sleep(0.25)
        seen.extend(message.value for message in messages)
        at_work.discard(messages[0].shard)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        await queue.open_group(GROUP)
        async with running(client, worker), queue.producer() as producer:
            for number in range(200):
                await producer.send(number, key=f"k{number}")
                await anyio.sleep(0.01)
            await until(lambda: drained(queue), 30, "an empty backlog")
        assert seen == list(range(200))
        assert await total(queue, "retried") == 0
        await check_equation(queue)


async def test_a_cancellation_of_the_handlers_own_making_is_a_failure(cluster: LocalCluster, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group=GROUP, retry=FAST, concurrency=1)
    seen: list[Any] = []

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        seen.append((message.value, message.attempt))
        if message.value == "odd" and message.attempt == 1:
            raise asyncio.CancelledError

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            await producer.send("odd", key="a")
            await producer.send("even", key="b")
        async with running(client, worker):
            await until(lambda: drained(queue), 30, "an empty backlog")
        assert seen == [("odd", 1), ("even", 1), ("odd", 2)]
        await check_equation(queue)


async def test_a_worker_can_be_stopped_while_the_store_is_away(server_binary: Any, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group=GROUP, retry=FAST, lease=0.6, drain_limit=0.5)
    ended = anyio.Event()

    @worker.handler
    async def handle(message: shardq.Message) -> None: ...

    async def run(client: shardq.Client) -> None:
        await worker.run(client)
        ended.set()

    with LocalCluster(port=None, server=server_binary) as own:
        async with shardq.connect(own.url) as client:
            queue = await client.queue(queue_name, shards=3)
            await queue.open_group(GROUP)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run, client)
                await until(lambda: every_lease_held(queue), 20, "the leases")
                for server in own.processes:
                    server.kill()
                worker.stop()
                await until(ended.is_set, 20, "the worker's end")


async def every_lease_held(queue: shardq.Queue) -> bool:
    return all(shard.groups[GROUP].held for shard in (await queue.counters([GROUP])).values())


async def test_a_cancelled_worker_gives_its_leases_back(cluster: LocalCluster, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group=GROUP, retry=FAST)
    started, ended = 0, 0

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        nonlocal started, ended
        started += 1
        await anyio.sleep(0.01 if message.value % 2 else 60)
        ended += 1

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=3)
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            for number in range(20):
                await producer.send(number, key=f"k{number}")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run, client)
            await until(lambda: started == 20 and ended == 10, 20, "every handler to run")
            tasks.cancel_scope.cancel()
        counters = await queue.counters([GROUP])
        assert not any(shard.groups[GROUP].held for shard in counters.values())
        assert sum(shard.groups[GROUP].acked for shard in counters.values()) == 10, "what had finished is committed"
        assert sum(backlog(shard) for shard in counters.values()) == 10
        await check_equation(queue)


async def test_garbage_in_the_control_hash_stops_nobody(cluster: LocalCluster, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group=GROUP, retry=FAST)
    values: list[Any] = []

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        values.append(message.value)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=3)
        await queue.open_group(GROUP)
        garbage = ("m:nobody", b"\xff", "m:none", "a:b:c:d", "plan_version", "17", "plan", b"\xc1garbage")
        set_garbage = pack_command("HSET", queue.keys.control(GROUP), *garbage)
        await client.pipes.command(queue.keys.control_slot, set_garbage)
        async with running(client, worker), queue.producer() as producer:
            await until(lambda: every_lease_held(queue), 20, "the leases")
            await producer.send("fine", key="k")
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert values == ["fine"]


async def test_closing_a_client_ends_the_calls_of_others(server_binary: Any, queue_name: str) -> None:
    caught: list[Exception] = []

    async def ask(queue: shardq.Queue) -> None:
        try:
            await queue.counters([])
        except shardq.ShardqError as error:
            caught.append(error)

    with LocalCluster(port=None, server=server_binary) as own:
        async with anyio.create_task_group() as tasks:
            async with shardq.connect(own.url) as client:
                queue = await client.queue(queue_name, shards=1)
                for server in own.processes:
                    os.kill(int(server.pid), signal.SIGSTOP)
                tasks.start_soon(ask, queue)
                await anyio.lowlevel.checkpoint()
                await anyio.lowlevel.checkpoint()
            await until(lambda: len(caught) == 1, 10, "the call to end")
        assert isinstance(caught[0], shardq.ClosedError)
        for server in own.processes:
            os.kill(int(server.pid), signal.SIGCONT)


async def test_bad_workers_have_their_errors(cluster: LocalCluster, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group=GROUP, retry=FAST)
    async with shardq.connect(cluster.url) as client:
        with pytest.raises(shardq.UsageError, match="no handler"):
            await worker.run(client)
        with pytest.raises(shardq.UsageError, match="1 arguments"):
            worker.handler(lambda: None)
        with pytest.raises(shardq.UsageError, match="a function"):
            worker.handler(3)  # type: ignore[type-var]

        with pytest.raises(shardq.UsageError, match="generator"):

            @worker.handler
            async def stream(message: shardq.Message) -> AsyncIterator[int]:
                yield 1

        @worker.handler
        async def handle(message: shardq.Message) -> None: ...

        with pytest.raises(shardq.UsageError, match="handler already"):
            worker.handler(handle)
        with pytest.raises(shardq.UnknownQueue, match="shards=N"):
            await worker.run(client)
        with pytest.raises(shardq.UsageError, match="lease"):
            shardq.Worker(queue_name, group=GROUP, lease=0.1)
        with pytest.raises(shardq.UsageError, match="valid"):
            shardq.Worker(queue_name, group="no good")
