"""The loop that splits hot shards by itself, with a queue that only writes down what was asked of it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import cast

import anyio
import pytest

import shardq
from shardq.core.autosplit import AutoSplit
from shardq.core.history import Record
from shardq.core.load import Load
from shardq.core.records import Key
from shardq.errors import StoreUnavailable
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime.autosplit import AutoSplitter, newest_keys
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.standalone import coordinate
from tests.runtime.harness import GROUP, until

pytestmark = pytest.mark.anyio

MANY: Sequence[Key] = [f"k{number}" for number in range(100)]


@dataclass
class Fake:
    """Four shards, of which `hot` are hot; a split adds one."""

    hot: set[int] = field(default_factory=lambda: {2})
    keys: Sequence[Key] = field(default_factory=lambda: MANY)
    count: int = 4
    error: Exception | None = None
    asked: list[int] = field(default_factory=list)
    split: list[int] = field(default_factory=list)

    def loads(self) -> Mapping[int, Load]:
        return {
            shard: Load(*((1000.0, 1000.0) if shard in self.hot else (1.0, 1.0)), 0, 0) for shard in range(self.count)
        }

    async def newest(self, shard: int) -> Sequence[Key]:
        self.asked.append(shard)
        return self.keys

    async def do_split(self, shard: int) -> None:
        self.split.append(shard)
        if self.error is not None:
            raise self.error
        self.count += 1

    def splitter(
        self, max_shards: int = 6, every_s: float = 0.0, hot_for_s: float = 0.0, look_again_s: float = 0.0
    ) -> AutoSplitter:
        return AutoSplitter(
            AutoSplit(max_shards, every_s, hot_for_s),
            "q",
            loads=self.loads,
            ranges=lambda: dict.fromkeys(range(self.count), (0, 1 << 32)),
            keys=self.newest,
            split=self.do_split,
            look_again_s=look_again_s,
        )


async def test_a_hot_shard_is_split_until_there_are_enough() -> None:
    fake = Fake()
    splitter = fake.splitter(max_shards=6)
    for _ in range(5):
        await splitter.look()
    assert fake.split == [2, 2]
    assert fake.asked == [2, 2], "keys are looked at only where a split is due"


async def test_a_hot_key_is_not_split_and_said_once_without_its_name(caplog: pytest.LogCaptureFixture) -> None:
    fake = Fake(keys=["user:42"] * 80 + ["other"] * 20)
    splitter = fake.splitter()
    for _ in range(3):
        await splitter.look()
    assert fake.split == []
    assert [record.getMessage() for record in caplog.records] == [
        "q: hot shard 2 is not split: one key has 80% of its newest 100 messages"
    ]
    fake.keys = MANY
    await splitter.look()
    assert fake.split == [2]


async def test_a_hot_key_is_looked_at_rarely_and_keeps_no_other_shard_from_being_split() -> None:
    fake = Fake(keys=["user:42"] * 100)
    splitter = fake.splitter(look_again_s=1000, max_shards=9)
    for _ in range(3):
        await splitter.look()
    assert fake.asked == [2]
    fake.hot, fake.keys, fake.count = {2, 3}, MANY, 6
    await splitter.look()
    assert fake.split == [3]


async def test_time_passes_between_two_splits() -> None:
    fake = Fake()
    splitter = fake.splitter(every_s=0.5)
    await splitter.look()
    await splitter.look()
    assert fake.split == [2]

    async def again() -> bool:
        await splitter.look()
        return len(fake.split) == 2

    assert await until(again, 10, "the second split") > 0.1


async def test_what_has_just_become_hot_is_left_alone() -> None:
    fake = Fake()
    splitter = fake.splitter(hot_for_s=1000)
    await splitter.look()
    await splitter.look()
    assert fake.split == fake.asked == []


async def test_a_split_that_fails_is_tried_again_later(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "shardq")
    fake = Fake(error=StoreUnavailable("its master is away"))
    splitter = fake.splitter(every_s=0.3)
    await splitter.look()
    await splitter.look()
    assert fake.split == [2]
    assert "hot shard 2 was not split: its master is away; tried again in 0.3 s" in caplog.text
    fake.error = None

    async def done() -> bool:
        await splitter.look()
        return fake.count == 5

    await until(done, 10, "the split that works")


async def test_without_loads_it_does_nothing_and_keys_that_cant_be_read_are_no_reason_to_split() -> None:
    fake = Fake(hot=set())
    splitter = fake.splitter()
    await splitter.look()
    fake.hot = {1}
    fake.keys = ()
    await splitter.look()
    assert fake.split == []
    assert fake.asked == [1]


async def test_a_retired_shard_is_not_split() -> None:
    fake = Fake(hot={4})
    splitter = AutoSplitter(
        AutoSplit(9, 0, 0),
        "q",
        loads=lambda: {
            shard: Load(1000.0 if shard == 4 else 1.0, 1000.0 if shard == 4 else 1.0, 0, 0) for shard in range(5)
        },
        ranges=lambda: dict.fromkeys(range(4), (0, 1 << 32)),
        keys=fake.newest,
        split=fake.do_split,
    )
    await splitter.look()
    assert fake.asked == []


async def test_it_looks_until_it_is_cancelled() -> None:
    fake = Fake()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fake.splitter(max_shards=5).run, 0.01)
        await until(lambda: fake.split == [2], 10, "a split")
        tasks.cancel_scope.cancel()


@pytest.mark.server_kinds("valkey9")
async def test_the_keys_of_the_newest_messages(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            await producer.send_many((f"k{number % 3}", number) for number in range(600))
            await producer.send(1)
        keys = await newest_keys(queue, 0, 0)
        assert len(keys) == 500
        assert set(keys) == {"k0", "k1", "k2", None}


class Passing:
    """A queue of which each look finds one more message, with the one before it, or nothing at all."""

    def __init__(self, *, empty: bool = False) -> None:
        self.looks, self._empty = 0, empty

    async def peek(self, _count: int, *, reverse: bool, shards: Sequence[int]) -> list[Record]:
        assert (reverse, shards) == (True, [7])
        self.looks += 1
        newest = [] if self._empty else [self.looks, self.looks - 1]
        return [Record(f"7/{number}-0/0", 7, f"k{number % 4}", b"", None, 0, 0) for number in newest]


async def test_keys_of_a_shard_that_is_nearly_empty_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardq.runtime.autosplit.LOOK_EVERY_S", 0.0)
    queue = Passing()
    keys = await newest_keys(cast("shardq.Queue", queue), 7, 60)
    assert (queue.looks, Counter(keys)) == (99, {"k0": 25, "k1": 25, "k2": 25, "k3": 25}), "each message counts once"


async def test_looks_that_take_their_time_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the newest messages are some, and large: each look reads them all again."""
    clock, queue = [1000.0], Passing()
    look = queue.peek

    async def slowly(count: int, *, reverse: bool, shards: Sequence[int]) -> list[Record]:
        clock[0] += 0.2
        return await look(count, reverse=reverse, shards=shards)

    async def sleep(pause_s: float) -> None:
        clock[0] += pause_s

    monkeypatch.setattr(queue, "peek", slowly)
    monkeypatch.setattr("shardq.runtime.autosplit.monotonic", lambda: clock[0])
    monkeypatch.setattr("shardq.runtime.autosplit.anyio", SimpleNamespace(sleep=sleep))
    keys = await newest_keys(cast("shardq.Queue", queue), 7, 5)
    assert (len(keys), queue.looks) == (6, 5), "a fifth of the time"
    assert clock[0] <= 1005


