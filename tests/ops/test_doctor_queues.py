"""The doctor on queues: each defect is made on a real one, found, mended as the finding says, and gone then."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

import shardq
from shardq.core.findings import Finding
from shardq.core.queue_settings import QueueSettings
from shardq.errors import UnknownQueue
from shardq.ops.doctor.facts import HotShard, Limits, QueueFacts
from shardq.ops.doctor.queues import hot, hot_between, uneven
from shardq.ops.doctor.run import Wanted, examine
from shardq.ops.inspect import QueueView, ShardView, read_queue
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.commands import pack_command
from tests.runtime.harness import running, until, workers

# What it finds of queues is read by functions that tests/storage shows on every kind.
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis8")]

GROUP = "g"
SHORT, BEAT = 0.2, 1.6  # seconds; a member beats once a second


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[shardq.Client]:
    async with shardq.connect(cluster.url) as connected:
        yield connected


@pytest.fixture
async def queue(client: shardq.Client, queue_name: str) -> shardq.Queue:
    """Three shards on three masters, and a group."""
    made = await client.queue(queue_name, shards=3)
    await made.open_group(GROUP)
    return made


async def look(cluster: LocalCluster, queue: shardq.Queue, over_s: float = SHORT, **wanted: Any) -> dict[str, Finding]:
    """What was found of this queue, by id."""
    with anyio.fail_after(30):
        findings = await examine(cluster.url, Wanted(queue.name, over_s, **wanted))
    found = {each.id: each for each in findings if each.subject.split()[0] == queue.name}
    assert all(each.what and each.do for each in found.values())
    return found


async def send(queue: shardq.Queue, count: int, key: str | None = None) -> None:
    async with queue.producer() as producer:
        await producer.send_many((key or f"k{number}", number) for number in range(count))


async def ask(queue: shardq.Queue, shard: int, *words: str | bytes | int) -> Any:
    return await queue.client.pipes.command(queue.shards[shard].slot, pack_command(*words))


def taker(queue: shardq.Queue, **settings: Any) -> shardq.Worker:
    worker = shardq.Worker(queue.name, group=GROUP, lease=2, **settings)

    @worker.handler
    async def take(_message: shardq.Message) -> None:
        await anyio.lowlevel.checkpoint()

    return worker


async def drained(queue: shardq.Queue) -> bool:
    total = (await read_queue(queue.client, queue.name)).total(GROUP)
    return total is not None and total.backlog == 0


async def test_a_sound_queue_and_one_that_is_not_there(cluster: LocalCluster, queue: shardq.Queue) -> None:
    assert await look(cluster, queue) == {}
    async with running(queue.client, taker(queue)):
        await send(queue, 30)
        await until(lambda: drained(queue), 20, "the messages to be handled")
        assert await look(cluster, queue, BEAT) == {}
    with pytest.raises(BaseException) as caught:  # noqa: PT011  # as run_async's one_error gets it
        await examine(cluster.url, Wanted(f"{queue.name}-not", SHORT))
    assert _leaf(caught.value, UnknownQueue)


def _leaf(error: BaseException, kind: type[BaseException]) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_leaf(each, kind) for each in error.exceptions)
    return isinstance(error, kind)


async def test_a_corrupt_routing_table_hides_its_own_queue_only(cluster: LocalCluster, queue: shardq.Queue) -> None:
    stored = await queue.client.pipes.command(
        queue.keys.control_slot, pack_command("HGET", queue.keys.routing, "table")
    )

    async def put(table: bytes) -> None:
        packed = pack_command("HSET", queue.keys.routing, "table", table)
        await queue.client.pipes.command(queue.keys.control_slot, packed)

    other = await queue.client.queue(f"{queue.name}-other", shards=1)
    await put(b"junk")
    try:
        assert set(await look(cluster, queue)) == {"queues.unreadable"}
        findings = await examine(cluster.url, Wanted(over_s=SHORT))
        assert [each.id for each in findings if each.subject == queue.name] == ["queues.unreadable"]
        assert not [each for each in findings if each.subject == other.name and each.level == "problem"]
    finally:
        await put(stored)
    assert await look(cluster, queue) == {}


async def test_keys_that_are_gone(cluster: LocalCluster, queue: shardq.Queue) -> None:
    shard = queue.shards[1]
    gone = [shard.stream, shard.meta, shard.delayed, shard.expiring, shard.timed, *shard.of_group(GROUP)]
    for key in gone:
        await ask(queue, 1, "DEL", key)
    found = await look(cluster, queue)
    assert set(found) == {"shard.missing"}
    assert found["shard.missing"].subject == f"{queue.name} shard 1"
    await queue.client.queue(queue.name, shards=3)  # as it says: the shard begins empty, without groups
    found = await look(cluster, queue)
    assert set(found) == {"group.incomplete"}
    assert "shard 1" in found["group.incomplete"].what
    await queue.open_group(GROUP)
    assert await look(cluster, queue) == {}


async def test_messages_that_nobody_handles(cluster: LocalCluster, queue: shardq.Queue) -> None:
    await send(queue, 30)
    found = await look(cluster, queue)
    assert set(found) == {"group.no_workers"}
    assert "messages: 30" in found["group.no_workers"].what
    async with running(queue.client, taker(queue)):
        await until(lambda: drained(queue), 20, "the messages to be handled")
    assert await look(cluster, queue) == {}


async def test_entries_in_hand_of_nobody_and_for_long(cluster: LocalCluster, queue: shardq.Queue) -> None:
    worker = shardq.Worker(queue.name, group=GROUP, lease=2)
    begun = anyio.Event()

    @worker.handler
    async def hang(_message: shardq.Message) -> None:
        begun.set()
        await anyio.sleep_forever()

    await send(queue, 1)
    strict = Limits(old_pending_s=0.001)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run, queue.client)
        await begun.wait()
        assert set(await look(cluster, queue, BEAT, limits=strict)) == {"group.pending_old"}
        tasks.cancel_scope.cancel()
    (owned,) = (n for n, shard in (await queue.counters()).items() if shard.groups[GROUP].pending_entries)
    if (await queue.counters())[owned].groups[GROUP].held:  # cancelled, it could not give its shards back
        hash_ = queue.shards[owned].group(GROUP)
        await ask(queue, owned, "HSET", hash_, "token", "", "owner", "")
    found = await look(cluster, queue)
    assert set(found) == {"group.no_workers", "group.pending_unowned"}
    async with running(queue.client, taker(queue)):
        await until(lambda: drained(queue), 20, "the message to be handled")
    assert await look(cluster, queue) == {}


async def test_a_worker_that_is_paused(cluster: LocalCluster, queue: shardq.Queue, tmp_path: Path) -> None:
    def owners() -> Any:
        return read_queue(queue.client, queue.name)

    with workers(cluster.url, queue.name, tmp_path, lease=60) as start:
        worker = start()

        async def owned() -> bool:
            return all(shard.groups[GROUP].owner for shard in (await owners()).shards.values())

        await until(owned, 20, "the shards to be owned")
        worker.send(signal.SIGSTOP)
        found = await look(cluster, queue, BEAT)
        assert set(found) == {"lease.still"}
        assert worker.name in found["lease.still"].what
        worker.send(signal.SIGCONT)

        async def gone() -> bool:
            return await look(cluster, queue, BEAT) == {}

        await until(gone, 20, "the worker to be seen alive")
        worker.send(signal.SIGTERM)
        assert await worker.wait() == 0


@asynccontextmanager
async def beating(queue: shardq.Queue, member: str) -> AsyncIterator[None]:
    """A member of the group that is alive and takes no shard."""

    async def beat() -> None:
        beats = 0
        while True:
            beats += 1
            packed = pack_command("HSET", queue.keys.control(GROUP), f"m:{member}", f"nonce:{beats}:active")
            await queue.client.pipes.command(queue.keys.control_slot, packed)
            await anyio.sleep(0.02)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(beat)
        yield
        tasks.cancel_scope.cancel()
    packed = pack_command("HDEL", queue.keys.control(GROUP), f"m:{member}")
    await queue.client.pipes.command(queue.keys.control_slot, packed)


async def test_shards_that_no_worker_takes(cluster: LocalCluster, queue: shardq.Queue) -> None:
    async with beating(queue, "idler"):
        found = await look(cluster, queue)
    assert set(found) == {"shard.no_owner"}
    assert "shards 0, 1, 2" in found["shard.no_owner"].what
    assert await look(cluster, queue) == {}


async def test_another_client_in_a_group(cluster: LocalCluster, queue: shardq.Queue) -> None:
    await send(queue, 10, key="one key")
    (shard,) = (n for n, each in (await queue.counters()).items() if each.appended)
    stream = queue.shards[shard].stream
    await ask(queue, shard, "XGROUP", "CREATE", stream, "other", "0")
    await ask(queue, shard, "XREADGROUP", "GROUP", GROUP, "stray", "COUNT", 10, "STREAMS", stream, ">")
    found = await look(cluster, queue)
    assert {"group.stray_consumer", "stream.foreign_group"} <= set(found)
    assert found["group.stray_consumer"].level == "problem"
    assert "XAUTOCLAIM" in found["group.stray_consumer"].do
    await ask(queue, shard, "XAUTOCLAIM", stream, GROUP, "owner", "0", "0")
    found = await look(cluster, queue)
    assert found["group.stray_consumer"].level == "warning"
    assert "DELCONSUMER" in found["group.stray_consumer"].do
    await ask(queue, shard, "XGROUP", "DELCONSUMER", stream, GROUP, "stray")
    await ask(queue, shard, "XGROUP", "DESTROY", stream, "other")
    async with running(queue.client, taker(queue)):
        await until(lambda: drained(queue), 20, "what the other client had to be handled")
    assert await look(cluster, queue) == {}


async def test_dead_letters(cluster: LocalCluster, queue: shardq.Queue) -> None:
    worker = shardq.Worker(queue.name, group=GROUP, lease=2, retry=shardq.Retry(attempts=1))

    @worker.handler
    async def fail(_message: shardq.Message) -> None:
        raise ValueError("never works")

    await send(queue, 2)
    async with running(queue.client, worker):
        await until(lambda: drained(queue), 20, "the dead letters")
    found = await look(cluster, queue)
    assert set(found) == {"group.dead_letters"}
    assert found["group.dead_letters"].what.endswith(": 2")
    await queue.dead_letters(GROUP).purge()
    assert await look(cluster, queue) == {}


async def test_a_full_queue(cluster: LocalCluster, queue: shardq.Queue) -> None:
    await queue.change(max_backlog=30, overflow="reject")
    await send(queue, 8, key="a")
    assert set(await look(cluster, queue)) == {"group.no_workers", "queues.nearly_full"}
    await send(queue, 2, key="a")
    found = await look(cluster, queue)
    assert set(found) == {"group.no_workers", "queues.full"}
    assert found["queues.full"].level == "problem"
    await queue.change(overflow="drop-oldest")
    assert (await look(cluster, queue))["queues.full"].level == "warning"
    await queue.change(max_backlog=None, overflow="block")
    assert set(await look(cluster, queue)) == {"group.no_workers"}


@pytest.mark.parametrize("keys", [1, 50])
async def test_a_hot_shard(cluster: LocalCluster, queue: shardq.Queue, keys: int) -> None:
    keyed = [f"h{n}" for n in range(400) if queue.place_of(f"h{n}") == queue.shards[2]][:keys]

    async def busy() -> None:
        async with queue.producer() as producer:
            while True:
                await producer.send_many((key, 1) for key in keyed * (100 // keys))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(busy)
        limits = Limits(hot_per_s=20)
        found = await look(cluster, queue, limits=limits)
        tasks.cancel_scope.cancel()
    said, other = ("shard.hot_key", "shard.hot") if keys == 1 else ("shard.hot", "shard.hot_key")
    assert other not in found
    assert (found[said].subject, found[said].level) == (f"{queue.name} shard 2", "warning")
    assert f"{GROUP} can't keep up with it" in found[said].what
    if keys == 1:
        assert f"one key, {keyed[0]!r}, has 100% of its newest 500 messages" in found[said].what
        assert found[said].do.startswith("no split helps")
    else:
        assert found[said].do.startswith(f"shardq split {queue.name} 2: of its newest 500 messages ")
        assert "'h" not in found[said].what + found[said].do, "keys are shown only where one is the reason"
    assert not {"shard.hot", "shard.hot_key"} & set(await look(cluster, queue, limits=limits))


def test_a_hot_shard_whose_group_keeps_up_is_advice_and_one_whose_keys_cant_be_read_is_named_too() -> None:
    quiet = replace(_blank(0), appended=1000)
    then = QueueView("q", {n: _blank(n) for n in range(3)}, {})
    now = QueueView("q", {0: quiet, 1: _blank(1), 2: _blank(2)}, {})
    now = replace(now, shards={n: replace(shard, time_ms=1000) for n, shard in now.shards.items()})
    found = hot_between(then, now, Limits())
    assert found == [HotShard(0, "gets 1000 messages/s, the median shard 0 messages/s", None, [])]
    facts = QueueFacts("q", QueueSettings(), 3, 3, then, now, 1.0, hot=found)
    (finding,) = hot(facts, Limits())
    assert (finding.id, finding.level, finding.do) == ("shard.hot", "advice", "shardq split q 0")


def _blank(number: int) -> ShardView:
    return ShardView(number, 0, 1 << 32, 0, "n:1", "open", 0, 0, 0, 0, 0, 0, {})


async def test_shards_that_lie_unevenly(cluster: LocalCluster, queue: shardq.Queue) -> None:
    view = await read_queue(queue.client, queue.name)
    facts = QueueFacts(queue.name, queue.settings, 3, 3, view, view, SHORT)
    assert list(uneven(facts, Limits())) == []
    one = view.shards[0].node
    together = replace(view, shards={n: replace(shard, node=one) for n, shard in view.shards.items()})
    (finding,) = uneven(replace(facts, after=together), Limits())
    assert (finding.id, finding.level) == ("queues.uneven", "advice")
    assert f"3 on {one}" in finding.what
    split = replace(view, shards={n: replace(view.shards[0], shard=n) for n in range(3)})
    assert list(uneven(replace(facts, after=split), Limits())) == [], "what splits made of one shard can't be spread"


async def test_what_deleted_queues_left(cluster: LocalCluster, queue: shardq.Queue) -> None:
    left = [queue.shards[0].data(f"total:{number}") for number in range(3000)]
    await ask(queue, 0, "MSET", *(word for key in left for word in (key, "7")))
    assert "orphans.keys" not in await look(cluster, queue, deep=True)
    await queue.delete()
    findings = await examine(cluster.url, Wanted(over_s=SHORT, deep=True))
    (finding,) = (each for each in findings if each.id == "orphans.keys" and each.subject == queue.name)
    assert finding.what.startswith("3000 ")
    few = await examine(cluster.url, Wanted(over_s=SHORT, deep=True, limits=Limits(orphans=1)))
    assert [each.level for each in few if each.id == "orphans.unknown"] == ["unknown"]
    await ask(queue, 0, "DEL", *left)
    findings = await examine(cluster.url, Wanted(over_s=SHORT, deep=True))
    assert not [each for each in findings if each.id == "orphans.keys" and each.subject == queue.name]
