"""A group that was deleted stays deleted: while the queue's shards are changed, and when a worker comes back that was
away for longer than the deletion is noted.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

import shardq
from shardq.core import reshard as reshards
from shardq.errors import StoreUnavailable, UnknownGroup
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime import contact as contacts
from shardq.runtime import reshard as resharding
from shardq.runtime.contact import AWAY_S, Contact
from shardq.runtime.deletion import DeletionWatch
from shardq.runtime.outages import Outages
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.standalone import coordinate
from shardq.storage import groups
from shardq.storage.commands import pack_command
from shardq.storage.control import control_state
from shardq.storage.keys import ShardKeys
from shardq.storage.nodes import node_command
from shardq.storage.pipes import Pipes
from tests.runtime.harness import owners, until, workers
from tests.runtime.test_reshard import filled

# The functions themselves are tested on every kind (tests/storage/test_functions_reshard.py).
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis7", "valkey9")]


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[shardq.Client]:
    async with shardq.connect(cluster.url) as client:
        yield client


@pytest.mark.parametrize("done", range(len(resharding.STEPS) + 1))
async def test_a_group_deleted_meanwhile_is_on_no_shard(client: shardq.Client, queue_name: str, done: int) -> None:
    """By somebody who knows the old shards only; workers that know the new ones only learn of it, too."""
    queue = await filled(client, queue_name)
    await queue.open_group("kept")
    plan = reshards.split_all(queue.table)
    await resharding.begin(client.pipes, queue.keys, plan)
    work = resharding.Work(client.pipes, queue.keys, plan.to_bytes())
    for step in resharding.STEPS[:done]:
        assert await step(work)
    await shardq.Queue(client, queue.keys, queue.table).delete_group("g")
    for step in resharding.STEPS[done:]:
        assert await step(work)
    await queue.refresh()
    await check_deleted(queue, "g")


async def check_deleted(queue: shardq.Queue, group: str) -> None:
    """The group is on no shard, and noted as deleted on each; the group `kept` is on all."""
    for keys in queue.shards.values():
        assert await groups.was_deleted(queue.client.pipes, keys, group), keys.meta
        assert not await groups.was_deleted(queue.client.pipes, keys, "kept")
        assert await queue.client.pipes.command(keys.slot, pack_command("EXISTS", keys.group(group))) == 0
    assert [(info.name, info.shards) for info in await queue.groups()] == [("kept", len(queue.shards))]


@pytest.mark.parametrize("after", [True, False], ids=["read before, opened after", "in between"])
async def test_a_group_that_is_deleted_while_it_is_opened_on_new_shards_does_not_come_back(
    client: shardq.Client, queue_name: str, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """Whoever carries out the reshard read that the old shards have it."""
    queue = await filled(client, queue_name)
    await queue.open_group("kept")
    open_group, opened = groups.open_group, 0

    async def open_late(pipes: Pipes, shard: ShardKeys, group: str, start: groups.Start) -> groups.Done:
        nonlocal opened
        opened += group == "g"
        if group == "g" and opened == (1 if after else 3):
            await shardq.Queue(client, queue.keys, queue.table).delete_group("g")
        return await open_group(pipes, shard, group, start)

    monkeypatch.setattr(groups, "open_group", open_late)
    await queue.split_all()
    assert opened >= 4
    await check_deleted(queue, "g")


async def test_a_group_opened_anew_during_a_reshard_is_not_taken_for_the_deleted_one(
    client: shardq.Client, queue_name: str
) -> None:
    queue = await filled(client, queue_name)
    await queue.delete_group("g")
    await queue.split(0)
    await queue.open_group("g")
    await queue.split(1)
    await queue.merge([2, 3])
    for shard in queue.table.shards:
        assert not await groups.was_deleted(client.pipes, queue.shards[shard.id], "g")
    (info,) = await queue.groups()
    assert (info.name, info.shards) == ("g", len(queue.shards))


# -- away for longer than a deletion is noted --------------------------------------------------------------------------


async def forget_notes(queue: shardq.Queue) -> None:
    """As the tidy of a shard does after an hour (tests/storage/test_functions_group.py)."""
    for keys in queue.shards.values():
        await queue.client.pipes.command(keys.slot, pack_command("HDEL", keys.meta, "gone:g"))


@pytest.mark.server_kinds("redis7")
@pytest.mark.parametrize("has_shards", [True, False])
async def test_a_worker_that_was_away_for_too_long_does_not_open_its_group_anew(
    cluster: LocalCluster, client: shardq.Client, queue_name: str, tmp_path: Path, has_shards: bool
) -> None:
    """Whether it had shards, or stood by without any."""
    away_s = 1.5
    queue = await client.queue(queue_name, shards=1)

    async def is_owned() -> bool:
        return len(await owners(queue)) == 1

    with workers(cluster.url, queue_name, tmp_path, lease=1.0) as start:
        first = start(AWAY_S=f"{away_s}")
        await until(is_owned, 20, "the first one to have the shard")
        second = start(AWAY_S=f"{away_s}")
        await until(lambda: second.says("handles"), 20, "the second one to stand by")
        asleep, other = (first, second) if has_shards else (second, first)
        asleep.send(signal.SIGSTOP)
        stopped_s = time.monotonic()
        other.send(signal.SIGTERM)
        await other.wait()
        await queue.delete_group("g", force=True)
        await forget_notes(queue)
        await until(lambda: time.monotonic() - stopped_s > away_s, 20, "the pause to be too long")
        asleep.send(signal.SIGCONT)
        assert await asleep.wait() == 1
        assert asleep.says("was cut off, for too long to know why: start the worker again")
    assert await queue.groups() == []


async def test_a_coordinator_that_was_away_for_too_long_takes_a_missing_group_for_a_deleted_one(
    client: shardq.Client, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr(contacts, "_now_s", lambda: now_s)
    queue = await client.queue(queue_name, shards=2)
    contact = Contact()
    watch = DeletionWatch(client.pipes, queue, "g", Outages(), contact)
    await watch.look()
    now_s += AWAY_S + 1
    contact.heard()
    await watch.look()  # it was not there at any time: a worker may open it
    await queue.open_group("g")
    await watch.look()
    await queue.delete_group("g")
    await forget_notes(queue)
    await watch.look()  # as if the queue were another one: it was not away
    now_s += AWAY_S + 1
    contact.heard()
    with pytest.raises(UnknownGroup, match=r"group 'g' of queue .* is gone, .* too long to know why: start it again"):
        await watch.look()


def test_contact_is_lost_until_the_group_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(contacts, "_now_s", lambda: now_s)
    contact = Contact()
    for _ in range(3):
        now_s += AWAY_S
        assert not contact.is_lost()
        contact.heard()
    now_s += AWAY_S + 1
    assert contact.is_lost()
    contact.heard()
    assert contact.is_lost(), "what happened while it was away was missed for good"
    contact.there()
    assert not contact.is_lost()
    now_s += AWAY_S + 1
    contact.there(ago_s=AWAY_S + 1)
    assert contact.is_lost(), "seen no later than it was heard"
    contact.there(ago_s=AWAY_S - 1)
    assert not contact.is_lost()


# -- no key is left ----------------------------------------------------------------------------------------------------


def keys_of_group(cluster: LocalCluster, queue: str) -> list[str]:
    """Every key on every node that is the group's."""
    found = [node_command("127.0.0.1", port, "KEYS", f"*{queue}*:g") for port in cluster.ports]
    return sorted(str(name) for names in found for name in names)