@pytest.mark.parametrize("change", ["another one leads", "it was split"])
async def test_what_changed_while_keys_were_gathered_is_seen(change: str) -> None:
    fake = Fake()
    splitter = fake.splitter()

    async def newest(_shard: int) -> Sequence[Key]:
        if change == "it was split":
            fake.count = 2  # shard 2 is none of those that take messages any more
        else:
            loads.clear()
        return MANY

    loads = dict(fake.loads())
    splitter._loads, splitter._keys = lambda: loads, newest
    await splitter.look()
    assert fake.split == []


async def test_where_nothing_comes_by_it_ends_without_keys() -> None:
    queue = Passing(empty=True)
    assert await newest_keys(cast("shardq.Queue", queue), 7, 0.1) == []
    assert queue.looks > 1


@pytest.mark.server_kinds("valkey9")
async def test_a_coordinator_splits_what_is_hot_on_a_real_cluster(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it but the split itself: the leader's looks, the rule, the keys."""
    asked: list[int] = []

    async def split(_queue: shardq.Queue, shard: int) -> None:
        asked.append(shard)

    monkeypatch.setattr(shardq.Queue, "split", split, raising=False)
    settings = WorkerSettings(lease_s=2.0, leader_lease_s=1.0, load_sample_s=0.2)
    stop, bounds = anyio.Event(), AutoSplit(max_shards=8, every_s=1000, hot_for_s=0.5)
    async with shardq.connect(cluster.url) as client, shardq.connect(cluster.url) as leader:
        queue = await client.queue(queue_name, shards=4)
        await queue.open_group(GROUP)
        keys = [f"k{number}" for number in range(400) if queue.place_of(f"k{number}") == queue.shards[3]]
        async with queue.producer() as producer, anyio.create_task_group() as tasks:
            tasks.start_soon(partial(coordinate, leader, queue_name, GROUP, settings, stop, autosplit=bounds))

            async def split_once() -> bool:
                await producer.send_many((key, 1) for key in keys)
                return asked == [3]

            await until(split_once, 30, "shard 3 to be split")
            stop.set()
