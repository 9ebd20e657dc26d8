"""Schedules against real clusters: each tick once, whoever lives or dies; what was missed; changes while leaders send.

Ticks come every second here: an expression of six fields has seconds. What takes longer than a test may last is done
by leaders whose clock is ahead.
"""

from __future__ import annotations

import random
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest

import shardq
from shardq.core import records
from shardq.core.hashing import key_hash
from shardq.core.schedule import MISSED, MOST_MISSED, Schedule
from shardq.errors import InvalidKey, InvalidValue, MessageTooLarge, UnknownQueue, UsageError
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime.scheduler import Scheduler
from shardq.runtime.schedules import home
from shardq.storage import schedules
from shardq.storage.commands import pack_command
from shardq.storage.control import control_state
from tests.cli.support import Command, Start, commands
from tests.runtime.harness import until

# Of the server it uses what tests/storage shows of every kind.
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis7")]

EVERY_SECOND = "* * * * * *"
EVERY_MINUTE = "* * * * *"
SHARDS = 4


class Sent(NamedTuple):
    """A tick's message as it stands in the stream."""

    name: str
    tick: int
    shard: int
    key: Any
    value: Any
    headers: Any


async def sent(queue: shardq.Queue, name: str = "s") -> list[Sent]:
    """What a schedule has sent, by shard and there in the order of the stream."""
    found = []
    for shard, keys in queue.shards.items():
        entries = await queue.client.pipes.command(keys.slot, pack_command("XRANGE", keys.stream, "-", "+"))
        for _, fields in entries:
            batch = records.decode(fields[3])
            assert batch.headers is not None
            for key, value, headers in zip(batch.keys, batch.values, batch.headers, strict=True):
                assert headers is not None
                tick = int(datetime.fromisoformat(str(headers["shardq-tick"])).timestamp())
                found.append(Sent(str(headers["shardq-schedule"]), tick, shard, key, value, headers))
    return [each for each in found if each.name == name]


async def ticks(queue: shardq.Queue, name: str = "s") -> list[int]:
    return sorted(each.tick for each in await sent(queue, name))


def assert_each_second_once(found: list[int], at_least: int) -> None:
    assert {tick: number for tick, number in Counter(found).items() if number > 1} == {}
    assert {other - one for one, other in pairwise(sorted(found))} <= {1}
    assert len(found) >= at_least


@asynccontextmanager
async def declared(cluster: LocalCluster, name: str) -> AsyncIterator[tuple[shardq.Client, shardq.Queue]]:
    async with shardq.connect(cluster.url) as client:
        yield client, await client.queue(name, shards=SHARDS)


@asynccontextmanager
async def leading(
    queue: shardq.Queue, *ahead_s: float, leads: Callable[[], bool] = lambda: True
) -> AsyncIterator[None]:
    """One leader for each number, its clock so many seconds ahead."""

    def clock(ahead: float) -> Callable[[], float]:
        return lambda: time.time() + ahead

    async with anyio.create_task_group() as tasks:
        for ahead in ahead_s or (0.0,):
            leader = Scheduler(pipes=queue.client.pipes, keys=queue.keys, leads=leads, clock=clock(ahead))
            tasks.start_soon(leader.run)
        yield
        tasks.cancel_scope.cancel()


async def until_sent(queue: shardq.Queue, count: int, name: str = "s") -> None:
    async def there() -> bool:
        return len(await sent(queue, name)) >= count

    await until(there, 30, f"{count} messages of schedule {name}")


# -- setting, removing, listing ---------------------------------------------------------------------------


async def test_it_is_set_listed_and_removed(cluster: LocalCluster, queue_name: str) -> None:
    async with declared(cluster, queue_name) as (client, _):
        assert await client.schedules(queue_name) == []
        nightly = await client.schedule(
            queue_name,
            "nightly",
            "0 3 * * *",
            key=b"\0k",
            value={"n": 1},
            headers={"a": b"b"},
            timezone="Europe/Berlin",
        )
        other = await client.schedule(queue_name, "a", EVERY_MINUTE, missed="skip")
        assert await client.schedules(queue_name) == [other, nightly]
        assert (nightly.name, nightly.cron, nightly.timezone) == ("nightly", "0 3 * * *", "Europe/Berlin")
        assert (nightly.key, nightly.value, nightly.headers) == (b"\0k", {"n": 1}, {"a": b"b"})
        assert abs(nightly.since_ms - time.time() * 1000) < 60_000
        assert await client.unschedule(queue_name, "nightly")
        assert not await client.unschedule(queue_name, "nightly")
        assert await client.schedules(queue_name) == [other]