async def test_nothing_is_left_of_a_group_once_those_who_were_in_it_have_ended(
    cluster: LocalCluster, client: shardq.Client, queue_name: str
) -> None:
    """Of two workers with shards, one that stands by and two coordinators, one of which leads. They have a limit, which
    is kept with the members; the queue has messages still, so that there is reason to ask for leave."""
    queue = await client.queue(queue_name, shards=2)
    await queue.open_group("g", "latest")
    ended = Counter[str]()
    stops = [anyio.Event(), anyio.Event()]

    async def work(name: str) -> None:
        worker = shardq.Worker(queue_name, group="g", name=name, lease=1.0, limit="1000/s")
        worker.handler(handle)
        with pytest.raises(UnknownGroup, match="was deleted while this worker ran: start the worker again"):
            await worker.run(client)
        ended["worker"] += 1

    async def handle(message: shardq.Message) -> None:
        await anyio.lowlevel.checkpoint()

    async def coordinate_(stop: anyio.Event) -> None:
        with pytest.raises(UnknownGroup, match="was deleted while this coordinator ran: start it again"):
            await coordinate(client, queue_name, "g", WorkerSettings(lease_s=1.0), stop)
        ended["coordinator"] += 1

    async def is_complete() -> bool:
        state = await control_state(client.pipes, queue.keys, "g")
        return len(state.members) == 5 and len(await owners(queue)) == 2

    async with anyio.create_task_group() as tasks:
        for stop in stops:
            tasks.start_soon(coordinate_, stop)
        for name in ("one", "two", "three"):
            tasks.start_soon(work, name)
        await until(is_complete, 20, "all to be there")
        async with queue.producer() as producer:
            await producer.send_many((f"k{number}", number) for number in range(500))
        await queue.delete_group("g", force=True)
        await until(lambda: ended.total() == 5, 30, "all to notice")
    assert keys_of_group(cluster, queue_name) == []


