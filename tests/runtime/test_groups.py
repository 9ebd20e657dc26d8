"""Groups over all shards of a queue: where they begin, resets under running workers, and that a deleted one is gone."""

from __future__ import annotations

import logging
import signal
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

import shardq
from shardq.core.ids import MessageId, entry_key
from shardq.errors import GroupInUse, UnknownGroup, UsageError
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime.groups import Groups
from shardq.storage import calls, control, groups
from shardq.storage.commands import pack_command
from shardq.storage.groups import Start
from shardq.storage.keys import ShardKeys
from shardq.storage.nodes import node_command
from tests.runtime.harness import GROUP, Traffic, check_equation, drained, owners, running, until, workers
from tests.runtime.judge import judge, read_journal

# Workers are what is tested here; two kinds of server are enough for that.
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis7", "valkey9")]

SHARDS = 4


async def send(queue: shardq.Queue, count: int) -> list[MessageId]:
    """Messages of many keys; returns their ids in the order sent."""
    async with queue.producer() as producer:
        return [MessageId.parse(await producer.send(number, key=f"k{number % 17}")) for number in range(count)]


async def backlog(queue: shardq.Queue, group: str) -> int:
    (found,) = [info for info in await queue.groups() if info.name == group]
    return found.backlog


# -- where a group begins ------------------------------------------------------------------------------------


async def test_each_group_has_its_own_start(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        ids = await send(queue, 60)
        middle = ids[30]
        ms = entry_key(middle.entry)[0]
        from_ms = sum(entry_key(each.entry)[0] >= ms for each in ids)
        from_id = sum(
            (entry_key(each.entry), each.index) >= (entry_key(middle.entry), middle.index)
            if each.shard == middle.shard
            else entry_key(each.entry)[0] >= ms
            for each in ids
        )
        moment = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=ms)
        expected: dict[str, tuple[Any, int]] = {
            "all": ("earliest", 60),
            "none": ("latest", 0),
            "moment": (moment, from_ms),
            "elsewhere": (moment.astimezone(), from_ms),
            "seconds": (ms / 1000, from_ms),
            "whole": (0, 60),
            "to-come": (datetime.now(UTC) + timedelta(days=1), 0),
            "id": (str(middle), from_id),
        }
        for group, (start, _) in expected.items():
            assert await queue.open_group(group, start)
            assert not await queue.open_group(group, "latest"), "it stays where it is"
        found = await queue.groups()
        assert [info.name for info in found] == sorted(expected)
        assert {info.name: info.backlog for info in found} == {name: count for name, (_, count) in expected.items()}
        assert {(info.shards, info.owned, info.workers, info.dead, info.waiting) for info in found} == {
            (SHARDS, 0, (), 0, 0)
        }