async def test_setting_it_again_changes_nothing(cluster: LocalCluster, queue_name: str) -> None:
    async with declared(cluster, queue_name) as (client, queue):
        first = await client.schedule(
            queue_name, "s", EVERY_MINUTE, key="k", value=[1, {"a": b"x"}], headers={"h": "v"}
        )
        version = await schedules.version(client.pipes, queue.keys)
        again = await client.schedule(
            queue_name, "s", EVERY_MINUTE, key="k", value=(1, {"a": b"x"}), headers={"h": "v"}
        )
        assert again == first
        assert await schedules.version(client.pipes, queue.keys) == version


async def test_new_times_begin_now_and_other_changes_do_not(cluster: LocalCluster, queue_name: str) -> None:
    async with declared(cluster, queue_name) as (client, _):
        first = await client.schedule(queue_name, "s", EVERY_MINUTE)
        await anyio.sleep(0.01)
        changed = await client.schedule(queue_name, "s", EVERY_MINUTE, key="k", value=2, missed="all")
        assert (changed.since_ms, changed.value) == (first.since_ms, 2)
        await anyio.sleep(0.01)
        moved = await client.schedule(queue_name, "s", "0 * * * *", key="k", value=2, missed="all")
        assert moved.since_ms > first.since_ms
        await anyio.sleep(0.01)
        zoned = await client.schedule(
            queue_name, "s", "0 * * * *", key="k", value=2, missed="all", timezone="Asia/Tokyo"
        )
        assert zoned.since_ms > moved.since_ms


async def test_many_workers_that_start_at_once_set_it_once(cluster: LocalCluster, queue_name: str) -> None:
    async with declared(cluster, queue_name) as (client, _):
        stood: list[Schedule] = []

        async def start(key: str) -> None:
            stood.append(await client.schedule(queue_name, "s", EVERY_MINUTE, key=key))

        for key in ("one", "two"):
            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(start, key)
        (stands,) = await client.schedules(queue_name)
        assert stood[-1] == stands
        assert len({each.since_ms for each in stood}) == 1


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"name": ""}, UsageError, "schedule name"),
        ({"name": "a b"}, UsageError, "schedule name"),
        ({"name": "x" * 65}, UsageError, "schedule name"),
        ({"name": "a/b"}, UsageError, "schedule name"),
        ({"cron": "61 * * * *"}, UsageError, "is not a cron expression"),
        ({"cron": None}, UsageError, "is not a cron expression"),
        ({"cron": "* * */20 * 1L"}, UsageError, "would never send"),
        ({"timezone": "Europe/Nowhere"}, UsageError, "time zone"),
        ({"timezone": None}, UsageError, "time zone"),
        ({"missed": "sometimes"}, UsageError, "missed"),
        ({"missed": []}, UsageError, "missed"),
        ({"key": 5}, InvalidKey, "str or bytes"),
        ({"key": "\ud800"}, InvalidKey, "UTF-8"),
        ({"value": object()}, InvalidValue, "can't be carried"),
        ({"value": "\ud800"}, InvalidValue, "UTF-8"),
        ({"value": "x" * 70_000}, MessageTooLarge, "store the value elsewhere"),
        ({"headers": {"a": 1}}, InvalidValue, "header"),
        ({"headers": [1]}, InvalidValue, "headers"),
        ({"headers": {"shardq-tick": "x"}}, InvalidValue, "shardq's own"),
        ({"queue": "no-such-queue"}, UnknownQueue, "does not exist"),
        ({"queue": "a b"}, UsageError, "queue name"),
    ],
)
async def test_what_can_not_be_set(
    cluster: LocalCluster, queue_name: str, change: dict[str, Any], error: type[Exception], text: str
) -> None:
    async with declared(cluster, queue_name) as (client, queue):
        arguments = {"queue": queue_name, "name": "s", "cron": EVERY_MINUTE} | change
        with pytest.raises(error, match=text):
            await client.schedule(**arguments)
        assert await schedules.read_all(client.pipes, queue.keys) == (b"", {})


async def test_what_can_not_be_removed_or_listed(cluster: LocalCluster, queue_name: str) -> None:
    async with declared(cluster, queue_name) as (client, _):
        with pytest.raises(UsageError, match="schedule name"):
            await client.unschedule(queue_name, "a b")
        for call in (client.unschedule("no-such-queue", "s"), client.schedules("no-such-queue")):
            with pytest.raises(UnknownQueue):
                await call


# -- sending ----------------------------------------------------------------------------------------------


