"""The read model against known traffic: every figure is what was sent and handled, whatever can't be read is named."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

import shardq
from shardq.errors import UnknownQueue, UsageError
from shardq.ops.inspect import group_view, read_queue
from shardq.ops.local_cluster import LocalCluster, find_server
from shardq.storage.commands import pack_command
from shardq.storage.control import control_state
from shardq.storage.counters import GroupCounters, ShardCounters

pytestmark = pytest.mark.anyio


def counters(**changes: int | str) -> GroupCounters:
    values: dict[str, int | str | bool] = dict.fromkeys(GroupCounters.__slots__, 0)
    values |= dict.fromkeys(("owner", "renewals", "heir", "oldest_pending", "oldest_unread", "oldest_waiting"), "")
    return GroupCounters(**(values | {"held": False} | changes))  # type: ignore[arg-type]


def shard(appended: int, time_ms: int = 0) -> ShardCounters:
    return ShardCounters(time_ms, 0, "", "open", appended, 0, 0, 0, (), {})


@pytest.mark.parametrize(
    ("appended", "group", "backlog", "pel_messages"),
    [
        (10, {}, 10, 0),
        (10, {"delivered": 6, "acked": 4}, 6, 2),
        (10, {"delivered": 10, "acked": 7, "dead": 3}, 0, 0),
        (10, {"delivered": 10, "acked": 7, "dead": 3, "replayed": 2}, 2, 2),  # handed back, in hand again
        (10, {"delivered": 10, "acked": 7, "waiting": 3}, 3, 0),  # waiting for a retry, in no entry any more
        (10, {"delivered": 5, "acked": 5, "skip": 3}, 2, 0),  # 3 were dropped before the group got them
        (10, {"base": 4}, 6, 0),  # 4 were gone before the group began
        (10, {"foreign": 2, "delivered": 12, "acked": 11}, 1, 1),
        (10, {"delivered": 3, "acked": 4}, 6, 0),  # never negative, whatever a failover rolled back
    ],
)
def test_what_is_left(appended: int, group: dict[str, int], backlog: int, pel_messages: int) -> None:
    view = group_view(counters(**group), shard(appended))
    assert (view.backlog, view.pel_messages) == (backlog, pel_messages)


@pytest.mark.parametrize(
    ("pending", "unread", "waiting", "oldest"),
    [
        ("", "", "", None),
        ("1000-0", "", "", 4.0),
        ("", "2500-3", "", 2.5),
        ("1000-0", "2500-0", "", 4.0),
        ("6000-0", "", "", 0.0),
        ("", "", "3000-1", 2.0),
        ("2500-0", "4000-0", "2000-0", 3.0),
    ],
)
def test_ages_by_the_servers_clock(pending: str, unread: str, waiting: str, oldest: float | None) -> None:
    group = counters(oldest_pending=pending, oldest_unread=unread, oldest_waiting=waiting)
    view = group_view(group, shard(1, time_ms=5000))
    assert view.oldest_age_s == oldest


async def test_every_figure_while_messages_come_and_go(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=3)
        empty = await read_queue(client, queue_name)
        assert (empty.appended, empty.groups, empty.unreadable) == (0, {}, {})
        assert empty.total("g") is None
        async with queue.producer() as producer:
            await producer.send_many((f"k{number}", number) for number in range(60))
        await queue.open_group("g")
        waiting = await read_queue(client, queue_name)
        total = waiting.total("g")
        assert total is not None
        assert (waiting.appended, total.backlog, total.delivered, total.pel_entries) == (60, 60, 0, 0)
        assert total.oldest_pending_age_s is None
        assert total.oldest_unread_age_s is not None
        assert not total.held
        for view in waiting.shards.values():
            assert view.slot == queue.shards[view.shard].slot
            assert view.node in {f"127.0.0.1:{port}" for port in cluster.ports}

        worker = shardq.Worker(queue_name, group="g", name="w", lease=2, concurrency=100)
        held, go = anyio.Event(), anyio.Event()
        running = 0

        @worker.handler
        async def handle(message: shardq.Message) -> None:
            nonlocal running
            running += 1
            if running == 60:
                held.set()
            await go.wait()

        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(worker.run, client)
                await held.wait()
                busy = await read_queue(client, queue_name, ["g"])
                total = busy.total("g")
                assert total is not None
                assert (total.backlog, total.delivered, total.pel_messages, total.acked) == (60, 60, 60, 0)
                assert total.held
                assert {view.groups["g"].owner for view in busy.shards.values()} == {"w"}
                assert total.oldest_unread_age_s is None
                assert total.oldest_pending_age_s is not None
                for number, keys in queue.shards.items():
                    command = pack_command("XPENDING", keys.stream, "g")
                    assert (
                        busy.shards[number].groups["g"].pel_entries
                        == (await client.pipes.command(keys.slot, command))[0]
                    )
                assert busy.groups["g"].members == ("w",)
                assert (busy.groups["g"].leader, busy.groups["g"].rebalances) == ("w", 1)
                go.set()
                worker.stop()
        done = await read_queue(client, queue_name)
        total = done.total("g")
        assert total is not None
        assert (total.backlog, total.acked, total.pel_messages, total.pel_entries) == (0, 60, 0, 0)
        assert total.oldest_age_s is None
        assert {view.groups["g"].owner for view in done.shards.values()} == {""}
        assert done.groups["g"].members == ()


async def test_what_does_not_exist(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        with pytest.raises(UnknownQueue, match=queue_name):
            await read_queue(client, queue_name)
        queue = await client.queue(queue_name, shards=2)
        with pytest.raises(UsageError, match="has no group 'other': it has none yet"):
            await read_queue(client, queue_name, ["other"])
        await queue.open_group("g")
        with pytest.raises(UsageError, match="has no group 'other': its groups are g"):
            await read_queue(client, queue_name, ["g", "other"])
        assert (await control_state(client.pipes, queue.keys, "never")).members == {}


async def test_a_master_that_is_away_hides_its_own_shards_only(queue_name: str, tmp_path: Path) -> None:
    with LocalCluster(3, 0, None, find_server(None), settings={"cluster-node-timeout": "60000"}) as cluster:
        async with shardq.connect(cluster.url) as client:
            queue = await client.queue(queue_name, shards=6)
            await queue.open_group("g")
            control = client.cluster.node_of(queue.keys.control_slot)
            assert control is not None
            victim = next(process for process in cluster.processes if process.port != control.port)
            victim.kill()
            view = await read_queue(client, queue_name, timeout_s=0.5)
            gone = f"127.0.0.1:{victim.port}"
            assert len(view.unreadable) == 2
            assert all(gone in why for why in view.unreadable.values())
            assert len(view.shards) == 4
            assert gone not in {shard.node for shard in view.shards.values()}
            total = view.total("g")
            assert total is not None
            assert total.backlog == 0
