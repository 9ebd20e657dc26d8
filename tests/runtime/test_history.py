"""Messages read without consuming them: which, in which order, with how little memory, and what a follower sees."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

import shardq
from shardq.core.history import Record
from shardq.core.ids import MessageId, entry_key
from shardq.errors import ClosedError, InvalidKey, StoreRefused, StoreUnavailable, UsageError
from shardq.ops.local_cluster import LocalCluster, find_server
from shardq.runtime import history
from shardq.storage.commands import pack_command
from tests.runtime.harness import until

pytestmark = pytest.mark.anyio

SHARDS = 4


@pytest.fixture
def any_cluster(shared_clusters: Callable[[Path], LocalCluster]) -> LocalCluster:
    """A shared cluster of the server that is found first, for what no server kind changes."""
    return shared_clusters(find_server(None))


@asynccontextmanager
async def filled(cluster: LocalCluster, name: str, count: int = 60) -> AsyncIterator[tuple[shardq.Queue, list[str]]]:
    """A queue with numbers of seven keys, each in an entry of its own, and their ids in the order sent."""
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(name, shards=SHARDS)
        async with queue.producer() as producer:
            ids = [await producer.send(number, key=f"k{number % 7}") for number in range(count)]
        yield queue, ids


def order(record: Record) -> tuple[int, int, int, int]:
    found = MessageId.parse(record.id)
    return (*entry_key(found.entry), found.shard, found.index)


async def listed(records: AsyncIterator[Record]) -> list[Record]:
    return [record async for record in records]


# -- a part of the history ---------------------------------------------------------------------------------------------


async def test_everything_in_one_order_forward_and_back(cluster: LocalCluster, queue_name: str) -> None:
    async with filled(cluster, queue_name) as (queue, ids):
        found = await listed(queue.history())
        assert sorted(record.id for record in found) == sorted(ids)
        assert found == sorted(found, key=order)
        assert await listed(queue.history(reverse=True)) == found[::-1]
        assert [record.value for record in found if record.key == "k3"] == list(range(3, 60, 7))
        assert all(record.stored_at_ms == order(record)[0] for record in found)
        assert all(record.shard == MessageId.parse(record.id).shard for record in found)
        assert await queue.peek(5) == found[:5]
        assert await queue.peek(5, reverse=True) == found[:-6:-1]
        assert await queue.peek(0) == []
        assert len(await queue.peek(1000)) == 60


async def test_it_consumes_nothing_and_shows_what_is_being_handled(cluster: LocalCluster, queue_name: str) -> None:
    async with filled(cluster, queue_name) as (queue, ids):
        await queue.open_group("g")
        before = await queue.counters()
        assert len(await listed(queue.history())) == len(ids)
        after = await queue.counters()
        assert {shard: state.groups for shard, state in after.items()} == {
            shard: state.groups for shard, state in before.items()
        }


async def test_batches_headers_and_what_other_clients_wrote(any_cluster: LocalCluster, queue_name: str) -> None:
    async with filled(any_cluster, queue_name, 0) as (queue, _):
        async with queue.producer() as producer:
            await producer.send_many((None, number) for number in range(500))
            await producer.send(b"\xff", key=b"\xfe", headers={"trace": "x"})
        keys = queue.shards[2]
        for fields in (("name", "value"), ("at", "0", "batch", b"\x01\x00\x00\x01junk")):
            await queue.client.pipes.command(keys.slot, pack_command("XADD", keys.stream, "*", *fields))
        found = await listed(queue.history())
        assert sorted(record.value for record in found if type(record.value) is int) == list(range(500))
        (sent,) = (record for record in found if record.headers)
        assert (sent.key, sent.value, sent.headers) == (b"\xfe", b"\xff", {"trace": "x"})
        foreign, broken = await queue.peek(2, shards=[2], reverse=True, start=timedelta(minutes=5))
        assert broken.value == {"name": b"value"}
        assert foreign.error is not None
        assert foreign.value == b"\x01\x00\x00\x01junk"


async def test_from_one_moment_to_another(any_cluster: LocalCluster, queue_name: str) -> None:
    async with filled(any_cluster, queue_name) as (queue, _):
        found = await listed(queue.history())
        # Two whole ms in the middle, whatever shares them.
        first, last = found[20].stored_at_ms, found[40].stored_at_ms
        wanted = [record for record in found if first <= record.stored_at_ms <= last]
        moments: list[Callable[[int], history.When]] = [
            lambda ms: ms / 1000,
            lambda ms: datetime.fromtimestamp(ms / 1000, UTC),
        ]
        for moment in moments:
            assert await listed(queue.history(moment(first), moment(last))) == wanted
            assert await listed(queue.history(moment(first), moment(last), reverse=True)) == wanted[::-1]
        assert await listed(queue.history(0, datetime(9999, 1, 1, tzinfo=UTC))) == found
        assert await listed(queue.history(-5)) == found
        assert await listed(queue.history(timedelta(hours=1), timedelta(0))) == found
        assert await listed(queue.history(end=timedelta(hours=1))) == []
        assert await listed(queue.history(time.time() + 3600)) == []


async def test_from_one_message_to_another(any_cluster: LocalCluster, queue_name: str) -> None:
    async with filled(any_cluster, queue_name) as (queue, _):
        async with queue.producer() as producer:
            await producer.send_many((f"k{number % 7}", number) for number in range(200))
        found = await listed(queue.history())
        for start, end in ((found[30], found[200]), (found[0], found[0]), (found[100], found[140])):
            own = [record for record in found if record.shard == start.shard and order(record) >= order(start)]
            assert [record for record in await listed(queue.history(start.id)) if record.shard == start.shard] == own
            own = [record for record in found if record.shard == end.shard and order(record) <= order(end)]
            assert [record for record in await listed(queue.history(end=end.id)) if record.shard == end.shard] == own
            others = [record for record in await listed(queue.history(start.id)) if record.shard != start.shard]
            assert others == [
                record for record in found if record.shard != start.shard and record.stored_at_ms >= start.stored_at_ms
            ]
        middle = found[150]
        (only,) = await listed(queue.history(middle.id, middle.id, shards=[middle.shard]))
        assert only == middle


async def test_only_some_shards_or_a_key(any_cluster: LocalCluster, queue_name: str) -> None:
    async with filled(any_cluster, queue_name) as (queue, _):
        found = await listed(queue.history())
        assert await listed(queue.history(shards=[1, 3, 1])) == [record for record in found if record.shard in (1, 3)]
        wanted = [record for record in found if record.key == "k4"]
        assert await listed(queue.history(key="k4")) == wanted
        assert await listed(queue.history(key=b"k4", reverse=True, limit=2)) == wanted[:-3:-1]
        assert await listed(queue.history(key="no such key")) == []


async def test_a_deleted_message_is_not_shown(any_cluster: LocalCluster, queue_name: str) -> None:
    async with filled(any_cluster, queue_name, 0) as (queue, _):
        await queue.open_group("g")
        async with queue.producer() as producer:
            await producer.send_many(("k", number) for number in range(20))
        found = await queue.peek(20)
        await queue.delete_message(found[7].id)  # stored still: the group has not finished the others of its batch
        assert await listed(queue.history()) == found[:7] + found[8:]
        follower = Follower(queue, from_end=15)
        async with following(follower):
            await follower.has(15)
        assert follower.records == [*found[4:7], *found[8:]]


async def test_memory_is_bounded_by_pages(
    any_cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    read = history.Pager._read

    async def spy(self: history.Pager, count: int) -> list[Any]:
        entries = await read(self, count)
        sizes.append(sum(len(part) for _, fields in entries for part in fields))
        return entries

    monkeypatch.setattr(history.Pager, "_read", spy)
    async with filled(any_cluster, queue_name, 0) as (queue, _):
        async with queue.producer(max_batch_bytes=20_000) as producer:
            await producer.send_many((None, bytes(2000)) for _ in range(4000))
        assert len(await listed(queue.history())) == 4000
        assert sum(sizes) > 8_000_000
        assert max(sizes) < history.FIRST_ENTRIES * 25_000
        sizes.clear()
        assert len(await queue.peek(3)) == 3
        assert len(sizes) == SHARDS


async def test_an_answer_that_does_not_come_is_asked_for_in_smaller_pieces(
    any_cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = history.Pager._read

    async def slow(self: history.Pager, count: int) -> list[Any]:
        if count > 2:
            raise shardq.StoreTimeout("it did not answer")
        return await read(self, count)

    monkeypatch.setattr(history.Pager, "_read", slow)
    async with filled(any_cluster, queue_name) as (queue, ids):
        assert len(await listed(queue.history())) == len(ids)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"start": "nonsense"}, "not a message id"),
        ({"start": "9/1-0/0"}, "has no shard 9"),
        ({"end": datetime(2026, 1, 1)}, "has no time zone"),
        ({"start": float("nan")}, "no Unix time in seconds"),
        ({"start": float("inf")}, "no Unix time in seconds"),
        ({"end": 1795231414661}, "milliseconds"),
        ({"start": timedelta(seconds=-1)}, "lies in the future"),
        ({"start": True}, "is a message id, an aware datetime"),
        ({"start": b"1/1-0/0"}, "is a message id, an aware datetime"),
        ({"shards": [0, 7]}, "has no shard 7: its shards are 0 to 3"),
        ({"shards": []}, "`shards` is empty"),
        ({"shards": [0], "key": "k"}, "not both"),
        ({"limit": -1}, "limit is 0 or more"),
    ],
    ids=str,
)
async def test_what_can_not_be_asked_is_refused_at_once(
    any_cluster: LocalCluster, queue_name: str, arguments: dict[str, Any], says: str
) -> None:
    async with filled(any_cluster, queue_name, 0) as (queue, _):
        with pytest.raises(UsageError, match=says):
            queue.history(**arguments)


async def test_other_mistakes(any_cluster: LocalCluster, queue_name: str) -> None:
    async with filled(any_cluster, queue_name, 3) as (queue, _):
        with pytest.raises(UsageError, match="start is the older one"):
            await listed(queue.history(2000, 1000))
        with pytest.raises(UsageError, match="start is the older one"):
            await listed(queue.history(timedelta(minutes=1), timedelta(minutes=2)))
        with pytest.raises(InvalidKey):
            queue.history(key=5)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="from_end"):
            queue.tail(from_end=-1)
        with pytest.raises(UsageError, match="has no shard 9"):
            queue.tail(shards=[9])
    with pytest.raises(ClosedError):
        await queue.peek()


# -- following ---------------------------------------------------------------------------------------------------------


class Follower:
    """Collects what `queue.tail` gives, in a task."""

    def __init__(self, queue: shardq.Queue, **arguments: Any) -> None:
        self.records: list[Record] = []
        self._found = queue.tail(**arguments)

    async def run(self) -> None:
        async for record in self._found:
            self.records.append(record)

    async def has(self, count: int) -> None:
        await until(lambda: len(self.records) >= count, 30, f"{count} records, got {len(self.records)}")


@asynccontextmanager
async def following(*followers: Follower) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        for follower in followers:
            tasks.start_soon(follower.run)
        yield
        tasks.cancel_scope.cancel()


async def test_the_last_ones_and_then_what_comes(cluster: LocalCluster, queue_name: str) -> None:
    async with filled(cluster, queue_name, 30) as (queue, ids):
        newest = await queue.peek(10, reverse=True)
        followers = [Follower(queue), Follower(queue, from_end=0), Follower(queue, key="k2", from_end=2)]
        async with following(*followers):
            await followers[0].has(10)
            await followers[2].has(2)
            async with queue.producer() as producer:
                ids += [await producer.send(number, key=f"k{number % 7}") for number in range(30, 60)]
                await producer.send_many((f"k{number % 7}", number) for number in range(60, 2060))
            await followers[0].has(10 + 2030)
            await until(lambda: len(followers[1].records) >= 2000, 30, "most for one that began with none")
            await followers[2].has(2 + 290)
        assert followers[0].records[:10] == newest[::-1]
        everything = await listed(queue.history())
        by_shard = {shard: [each for each in everything if each.shard == shard] for shard in queue.shards}
        for shard, records in by_shard.items():
            own = [record for record in followers[0].records if record.shard == shard]
            assert own == records[len(records) - len(own) :]
        assert len({record.id for record in followers[0].records}) == 2040
        assert [record.value for record in followers[2].records] == list(range(16, 2060, 7))


async def test_more_than_a_page_comes_at_once(any_cluster: LocalCluster, queue_name: str) -> None:
    async with filled(any_cluster, queue_name, 0) as (queue, _):
        follower = Follower(queue, from_end=3000)  # some may be stored before it begins
        async with following(follower):
            async with queue.producer(max_batch_messages=1) as producer:
                await producer.send_many((None, number) for number in range(3000))
            await follower.has(3000)
        assert sorted(record.value for record in follower.records) == list(range(3000))


async def test_what_was_trimmed_behind_a_follower_is_no_error(any_cluster: LocalCluster, queue_name: str) -> None:
    async with filled(any_cluster, queue_name, 20) as (queue, _):
        follower = Follower(queue, from_end=1)
        async with following(follower):
            await follower.has(1)
            for keys in queue.shards.values():
                await queue.client.pipes.command(keys.slot, pack_command("XTRIM", keys.stream, "MAXLEN", 0))
            async with queue.producer() as producer:
                await producer.send_many((None, number) for number in range(100, 150))
            await follower.has(51)
        assert sorted(record.value for record in follower.records[1:]) == list(range(100, 150))


async def test_a_follower_outlives_an_absent_master(
    any_cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "shardq")
    async with filled(any_cluster, queue_name, 0) as (queue, _):
        follower, away = Follower(queue), False
        read = history.Pager._read

        async def sometimes(self: history.Pager, count: int) -> list[Any]:
            if away:
                raise StoreUnavailable("it is away")
            return await read(self, count)

        monkeypatch.setattr(history.Pager, "_read", sometimes)
        async with following(follower), queue.producer() as producer:
            await producer.send(1)
            await follower.has(1)
            away = True
            await producer.send(2)
            await until(lambda: len(caplog.messages) >= SHARDS, 30, "a warning for each shard")
            away = False
            await follower.has(2)
        assert [record.value for record in follower.records] == [1, 2]
        assert len([message for message in caplog.messages if "can't be followed right now" in message]) == SHARDS


async def test_an_error_that_waiting_does_not_mend_ends_a_follower(any_cluster: LocalCluster, queue_name: str) -> None:
    async with filled(any_cluster, queue_name, 0) as (queue, _):
        keys = queue.shards[1]
        await queue.client.pipes.command(keys.slot, pack_command("SET", keys.stream, "no stream"))
        with pytest.raises(StoreRefused, match="WRONGTYPE"):
            await Follower(queue).run()