async def test_messages_are_what_was_asked_for(cluster: LocalCluster, queue_name: str) -> None:
    async with declared(cluster, queue_name) as (client, queue):
        await client.schedule(
            queue_name, "s", EVERY_SECOND, key="k", value={"n": [1, b"x"]}, headers={"h": b"v"}, timezone="Asia/Tokyo"
        )
        async with leading(queue):
            await until_sent(queue, 2)
        first, second, *_ = await sent(queue)
        assert (first.key, first.value, first.headers["h"]) == ("k", {"n": [1, b"x"]}, b"v")
        assert first.headers["shardq-tick"].endswith("+09:00")
        assert {first.shard} == {queue.table.shard_for(key_hash("k")).id}
        assert second.tick == first.tick + 1


async def test_nobody_sends_who_does_not_lead(cluster: LocalCluster, queue_name: str) -> None:
    async with declared(cluster, queue_name) as (client, queue):
        leads = False
        await client.schedule(queue_name, "s", EVERY_SECOND)
        async with leading(queue, leads=lambda: leads):
            await anyio.sleep(1.5)
            assert await sent(queue) == []
            leads = True
            await until_sent(queue, 1)
            leads = False
            await anyio.sleep(0.2)  # what was under way
            before = await ticks(queue)
            await anyio.sleep(1.5)
            assert await ticks(queue) == before


async def test_leaders_whose_clocks_differ_send_each_tick_once(cluster: LocalCluster, queue_name: str) -> None:
    async with declared(cluster, queue_name) as (client, queue):
        await client.schedule(queue_name, "s", EVERY_SECOND, missed="all")
        await client.schedule(queue_name, "other", EVERY_SECOND, key="other", missed="all")
        async with leading(queue, 0.0, 0.0, 0.3, -2.1, 1.4):
            await until_sent(queue, 6)
            await until_sent(queue, 6, "other")
        assert_each_second_once(await ticks(queue), 6)
        assert_each_second_once(await ticks(queue, "other"), 6)


async def test_each_tick_once_while_its_key_changes(cluster: LocalCluster, queue_name: str) -> None:
    """It moves from shard to shard while leaders with different clocks go by what they read a moment ago."""
    async with declared(cluster, queue_name) as (client, queue):
        await client.schedule(queue_name, "s", EVERY_SECOND, key="0", missed="all")
        async with leading(queue, 0.0, 0.2, -0.8):
            await until_sent(queue, 1)
            for number in range(25):
                await client.schedule(queue_name, "s", EVERY_SECOND, key=str(number % 7), missed="all")
                await anyio.sleep(random.uniform(0, 0.6))
            await until_sent(queue, len(await ticks(queue)) + 2)
        found = await sent(queue)
        assert_each_second_once([each.tick for each in found], 6)
        assert len({each.shard for each in found}) > 1


async def test_a_move_that_was_cut_off_is_undone(cluster: LocalCluster, queue_name: str) -> None:
    """The shard was closed to the schedule, and nobody changed the definition then."""
    async with declared(cluster, queue_name) as (client, queue):
        stands = await client.schedule(queue_name, "s", EVERY_MINUTE, missed="all")
        shard = home(queue.keys, queue.table, stands)
        await schedules.close_ticks(client.pipes, shard, "s", int(time.time()) + 60, None)
        async with leading(queue, 30.0):
            await anyio.sleep(1.5)
            assert await schedules.last_tick(client.pipes, shard, "s") != (0, False), "it may still move"
        async with leading(queue, 300.0, 300.0):
            await until_sent(queue, 5)
        (undone,) = await client.schedules(queue_name)
        assert undone.to_bytes() == stands.next_turn().to_bytes()
        assert not await schedules.swap(client.pipes, queue.keys, "s", stands.to_bytes(), b"", None), "too late to move"
        assert {other - one for one, other in pairwise(await ticks(queue))} == {60}


async def test_each_tick_at_most_once_while_it_comes_and_goes(cluster: LocalCluster, queue_name: str) -> None:
    async with declared(cluster, queue_name) as (client, queue):
        async with leading(queue, 0.0, 0.2, -0.8):
            for _ in range(8):
                await client.schedule(queue_name, "s", EVERY_SECOND, missed="all")
                await anyio.sleep(random.uniform(0, 1.5))
                assert await client.unschedule(queue_name, "s")
                gone = await ticks(queue)
                await anyio.sleep(random.uniform(0, 0.3))
                assert await ticks(queue) == gone, "it is removed and sends"
            await client.schedule(queue_name, "s", EVERY_SECOND, missed="all")
            await until_sent(queue, len(await ticks(queue)) + 1)
        found = await ticks(queue)
        assert len(set(found)) == len(found)


