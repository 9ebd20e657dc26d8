"""`shardq split`, `merge`, `queue scale`: what they print, change and refuse, and what `queue show` says of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest

import shardq
from shardq.cli.app import run
from shardq.core import reshard as reshards
from shardq.errors import ShardqError
from shardq.ops.inspect import ShardView
from shardq.ops.local_cluster import LocalCluster, find_server
from shardq.ops.rates import Look, hottest
from shardq.runtime import reshard as resharding

Shardq = Callable[..., str]


@pytest.fixture
def url(shared_clusters: object, queue_name: str) -> str:
    """A shared cluster of the server that is found first, with a queue of two shards and a group that is behind."""
    assert callable(shared_clusters)
    cluster = shared_clusters(find_server(None))
    assert isinstance(cluster, LocalCluster)

    async def declare() -> None:
        async with shardq.connect(cluster.url) as client:
            queue = await client.queue(queue_name, shards=2)
            await queue.open_group("g")
            async with queue.producer() as producer:
                await producer.send_many((f"k{number}", number) for number in range(20))

    anyio.run(declare)
    return cluster.url


@pytest.fixture
def call(url: str, capfd: pytest.CaptureFixture[str]) -> Shardq:
    """`shardq ...`: what it prints; its error when it ends with status 1 or 2."""

    def call(*arguments: str, status: int = 0) -> str:
        assert run([*arguments, "--url", url]) == status
        printed = capfd.readouterr()
        return printed.err if status else printed.out

    return call


def objects(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


def test_split_merge_and_scale(call: Shardq, queue_name: str) -> None:
    assert call("split", queue_name, "0") == f"{queue_name}: shard 0 became shards 2, 3; it has 3 shards now\n"
    assert call("merge", queue_name, "3", "2") == f"{queue_name}: shards 2, 3 became shard 4; it has 2 shards now\n"
    scaled = call("queue", "scale", queue_name, "--shards", "6", "--json")
    assert objects(scaled) == [{"queue": queue_name, "sealed": [1, 4], "opened": [*range(5, 11)], "shards": 6}]
    assert call("queue", "scale", queue_name, "--shards", "6") == f"{queue_name}: it has 6 shards already\n"
    again = objects(call("queue", "scale", queue_name, "--shards", "6", "--json"))
    assert again == [{"queue": queue_name, "sealed": [], "opened": [], "shards": 6}]
    (split_all,) = objects(call("split", queue_name, "--all", "--into", "3", "--json"))
    assert (split_all["sealed"], split_all["shards"]) == ([*range(5, 11)], 18)
    (listed,) = [each for each in objects(call("queue", "list", "--json")) if each["queue"] == queue_name]
    assert listed["shards"] == 18


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (["split", "9"], 1, "error: there is no shard 9"),
        (["split"], 2, "name one shard, or give --hottest or --all"),
        (["split", "0", "--all"], 2, "name one shard"),
        (["split", "--hottest", "--all"], 2, "name one shard"),
        (["split", "--hottest", "--over", "0"], 2, "--over can't be 0"),
        (["split", "--hottest", "--over", "0.05"], 1, "stored a message within 0.05 s"),
        (["split", "0", "--into", "1"], 2, "Invalid value for '--into'"),
        (["split", "-1"], 2, "No such option"),
        (["merge", "0", "1"], 1, "error: shards 0 and 1 can't be merged: they lie in different hash slots"),
        (["merge", "0"], 1, "error: a merge takes two or more shards"),
        (["merge"], 2, "Missing argument"),
    ],
)
def test_what_can_not_be_is_one_line(
    call: Shardq, queue_name: str, arguments: list[str], status: int, why: str
) -> None:
    command, *more = arguments
    said = call(command, queue_name, *more, status=status)
    assert said.startswith("error: ")
    assert why in said
    assert said.count("\n") == 1


def test_fewer_shards_than_declared_are_refused(call: Shardq, queue_name: str) -> None:
    said = call("queue", "scale", queue_name, "--shards", "1", status=1)
    assert "it was declared with 2" in said


def test_the_map_names_retired_shards_and_what_they_wait_for(call: Shardq, queue_name: str) -> None:
    call("split", queue_name, "0")
    shown = call("queue", "show", queue_name, "--over", "0")
    assert f"{queue_name}: shard 0 is retired and waits for messages that group g has not finished\n" in shown
    assert [line.split()[4] for line in shown.splitlines() if line.startswith("    ")] == ["sealed", *["open"] * 3]
    waits = {each["shard"]: each["waits_for"] for each in objects(call("queue", "show", queue_name, "--json"))}
    assert waits == {0: "messages that group g has not finished", 1: None, 2: None, 3: None}


def test_one_that_stopped_is_shown_and_completed(call: Shardq, url: str, queue_name: str) -> None:
    async def begin() -> None:
        async with shardq.connect(url) as client:
            queue = await client.queue(queue_name)
            await resharding.begin(client.pipes, queue.keys, reshards.split(queue.table, 1))

    anyio.run(begin)
    shown = call("queue", "show", queue_name, "--over", "0")
    assert f"{queue_name}: a reshard of shards 1 is under way (opening); repeating it completes it\n" in shown
    assert call("split", queue_name, "1") == f"{queue_name}: shard 1 became shards 2, 3; it has 3 shards now\n"


# -- the hottest -------------------------------------------------------------------------------------------------------


def look(before: dict[int, int], now: dict[int, int]) -> Look:
    def view(stored: dict[int, int], time_ms: int) -> Any:
        shards = {
            number: ShardView(number, 0, 1, 0, "", "open", time_ms, appended, 0, 0, 0, 0, {})
            for number, appended in stored.items()
        }
        return SimpleNamespace(shards=shards)

    return Look(cast("Any", view(before, 1000)), cast("Any", view(now, 2000)))


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        ({0: 0, 1: 900}, {0: 50, 1: 910}, 0),
        ({0: 0, 1: 0}, {0: 50, 1: 51}, 1),
        ({0: 0, 1: 0, 2: 0}, {0: 50, 1: 51, 2: 900}, 1),  # not one of those that are asked for
        ({0: 5, 1: 5}, {0: 5, 1: 5}, None),
        ({0: 5}, {0: 4, 1: 99}, None),  # taken back by a failover; not known before
        ({}, {}, None),
    ],
)
def test_the_hottest_stored_most(before: dict[int, int], now: dict[int, int], found: int | None) -> None:
    assert hottest(look(before, now), [0, 1]) == found


def test_the_hottest_is_split(call: Shardq, url: str, queue_name: str) -> None:
    async def send_for_ever(ready: anyio.Event) -> None:
        async with shardq.connect(url) as client:
            queue = await client.queue(queue_name)
            key = next(key for key in map(str, range(99)) if queue.place_of(key) == queue.shards[1])
            with contextlib.suppress(ShardqError):
                async with queue.producer() as producer:
                    while True:
                        await producer.send("v", key=key)
                        ready.set()

    async def main() -> list[int]:
        async with anyio.create_task_group() as tasks:
            ready = anyio.Event()
            tasks.start_soon(send_for_ever, ready)
            await ready.wait()
            arguments = ["split", queue_name, "--hottest", "--over", "0.3", "--url", url]
            status = await anyio.to_thread.run_sync(run, arguments)
            tasks.cancel_scope.cancel()
        assert status == 0
        async with shardq.connect(url) as client:
            return sorted((await client.queue(queue_name)).table.retired_by_id)

    assert anyio.run(main) == [1]
