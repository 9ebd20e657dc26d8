"""What leaders and workers make of a reshard: they learn of it, complete it, wait at gates and remove what is through.
Workers run in this process; those that die are in test_workers_reshard.py."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

import shardq
from shardq.core import reshard as reshards
from shardq.core.autosplit import AutoSplit
from shardq.errors import StoreRefused
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime import reshard as resharding
from shardq.runtime import upkeep
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.standalone import coordinate
from shardq.storage.commands import pack_command
from shardq.storage.keys import Keys
from shardq.storage.pipes import Pipes
from tests.runtime.harness import GROUP, drained, owners, running, until
from tests.runtime.test_reshard import cut_off, producers, rig

# On redis7 workers are killed through reshards instead (test_workers_reshard.py); the functions are tested on all.
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis8", "valkey9")]

LEASE_S = 2.0
KEYS = [f"k{number}" for number in range(12)]


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[shardq.Client]:
    async with shardq.connect(cluster.url) as client:
        yield client


class Clerk:
    """A worker that writes down what it handles, by key; messages named in `failing` fail while they are in it."""

    def __init__(self, queue: str, group: str = GROUP, **more: Any) -> None:
        self.done: dict[Any, list[Any]] = defaultdict(list)
        self.failing: set[Any] = set()
        retry = shardq.Retry(attempts=1000, base=0.05, factor=1)
        self.worker = shardq.Worker(queue, group=group, **{"lease": LEASE_S, "retry": retry, **more})
        self.worker.handler(self._handle)

    async def _handle(self, message: shardq.Message) -> None:
        if message.value in self.failing:
            raise ValueError("not yet")
        self.done[message.key].append(message.value)

    @property
    def total(self) -> int:
        return sum(map(len, self.done.values()))


@asynccontextmanager
async def at_work(client: shardq.Client, *clerks: Clerk) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for clerk in clerks:
            await stack.enter_async_context(running(client, clerk.worker))
        yield


async def send(queue: shardq.Queue, first: int, count: int = 3) -> None:
    """Numbers from `first` on, `count` for every key."""
    await queue.refresh()
    async with queue.producer() as producer:
        for number in range(first, first + count):
            await producer.send_many((key, number) for key in KEYS)


def in_order(count: int) -> dict[Any, list[Any]]:
    return {key: list(range(count)) for key in KEYS}


async def is_published(queue: shardq.Queue, plan: reshards.Reshard) -> bool:
    return (await resharding.read_table(queue.client.pipes, queue.keys)).version >= plan.table.version


# -- leaders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 8, 16, 24])
async def test_leaders_complete_what_somebody_left_unfinished(
    client: shardq.Client, cluster: LocalCluster, queue_name: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three groups, one of them elsewhere: all of their leaders try."""
    monkeypatch.setattr(upkeep, "LOOK_EVERY_S", 0.2)
    monkeypatch.setattr(upkeep, "UNFINISHED_S", 0.3)
    queue = await client.queue(queue_name, shards=2)
    clerks = [Clerk(queue_name), Clerk(queue_name, "other")]
    async with (
        shardq.connect(cluster.url) as another,
        at_work(client, *clerks),
        at_work(another, Clerk(queue_name, "x")),
    ):
        await send(queue, 0)
        plan = reshards.split_all(queue.table)
        await resharding.begin(client.pipes, queue.keys, plan)
        assert await cut_off(client.pipes, at, lambda pipes: resharding.carry_on(pipes, queue.keys), lost=False)
        await until(lambda: is_published(queue, plan), 20, "the leaders to complete it")
        await send(queue, 3)
        await until(lambda: all(clerk.total == 6 * len(KEYS) for clerk in clerks), 20, "all to be handled")
        assert [clerk.done for clerk in clerks] == [in_order(6)] * 2


async def test_delayed_messages_that_were_left_behind_are_moved(
    client: shardq.Client, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "UNFINISHED_S", 0.1)
    queue = await client.queue(queue_name, shards=1)
    clerk = Clerk(queue_name)
    parent = queue.shards[0]

    async def rests() -> bool:
        return not await owners(queue)

    async def moved() -> bool:
        count = await client.pipes.command(parent.slot, pack_command("ZCARD", parent.delayed))
        return int(count) <= 1  # one member stands for the set itself

    async with at_work(client, clerk):
        await until(lambda: owned_by_somebody(queue), 20, "an owner")
        await queue.pause_group(GROUP)  # its leader goes on; what is due on the parent stays where it is
        await until(rests, 20, "the lease to be given back")
        async with queue.producer() as producer:
            await producer.send("late", key="k", delay=1)
        async with AsyncExitStack() as stack:
            alone = partial(upkeep.alone, client.pipes.cluster, queue.keys.routing)
            await until(lambda: stack.enter_async_context(alone()), 20, "the leader to leave the reshard to this test")
            plan = reshards.split_all(queue.table)
            await resharding.begin(client.pipes, queue.keys, plan)
            work = resharding.Work(client.pipes, queue.keys, plan.to_bytes())
            for step in resharding.STEPS[:-1]:
                assert await step(work)
            assert not await moved()
        await until(moved, 20, "the leader to move what was left behind")
        await queue.resume_group(GROUP)
        await until(lambda: clerk.total == 1, 20, "the delayed message, by way of a child")
        assert (await queue.refresh(), (await queue.counters([]))[0].appended) == (True, 0)


