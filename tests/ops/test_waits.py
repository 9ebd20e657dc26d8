"""Two groups, one of which nobody runs, and a split: whoever looks is told which group has not finished which shard."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial

import anyio.to_thread
import pytest
from prometheus_client.core import Metric

import shardq
from shardq.cli.app import run
from shardq.core import reshard as reshards
from shardq.ops.console.feed import Reading
from shardq.ops.exporter import QueueReader
from shardq.ops.inspect import read_queue
from shardq.ops.local_cluster import LocalCluster
from shardq.ops.queue_metrics import families
from shardq.ops.rates import Look
from shardq.ops.top.board import Board, Place, rows
from shardq.ops.waits import in_words, named, waiting_shards, waits_for
from shardq.runtime import reshard as resharding
from tests.runtime.harness import drained, running, until

pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis7")]

WORDS = "group bikes has 9 messages to finish on retired shard 0, and begins on shards 2, 3 only then"


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[shardq.Client]:
    async with shardq.connect(cluster.url) as client:
        yield client


@pytest.fixture
async def queue(client: shardq.Client, queue_name: str) -> shardq.Queue:
    """Shard 0 was split. `vans` has finished it, `bikes` has nine messages there and two on the new shards."""
    queue = await client.queue(queue_name, shards=2)
    worker = shardq.Worker(queue_name, group="vans")

    @worker.handler
    async def handle(message: shardq.Message) -> None: ...

    for group in ("bikes", "vans"):
        await queue.open_group(group)
    low = [f"k{number}" for number in range(100) if queue.place_of(f"k{number}") == queue.shards[0]]
    async with running(client, worker):
        async with queue.producer() as producer:
            await producer.send_many((key, 0) for key in low[:9])
            await until(lambda: drained(queue, "vans"), 20, "the group that runs to finish")
        await queue.split(0)
        async with queue.producer() as producer:
            await producer.send_many((key, 0) for key in low[:2])
        await until(lambda: drained(queue, "vans"), 20, "the group that runs to finish")
    return queue


async def metrics(client: shardq.Client, queue: str) -> dict[tuple[str, str, str], float]:
    """By name, shard and group ('' where there is none), of this queue alone."""
    found: list[Metric] = list(families(await QueueReader(client, 1.0).snapshot(), 0.0))
    return {
        (sample.name, sample.labels.get("shard", ""), sample.labels.get("group", "")): sample.value
        for metric in found
        for sample in metric.samples
        if sample.labels.get("queue") == queue
    }


async def test_metrics(client: shardq.Client, queue: shardq.Queue) -> None:
    found = await metrics(client, queue.name)
    unfinished = {key[1:]: value for key, value in found.items() if key[0] == "shardq_retired_unfinished_messages"}
    assert unfinished == {("0", "bikes"): 9, ("0", "vans"): 0}, "of retired shards alone"
    waiting = {group: found["shardq_waiting_shards", "", group] for group in ("bikes", "vans")}
    assert waiting == {"bikes": 2, "vans": 0}
    assert found["shardq_reshard_under_way", "", ""] == 0


async def test_a_reshard_under_way(client: shardq.Client, queue: shardq.Queue) -> None:
    plan = reshards.split(queue.table, 1)
    await resharding.begin(client.pipes, queue.keys, plan)
    assert (await read_queue(client, queue.name)).reshard == "opening"
    assert (await metrics(client, queue.name))["shardq_reshard_under_way", "", ""] == 1
    work = resharding.Work(client.pipes, queue.keys, plan.to_bytes())
    for step in (resharding.open_children, resharding.commit):
        assert await step(work)
    view = await read_queue(client, queue.name)
    assert view.reshard == "sealing"
    assert Reading(view=view).about("vans")["reshard"] == "A reshard is under way (sealing)."
    await resharding.carry_on(client.pipes, queue.keys)
    assert (await read_queue(client, queue.name)).reshard == ""


async def test_console_and_top(client: shardq.Client, queue: shardq.Queue) -> None:
    view = await read_queue(client, queue.name)
    assert (waits_for(view, "bikes"), waits_for(view, "vans")) == ({2: [0], 3: [0]}, {})
    assert (in_words(view, "bikes"), in_words(view, "vans")) == (WORDS, "")
    reading = Reading(view=view)
    assert {number: list(row.waits) for number, row in reading.rows("bikes").items()} == {0: [], 1: [], 2: [0], 3: [0]}
    assert not any(row.waits for row in reading.rows("vans").values())
    assert [reading.about(group)["reshard"] for group in ("bikes", "vans")] == [f"G{WORDS[1:]}.", ""]
    board = Board({queue.name: Look(None, view)})
    for group, notes in (("bikes", ["retired", "", "waits", "waits"]), ("vans", ["retired", "", "", ""])):
        place = Place("shards", queue.name, group)
        assert [row.values[-1] for row in rows(board, place)] == notes


async def test_shards_that_were_split_again_before_they_had_messages(
    client: shardq.Client, queue: shardq.Queue
) -> None:
    for _ in range(2):
        await queue.split_all()
    newest = [shard.id for shard in queue.table.homes[0]]
    view = await read_queue(client, queue.name)
    assert (waiting_shards(view, "bikes"), len(newest)) == ([2, 3, *newest], 8)
    assert len(waits_for(view, "bikes")) == 2 + 4 + 8, "nobody may own the four between them either"
    await queue.reset_group("bikes", "latest", force=True)
    view = await read_queue(client, queue.name)
    assert waiting_shards(view, "bikes") == []
    assert in_words(view, "bikes") == ""


async def test_commands(cluster: LocalCluster, queue: shardq.Queue, capfd: pytest.CaptureFixture[str]) -> None:
    async def said(*command: str) -> str:
        call: Callable[[], int] = partial(run, [*command, "--url", cluster.url, "--over", "0"])
        assert await anyio.to_thread.run_sync(call) == 0
        return capfd.readouterr().out

    shown = await said("queue", "show", queue.name)
    assert f"{queue.name}: {WORDS}\n" in shown
    assert f"{queue.name}: shard 0 is retired and waits for messages that group bikes has not finished\n" in shown
    leases = [
        line.rsplit("  ", 1)[1] for line in (await said("status", queue.name, "--group", "bikes")).splitlines()[2:]
    ]
    assert leases == ["free, retired", "free", "free, waits for shard 0", "free, waits for shard 0"]
    assert '"waits_for": [0]' in await said("status", queue.name, "--group", "bikes", "--json")


def test_many_shards_are_named_in_part() -> None:
    assert (named([3]), named([3, 4]), named(range(9))) == (
        "shard 3",
        "shards 3, 4",
        "shards 0, 1, 2, 3, 4, 5, 6, 7, ...",
    )
