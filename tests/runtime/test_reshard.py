"""Changing the number of shards: who stops anywhere is followed by another; what was stored, or waits, is found."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, cast

import anyio
import pytest

import shardq
from shardq.core import records
from shardq.core import reshard as reshards
from shardq.core.hashing import key_hash
from shardq.core.reshard import Reshard
from shardq.core.routing import RoutingTable
from shardq.errors import JobTimeout, QueueMismatch, ReshardUnderWay, StoreUnavailable, UnknownQueue, UsageError
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime import reshard as resharding
from shardq.runtime.reshard_state import Unfinished
from shardq.storage import calls, queues, reshard, schedules
from shardq.storage.commands import pack_command
from shardq.storage.keys import Keys
from shardq.storage.pipes import Pipes
from tests.runtime.harness import until
from tests.runtime.test_removal import keys_of
from tests.storage.rig import Rig, one

# The functions themselves are tested on every kind (tests/storage/test_functions_reshard.py).
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis8", "valkey9")]

HOUR = 3600.0


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[shardq.Client]:
    async with shardq.connect(cluster.url) as client:
        yield client


def rig(queue: shardq.Queue, shard: int) -> Rig:
    """One shard of the queue, to call functions on."""
    made = Rig(queue.client, queue.name)
    made.shard = queue.shards[shard]
    return made


async def finish(queue: shardq.Queue, shard: int, group: str = "g") -> int:
    """The group finishes the shard; returns how many entries it had to do."""
    made = rig(queue, shard)
    held_its_keys = {each.id: queue.keys.of(each) for each in queue.table.ancestors(shard)}
    acquired = await calls.acquire(
        made.pipes, made.shard, group, "w", "n", 0, None, timeout_s=10, confirm=None, parents=held_its_keys
    )
    assert acquired.status == "OK"
    token = f"{acquired.epoch}:n"
    done = 0
    while entries := await made.fetch(token, group=group):
        messages = sum([len(await values_of(made, entry)) for entry in entries])
        assert (await made.step(token, finished=entries, acked=messages, group=group)).status == "OK"
        done += messages
    await calls.lease_call(made.pipes, made.shard, group, "release", [token], timeout_s=10)
    return done


async def values_of(made: Rig, entry: str) -> Sequence[Any]:
    ((_, fields),) = await made.command("XRANGE", made.shard.stream, entry, entry)
    return records.decode(fields[3]).values


async def gate(queue: shardq.Queue, shard: int, group: str = "g") -> str:
    return str((await rig(queue, shard).command("HGET", queue.shards[shard].group(group), "gate")).decode())


async def state(queue: shardq.Queue, shard: int) -> str | None:
    return await rig(queue, shard).meta("state")


async def filled(client: shardq.Client, name: str, shards: int = 2) -> shardq.Queue:
    """A queue with a group, 20 messages, 6 that are delayed, and one that was sent under a dedupe id."""
    queue = await client.queue(name, shards=shards)
    await queue.open_group("g")
    async with queue.producer() as producer:
        for number in range(20):
            await producer.send(number, key=f"k{number}")
        for number in range(5):
            await producer.send(number, key=f"k{number}", delay=HOUR)
        await producer.send("once", delay=HOUR, dedupe_id="id")
    return queue


async def delayed(queue: shardq.Queue) -> dict[int, int]:
    return {shard: found.delayed for shard, found in (await queue.counters([])).items()}


# -- stopping anywhere -------------------------------------------------------------------------------------------------


class Cut:
    """In the place of a client's pipes: the call of number `at` is not carried out, or its answer is lost."""

    def __init__(self, pipes: Pipes, at: int, *, lost: bool) -> None:
        self._pipes, self._left, self._lost = pipes, at, lost
        self.cluster = pipes.cluster
        self.cut = False

    async def call(self, *args: Any, **more: Any) -> Any:
        return await self._do(lambda: self._pipes.call(*args, **more))

    async def command(self, *args: Any, **more: Any) -> Any:
        return await self._do(lambda: self._pipes.command(*args, **more))

    async def _do(self, do: Callable[[], Awaitable[Any]]) -> Any:
        self._left -= 1
        if self._left >= 0:
            return await do()
        if self._left == -1 and self._lost:
            await do()
        self.cut = True
        raise StoreUnavailable("cut off")