async def test_the_bell_is_enough(client: shardq.Client, queue_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = await client.queue(queue_name, shards=1)
    monkeypatch.setattr(upkeep, "LOOK_EVERY_S", 1000)
    rests: list[float] = []

    def uniform(low: float, high: float) -> float:
        if high == 1.0:  # it draws how long it rests, and not when it looks after old shards again
            rests.append(high)
        return high

    monkeypatch.setattr(upkeep, "random", SimpleNamespace(uniform=uniform))
    clerk = Clerk(queue_name)
    async with at_work(client, clerk):
        await until(lambda: owned_by_somebody(queue), 20, "an owner")
        await until(lambda: bool(rests), 20, "the only look to be over")
        await queue.split_all()
        await send(queue, 0)
        await until(lambda: clerk.total == 3 * len(KEYS), 20, "all to be handled")


async def test_a_bell_that_was_lost_costs_a_second_or_two(client: shardq.Client, queue_name: str) -> None:
    queue = await client.queue(queue_name, shards=1)
    clerks = [Clerk(queue_name), Clerk(queue_name)]
    async with at_work(client, *clerks):
        await until(lambda: owned_by_somebody(queue), 20, "an owner")
        plan = reshards.split_all(queue.table)
        await resharding.begin(client.pipes, queue.keys, plan)
        work = resharding.Work(client.pipes, queue.keys, plan.to_bytes())
        for step in resharding.STEPS:
            assert await step(work)
            work.groups = set()  # no bell is rung
        await send(queue, 0)
        await until(lambda: sum(clerk.total for clerk in clerks) == 3 * len(KEYS), 20, "all to be handled")


async def owned_by_somebody(queue: shardq.Queue, group: str = GROUP) -> bool:
    found = await queue.counters([group])
    return all(group in each.groups and each.groups[group].held for each in found.values())


async def test_a_retired_shard_that_is_through_is_removed_and_its_owner_ends(
    cluster: LocalCluster,
    client: shardq.Client,
    queue_name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "shardq")
    monkeypatch.setattr(upkeep, "LOOK_AFTER_EVERY_S", 0.5)
    queue = await client.queue(queue_name, shards=2)
    clerks = [Clerk(queue_name), Clerk(queue_name), Clerk(queue_name, "other")]
    async with shardq.connect(cluster.url) as asleep, at_work(client, *clerks):
        stale = await asleep.queue(queue_name)
        await send(queue, 0)
        await queue.split_all()
        await send(queue, 3)
        await until(lambda: sum(clerk.total for clerk in clerks) == 12 * len(KEYS), 20, "all to be handled")
        await until(lambda: owned_by_somebody(queue), 20, "owners of old and new ones")
        for shard in (0, 1):  # as after an hour
            await rig(queue, shard).command("HDEL", queue.shards[shard].meta, *await producers(queue, shard))

        async def gone() -> bool:
            await queue.refresh()
            return not queue.table.retired

        await until(gone, 20, "the old shards to be removed")
        await send(queue, 6)
        await until(lambda: sum(clerk.total for clerk in clerks) == 18 * len(KEYS), 20, "all to be handled")
        await until(lambda: owned_by_somebody(queue), 20, "owners of the new ones")
        assert (await queue.reshard(), len(await owners(queue))) == (None, 4)
        assert sorted(stale.shards) == [0, 1]
        assert sorted(await stale.counters()) == sorted(queue.shards), "it has heard of nothing until now"
    assert "removed retired shards" in caplog.text
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [text for text in warnings if "twice" not in text] == []


async def test_a_leader_without_the_right_says_so_once(
    client: shardq.Client, queue_name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused = 0

    async def carry_on(_pipes: Pipes, _keys: Keys) -> bool:
        nonlocal refused
        refused += 1
        raise StoreRefused("does not let this user run FCALL")

    monkeypatch.setattr(upkeep, "REFUSED_S", 0.1)
    monkeypatch.setattr(upkeep, "LOOK_EVERY_S", 0.1)
    queue = await client.queue(queue_name, shards=1)
    clerk = Clerk(queue_name)
    async with at_work(client, clerk):
        with monkeypatch.context() as patched:
            patched.setattr(resharding, "carry_on", carry_on)
            await resharding.begin(client.pipes, queue.keys, reshards.split_all(queue.table))
            await until(lambda: refused >= 3, 20, "three tries")
            await send(queue, 0)
            await until(lambda: clerk.total == 3 * len(KEYS), 20, "its own work, which goes on")
        assert caplog.text.count(f"shardq acl worker --queue {queue_name} --reshards") == 1

        async def published() -> bool:
            return await queue.refresh()

        await until(published, 20, "the plan to be carried out, now that it may")


async def test_one_process_does_it_once_at_a_time(client: shardq.Client) -> None:
    async with upkeep.alone(client.cluster, "a") as first:
        async with upkeep.alone(client.cluster, "a") as second, upkeep.alone(client.cluster, "b") as other:
            assert (first, second, other) == (True, False, True)
        async with upkeep.alone(client.cluster, "a") as third:
            assert not third
    async with upkeep.alone(client.cluster, "a") as again:
        assert again


# -- gates -------------------------------------------------------------------------------------------------------------


async def test_a_retry_keeps_its_group_waiting_and_no_other(
    client: shardq.Client, queue_name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardq.runtime.gates.TOLD_FIRST_S", 0.1)
    monkeypatch.setattr("shardq.runtime.gates.TOLD_EVERY_S", 0.2)  # a first line may say that there is more to do
    caplog.set_level(logging.INFO, "shardq")
    queue = await client.queue(queue_name, shards=1)
    slow, quick, helper = Clerk(queue_name), Clerk(queue_name, "quick"), Clerk(queue_name)
    slow.failing = helper.failing = {"stuck"}
    async with at_work(client, slow, quick):
        async with queue.producer() as producer:
            await producer.send("stuck", key="s")
        await send(queue, 0)
        await queue.split_all()
        await send(queue, 3)
        await until(lambda: quick.total == 6 * len(KEYS) + 1, 20, "the other group to go on")
        await until(lambda: slow.total == 3 * len(KEYS), 20, "what the group has on the old shard")
        waiting = f"{queue_name}/{GROUP}: shards 1, 2 wait until the group has finished 1 messages on shard 0"
        await until(lambda: waiting in caplog.text, 20, "a line that says so")
        async with at_work(
            client, helper
        ):  # a worker that comes takes its part of the waiting, one that goes leaves it
            await until(lambda: len_members(queue, 2), 20, "a second worker")
            await queue.pause_group(GROUP)
            await until(lambda: nobody_owns(queue), 20, "the pause")
            await queue.resume_group(GROUP)
            await until(lambda: held(queue, 0), 20, "an owner of the old shard")
            assert (slow.total + helper.total, list(slow.done["s"])) == (3 * len(KEYS), [])
        slow.failing.clear()
        await until(lambda: slow.total + helper.total == 6 * len(KEYS) + 1, 20, "all to be handled")
        assert "no shard waits for an older one any more" in caplog.text
    del slow.done["s"], quick.done["s"]
    assert (slow.done, quick.done) == (in_order(6), in_order(6))


async def len_members(queue: shardq.Queue, count: int, group: str = GROUP) -> bool:
    return any(info.name == group and len(info.workers) == count for info in await queue.groups())


async def nobody_owns(queue: shardq.Queue) -> bool:
    return not await owners(queue)


async def held(queue: shardq.Queue, shard: int) -> bool:
    return shard in await owners(queue)


async def test_empty_generations_hold_nothing_up(client: shardq.Client, queue_name: str) -> None:
    """Shards that are split again before anybody has owned them."""
    queue = await client.queue(queue_name, shards=1)
    await send(queue, 0)
    for change in (queue.split_all(), queue.split_all(), queue.scale(1), queue.scale(3)):
        await change
    await send(queue, 3)
    clerk = Clerk(queue_name)
    async with at_work(client, clerk):
        await until(lambda: clerk.total == 6 * len(KEYS), 20, "all to be handled")
    assert clerk.done == in_order(6)


async def test_a_group_is_opened_reset_and_deleted_over_old_and_new_shards(
    client: shardq.Client, queue_name: str
) -> None:
    queue = await client.queue(queue_name, shards=2, retention="1h")
    clerk, late = Clerk(queue_name), Clerk(queue_name, "late")
    async with at_work(client, clerk):
        await send(queue, 0)
        await queue.split_all()
        await send(queue, 3)
        await queue.scale(2)
        await send(queue, 6)
        async with at_work(client, late):
            await until(lambda: clerk.total == late.total == 9 * len(KEYS), 20, "both groups")
        assert clerk.done == late.done == in_order(9)
        clerk.done.clear()
        await queue.reset_group(GROUP, "earliest", force=True)
        await until(lambda: drained_all(queue), 20, "all of it again")
        # What was in hand when the leases were taken away may come twice; here nothing was.
        assert clerk.done == in_order(9)
        await until(lambda: nobody_of(queue, "late"), 20, "the other group's workers to be gone")
        await queue.delete_group("late")
        assert [info.name for info in await queue.groups()] == [GROUP]


async def drained_all(queue: shardq.Queue) -> bool:
    await queue.refresh()
    return await drained(queue)


async def nobody_of(queue: shardq.Queue, group: str) -> bool:
    return any(info.name == group and not info.workers and not info.owned for info in await queue.groups())


async def test_a_dead_letter_of_an_old_shard_is_replayed_there(client: shardq.Client, queue_name: str) -> None:
    queue = await client.queue(queue_name, shards=1)
    clerk = Clerk(queue_name, retry=shardq.Retry(attempts=1))
    clerk.failing = {"bad"}
    async with at_work(client, clerk):
        async with queue.producer() as producer:
            await producer.send("bad", key="b")
        await queue.split_all()
        await send(queue, 0)
        await until(lambda: clerk.total == 3 * len(KEYS), 20, "all but the bad one")
        clerk.failing.clear()
        assert await queue.dead_letters(GROUP).replay() == 1
        await until(lambda: clerk.done["b"] == ["bad"], 20, "the one that was replayed")
        await until(lambda: drained_all(queue), 20, "nothing left")


# -- balance and autosplit ---------------------------------------------------------------------------------------------


async def test_new_shards_are_spread_whatever_is_retired(client: shardq.Client, queue_name: str) -> None:
    queue = await client.queue(queue_name, shards=4)
    names = ("w0", "w1")

    async def even(each: int) -> bool:
        held = await owners(queue)
        return Counter(held.get(shard.id) for shard in queue.table.shards) == dict.fromkeys(names, each)

    async with at_work(client, *(Clerk(queue_name, name=name) for name in names)):
        await until(lambda: even(2), 20, "two of the four for each")
        for shard in [shard for shard, owner in (await owners(queue)).items() if owner == "w0"]:
            await queue.split(shard)
        await until(lambda: even(3), 20, "three of the six for each, though one of them had both of the old ones")


async def test_children_are_owned_where_the_group_is_balanced_by_load(client: shardq.Client, queue_name: str) -> None:
    queue = await client.queue(queue_name, shards=2)
    clerks = [Clerk(queue_name, balance="load"), Clerk(queue_name, balance="load")]
    async with at_work(client, *clerks):
        await send(queue, 0)
        await queue.split_all()
        await send(queue, 3)
        await until(lambda: sum(clerk.total for clerk in clerks) == 6 * len(KEYS), 20, "all to be handled")
        await until(lambda: owned_by_somebody(queue), 20, "owners of all")


@pytest.mark.server_kinds("valkey9")
async def test_a_hot_shard_is_split_by_the_coordinator_and_workers_go_on(
    client: shardq.Client, cluster: LocalCluster, queue_name: str
) -> None:
    """Nothing is retained and the worker keeps up: at most moments no message is there to be looked at."""
    # Nobody takes the lead from the coordinator, however slow the machine is: only while it leads it splits.
    settings = WorkerSettings(lease_s=30.0, leader_lease_s=15.0, load_sample_s=0.2)
    stop, bounds = anyio.Event(), AutoSplit(max_shards=5, every_s=1000, hot_for_s=0.5)
    queue = await client.queue(queue_name, shards=4)
    await queue.open_group(GROUP)
    keys = [f"k{number}" for number in range(400) if queue.place_of(f"k{number}") == queue.shards[3]]
    clerk, sent = Clerk(queue_name, lease=30.0), 0
    async with shardq.connect(cluster.url) as leader, anyio.create_task_group() as tasks:
        tasks.start_soon(partial(coordinate, leader, queue_name, GROUP, settings, stop, autosplit=bounds))
        control = pack_command("HGET", queue.keys.control(GROUP), "leader_nonce")

        async def leads() -> bool:
            return bool(await client.pipes.command(queue.keys.control_slot, control))

        await until(leads, 20, "the coordinator to lead")
        async with at_work(client, clerk):

            async def split() -> bool:
                nonlocal sent
                async with queue.producer() as producer:
                    with contextlib.suppress(shardq.NotStored):  # the shard is split while it sends
                        await producer.send_many((key, sent) for key in keys)
                sent += 1
                await queue.refresh()  # the producer may have done so, too
                return len(queue.table.shards) == 5

            await until(split, 30, "shard 3 to be split")
            assert [shard.id for shard in queue.table.shards] == [0, 1, 2, 4, 5]
            await until(lambda: drained(queue), 20, "all of it to be handled")
            stop.set()
    assert clerk.done.keys() == set(keys)
    assert all(numbers == sorted(numbers) for numbers in clerk.done.values())