async def test_a_group_that_begins_late_is_not_handed_what_was_before(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        async with queue.producer() as producer:
            # In one batch, as far as possible: the start lies inside it.
            async with anyio.create_task_group() as tasks:
                ids: list[str] = []

                async def send_one(number: int) -> None:
                    ids.append(await producer.send(number, key="same"))

                for number in range(20):
                    tasks.start_soon(send_one, number)
        ids.sort(key=lambda text: (entry_key(MessageId.parse(text).entry), MessageId.parse(text).index))
        await queue.open_group("g", ids[13])
        assert await backlog(queue, "g") == 7
        got: list[str] = []
        worker = shardq.Worker(queue_name, group="g", lease=1)

        @worker.handler
        async def take(message: shardq.Message) -> None:
            assert message.attempt == 1
            got.append(message.id)
            if len(got) == 7:
                worker.stop()

        with anyio.fail_after(30):
            await worker.run(client)
        assert got == ids[13:]
        assert await backlog(queue, "g") == 0
        await check_equation(queue)


@pytest.mark.parametrize(
    ("start", "says"),
    [
        ("earlist", "is no start of a group: give 'earliest'"),
        ("", "is no start of a group"),
        ("1795231414661-0", "is no start of a group"),
        ("9/1795231414661-0/7", "names shard 9, which this queue does not have"),
        ("0/1795231414661/7", "is not a message id"),
        ("0/d5/0", "is not a message id"),
        (None, "is no start of a group"),
        (True, "is no start of a group"),
        (b"earliest", "is no start of a group"),
        (datetime(2026, 1, 31), "has no time zone"),
        (datetime(1969, 1, 31, tzinfo=UTC), "is before 1970"),
        (-1.5, "is before 1970"),
        (1795231414661, "not milliseconds"),
        (float("nan"), "is no time"),
        (float("inf"), "is no time"),
    ],
    ids=repr,
)
async def test_what_is_no_position_is_refused(cluster: LocalCluster, queue_name: str, start: Any, says: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        with pytest.raises(UsageError, match=says):
            await queue.open_group("g", start)
        assert await queue.groups() == []
        await queue.open_group("g")
        with pytest.raises(UsageError, match=says):
            await queue.reset_group("g", start)


# -- reset ---------------------------------------------------------------------------------------------------


async def epochs(queue: shardq.Queue) -> dict[int, int]:
    return {shard: found.groups[GROUP].epoch for shard, found in (await queue.counters([GROUP])).items()}


async def totals(queue: shardq.Queue) -> dict[str, int]:
    """What is exported as counters, over all shards."""
    found = [shard.groups[GROUP] for shard in (await queue.counters([GROUP])).values()]
    given_up = [
        await queue.client.pipes.command(keys.slot, pack_command("HGET", keys.group(GROUP), "given_up"))
        for keys in queue.shards.values()
    ]
    return {
        "delivered": sum(each.delivered for each in found) + sum(map(int, given_up)),
        "acked": sum(each.acked for each in found),
        "retried": sum(each.retried for each in found),
        "dead": sum(each.dead for each in found),
    }


async def test_a_forced_reset_under_running_workers_has_everything_behind_it_handled_again(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=12, retention="1h")
        traffic = Traffic()
        with workers(cluster.url, queue_name, tmp_path, handler_s=0.002) as start:
            started = [start(), start()]
            names = {worker.name for worker in started}

            async def spread() -> bool:
                owned = await owners(queue)
                return len(owned) == 12 and set(owned.values()) == names

            await until(spread, 20, "both workers to have shards")
            async with queue.producer() as producer, anyio.create_task_group() as tasks:
                tasks.start_soon(traffic.keep_sending, producer, 0.02)
                await until(lambda: len(read_journal(tmp_path)) > 1500, 40, "traffic")
                before, counted = await epochs(queue), await totals(queue)
                with pytest.raises(GroupInUse, match="nothing was changed: worker w"):
                    await queue.reset_group(GROUP, "earliest")
                assert await epochs(queue) == before
                assert await queue.reset_group(GROUP, "earliest", force=True) > 600
                await until(spread, 20, "both workers to have their shards back")
                traffic.stopped = True

            async def done() -> bool:
                return await backlog(queue, GROUP) == 0

            await until(done, 40, "an empty backlog")
            await check_equation(queue)
            after = await totals(queue)
            assert all(after[name] >= counted[name] for name in after)
            facts = read_journal(tmp_path)
            again = [fact for fact in facts if fact.fence > before[int(fact.id.split("/")[0])]]
            verdict = judge(traffic.sent, again)
            assert (verdict.lost, verdict.disorder, verdict.overlaps, verdict.stale) == (set(), [], [], [])
            assert verdict.handled == traffic.total
            assert judge(traffic.sent, facts).overlaps == []
            assert after["acked"] >= counted["acked"] + traffic.total
            assert {name: after[name] for name in ("retried", "dead")} == {"retried": 0, "dead": 0}
            # What a reset gave up was delivered but never acknowledged: delivered - given up = acknowledged.
            assert after["delivered"] >= after["acked"]


async def test_a_paused_group_rests_and_goes_on_where_it_was(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=6)
        with pytest.raises(UnknownGroup):
            await queue.pause_group(GROUP)
        await queue.open_group(GROUP)
        traffic = Traffic()

        async def all_owned() -> bool:
            return len(await owners(queue)) == 6

        async def rests() -> bool:
            return not await owners(queue)

        def journal_has(count: int) -> bool:
            return len(read_journal(tmp_path)) > count

        def traffic_has(count: int) -> bool:
            return traffic.total > count

        with workers(cluster.url, queue_name, tmp_path, handler_s=0.002) as start:
            started = [start(), start()]
            async with queue.producer() as producer, anyio.create_task_group() as tasks:
                tasks.start_soon(traffic.keep_sending, producer, 0.02)
                for times in range(1, 4):
                    await until(partial(journal_has, 600 * times), 40, "traffic")
                    await queue.pause_group(GROUP)
                    await queue.pause_group(GROUP)
                    await until(rests, 20, "every lease to be given back")
                    (info,) = await queue.groups()
                    assert (info.paused, info.owned) == (True, 0)
                    handled, stored = len(read_journal(tmp_path)), traffic.total
                    started.append(start())  # takes nothing either
                    await until(partial(started[-1].says, "paused"), 20, "the new worker to know")
                    await until(partial(traffic_has, stored + 100), 20, "more messages")
                    assert await rests()
                    assert len(read_journal(tmp_path)) == handled
                    await queue.resume_group(GROUP)
                    await until(all_owned, 20, "the shards to be taken again")
                traffic.stopped = True
            await until(lambda: drained(queue), 40, "an empty backlog")
        verdict = judge(traffic.sent, read_journal(tmp_path))
        assert (verdict.lost, verdict.repeated, verdict.disorder, verdict.overlaps) == (set(), set(), [], [])
        (info,) = await queue.groups()
        assert not info.paused


async def test_a_group_that_is_resumed_while_its_workers_still_leave(cluster: LocalCluster, queue_name: str) -> None:
    """The handler that runs keeps the lease; the pause is over before it ends."""
    worker = shardq.Worker(queue_name, group=GROUP, lease=2.0)
    began, go, seen = anyio.Event(), anyio.Event(), list[int]()

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        began.set()
        await go.wait()
        seen.append(message.value)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        await queue.open_group(GROUP)
        async with running(client, worker), queue.producer() as producer:
            await producer.send(1, key="k")
            await began.wait()
            await queue.pause_group(GROUP)
            await queue.resume_group(GROUP)
            await producer.send(2, key="k")
            go.set()
            await until(lambda: drained(queue), 30, "an empty backlog")
            await queue.pause_group(GROUP)
            await producer.send(3, key="k")

            async def rests() -> bool:
                return not await owners(queue)

            await until(rests, 30, "the lease to be given back")
            await queue.resume_group(GROUP)
            await until(lambda: drained(queue), 30, "an empty backlog")
    assert seen == [1, 2, 3]


async def test_a_shard_that_changes_hands_as_its_group_is_paused_is_given_back(
    cluster: LocalCluster, queue_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The holder knows that its heir is ready and waits for a handler; the heir rests before it is given the lease."""
    caplog.set_level(logging.INFO, "shardq")
    began, go, seen = set[str](), anyio.Event(), set[str]()

    def worker(name: str) -> shardq.Worker:
        made = shardq.Worker(queue_name, group=GROUP, name=name, lease=2.0)

        @made.handler
        async def handle(message: shardq.Message) -> None:
            began.add(message.value)
            await go.wait()
            seen.add(message.value)

        return made

    async with shardq.connect(cluster.url) as client, shardq.connect(cluster.url) as other:
        queue = await client.queue(queue_name, shards=2)
        await queue.open_group(GROUP)
        keys = {queue.place_of(f"k{number}"): f"k{number}" for number in range(50)}
        seen_ready: dict[ShardKeys, int] = {}

        async def heir_is_known() -> bool:
            """Two more steps of the holder since then: it has read the answer to the first."""
            for place in keys:
                call = pack_command("HMGET", place.group(GROUP), "heir_ready", "renewals")
                ready, renewals = await client.pipes.command(place.slot, call)
                if ready == b"1" and int(renewals) >= seen_ready.setdefault(place, int(renewals)) + 2:
                    return True
            return False

        async def rests() -> bool:
            return not await owners(queue)

        async with running(client, worker("first")), queue.producer() as producer:
            for key in keys.values():
                await producer.send(key, key=key)
            await until(lambda: len(began) == 2, 20, "handlers on both shards")
            async with running(other, worker("second")):
                await until(heir_is_known, 20, "the first to know that the second is ready")
                await queue.pause_group(GROUP)
                rest = [f"{name} of {queue_name}/{GROUP}: the group is paused" for name in ("first", "second")]
                await until(lambda: all(text in caplog.text for text in rest), 20, "both to know of the pause")
                go.set()
                await until(rests, 20, "every lease to be given back")
                await queue.resume_group(GROUP)
                await until(lambda: drained(queue), 20, "an empty backlog")
    assert seen == set(keys.values())


async def test_killed_workers_need_force_and_the_next_one_begins_at_once(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS, retention="1h")
        traffic = Traffic(keys=8)
        async with queue.producer() as producer:
            await traffic.send(producer, 300)
        with workers(cluster.url, queue_name, tmp_path, lease=30) as start:
            first = start()
            await until(lambda: len(read_journal(tmp_path)) == 600, 30, "all to be handled")
            first.send(signal.SIGKILL)
            await first.wait()
            with pytest.raises(
                GroupInUse, match=rf"worker {first.name} holds shard 0 \(4 shards are held\).*force=True"
            ):
                await queue.reset_group(GROUP, "earliest")
            before = await epochs(queue)
            assert await queue.reset_group(GROUP, "earliest", force=True) == 300
            start()

            async def done() -> bool:
                return await backlog(queue, GROUP) == 0

            await until(done, 25, "all to be handled again, sooner than a lease time")
            again = [fact for fact in read_journal(tmp_path) if fact.fence > max(before.values())]
            verdict = judge(traffic.sent, again)
            assert (verdict.lost, verdict.repeated, verdict.disorder) == (set(), set(), [])


async def test_a_reset_between_positions_of_a_queue_at_rest(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        ids = await send(queue, 50)
        with pytest.raises(UnknownGroup, match=r"has no group 'g': queue\.groups\(\)"):
            await queue.reset_group("g", "earliest")
        await queue.open_group("keeper")
        await queue.open_group("g", "latest")
        last = ids[-1]
        for to, count in (("earliest", 50), ("latest", 0), (0.0, 50), (str(last), None), ("earliest", 50)):
            behind = await queue.reset_group("g", to)
            assert behind == await backlog(queue, "g")
            assert count is None or behind == count
        assert await backlog(queue, "keeper") == 50
        await check_equation(queue)


async def test_a_worker_that_comes_in_between_is_named(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        await send(queue, 20)
        await queue.open_group("g")
        keys = queue.shards[2]
        await calls.acquire(client.pipes, keys, "g", "late", "n", 0, None, timeout_s=5, confirm=None)
        monkeypatch.setattr(Groups, "_refuse_if_held", lambda *_: None)
        with pytest.raises(GroupInUse, match=r"3 of 4 shards are reset, worker late holds shard 2.*then repeat this"):
            await queue.reset_group("g", "latest")
        with pytest.raises(GroupInUse, match=r"3 of 4 shards are deleted, worker late holds shard 2.*then repeat this"):
            await queue.delete_group("g")
        (info,) = await queue.groups()
        assert (info.shards, info.owned) == (1, 1)
        await queue.reset_group("g", "latest", force=True)
        (info,) = await queue.groups()
        assert (info.shards, info.owned, info.backlog) == (SHARDS, 0, 0), "it is whole again"


# -- delete --------------------------------------------------------------------------------------------------


def everything(cluster: LocalCluster, queue: str) -> dict[str, Any]:
    """Every key of the queue on every node with what it holds; of streams the entries and groups."""
    held: dict[str, Any] = {}
    for port in cluster.ports:
        for name in node_command("127.0.0.1", port, "KEYS", f"shardq:*{queue}*"):
            kind = node_command("127.0.0.1", port, "TYPE", name)
            look = {"hash": ["HGETALL", name], "stream": ["XRANGE", name, "-", "+"]}.get(str(kind), ["DUMP", name])
            held[name] = node_command("127.0.0.1", port, *look)
            if kind == "hash":
                pairs = zip(held[name][::2], held[name][1::2], strict=True)
                # When a group was deleted is noted for the workers that may still run.
                held[name] = {field: value for field, value in pairs if not field.startswith("gone:")}
            if kind == "stream":
                held[f"groups of {name}"] = node_command("127.0.0.1", port, "XINFO", "GROUPS", name)
    return held


async def test_a_deleted_group_leaves_nothing_behind(cluster: LocalCluster, queue_name: str, tmp_path: Path) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        await queue.open_group("keeper")
        await send(queue, 40)
        async with queue.producer() as producer:
            await producer.send("poison", key="k")
        before = everything(cluster, queue_name)
        with workers(cluster.url, queue_name, tmp_path) as start:
            worker = start()
            await until(lambda: len(read_journal(tmp_path)) > 80, 20, "messages to be handled")
            with pytest.raises(GroupInUse, match=f"nothing was changed: worker {worker.name} holds"):
                await queue.delete_group(GROUP)
            (found,) = [info for info in await queue.groups() if info.name == GROUP]
            assert (found.owned, found.workers) == (SHARDS, (worker.name,))
            worker.send(signal.SIGKILL)
            await worker.wait()
        assert everything(cluster, queue_name) != before
        await queue.delete_group(GROUP, force=True)
        assert everything(cluster, queue_name) == before
        with pytest.raises(UnknownGroup, match="has no group 'g'"):
            await queue.delete_group(GROUP)
        assert everything(cluster, queue_name) == before
        assert [info.name for info in await queue.groups()] == ["keeper"]
        await queue.open_group(GROUP)
        assert await backlog(queue, GROUP) == 41


async def test_workers_end_when_their_group_is_deleted_and_a_new_one_opens_it_anew(
    cluster: LocalCluster, queue_name: str
) -> None:
    ended: dict[str, BaseException | None] = {}
    seen: list[int] = []

    def made(name: str) -> shardq.Worker:
        worker = shardq.Worker(queue_name, group=GROUP, name=name, lease=1.0)

        @worker.handler
        async def handle(message: shardq.Message) -> None:
            seen.append(message.value)

        return worker

    async def run(client: shardq.Client, name: str) -> None:
        try:
            await made(name).run(client)
        except UnknownGroup as error:
            ended[name] = error

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        await send(queue, 20)
        async with anyio.create_task_group() as tasks:
            for name in ("one", "two"):
                tasks.start_soon(run, client, name)

            async def shared() -> bool:
                return set((await owners(queue)).values()) == {"one", "two"} and len(seen) == 20

            await until(shared, 20, "both workers to have shards")
            await queue.delete_group(GROUP, force=True)
            await until(lambda: len(ended) == 2, 20, "both workers to end")
        for error in ended.values():
            assert f"group '{GROUP}' of queue '{queue_name}' was deleted" in str(error)
        assert await queue.groups() == [], "nobody opened it again"
        await send(queue, 20)
        async with running(client, made("three")):
            await until(lambda: len(seen) >= 40, 20, "a worker that comes later to begin anew")
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert ended.keys() == {"one", "two"}


@pytest.mark.parametrize("deleted", range(SHARDS + 1))
async def test_what_was_cut_short_is_completed(cluster: LocalCluster, queue_name: str, deleted: int) -> None:
    """A client that is killed in the middle has done some shards, all shards, or these and no members yet."""
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        await send(queue, 20)
        before = everything(cluster, queue_name)
        await queue.open_group("g")
        await client.pipes.command(queue.keys.control_slot, pack_command("HSET", queue.keys.control("g"), "term", 1))
        for shard in range(deleted):
            await groups.delete_group(client.pipes, queue.shards[shard], "g", force=False)
        assert [info.shards for info in await queue.groups()] == [SHARDS - deleted] * (deleted < SHARDS)
        await queue.delete_group("g")
        assert everything(cluster, queue_name) == before
        for shard in range(deleted):
            await groups.open_group(client.pipes, queue.shards[shard], "g", Start("latest"))
        await queue.open_group("g")
        (info,) = await queue.groups()
        assert info.shards == SHARDS


async def test_members_without_a_lease_keep_a_group_from_being_deleted(cluster: LocalCluster, queue_name: str) -> None:
    """A coordinator, or a worker that has only just come, would bring parts of it back."""
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        await queue.open_group("g")
        for name in "abcdefg":
            await control.beat(
                client.pipes,
                queue.keys,
                "g",
                worker=name,
                nonce="n",
                beats=1,
                leaving=True,
                term=0,
                plan_version=0,
                watch=(),
                timeout_s=5,
            )
        with pytest.raises(GroupInUse, match="its members are a, b, c, d, e and others"):
            await queue.delete_group("g")
        await queue.delete_group("g", force=True)
        assert await queue.groups() == []


async def test_every_call_checks_the_name(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        for call in (
            queue.open_group("not a name"),
            queue.reset_group("not a name", "earliest"),
            queue.delete_group("not a name"),
        ):
            with pytest.raises(UsageError, match="group name 'not a name' is not valid"):
                await call


async def test_many_groups_go_side_by_side(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        got: dict[str, list[Any]] = defaultdict(list)
        for number in range(20):
            await queue.open_group(f"g{number:02}", "latest" if number % 2 else "earliest")
            if number == 9:
                await send(queue, 30)
        assert len(await queue.groups()) == 20
        ran = [shardq.Worker(queue_name, group=f"g{number:02}", lease=2) for number in (8, 9, 10, 11)]
        async with anyio.create_task_group() as tasks:
            for worker in ran:

                @worker.handler
                async def take(message: shardq.Message) -> None:
                    got[message.group].append(message.value)

                tasks.start_soon(worker.run, client)

            async def done() -> bool:
                found = {info.name: info.backlog for info in await queue.groups()}
                return all(found[name] == 0 for name in ("g08", "g09", "g10", "g11"))

            await until(done, 30, "the groups with workers to be through")
            for worker in ran:
                worker.stop()
        assert {name: sorted(values) for name, values in got.items()} == {
            name: list(range(30)) for name in ("g08", "g09", "g10")
        }
        left = {info.name: info.backlog for info in await queue.groups()}
        assert left == {
            f"g{number:02}": 0 if number in (8, 9, 10) or (number > 9 and number % 2) else 30 for number in range(20)
        }