async def cut_off(pipes: Pipes, at: int, do: Callable[[Pipes], Awaitable[object]], *, lost: bool) -> bool:
    """Does it with pipes that are cut at that call; false when it needed fewer."""
    cut = Cut(pipes, at, lost=lost)
    try:
        await do(cast("Pipes", cut))
    except StoreUnavailable:
        assert cut.cut
    return cut.cut


async def check_done(queue: shardq.Queue, plan: Reshard) -> None:
    """The plan was carried out, nothing is left of it to do, and nothing was lost."""
    stored = await queues.stored_queue(queue.client.pipes, queue.keys)
    assert stored is not None
    assert (stored.reshard, stored.committed, stored.table) == (b"", False, plan.table.to_bytes())
    assert await queue.refresh()
    assert [await state(queue, parent) for parent in plan.parents] == ["sealed"] * len(plan.parents)
    for child in plan.children:
        assert await state(queue, child.id) == "open"
        assert await gate(queue, child.id) == "1"
    where = await delayed(queue)
    assert sum(where.values()) == 6
    assert [where[parent] for parent in plan.parents] == [0] * len(plan.parents)
    assert [info.backlog for info in await queue.groups()] == [20]
    assert [record.value async for record in queue.history(key="k7")] == [7]


@pytest.mark.parametrize("lost", [False, True], ids=["not done", "answer lost"])
async def test_wherever_it_stops_another_completes_it(client: shardq.Client, queue_name: str, lost: bool) -> None:
    stops = 0
    for at in itertools.count():
        queue = await filled(client, f"{queue_name}-{at}")
        plan = reshards.split_all(queue.table)
        await resharding.begin(client.pipes, queue.keys, plan)
        keys = queue.keys

        async def carry_on(pipes: Pipes, keys: Any = keys) -> None:
            await resharding.carry_on(pipes, keys)

        if not await cut_off(client.pipes, at, carry_on, lost=lost):
            break
        stops += 1
        await resharding.carry_on(client.pipes, queue.keys)
        await resharding.look_after(client.pipes, queue.keys)
        assert not await resharding.carry_on(client.pipes, queue.keys)
        await check_done(queue, plan)
        await queue.delete()
    assert stops > 20


@pytest.mark.parametrize("done", range(len(resharding.STEPS) + 1))
async def test_several_carry_it_on_at_once(client: shardq.Client, queue_name: str, done: int) -> None:
    queue = await filled(client, queue_name)
    plan = reshards.split_all(queue.table)
    await resharding.begin(client.pipes, queue.keys, plan)
    slow = resharding.Work(client.pipes, queue.keys, plan.to_bytes())
    for step in resharding.STEPS[:done]:
        await step(slow)
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(resharding.carry_on, client.pipes, queue.keys)
    for step in resharding.STEPS[done:]:
        if not await step(slow):
            break
    await resharding.look_after(client.pipes, queue.keys)
    await check_done(queue, plan)


@pytest.mark.parametrize("done", range(len(resharding.STEPS) + 1))
async def test_a_group_opened_meanwhile_is_on_every_shard(client: shardq.Client, queue_name: str, done: int) -> None:
    """By somebody who knows the old shards only."""
    queue = await filled(client, queue_name)
    plan = reshards.split_all(queue.table)
    await resharding.begin(client.pipes, queue.keys, plan)
    work = resharding.Work(client.pipes, queue.keys, plan.to_bytes())
    for step in resharding.STEPS[:done]:
        assert await step(work)
    stale = shardq.Queue(client, queue.keys, queue.table)
    assert await stale.open_group("late", "latest")
    for step in resharding.STEPS[done:]:
        assert await step(work)
    await queue.refresh()
    registered = {shard: found.registered for shard, found in (await queue.counters([])).items()}
    assert registered == dict.fromkeys(range(6), ("g", "late"))
    assert [await gate(queue, child.id, "late") for child in plan.children] == ["1"] * 4
    (_, info) = await queue.groups()
    assert (info.name, info.backlog, info.shards) == ("late", 0, 6)


