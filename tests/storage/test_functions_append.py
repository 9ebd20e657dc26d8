"""The functions that open shards and groups and store batches; after every test the counters must add up."""

from __future__ import annotations

import pytest

from shardq.core.routing import RoutingTable
from shardq.core.step import FIRST
from shardq.errors import StoreRefused, UnknownQueue
from shardq.storage import appends, calls, groups, queues
from tests.storage.rig import Rig, batch_of

pytestmark = pytest.mark.anyio


# -- declaring ------------------------------------------------------------------------------------------


async def test_the_first_routing_table_stands(shard: Rig) -> None:
    first, second = RoutingTable.equal(2).to_bytes(), RoutingTable.equal(3).to_bytes()
    declared = await queues.declare(shard.pipes, shard.keys, 1, first, b"settings")
    assert (declared.table, declared.settings) == (first, b"settings")
    assert await queues.declare(shard.pipes, shard.keys, 2, second, b"others") == declared
    assert await queues.stored_queue(shard.pipes, shard.keys) == declared


async def test_opening_again_changes_nothing(shard: Rig) -> None:
    await shard.append("p", 1, "a", "b")
    token = await shard.own()
    (entry,) = await shard.fetch(token)
    assert not await calls.open_shard(shard.pipes, shard.shard)
    await shard.open_group()
    assert await shard.entries() == [entry]
    assert await shard.backlog() == 2
    assert await shard.fetch(token, cursor=FIRST) == [entry]


async def test_a_group_needs_its_shard(shard: Rig) -> None:
    other = shard.keys.shard(7, "0")
    with pytest.raises(UnknownQueue, match="gone"):
        await groups.open_group(shard.pipes, other, "g", groups.Start())
    assert await shard.pipes.call(
        other.slot, "append", [other.stream, other.meta], ["p", 1, 1, batch_of("a"), "b"]
    ) == [b"MISSING"]


async def test_a_late_group_starts_behind_what_was_trimmed(shard: Rig) -> None:
    """Also where another client's entries stand before the first one of ours that is left."""
    token = await shard.own()
    await shard.append("p", 1, "a", "b", "c")
    await shard.command("XADD", shard.shard.stream, "*", "name", "Ann")
    await shard.append("p", 2, "d", "e")
    first, *_ = await shard.fetch(token)
    await shard.step(token, acked=3, finished=[first])
    assert len(await shard.entries()) == 2
    await shard.open_group("late")
    assert (await shard.counters("late")).base == 3
    assert await shard.backlog("late") == 2
    late = await shard.own("l", "late")
    entries = await shard.fetch(late, group="late")
    assert len(entries) == 2
    assert await shard.backlog("late") == 3
    await shard.step(late, acked=3, finished=entries, group="late")
    assert await shard.backlog("late") == 0


async def test_a_group_on_a_shard_that_was_emptied(shard: Rig) -> None:
    token = await shard.own()
    await shard.append("p", 1, "a", "b")
    await shard.step(token, acked=2, finished=await shard.fetch(token))
    assert await shard.entries() == []
    await shard.open_group("late")
    assert (await shard.counters("late")).base == 2
    assert await shard.backlog("late") == 0


# -- appending ------------------------------------------------------------------------------------------


async def test_one_sequence_is_stored_once(shard: Rig) -> None:
    first = await shard.append("p", 1, "a", "b")
    assert first.status == "OK"
    assert await shard.append("p", 1, "a", "b") == first
    second = await shard.append("p", 2, "c")
    assert second.status == "OK"
    assert await shard.append("p", 2, "c") == second
    assert (await shard.append("p", 1, "a", "b")).status == "STALE"
    assert await shard.entries() == [*first.entries, *second.entries]
    assert await places(shard) == [0, 2]
    assert await shard.backlog() == 3


async def test_producers_do_not_share_sequences(shard: Rig) -> None:
    answers = [
        await shard.append(producer, sequence, producer) for sequence in (1, 2, 9) for producer in ("p", "q", "r")
    ]
    assert [await shard.append(producer, 9, producer) for producer in ("p", "q", "r")] == answers[6:]
    assert await shard.entries() == [entry for answer in answers for entry in answer.entries]
    assert await places(shard) == list(range(9))
    assert await shard.backlog() == 9


async def places(shard: Rig) -> list[int]:
    """Messages appended before each entry, as it says itself."""
    return [int(fields[1]) for _, fields in await shard.command("XRANGE", shard.shard.stream, "-", "+")]


async def test_a_sealed_shard_takes_nothing(shard: Rig) -> None:
    first = await shard.append("p", 1, "a")
    await shard.tune(state="sealed")
    assert (await shard.append("p", 2, "b")).status == "SEALED"
    assert await shard.append("p", 1, "a") == first, "stored before: it keeps its answer"
    assert await shard.entries() == [*first.entries]


@pytest.mark.parametrize(
    ("count", "raw"),
    [
        (2, batch_of("a")),
        (0, batch_of("a")),
        (1, b""),
        (1, b"\1\0\0"),
        (1, b"\2\0\0\1rest"),
        (0, b"\1\0\0\0"),
        (-1, b"\1"),
    ],
)
async def test_a_batch_that_contradicts_its_count_is_refused(shard: Rig, count: int, raw: bytes) -> None:
    with pytest.raises(StoreRefused, match="report it"):
        await shard.send(appends.pack_append(shard.shard, "p", 1, count, raw, None))
    assert await shard.entries() == []


async def test_the_bell_rings_once_for_who_waits(shard: Rig) -> None:
    token = await shard.own()
    await shard.step(token, limit=10, wait=True)
    assert await shard.meta("waiting") == "1"
    await shard.append("p", 1, "a")
    assert await shard.meta("waiting") is None
