"""The functions of schedules: definitions change only from what was seen, no tick is stored twice or in two places."""

from __future__ import annotations

import anyio
import pytest

from shardq.core.slots import tag_for_slot
from shardq.errors import StoreRefused, UnknownQueue
from shardq.storage import schedules
from shardq.storage.keys import ShardKeys
from tests.storage.rig import Rig, batch_of

pytestmark = pytest.mark.anyio

FIELD = "p:cron/s"


async def tick(rig: Rig, tick_s: int, shard: ShardKeys | None = None) -> str:
    return await schedules.append_tick(rig.pipes, shard or rig.shard, "s", tick_s, batch_of(str(tick_s)), None)


async def close(rig: Rig, until_s: int) -> int | None:
    return await schedules.close_ticks(rig.pipes, rig.shard, "s", until_s, None)


async def reopen(rig: Rig, last_s: int) -> None:
    await schedules.open_ticks(rig.pipes, rig.shard, "s", last_s, None)


async def last(rig: Rig) -> int:
    return (await schedules.last_tick(rig.pipes, rig.shard, "s"))[0]


async def is_closed(rig: Rig) -> bool:
    return (await schedules.last_tick(rig.pipes, rig.shard, "s"))[1]


# -- definitions ------------------------------------------------------------------------------------------


async def test_a_definition_changes_only_from_what_was_seen(shard: Rig) -> None:
    async def swap(seen: bytes, new: bytes) -> bool:
        return await schedules.swap(shard.pipes, shard.keys, "s", seen, new, None)

    async def stored() -> bytes:
        return await schedules.read_one(shard.pipes, shard.keys, "s")

    assert not await swap(b"one", b"two")
    assert await swap(b"", b"one")
    assert not await swap(b"", b"two")
    assert await stored() == b"one"
    assert await swap(b"one", b"two")
    assert await swap(b"one", b"two"), "the second copy of a call says what the first one did"
    assert not await swap(b"one", b"")
    assert await swap(b"two", b"")
    assert await swap(b"two", b"")
    assert await stored() == b""


async def test_of_many_that_saw_the_same_one_wins(shard: Rig) -> None:
    won: list[int] = []

    async def one(number: int) -> None:
        if await schedules.swap(shard.pipes, shard.keys, "s", b"", str(number).encode(), None):
            won.append(number)

    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(one, number)
    assert len(won) == 1
    assert await schedules.read_one(shard.pipes, shard.keys, "s") == str(won[0]).encode()


async def test_every_change_has_a_version_of_its_own(shard: Rig) -> None:
    async def version() -> bytes:
        return await schedules.version(shard.pipes, shard.keys)

    seen = [await version()]
    assert seen == [b""]
    for name, before, after in [("s", b"", b"1"), ("t", b"", b"1"), ("s", b"1", b"2"), ("s", b"2", b"")]:
        assert await schedules.swap(shard.pipes, shard.keys, name, before, after, None)
        seen.append(await version())
        assert not await schedules.swap(shard.pipes, shard.keys, name, b"else", b"3", None)
        assert await version() == seen[-1]
    assert len(set(seen)) == len(seen)
    assert await schedules.read_all(shard.pipes, shard.keys) == (seen[-1], {"t": b"1"})


# -- ticks ------------------------------------------------------------------------------------------------


async def test_a_tick_is_stored_once_whoever_sends_it(shard: Rig) -> None:
    assert await last(shard) == 0
    statuses: list[str] = []

    async def leader() -> None:
        statuses.extend([await tick(shard, number) for number in range(100, 110)])

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(leader)
    assert set(statuses) <= {"OK", "STALE"}
    assert len(await shard.entries()) == 10
    assert await last(shard) == 109


async def test_a_closed_shard_takes_no_tick_that_an_old_leader_may_send(shard: Rig) -> None:
    assert await tick(shard, 100) == "OK"
    assert await close(shard, 160) == 100
    assert await close(shard, 170) == 100, "the second copy of a call still knows the last tick"
    assert [await tick(shard, number) for number in (100, 101, 169)] == ["STALE"] * 3
    assert len(await shard.entries()) == 1
    assert await last(shard) == 170
    assert await is_closed(shard)
    # Whoever closed it died before the schedule went elsewhere: it goes on.
    assert await tick(shard, 171) == "OK"
    assert await last(shard) == 171
    assert not await is_closed(shard)


async def test_closing_by_a_slow_clock_opens_nothing(shard: Rig) -> None:
    assert await tick(shard, 100) == "OK"
    assert await close(shard, 50) == 100
    assert [await tick(shard, number) for number in (51, 99)] == ["STALE"] * 2
    assert await last(shard) == 100
    await reopen(shard, 0)
    assert await tick(shard, 100) == "OK"
    assert len(await shard.entries()) == 1


async def test_a_schedule_that_comes_back_goes_on_where_it_was(shard: Rig) -> None:
    assert await tick(shard, 100) == "OK"
    await close(shard, 160)
    await reopen(shard, 110)
    assert await last(shard) == 110
    assert [await tick(shard, number) for number in (100, 109, 110)] == ["STALE", "STALE", "OK"]
    assert len(await shard.entries()) == 1
    assert await tick(shard, 111) == "OK"
    assert len(await shard.entries()) == 2


async def test_opening_again_lowers_nothing(shard: Rig) -> None:
    """Several clients set the same new key at once, and the first leader is faster than the last of them."""
    await reopen(shard, 0)
    assert await last(shard) == 0
    await reopen(shard, 100)
    assert await tick(shard, 101) == "OK"
    await reopen(shard, 100)
    await reopen(shard, 0)
    assert await tick(shard, 101) == "OK"
    assert len(await shard.entries()) == 1


async def test_a_shard_that_is_gone_gets_no_keys(shard: Rig) -> None:
    gone = shard.keys.shard(7, tag_for_slot(shard.shard.slot))
    with pytest.raises(UnknownQueue, match="gone"):
        await schedules.close_ticks(shard.pipes, gone, "s", 100, None)
    with pytest.raises(UnknownQueue, match="gone"):
        await schedules.open_ticks(shard.pipes, gone, "s", 100, None)
    assert await tick(shard, 100, gone) == "MISSING"
    assert await shard.command("EXISTS", gone.meta) == 0


async def test_the_last_tick_outlives_producers_that_are_idle(shard: Rig) -> None:
    """A yearly schedule's field is never pruned; what a schedule that left has left behind is."""
    await shard.command("HSET", shard.shard.meta, FIELD, "100:1000-0:0", "p:cron/left", "100|1000-0|90")
    await shard.command("HSET", shard.shard.meta, "p:idle", "9:1000-0:0")
    for number in range(300):
        await shard.append(f"p{number}", 1, "a")
    fields = await shard.command("HKEYS", shard.shard.meta)
    assert FIELD.encode() in fields
    assert b"p:idle" not in fields
    assert b"p:cron/left" not in fields
    await shard.backlog()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("swap_schedule", ["s", "x"]),
        ("swap_schedule", ["", "", "x"]),
        ("close_ticks", ["cron/s", "soon"]),
        ("close_ticks", ["cron/s"]),
        ("open_ticks", ["cron/s", "-1"]),
        ("open_ticks", ["cron/s", "1", "2"]),
    ],
)
async def test_wrong_arguments_are_refused(shard: Rig, function: str, arguments: list[str]) -> None:
    with pytest.raises(StoreRefused, match="report it"):
        await shard.call(function, [shard.shard.meta], *arguments)