@pytest.mark.parametrize("lost", [False, True], ids=["not done", "answer lost"])
async def test_a_removal_that_stops_anywhere_is_completed(
    cluster: LocalCluster, client: shardq.Client, queue_name: str, lost: bool
) -> None:
    for at in itertools.count():
        queue = await client.queue(f"{queue_name}-{at}", shards=1)
        await queue.open_group("g")
        await queue.split(0)
        keys = queue.keys

        async def look_after(pipes: Pipes, keys: Any = keys) -> None:
            await resharding.look_after(pipes, keys)

        if not await cut_off(client.pipes, at, look_after, lost=lost):
            break
        assert await resharding.look_after(client.pipes, queue.keys) == {}
        assert await queue.refresh()
        assert (queue.table.retired, queue.table.removed) == ((), ((0, 0),))
        left = [
            name
            for name in keys_of(cluster, queue.name)
            if name.endswith(("0:stream", "0:meta", "0:delayed", "0:group:g"))
        ]
        assert not left
        assert await finish(queue, 1) == 0  # its gate opens
        await queue.delete()
    assert at > 5


# -- what a user asks for ----------------------------------------------------------------------------------------------


async def test_split_merge_and_scale(client: shardq.Client, queue_name: str) -> None:
    queue = await filled(client, queue_name)
    shards = queue.shards
    assert await queue.split(0, into=3) == [2, 3, 4]
    assert queue.shards is shards
    assert list(shards) == [2, 3, 4, 1, 0]
    assert await queue.merge([4, 3]) == [5]
    assert await queue.scale(2) == [6]
    assert await queue.scale(2) == []
    assert await queue.split_all() == [7, 8, 9, 10]
    assert [(shard.id, shard.home_id) for shard in queue.table.shards] == [(7, 0), (8, 0), (9, 1), (10, 1)]
    assert await queue.scale(8) == [*range(11, 19)]
    other = await client.queue(queue_name)
    assert other.table == queue.table
    assert sum(found.delayed for found in (await queue.counters()).values()) == 6
    assert [info.backlog for info in await queue.groups()] == [20]


@pytest.mark.parametrize(
    ("do", "why"),
    [
        (lambda queue: queue.split(9), "no shard 9"),
        (lambda queue: queue.split(0, into=1), "2 or more"),
        (lambda queue: queue.merge([0]), "two or more"),
        (lambda queue: queue.merge([0, 1]), "different hash slots"),
        (lambda queue: queue.scale(1), "declared with 2"),
    ],
)
async def test_what_can_not_be_is_refused_before_anything(
    client: shardq.Client, queue_name: str, do: Callable[[shardq.Queue], Awaitable[object]], why: str
) -> None:
    queue = await client.queue(queue_name, shards=2)
    with pytest.raises(UsageError, match=why):
        await do(queue)
    assert await queue.reshard() is None
    assert not await queue.refresh()


async def test_another_one_under_way_is_completed_and_named(client: shardq.Client, queue_name: str) -> None:
    queue = await filled(client, queue_name)
    plan = reshards.split(queue.table, 1)
    await resharding.begin(client.pipes, queue.keys, plan)
    with pytest.raises(ReshardUnderWay, match="was under way and is done"):
        await queue.split(0)
    await resharding.look_after(client.pipes, queue.keys)
    assert [shard.id for shard in queue.table.shards] == [0, 2, 3]
    assert await queue.split(0) == [4, 5]


async def test_a_repeated_call_completes_its_own_plan(client: shardq.Client, queue_name: str) -> None:
    queue = await filled(client, queue_name)
    await resharding.begin(client.pipes, queue.keys, reshards.split(queue.table, 1))
    assert await queue.split(1) == [2, 3]


async def test_two_at_once(client: shardq.Client, queue_name: str) -> None:
    queue = await filled(client, queue_name, 3)
    outcomes: list[object] = []

    async def split(shard: int) -> None:
        try:
            outcomes.append(await (await client.queue(queue_name)).split(shard))
        except ReshardUnderWay as error:
            outcomes.append(str(error))

    async with anyio.create_task_group() as tasks:
        for shard in range(3):
            tasks.start_soon(split, shard)
    await queue.refresh()
    made = [outcome for outcome in outcomes if isinstance(outcome, list)]
    assert made
    assert all("repeat this" in outcome for outcome in outcomes if isinstance(outcome, str))
    assert len(queue.table.shards) == 3 + len(made)


