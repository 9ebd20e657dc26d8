"""Producers while the number of shards changes: each message stored once, in order per key over the old shard and the
new ones, and every id that a send returned is true."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest

import shardq
from shardq.core import records
from shardq.core import reshard as reshards
from shardq.core.hashing import key_hash
from shardq.core.ids import MessageId
from shardq.core.reshard import Reshard
from shardq.core.routing import RoutingTable
from shardq.errors import NotStored, StoreUnavailable, UnknownQueue
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime import rerouting
from shardq.runtime import reshard as resharding
from shardq.runtime.rerouting import Rerouting
from shardq.storage.commands import pack_command
from tests.runtime.harness import GROUP, Traffic, drained, running, stored, until
from tests.runtime.proxy import proxied

# The functions themselves are tested on every kind (tests/storage/test_functions_reshard.py).
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis7", "valkey9")]

HOUR = 3600.0


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[shardq.Client]:
    async with shardq.connect(cluster.url) as client:
        yield client


@pytest.fixture
async def other(cluster: LocalCluster) -> AsyncIterator[shardq.Client]:
    """Somebody else, whose routing table is its own."""
    async with shardq.connect(cluster.url) as client:
        yield client


async def check(queue: shardq.Queue, traffic: Traffic) -> None:
    """What was sent is there once, under the id its send returned, in the order sent; nothing else is."""
    found = await stored(queue)
    by_key: dict[str, list[tuple[str, int]]] = {}
    for message_id, key, value in found:
        by_key.setdefault(key, []).append((message_id, value))
    for key, ids in traffic.sent.items():
        assert [message_id for message_id, _ in by_key[key]] == ids, key
        assert [value for _, value in by_key[key]] == sorted(value for _, value in by_key[key])
    assert len(found) == traffic.total
    assert sum(shard.appended for shard in (await queue.counters([])).values()) == len(found)


async def half_way(queue: shardq.Queue, make: Callable[[RoutingTable], Reshard | None]) -> resharding.Work:
    """A reshard that somebody left when its parents were sealed and the table was not published."""
    plan = make(queue.table)
    assert plan is not None
    await resharding.begin(queue.client.pipes, queue.keys, plan)
    work = resharding.Work(queue.client.pipes, queue.keys, plan.to_bytes())
    for step in (resharding.open_children, resharding.commit, resharding.seal):
        assert await step(work)
    return work


def waiting(producer: shardq.Producer) -> int:
    """Shards that have refused and whose keys nobody has yet."""
    assert producer._rerouting is not None
    return len(producer._rerouting._waiting)


async def test_messages_keep_their_order_while_shards_change_again_and_again(
    client: shardq.Client, other: shardq.Client, queue_name: str
) -> None:
    queue = await client.queue(queue_name, shards=3)
    changing = await other.queue(queue_name)
    chance, traffic = random.Random(7), Traffic()
    async with queue.producer() as producer, anyio.create_task_group() as tasks:
        tasks.start_soon(traffic.keep_sending, producer, 0.002)

        async def more(then: int) -> bool:
            return traffic.total > then

        for turn in range(14):
            before = traffic.total
            await until(lambda before=before: more(before + 200), 20, "messages")
            table = changing.table
            match turn % 5:
                case 0:
                    await changing.split(chance.choice(table.shards).id, chance.choice([2, 3]))
                case 1:
                    await changing.split_all()
                case 2:
                    siblings = next(shards for shards in table.homes.values() if len(shards) > 1)
                    await changing.merge(shard.id for shard in siblings[:3])
                case 3:
                    await changing.scale(3)
                case _:
                    await changing.scale(chance.randint(4, 9))
        traffic.stopped = True
    assert len(changing.table.removed) + len(changing.table.retired) > 10
    await check(queue, traffic)


async def test_send_many_goes_on_through_splits_and_merges(
    client: shardq.Client, other: shardq.Client, queue_name: str
) -> None:
    queue = await client.queue(queue_name, shards=2)
    changing = await other.queue(queue_name)
    done = False

    async def change() -> None:
        nonlocal done
        for shards in (4, 3, 8, 2):
            await changing.scale(shards)
        done = True

    async def streamed() -> AsyncIterator[tuple[str | None, int]]:
        number = 0
        while not done:
            yield f"key-{number % 50}" if number % 7 else None, number
            number += 1
            if number % 100 == 0:
                await anyio.sleep(0.002)

    async with queue.producer(max_batch_messages=100) as producer, anyio.create_task_group() as tasks:
        tasks.start_soon(change)
        sent = await producer.send_many(streamed())
        assert producer.buffered_bytes == 0
        tasks.start_soon(changing.split_all)
        numbers = range(sent, sent + 20_000)
        assert await producer.send_many((f"key-{number % 50}", number) for number in numbers) == 20_000
    by_key: dict[str | None, list[int]] = {}
    for _, key, number in await stored(queue):
        by_key.setdefault(key, []).append(number)
    assert sorted(number for numbers in by_key.values() for number in numbers) == list(range(sent + 20_000))
    for key, of_key in by_key.items():
        assert key is None or of_key == sorted(of_key)
    assert max(len(batch) for batch in await batches(queue)) <= 100


async def batches(queue: shardq.Queue) -> list[list[Any]]:
    return [
        list(records.decode(fields[3]).values)
        for keys in queue.shards.values()
        for _, fields in await queue.client.pipes.command(keys.slot, pack_command("XRANGE", keys.stream, "-", "+"))
    ]


@pytest.mark.parametrize("at_once", [1, 10**9])
async def test_what_waited_for_a_split_goes_in_full_batches(
    client: shardq.Client, other: shardq.Client, queue_name: str, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(rerouting, "HANDED_OVER_AT_ONCE", at_once)
    queue = await client.queue(queue_name, shards=2)
    changing = await other.queue(queue_name)
    count, turns, moves = 20_000, 0, []
    move = Rerouting._move

    def noted(self: Rerouting, *arguments: Any) -> None:
        moves.append(turns)
        move(self, *arguments)

    async def turn() -> None:
        nonlocal turns
        while len(moves) < 2:
            turns += 1
            await anyio.lowlevel.checkpoint()

    monkeypatch.setattr(Rerouting, "_move", noted)
    async with queue.producer() as producer, anyio.create_task_group() as tasks:
        await half_way(changing, reshards.split_all)
        tasks.start_soon(producer.send_many, [(f"key-{number % 500}", number) for number in range(count)])
        await until(lambda: waiting(producer) == 2, 10, "both shards to refuse")
        await until(lambda: producer._filler.put_messages == count, 10, "all to be taken")
        tasks.start_soon(turn)
        assert await resharding.carry_on(other.pipes, queue.keys)
    found = await batches(queue)
    by_key: dict[int, list[int]] = {}
    for number in itertools.chain.from_iterable(found):
        by_key.setdefault(number % 500, []).append(number)
    assert by_key == {key: list(range(key, count, 500)) for key in range(500)}
    assert len(found) <= count // 1000 + 2 * 4, "each batch was split, and its parts were sent by themselves"
    assert len(set(moves)) == (2 if at_once == 1 else 1), "much goes over in several turns, little in one"


async def test_a_producer_that_was_idle_finds_the_shards_of_the_second_reshard_after(
    client: shardq.Client, other: shardq.Client, queue_name: str
) -> None:
    queue = await client.queue(queue_name, shards=2)
    changing = await other.queue(queue_name)
    traffic = Traffic()
    async with queue.producer() as producer:
        await traffic.send(producer, 80)
        await changing.scale(8)
        await changing.merge([shard.id for shard in changing.table.shards[:3]])
        await changing.split(changing.table.shards[-1].id)
        assert len(queue.table.shards) == 2
        await traffic.send(producer, 80)
        assert queue.table == changing.table
    by_key: dict[str, list[str]] = {}
    for message_id, key, _ in await stored(queue):
        by_key.setdefault(key, []).append(message_id)
    assert by_key == traffic.sent
    active = {shard.id for shard in changing.table.shards}
    last = {key: changing.table.shard_for(key_hash(key)).id for key in by_key}
    assert {key: MessageId.parse(ids[-1]).shard for key, ids in by_key.items()} == last
    assert set(last.values()) <= active


async def test_a_lost_answer_at_the_seal_stores_each_message_once(server_binary: Path, queue_name: str) -> None:
    with LocalCluster(port=None, server=server_binary) as own:
        async with proxied(own, 0) as proxy, shardq.connect(own.url) as client, shardq.connect(own.url) as other:
            queue = await client.queue(queue_name, shards=3)
            changing = await other.queue(queue_name)
            traffic = Traffic()
            async with queue.producer() as producer, anyio.create_task_group() as tasks:
                tasks.start_soon(traffic.keep_sending, producer, 0.001)
                for shards in (6, 3, 5, 9, 4, 12):
                    before, sent = proxy.dropped, traffic.total
                    proxy.drop_replies = 3
                    await changing.scale(shards)
                    await until(lambda before=before: proxy.dropped > before, 20, "a reply to be dropped")
                    proxy.drop_replies = 0
                    await until(lambda sent=sent: traffic.total > sent + 100, 20, "messages")
                traffic.stopped = True
            await check(queue, traffic)


async def test_messages_wait_for_a_plan_that_was_left_half_way(
    client: shardq.Client, other: shardq.Client, queue_name: str
) -> None:
    queue = await client.queue(queue_name, shards=2)
    changing = await other.queue(queue_name)
    traffic = Traffic(keys=20)
    values = [("many", number) for number in range(2500)]
    async with queue.producer() as producer, anyio.create_task_group() as tasks:
        await traffic.send(producer, 20)
        await half_way(changing, reshards.split_all)
        tasks.start_soon(traffic.send, producer, 100)
        tasks.start_soon(producer.send_many, values)
        await until(lambda: waiting(producer) == 2, 10, "both shards to refuse")
        before = await stored(queue)
        assert len(before) == 20, "a shard that is sealed took messages"
        assert producer.buffered_bytes > 0
        assert await resharding.carry_on(other.pipes, queue.keys)
    found = await stored(queue)
    assert [value for _, key, value in found if key == "many"] == list(range(2500))
    ids = {key: [each for each, found_key, _ in found if found_key == key] for key in traffic.sent}
    assert ids == traffic.sent
    assert producer.buffered_bytes == 0


async def test_a_plan_that_nobody_completes_ends_messages_at_their_deadline(
    client: shardq.Client, other: shardq.Client, queue_name: str
) -> None:
    queue = await client.queue(queue_name, shards=1)
    changing = await other.queue(queue_name)
    async with queue.producer(delivery_timeout=0.4, max_batch_messages=10) as producer:
        await half_way(changing, reshards.split_all)
        failed: list[StoreUnavailable] = []

        async def send(number: int, **more: Any) -> None:
            with pytest.raises(StoreUnavailable, match="sealed for a reshard that nobody completed") as caught:
                await producer.send(number, key="k", **more)
            failed.append(caught.value)

        async with anyio.create_task_group() as tasks:
            for number in range(25):
                tasks.start_soon(send, number)
            tasks.start_soon(partial(send, 25, delay=HOUR))
        assert len(failed) == 26
        assert not any(error.outcome_unknown for error in failed)
        with pytest.raises(NotStored, match="35 messages of shards 0 are not stored") as lost:
            await producer.send_many(("k", number) for number in range(35))
        assert lost.value.failed == 35
        assert (producer.buffered_bytes, waiting(producer)) == (0, 0)
        assert await resharding.carry_on(other.pipes, queue.keys)
        assert (await producer.send("after", key="k")).startswith(("1/", "2/"))
    assert [value for _, _, value in await stored(queue)] == ["after"]


async def test_a_queue_that_was_deleted_says_so(client: shardq.Client, other: shardq.Client, queue_name: str) -> None:
    queue = await client.queue(queue_name, shards=2)
    changing = await other.queue(queue_name)
    async with queue.producer() as producer:
        await producer.send(1, key="k")
        await changing.split_all()
        await changing.delete()
        with pytest.raises(UnknownQueue, match="is gone: the queue was deleted"):
            await producer.send(2, key="k")
        again = await other.queue(queue_name, shards=5)
        with pytest.raises(UnknownQueue, match="is gone: the queue was deleted"):
            await producer.send(2, key="k")
        assert await again.peek() == []


@pytest.mark.parametrize("published", [False, True])
async def test_whoever_stops_waiting_leaves_the_others_alone(
    client: shardq.Client, other: shardq.Client, queue_name: str, published: bool
) -> None:
    queue = await client.queue(queue_name, shards=1)
    changing = await other.queue(queue_name)
    ids: dict[int, str] = {}

    async def send(number: int, scope: anyio.CancelScope) -> None:
        with scope:
            if number % 3:
                ids[number] = await producer.send(number, key="k")
            else:
                ids[number] = (await producer.submit(number, key="k")).message_id

    async with queue.producer() as producer, anyio.create_task_group() as tasks:
        for at in range(30):  # each round is cut off one turn of the loop later
            scopes = [anyio.CancelScope() for _ in range(4)]
            work = await half_way(
                changing, reshards.split_all if at % 2 == 0 else lambda table: reshards.scale(table, 1)
            )
            if published:
                assert await resharding.carry_on(other.pipes, queue.keys)
            for number, scope in enumerate(scopes):
                tasks.start_soon(send, at * 4 + number, scope)
            for _ in range(at * (2 if published else 1)):
                await anyio.lowlevel.checkpoint()
            for scope in scopes[:3]:
                scope.cancel()
            await resharding.carry_on(other.pipes, queue.keys)
            await until(lambda at=at: at * 4 + 3 in ids, 10, "the one that waits still")
            await changing.refresh()
            assert changing.table == work.plan.table
        await producer.flush()
    found = await stored(queue)
    by_number = {value: message_id for message_id, _, value in found}
    assert len(by_number) == len(found), "a message is stored twice"
    assert ids.items() <= by_number.items()
    assert [value for _, _, value in found] == sorted(by_number)


async def test_a_producer_that_is_left_while_a_shard_waits_ends_its_messages(
    client: shardq.Client, other: shardq.Client, queue_name: str
) -> None:
    queue = await client.queue(queue_name, shards=1)
    changing = await other.queue(queue_name)
    await half_way(changing, reshards.split_all)
    ended: list[BaseException] = []

    async def send(producer: shardq.Producer) -> None:
        with pytest.raises(shardq.StoreError) as caught:
            await producer.send(1, key="k")
        ended.append(caught.value)

    async def leave(tasks: anyio.abc.TaskGroup) -> None:
        async with queue.producer() as producer:
            tasks.start_soon(send, producer)
            await until(lambda: waiting(producer) == 1, 10, "the shard to refuse")
            raise KeyError

    async with anyio.create_task_group() as tasks:
        with pytest.raises(KeyError):
            await leave(tasks)
    assert len(ended) == 1
    await resharding.carry_on(other.pipes, queue.keys)
    assert await stored(queue) == []


async def test_a_thread_sends_through_splits(cluster: LocalCluster, other: shardq.Client, queue_name: str) -> None:
    changing = await other.queue(queue_name, shards=2)

    def work() -> tuple[dict[str, list[str]], int]:
        with shardq.SyncProducer(cluster.url, queue_name) as producer:
            started = [(f"k{n % 10}", producer.send_soon(n, key=f"k{n % 10}")) for n in range(3000)]
            producer.send(-1, key="first")
            anyio.from_thread.run(changing.split_all)
            started += [(f"k{n % 10}", producer.send_soon(n, key=f"k{n % 10}")) for n in range(3000, 6000)]
            anyio.from_thread.run(changing.scale, 3)
            started += [(f"k{n % 10}", producer.send_soon(n, key=f"k{n % 10}")) for n in range(6000, 9000)]
            producer.flush()
            many = producer.send_many([("many", 1)] * 10)
            ids: dict[str, list[str]] = {}
            for key, answer in started:
                assert answer.done(), "flush returned before its messages had ended"
                ids.setdefault(key, []).append(answer.result())
            return ids, many

    ids, many = await anyio.to_thread.run_sync(work)
    assert many == 10
    found = await stored(changing)
    for key, expected in ids.items():
        assert [message_id for message_id, found_key, _ in found if found_key == key] == expected
    assert len(found) == 9011


async def test_a_thread_that_waits_for_a_plan_hears_how_it_ends(
    cluster: LocalCluster, other: shardq.Client, queue_name: str
) -> None:
    changing = await other.queue(queue_name, shards=1)

    def work() -> tuple[list[str], list[str]]:
        with shardq.SyncProducer(cluster.url, queue_name) as producer:
            producer.send(0, key="k")
            anyio.from_thread.run(half_way, changing, reshards.split_all)
            answers = [producer.send_soon(n, key=f"k{n}") for n in range(20)]
            late = [producer.send_soon(n, key=f"k{n}", delay=HOUR) for n in range(20)]
            with pytest.raises(shardq.StoreTimeout):
                producer.flush(timeout=0.2)
            anyio.from_thread.run(resharding.carry_on, other.pipes, changing.keys)
            producer.flush()
            return [answer.result() for answer in answers], [answer.result() for answer in late]

    ids, late = await anyio.to_thread.run_sync(work)
    assert {value: message_id for message_id, key, value in await stored(changing) if key != "k"} == dict(
        enumerate(ids)
    )
    assert {message_id.split("/")[0] for message_id in late} <= {"1", "2"}
    assert sum(found.delayed for found in (await changing.counters([])).values()) == 20


async def test_jobs_delayed_messages_and_headers_move_with_their_shard(
    client: shardq.Client, other: shardq.Client, queue_name: str
) -> None:
    queue = await client.queue(queue_name, shards=6)
    changing = await other.queue(queue_name)
    jobs: list[shardq.Job] = []
    ids: dict[int, str] = {}

    async def submit(number: int, key: str | None) -> None:
        jobs.append(await producer.submit(number, key=key))

    async def send(number: int, **options: Any) -> None:
        ids[number] = await producer.send(number, **options)

    async with queue.producer() as producer, anyio.create_task_group() as tasks:
        await half_way(changing, reshards.split_all)
        for number in range(12):
            tasks.start_soon(submit, number, f"k{number}" if number % 3 else None)
        for number in range(12, 20):
            tasks.start_soon(partial(send, number, key=f"k{number}", delay=HOUR))
        for number in range(20, 30):
            tasks.start_soon(partial(send, number, key=f"k{number}", headers={"n": str(number)}))
        tasks.start_soon(partial(send, 30, dedupe_id="once"))
        await until(lambda: waiting(producer) == 6, 10, "every shard to refuse")
        await resharding.carry_on(other.pipes, queue.keys)
    await changing.refresh()
    assert {job.id.split("/")[1] for job in jobs} <= set("012345")
    found = {record.value: record async for record in changing.history()}
    for job in jobs:
        own = next(record for record in found.values() if record.id == job.message_id)
        assert (own.headers or {})["shardq-job"] == job.id
        assert (await job.state()).status == "queued"
        late = await changing.job(job.id).state()
        assert (late.id, late.status) == (job.id, "queued")
        assert changing.table.home_of(MessageId.parse(job.message_id).shard) == int(job.id.split("/")[1])
    for number in range(20, 30):
        assert (found[number].id, found[number].headers) == (ids[number], {"n": str(number)})
    for number in range(12, 20):
        assert int(ids[number].split("/")[0]) == changing.table.shard_for(key_hash(f"k{number}")).id
    assert sum(each.delayed for each in (await changing.counters([])).values()) == 8
    assert found[30].id == ids[30]


async def test_a_dedupe_id_gives_the_true_id_of_what_was_stored_before(
    client: shardq.Client, other: shardq.Client, queue_name: str
) -> None:
    queue = await client.queue(queue_name, shards=2)
    changing = await other.queue(queue_name)
    async with queue.producer() as producer:

        async def send() -> list[str]:
            return [await producer.send(n, key=f"k{n}", dedupe_id=f"d{n}") for n in range(8)]

        first = await send()
        later = await producer.send("later", key="k0", dedupe_id="later", delay=HOUR)
        await changing.split_all()
        assert await send() == first
        assert await producer.send("later", key="k0", dedupe_id="later", delay=HOUR) == later
        child = await producer.send("c", key="k0", dedupe_id="child")
        assert await producer.send("c", key="k0", dedupe_id="child") == child
        await changing.scale(2)
        assert await send() == first
        assert await producer.send("c", key="k0", dedupe_id="child") == child
        merged = await producer.send("m", key="k0", dedupe_id="merged")
        assert merged.split("/")[0] not in (child.split("/")[0], first[0].split("/")[0])
    found = {message_id: value for message_id, _, value in await stored(changing)}
    assert found == {**{message_id: number for number, message_id in enumerate(first)}, child: "c", merged: "m"}


async def test_a_handler_sends_to_a_queue_that_is_split_meanwhile(
    cluster: LocalCluster, client: shardq.Client, other: shardq.Client, queue_name: str
) -> None:
    source = await client.queue(queue_name, shards=2)
    target = await client.queue(f"{queue_name}-to", shards=2)
    changing = await other.queue(target.name)
    worker = shardq.Worker(queue_name, group=GROUP, retry=shardq.Retry(attempts=1))
    handled: list[Any] = []

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        handled.append(message.value)
        async with message.atomic() as tx:
            tx.incrby(message.local_key("count"), 1)
            tx.send(target, message.value, key=message.key)

    async with source.producer() as producer, running(client, worker):
        for number in range(40):
            await producer.send(number, key=f"k{number % 8}")
        await until(lambda: drained(source), 20, "an empty backlog")
        await half_way(changing, reshards.split_all)
        for number in range(40, 80):
            await producer.send(number, key=f"k{number % 8}")
        await until(lambda: len(handled) >= 41, 20, "a message that meets a sealed shard")
        await resharding.carry_on(other.pipes, target.keys)
        await until(lambda: drained(source), 20, "an empty backlog")
        await changing.scale(2)
        for number in range(80, 120):
            await producer.send(number, key=f"k{number % 8}")
        await until(lambda: drained(source), 20, "an empty backlog")
    assert sorted(handled) == list(range(120)), "a message was tried twice"
    assert [letter async for letter in source.dead_letters(GROUP)] == []
    found = await stored(changing)
    assert Counter(value for _, _, value in found) == Counter(range(120))
    for key in {key for _, key, _ in found}:
        values = [value for _, found_key, value in found if found_key == key]
        assert values == sorted(values)


async def test_a_batch_holds_no_more_than_the_narrowest_of_the_new_shards(
    client: shardq.Client, other: shardq.Client, queue_name: str
) -> None:
    queue = await client.queue(queue_name, shards=1, max_backlog=40)
    changing = await other.queue(queue_name)
    async with queue.producer() as producer, anyio.create_task_group() as tasks:
        await half_way(changing, lambda table: reshards.split(table, 0, 4))
        tasks.start_soon(producer.send_many, [("k", number) for number in range(10)])
        await until(lambda: waiting(producer) == 1, 10, "the shard to refuse")
        await resharding.carry_on(other.pipes, queue.keys)
    async with queue.producer() as producer:
        assert producer._filler.limits.batch_messages == 10
    assert [len(batch) for batch in await batches(queue)] == [10]