async def test_what_is_broken_stops_no_other(
    cluster: LocalCluster, queue_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with declared(cluster, queue_name) as (client, queue):
        slot, key = queue.keys.control_slot, queue.keys.schedules
        zone = Schedule(name="zone", cron=EVERY_SECOND, timezone="Mars/Base").to_bytes()
        for name, data in (("bytes", b"\xff\0"), ("zone", zone), (b"\xff", b"x")):
            await client.pipes.command(slot, pack_command("HSET", key, name, data))
        async with leading(queue):
            await client.schedule(queue_name, "s", EVERY_SECOND)
            await until_sent(queue, 3)
        assert len(re.findall("schedule zone .* time zone", caplog.text)) == 1
        assert len(re.findall("schedule bytes .* set it again", caplog.text)) == 1
        with pytest.raises(shardq.CorruptData, match="set it again"):
            await client.schedules(queue_name)
        await client.schedule(queue_name, "bytes", EVERY_SECOND)
        assert await client.unschedule(queue_name, "zone")


async def test_what_can_not_be_sent_is_sent_later(
    cluster: LocalCluster, queue_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with declared(cluster, queue_name) as (client, queue):
        await client.schedule(queue_name, "s", EVERY_SECOND, missed="all")
        async with leading(queue):
            await until_sent(queue, 1)
            for shard in queue.shards.values():
                await client.pipes.command(shard.slot, pack_command("HSET", shard.meta, "state", "sealed"))
            await anyio.sleep(2.5)
            for shard in queue.shards.values():
                await client.pipes.command(shard.slot, pack_command("HSET", shard.meta, "state", "open"))
            await until_sent(queue, 5)
        assert_each_second_once(await ticks(queue), 5)
        assert len(re.findall("schedule s .* takes no messages", caplog.text)) == 1


# -- workers ----------------------------------------------------------------------------------------------


async def test_workers_set_it_and_handle_it(cluster: LocalCluster, queue_name: str) -> None:
    """Two of them start at once, and again: each tick is handled once, and the schedule stays as it was set first."""
    handled: list[shardq.Message] = []

    def worker(name: str) -> shardq.Worker:
        made = shardq.Worker(queue_name, group="g", name=name, lease=1)
        made.cron(EVERY_SECOND, name="s", key="k", value={"n": 1}, headers={"h": "v"}, missed="all")
        made.cron(EVERY_MINUTE, name="other", timezone="Europe/Berlin", missed="skip")

        @made.handler
        async def handle(message: shardq.Message) -> None:
            handled.append(message)

        return made

    async with declared(cluster, queue_name) as (client, _):
        stood: list[list[Schedule]] = []
        for count in (2, 4):
            async with anyio.create_task_group() as tasks:
                both = [worker("one"), worker("two")]
                for each in both:
                    tasks.start_soon(each.run, client)
                await until(lambda count=count: len(handled) >= count, 30, "ticks")
                stood.append(await client.schedules(queue_name))
                for each in both:
                    each.stop()
        assert stood[0] == stood[1]
        assert [(each.name, each.missed) for each in stood[0]] == [("other", "skip"), ("s", "all")]
        (first, *_) = [message for message in handled if message.key == "k"]
        assert (first.value, first.headers) == ({"n": 1}, {"h": "v", **(first.headers or {})})
        found = [message.headers["shardq-tick"] for message in handled if message.key == "k" and message.headers]
        assert len(set(found)) == len(found)


def test_a_worker_says_at_once_what_can_not_be_set() -> None:
    worker = shardq.Worker("q", group="g")
    with pytest.raises(UsageError, match="is not a cron expression"):
        worker.cron("every minute", name="s")
    with pytest.raises(UsageError, match="schedule name"):
        worker.cron(EVERY_MINUTE, name="")


# -- missed ticks -----------------------------------------------------------------------------------------


async def test_what_was_missed(cluster: LocalCluster, queue_name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The leader's clock is 10 minutes ahead, so nobody was there for ten ticks."""
    async with declared(cluster, queue_name) as (client, queue):
        for missed in MISSED:
            await client.schedule(queue_name, missed, EVERY_MINUTE, missed=missed)
        async with leading(queue, 600.0, 600.0):
            await until_sent(queue, 10, "all")
            await until_sent(queue, 1, "last")
            await until_sent(queue, 1, "skip")
        every = await ticks(queue, "all")
        assert {other - one for one, other in pairwise(every)} == {60}
        assert [each.tick for each in await sent(queue, "all")] == every, "in order"
        (last, *_) = await sent(queue, "last")
        assert last.tick in every[9:]
        assert int(last.headers["shardq-missed"]) == every.index(last.tick)
        assert set(await ticks(queue, "skip")) <= set(every[8:])
        assert "shardq-missed" not in (await sent(queue, "all"))[0].headers
        assert "schedule last of" in caplog.text


async def test_all_that_was_missed_has_a_bound(cluster: LocalCluster, queue_name: str) -> None:
    async with declared(cluster, queue_name) as (client, queue):
        await client.schedule(queue_name, "s", EVERY_SECOND, missed="all")
        async with leading(queue, 7200.0):
            await until_sent(queue, MOST_MISSED)
        found = await sent(queue)
        assert_each_second_once([each.tick for each in found], MOST_MISSED)
        assert int(found[0].headers["shardq-missed"]) >= 1


# -- processes --------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with commands(tmp_path) as start:
        yield start


def coordinator(start: Start, cluster: LocalCluster, queue: str, group: str = "g") -> Command:
    return start("coordinator", queue, "--group", group, "--lease", "1", "--url", cluster.url)


async def leader_pid(queue: shardq.Queue, group: str) -> int:
    """0 while nobody leads."""
    found = re.search(r"-coordinator-(\d+)-", (await control_state(queue.client.pipes, queue.keys, group)).leader)
    return int(found[1]) if found else 0


@pytest.mark.slow
async def test_each_tick_once_while_leaders_are_killed(cluster: LocalCluster, queue_name: str, start: Start) -> None:
    """Two groups, so two leaders at once; again and again one of them is killed, or stopped for a while, within 100 ms
    of a tick."""
    async with declared(cluster, queue_name) as (client, queue):
        await client.schedule(queue_name, "s", EVERY_SECOND, missed="all")
        await client.schedule(queue_name, "keyed", EVERY_SECOND, key="k", missed="all")
        running = {group: [coordinator(start, cluster, queue_name, group) for _ in range(2)] for group in ("g", "h")}
        await until_sent(queue, 2)
        killed = 0
        while killed < 9:
            group = random.choice(["g", "h"])
            pid = await leader_pid(queue, group)
            victims = [each for each in running[group] if each.process.pid == pid]
            if not victims or victims[0].process.poll() is not None:
                await anyio.sleep(0.05)
                continue
            to_tick = 1 - time.time() % 1
            await anyio.sleep(max(0.0, to_tick + random.uniform(-0.1, 0.1)))
            killed += 1
            if killed % 3 == 0:
                victims[0].send(signal.SIGSTOP)
                await anyio.sleep(random.uniform(0.5, 2.5))
                victims[0].send(signal.SIGCONT)
            else:
                victims[0].process.kill()
                running[group].append(coordinator(start, cluster, queue_name, group))
        last = int(time.time())

        async def caught_up() -> bool:
            return min(max(await ticks(queue)), max(await ticks(queue, "keyed"))) >= last

        await until(caught_up, 30, "the last tick")
        assert_each_second_once(await ticks(queue), 8)
        assert_each_second_once(await ticks(queue, "keyed"), 8)


async def test_what_was_missed_while_all_were_down(cluster: LocalCluster, queue_name: str, start: Start) -> None:
    async with declared(cluster, queue_name) as (client, queue):
        for missed in MISSED:
            await client.schedule(queue_name, missed, EVERY_SECOND, missed=missed)
        both = [coordinator(start, cluster, queue_name) for _ in range(2)]
        for missed in MISSED:
            await until_sent(queue, 2, missed)
        for each in both:
            each.process.kill()
            each.process.wait()
        await anyio.sleep(0.2)  # what they had sent off arrives
        down = int(time.time())
        before = {missed: len(await sent(queue, missed)) for missed in MISSED}
        await anyio.sleep(3)
        assert before == {missed: len(await sent(queue, missed)) for missed in MISSED}, "nobody is there to send"
        again = coordinator(start, cluster, queue_name)
        for missed in MISSED:
            await until_sent(queue, before[missed] + 2, missed)
        again.process.kill()
        again.process.wait()
        assert_each_second_once(await ticks(queue, "all"), 6)
        assert_each_second_once(await ticks(queue, "skip"), 6)  # none was as late as a minute
        found = sorted(await sent(queue, "last"), key=lambda each: each.tick)
        gap = next(each for each in found if each.tick > down)
        assert int(gap.headers["shardq-missed"]) >= 2
        left_out = sum(int(each.headers.get("shardq-missed", 0)) for each in found[1:])
        assert len({each.tick for each in found}) + left_out == found[-1].tick - found[0].tick + 1
        assert len({each.tick for each in found}) == len(found)