async def test_a_plan_that_sealed_nothing_can_be_given_up(client: shardq.Client, queue_name: str) -> None:
    queue = await filled(client, queue_name)
    assert not await queue.give_up_reshard()
    plan = reshards.split(queue.table, 0)
    await resharding.begin(client.pipes, queue.keys, plan)
    work = resharding.Work(client.pipes, queue.keys, plan.to_bytes())
    assert await resharding.open_children(work)
    found = await queue.reshard()
    assert found is not None
    assert (found.phase, found.parents) == ("opening", (0,))
    assert await queue.give_up_reshard()
    assert not await resharding.commit(work)
    assert await state(queue, 0) == "open"
    children = [queue.keys.of(child) for child in plan.children]
    assert [await rig(queue, 0).command("EXISTS", child.stream, child.meta) for child in children] == [0, 0]
    assert await queue.split(0) == [4, 5]  # ids are not given again
    await resharding.begin(client.pipes, queue.keys, reshards.split(queue.table, 1))
    late = resharding.Work(client.pipes, queue.keys, reshards.split(queue.table, 1).to_bytes())
    assert await resharding.commit(late)
    with pytest.raises(ReshardUnderWay, match="can't be given up"):
        await queue.give_up_reshard()
    found = await queue.reshard()
    assert found is not None
    assert (found.phase, found.parents) == ("sealing", (0, 1))


async def test_who_slept_while_it_was_given_up_leaves_no_keys(client: shardq.Client, queue_name: str) -> None:
    queue = await filled(client, queue_name)
    plan = reshards.split(queue.table, 0)
    await resharding.begin(client.pipes, queue.keys, plan)
    sleeper = resharding.Work(client.pipes, queue.keys, plan.to_bytes())
    assert await queue.give_up_reshard()
    assert await resharding.open_children(sleeper)
    children = [queue.keys.of(child) for child in plan.children]
    there = [key for child in children for key in (child.stream, child.meta, child.group("g"))]
    assert await rig(queue, 0).command("EXISTS", *there) == 6
    assert not await resharding.commit(sleeper)
    assert await rig(queue, 0).command("EXISTS", *there) == 0
    assert [await state(queue, shard) for shard in (0, 1)] == ["open", "open"]