async def test_who_is_stopped_before_it_notices_leaves_nothing_either(
    cluster: LocalCluster, client: shardq.Client, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whoever is killed: after the deletion a member writes nothing."""
    queue = await client.queue(queue_name, shards=1)
    await queue.open_group("g")
    monkeypatch.setattr("shardq.runtime.deletion.LOOK_EVERY_S", 3600.0)
    looked, stop = 0, anyio.Event()

    async def cant_look(*_: object) -> groups.Standing:
        nonlocal looked
        looked += 1
        raise StoreUnavailable("as if the shard's master were away")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(coordinate, client, queue_name, "g", WorkerSettings(lease_s=0.6), stop)

        async def leads() -> bool:
            return bool((await control_state(client.pipes, queue.keys, "g")).leader)

        await until(leads, 20, "the coordinator to lead")
        monkeypatch.setattr("shardq.runtime.deletion.group_standing", cant_look)
        await queue.delete_group("g", force=True)
        await until(lambda: looked >= 3, 20, "some heartbeats")
        assert keys_of_group(cluster, queue_name) == [], "killed now it leaves nothing"
        stop.set()
    assert keys_of_group(cluster, queue_name) == []


async def test_a_coordinator_of_a_group_that_nobody_opened_leaves_nothing(
    cluster: LocalCluster, client: shardq.Client, queue_name: str
) -> None:
    queue = await client.queue(queue_name, shards=1)
    await queue.open_group("g")
    await queue.delete_group("g")
    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(coordinate, client, queue_name, "g", WorkerSettings(), stop)
        await until(lambda: keys_of_group(cluster, queue_name) != [], 20, "the coordinator to wait for it")
        stop.set()
    assert keys_of_group(cluster, queue_name) == []


async def test_a_group_whose_hash_was_lost_goes_on(client: shardq.Client, queue_name: str) -> None:
    """As after a master that came back empty: nobody deleted it, so its members join again, and one leads."""
    queue = await client.queue(queue_name, shards=2)
    handled = list[int]()

    async def work(name: str) -> None:
        worker = shardq.Worker(queue_name, group="g", name=name, lease=1.0)

        @worker.handler
        async def handle(message: shardq.Message) -> None:
            handled.append(message.value)

        await worker.run(client)

    async def is_complete() -> bool:
        state = await control_state(client.pipes, queue.keys, "g")
        return len(state.members) == 2 and state.leader != "" and len(set((await owners(queue)).values())) == 2

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work, "one")
        tasks.start_soon(work, "two")
        await until(is_complete, 20, "both to have a shard")
        await client.pipes.command(queue.keys.control_slot, pack_command("DEL", queue.keys.control("g")))
        await until(is_complete, 20, "both to be members again")
        async with queue.producer() as producer:
            await producer.send_many((f"k{number}", number) for number in range(50))
        await until(lambda: len(handled) == 50, 20, "all to be handled")
        tasks.cancel_scope.cancel()
    assert await client.pipes.command(queue.keys.control_slot, pack_command("EXISTS", queue.keys.control("g"))) == 1