async def test_a_plan_given_up_during_a_leaders_look_leaves_no_keys(
    client: shardq.Client, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader has read a table that knows nothing of the plan when it finds what is to be deleted."""
    queue = await filled(client, queue_name)
    plan = reshards.split(queue.table, 0)
    read = resharding.read_table

    async def read_then_wait(pipes: Pipes, keys: Keys) -> RoutingTable:
        monkeypatch.setattr(resharding, "read_table", read)
        table = await read(pipes, keys)
        await resharding.begin(pipes, keys, plan)
        assert await resharding.open_children(resharding.Work(pipes, keys, plan.to_bytes()))
        leaving = [child.id for child in plan.children]
        assert await reshard.end(pipes, keys, plan.to_bytes(), plan.given_up(), given_up=True, leaving=leaving) == "OK"
        return table

    monkeypatch.setattr(resharding, "read_table", read_then_wait)
    await resharding.look_after(client.pipes, queue.keys)
    children = [queue.keys.of(child) for child in plan.children]
    assert [await rig(queue, 0).command("EXISTS", child.stream, child.meta) for child in children] == [0, 0]
    assert await reshard.leaving(client.pipes, queue.keys) == []


async def test_what_is_left_to_do_is_told(client: shardq.Client, queue_name: str) -> None:
    queue = await filled(client, queue_name, 1)
    await queue.split(0)
    found = await queue.reshard()
    assert found is not None
    assert (found.phase, found.delayed) == ("draining", {})
    assert found.unfinished == (Unfinished("g", 0, 20, 0),)
    assert found.stay == {0: "messages that group g has not finished"}
    assert await finish(queue, 0) == 20
    found = await queue.reshard()
    assert found is not None
    assert (found.phase, found.unfinished) == ("retired", ())
    assert "producers" in found.stay[0]


@pytest.mark.parametrize(("shards", "fits"), [(2, True), (4, True), (3, False), (8, False)])
async def test_code_that_declares_the_queue_goes_on(
    client: shardq.Client, queue_name: str, shards: int, fits: bool
) -> None:
    queue = await client.queue(queue_name, shards=2)
    await queue.split_all()
    if fits:
        assert (await client.queue(queue_name, shards=shards)).table == queue.table
    else:
        with pytest.raises(QueueMismatch, match=rf"4 shards \(it was declared with 2\), not {shards}.*scale"):
            await client.queue(queue_name, shards=shards)


# -- order, and what is carried over -----------------------------------------------------------------------------------


async def test_a_group_begins_on_the_children_when_it_is_through_with_every_ancestor(
    client: shardq.Client, queue_name: str
) -> None:
    """Also when the shard between them never got a message."""
    queue = await filled(client, queue_name, 1)
    await queue.split(0)
    await queue.split(1)
    made = rig(queue, 3)
    parents = {each.id: queue.keys.of(each) for each in queue.table.ancestors(3)}
    assert sorted(parents) == [0, 1]
    acquired = await calls.acquire(
        made.pipes, made.shard, "g", "w", "n", 0, None, timeout_s=10, confirm=None, parents=parents
    )
    assert (acquired.status, acquired.parent, acquired.left) == ("GATED", 0, 20)
    assert await finish(queue, 0) == 20
    assert await finish(queue, 3) == 0
    assert await finish(queue, 1) == 0


async def test_a_reset_shuts_the_gates_again(client: shardq.Client, queue_name: str) -> None:
    queue = await client.queue(queue_name, shards=1, retention="1h")
    await queue.open_group("g")
    async with queue.producer() as producer:
        await producer.send("a", key="k")
    await queue.split(0)
    assert (await finish(queue, 0), await finish(queue, 1), await finish(queue, 2)) == (1, 0, 0)
    assert [await gate(queue, shard) for shard in (1, 2)] == ["", ""]
    assert await queue.reset_group("g", "earliest") == 1
    assert [await gate(queue, shard) for shard in (1, 2)] == ["1", "1"]
    assert (await finish(queue, 0), await finish(queue, 1)) == (1, 0)


async def test_what_is_asked_for_by_id_is_found_after_the_split(client: shardq.Client, queue_name: str) -> None:
    queue = await client.queue(queue_name, shards=1)
    await queue.open_group("g")
    async with queue.producer() as producer:
        job = await producer.submit("job", key="k")
        later = await producer.send("later", key="k", delay=HOUR)
        sent = await producer.send("sent", key="k", dedupe_id="id")
    await queue.split(0)
    assert (await queue.job(job.id).state()).status == "queued"
    with pytest.raises(JobTimeout):
        await queue.job(job.id).wait(0.01)
    async with (await client.queue(queue_name)).producer() as producer:
        again = await producer.send("sent", key="k", dedupe_id="id")
        assert again.partition("/")[2] == sent.partition("/")[2]
    assert [record.value async for record in queue.history(key="k")] == ["job", "sent"]
    assert later.startswith("0/d")
    assert await queue.delete_message(later)
    with pytest.raises(UsageError, match="not among the delayed"):
        await queue.delete_message(later)
    await queue.delete_message(sent)
    assert [record.value async for record in queue.history(key="k")] == ["job"]
    with pytest.raises(UsageError, match="has no shard 9"):
        queue.job(f"{queue_name}/9/{'0' * 16}")


async def test_ids_of_a_removed_shard_are_found(client: shardq.Client, queue_name: str) -> None:
    queue = await client.queue(queue_name, shards=1)
    async with queue.producer() as producer:
        job = await producer.submit("job", key="k", delay=HOUR)
    later = f"0/{(await rig(queue, 0).command('ZRANGE', queue.shards[0].delayed, 0, 0))[0].decode()}/0"
    await queue.split(0)
    await rig(queue, 0).command("HDEL", queue.shards[0].meta, *await producers(queue, 0))
    assert await resharding.look_after(client.pipes, queue.keys) == {}
    await queue.refresh()
    assert sorted(queue.shards) == [1, 2]
    assert (await queue.job(job.id).state()).status == "queued"
    assert await queue.delete_message(later)


async def test_a_retention_by_size_lets_old_shards_go_when_new_ones_are_full(
    client: shardq.Client, queue_name: str
) -> None:
    queue = await client.queue(queue_name, shards=1, retention="64KB")
    await queue.open_group("g")

    async def fill(messages: int) -> None:
        async with queue.producer() as producer:
            for number in range(messages):
                await producer.send(number.to_bytes(4, "big") * 250, key=f"k{number}")

    async def waits_for() -> list[str]:
        stay = await resharding.look_after(client.pipes, queue.keys)
        return [stay[shard].why for shard in sorted(stay)]

    await fill(40)
    await queue.split(0)
    assert await finish(queue, 0) == 40
    await rig(queue, 0).command("HDEL", queue.shards[0].meta, *await producers(queue, 0))
    assert await waits_for() == ["stored"]
    await fill(30)  # about half of what they may keep
    assert await waits_for() == ["stored"], "these are the newest messages of the queue"
    await fill(60)
    await queue.split(2)  # what took the keys over may have been split itself
    assert await waits_for() == ["stored", "backlog"]
    await finish(queue, 2)
    await fill(120)
    assert (await waits_for())[:1] != ["stored"], "the first one is through"
    await queue.refresh()
    assert [each.shard.id for each in queue.table.retired] == [2]
    assert len([record async for record in queue.history(shards=[1])]) > 20, "nothing of the others went"


async def producers(queue: shardq.Queue, shard: int) -> list[str]:
    fields = await rig(queue, shard).command("HKEYS", queue.shards[shard].meta)
    return [field.decode() for field in fields if field.startswith(b"p:")]


async def test_delayed_messages_go_where_their_keys_go(client: shardq.Client, queue_name: str) -> None:
    queue = await client.queue(queue_name, shards=1)
    async with queue.producer() as producer:
        for number in range(1200):
            await producer.send(number, key=f"k{number}", delay=HOUR)
        await producer.send("keyless", delay=HOUR)
    await rig(queue, 0).command("ZADD", queue.shards[0].delayed, 1, "nobody's")
    await rig(queue, 0).append_each("x", 1, one("broken", when="in:90000"))
    (name,) = await rig(queue, 0).command("ZRANGE", queue.shards[0].delayed, 1, 1)
    await rig(queue, 0).command("HSET", queue.shards[0].timed, name, b"\xc1")
    children = await queue.split(0, into=4)
    where = await delayed(queue)
    expected = dict.fromkeys(children, 0)
    for number in range(1200):
        expected[queue.table.shard_for(key_hash(f"k{number}")).id] += 1
    expected[children[0]] += 2
    assert {child: where[child] for child in children} == expected
    assert where[0] == 1  # somebody else's


async def test_a_schedule_goes_on_where_it_was(client: shardq.Client, queue_name: str) -> None:
    queue = await client.queue(queue_name, shards=1)
    await client.schedule(queue_name, "s", "0 3 * * *", key="k")
    batch = one("tick").batch
    assert await schedules.append_tick(client.pipes, queue.shards[0], "s", 60, batch, None) == "OK"
    await queue.split(0)
    child = queue.place_of("k")
    assert await schedules.last_tick(client.pipes, child, "s") == (60, False)
    assert await schedules.append_tick(client.pipes, child, "s", 60, batch, None) == "OK"
    assert await rig(queue, 0).command("XLEN", child.stream) == 0
    other = next(key for key in map(str, range(99)) if queue.place_of(key) != child)
    await client.schedule(queue_name, "s", "0 3 * * *", key=other)
    assert (await schedules.last_tick(client.pipes, child, "s"))[1]
    assert await schedules.last_tick(client.pipes, queue.place_of(other), "s") == (60, False)
    assert await client.unschedule(queue_name, "s")


async def test_who_moves_a_schedule_with_an_old_table_finds_its_shard(
    client: shardq.Client, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = await client.queue(queue_name, shards=1)
    before = queue.table
    await client.schedule(queue_name, "s", "0 3 * * *", key="k")
    await queue.split(0)
    stale = shardq.Queue(client, queue.keys, before)

    async def joined(_: str) -> shardq.Queue:
        return stale

    monkeypatch.setattr(client, "queue", joined)
    other = next(key for key in map(str, range(99)) if queue.place_of(key) != queue.place_of("k"))
    await client.schedule(queue_name, "s", "0 3 * * *", key=other)
    assert not (await schedules.last_tick(client.pipes, queue.place_of(other), "s"))[1]
    assert (await schedules.last_tick(client.pipes, queue.place_of("k"), "s"))[1]
    assert await client.unschedule(queue_name, "s")


async def test_bounds_are_shared_by_width(client: shardq.Client, queue_name: str) -> None:
    queue = await client.queue(queue_name, shards=2, max_backlog=100, overflow="reject")
    await queue.split(0, into=5)
    bounds = {shard: await rig(queue, shard).meta("max_backlog") for shard in queue.shards}
    assert bounds == {0: "50", 1: "50", **dict.fromkeys(range(2, 7), "10")}
    await queue.change(max_backlog=200)
    bounds = {shard: await rig(queue, shard).meta("max_backlog") for shard in queue.shards}
    assert bounds == {0: "100", 1: "100", **dict.fromkeys(range(2, 7), "20")}


@pytest.mark.parametrize("under_way", [False, True])
async def test_nothing_is_left_of_a_deleted_queue(
    cluster: LocalCluster, client: shardq.Client, queue_name: str, under_way: bool
) -> None:
    queue = await filled(client, queue_name)
    stale = shardq.Queue(client, queue.keys, queue.table)
    await queue.split(0)
    if under_way:
        plan = reshards.split(queue.table, 1)
        await resharding.begin(client.pipes, queue.keys, plan)
        assert await resharding.open_children(resharding.Work(client.pipes, queue.keys, plan.to_bytes()))
    await stale.delete()
    assert keys_of(cluster, queue_name) == []
    with pytest.raises(UnknownQueue):
        await queue.refresh()
    with pytest.raises(UnknownQueue):
        await resharding.look_after(client.pipes, queue.keys)


async def test_a_seal_that_a_failover_took_back_is_put_back(client: shardq.Client, queue_name: str) -> None:
    queue = await filled(client, queue_name, 1)
    await queue.split(0)
    made = rig(queue, 0)
    await made.command("HSET", made.shard.meta, "state", "open")
    stay = await resharding.look_after(client.pipes, queue.keys)
    assert (stay[0].why, await state(queue, 0)) == ("backlog", "sealed")


async def test_a_damaged_plan_is_said_to_be_corrupt(client: shardq.Client, queue_name: str) -> None:
    queue = await client.queue(queue_name, shards=1)
    packed = pack_command("HSET", queue.keys.routing, "reshard", b"\x01junk")
    await client.pipes.command(queue.keys.control_slot, packed)
    with pytest.raises(shardq.errors.CorruptData, match="plan of a reshard"):
        await resharding.carry_on(client.pipes, queue.keys)


async def test_a_table_of_a_resharded_queue_is_the_one_that_is_stored(client: shardq.Client, queue_name: str) -> None:
    queue = await filled(client, queue_name, 1)
    await queue.split(0)
    stored = await queues.stored_queue(client.pipes, queue.keys)
    assert stored is not None
    assert stored.table[:1] == b"\x02"
    assert RoutingTable.from_bytes(stored.table) == queue.table


async def test_a_follower_goes_on_with_the_new_shards(client: shardq.Client, queue_name: str) -> None:
    queue = await client.queue(queue_name, shards=2)
    found: list[Any] = []

    async def follow(of: shardq.Queue, **chosen: Any) -> None:
        async for record in of.tail(**chosen):
            found.append(record.value)  # noqa: PERF401  # it never ends

    async def send(values: Sequence[str]) -> None:
        async with (await client.queue(queue_name)).producer() as producer:
            for value in values:
                await producer.send(value, key="k")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow, queue)
        await send(["a"])
        await until(lambda: found == ["a"], 20, "the first to be followed")
        await (await client.queue(queue_name)).split_all()
        await send(["b", "c"])
        await until(lambda: found == ["a", "b", "c"], 20, "the new shards to be followed")
        found.clear()
        tasks.start_soon(lambda: follow(queue, key="k"))
        await until(lambda: found == ["a", "b", "c"], 20, "a key to be read on old and new shards")
        tasks.cancel_scope.cancel()
