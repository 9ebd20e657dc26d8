"""promote and tidy on real servers: what is due comes once and in order, what has had its time goes, nothing else."""

from __future__ import annotations

import anyio
import pytest

from shardq.errors import StoreRefused
from tests.storage.rig import Rig, one

pytestmark = pytest.mark.anyio
HOUR_MS = 3_600_000


async def delay(shard: Rig, count: int, *, producer: str = "p") -> list[str]:
    """So many messages that are due in an hour, all in the same ms."""
    items = [one(str(number), when=f"in:{HOUR_MS}") for number in range(count)]
    return [*(await shard.append_each(producer, 1, *items)).entries]


async def make_due(shard: Rig, *names: str) -> None:
    """As if the hour were over."""
    past = await shard.time_ms() - 1000
    await shard.command("ZADD", shard.shard.delayed, "XX", *(part for name in names for part in (past, name)))


# -- promote ----------------------------------------------------------------------------------------------


async def test_only_what_is_due_is_promoted(shard: Rig) -> None:
    names = await delay(shard, 5)
    moved, following = await shard.promote()
    assert moved == 0
    assert 0 < (following or 0) <= HOUR_MS
    await make_due(shard, names[1], names[3])
    moved, following = await shard.promote()
    assert moved == 2
    assert 0 < (following or 0) <= HOUR_MS
    assert await shard.values() == ["1", "3"]
    state = await shard.inspect("g")
    assert (state.appended, state.delayed) == (2, 3)
    assert await shard.backlog() == 2
    assert float(await shard.meta("due") or 0) == float(await shard.command("ZSCORE", shard.shard.delayed, names[0]))
    await make_due(shard, *names)
    assert await shard.promote() == (3, None)
    assert await shard.meta("due") is None
    assert await shard.values() == ["1", "3", "0", "2", "4"]
    assert await shard.command("HKEYS", shard.shard.timed) == [b"", b"delayed_next"]
    assert await shard.command("ZRANGE", shard.shard.delayed, 0, -1) == [b""]
    assert await shard.promote() == (0, None)
    token = await shard.own()
    await shard.step(token, acked=5, finished=await shard.fetch(token))
    assert await shard.backlog() == 0


async def test_messages_due_at_once_keep_the_order_in_which_they_were_sent(shard: Rig) -> None:
    names = await delay(shard, 120)
    await make_due(shard, *names)
    for moved in (50, 50, 20):
        assert (await shard.promote(50))[0] == moved
    assert await shard.values() == [str(number) for number in range(120)]


async def test_a_call_moves_as_many_as_it_is_told(shard: Rig) -> None:
    names = await delay(shard, 5)
    await make_due(shard, *names)
    assert await shard.promote(0) == (0, 0)
    assert await shard.promote(2) == (2, 0)
    state = await shard.inspect("g")
    assert (state.appended, state.delayed) == (2, 3)
    assert await shard.promote(9) == (3, None)


async def test_several_that_promote_at_once_lose_and_double_nothing(shard: Rig) -> None:
    names = await delay(shard, 300)
    other = await delay(shard, 300, producer="q")
    await make_due(shard, *names, *other)
    moved: list[int] = []

    async def promotes() -> None:
        while (step := (await shard.promote(7))[0]) > 0:
            moved.append(step)

    async with anyio.create_task_group() as tasks:
        for _ in range(6):
            tasks.start_soon(promotes)
    assert sum(moved) == 600
    assert sorted(await shard.values(), key=int) == sorted([*map(str, range(300))] * 2, key=int)
    assert (await shard.inspect("g")).delayed == 0
    assert await shard.backlog() == 600


async def test_promoting_rings_the_bell(shard: Rig) -> None:
    token = await shard.own()
    (name,) = await delay(shard, 1)
    stepped = await shard.step(token, limit=1, wait=True)
    assert 0 < (stepped.fetched.due_in_ms or 0) <= HOUR_MS
    await shard.promote()
    assert await shard.meta("waiting") == "1"
    await make_due(shard, name)
    assert (await shard.step(token)).fetched.due_in_ms is not None
    await shard.promote()
    assert await shard.meta("waiting") is None
    assert (await shard.step(token)).fetched.due_in_ms is None


async def test_a_sealed_shard_still_gives_what_was_delayed(shard: Rig) -> None:
    """Its groups have to finish it before those of its children begin."""
    names = await delay(shard, 2)
    await shard.tune(state="sealed")
    await make_due(shard, *names)
    assert await shard.promote() == (2, None)
    assert await shard.backlog() == 2


async def test_a_name_without_a_batch_is_dropped(shard: Rig) -> None:
    names = await delay(shard, 2)
    await shard.command("HDEL", shard.shard.timed, names[0])
    await make_due(shard, *names)
    assert await shard.promote() == (1, None)
    assert await shard.values() == ["1"]
    assert await shard.backlog() == 1


# -- tidy: what is remembered -----------------------------------------------------------------------------


async def test_what_has_had_its_time_is_forgotten(shard: Rig) -> None:
    items = [
        one("a", once="short", window_ms=1),
        one("b", once="long", window_ms=HOUR_MS),
        one("c", job="short", job_ms=1, job_record=b"record"),
        one("d", job="long", job_ms=HOUR_MS, job_record=b"record"),
        one("e", when="in:1"),
    ]
    answer = await shard.append_each("p", 1, *items)
    await anyio.sleep(0.01)
    assert not await shard.tidy()
    kept = {b"", b"o:long", b"j:long"}
    assert {*await shard.command("ZRANGE", shard.shard.expiring, 0, -1)} == kept
    assert {*await shard.command("HKEYS", shard.shard.timed)} == kept | {answer.entries[-1].encode(), b"delayed_next"}
    assert (await shard.promote())[0] == 1, "due, not expired"
    assert await shard.values() == ["a", "b", "c", "d", "e"]


async def test_much_is_forgotten_in_portions(shard: Rig) -> None:
    items = [one("a", once=str(number), window_ms=1) for number in range(1500)]
    await shard.append_each("p", 1, *items)
    await anyio.sleep(0.01)
    assert await shard.tidy(), "there is more"
    assert not await shard.tidy()
    assert await shard.command("HKEYS", shard.shard.timed) == [b""]


async def test_idle_producers_are_forgotten_schedules_are_not(shard: Rig) -> None:
    await shard.append("busy", 1, "a")
    await shard.append_each("busy each", 1, one("a", when="in:5000"))
    idle = {
        "p:idle": "7:1000-0:0",
        "p:idle each": "7|1000-0|1000-0 d5",
        "p:cron/yearly": "1700000000:1000-0:0",
        "p:cron/left": "1700000000|1000-0|1600000000",
    }
    await shard.tune(**idle)
    await shard.tidy()
    fields = {field.decode() for field in await shard.command("HKEYS", shard.shard.meta)}
    assert {field for field in fields if field.startswith("p:")} == {"p:busy", "p:busy each", "p:cron/yearly"}
    assert (await shard.append("busy", 1, "a")).status == "OK"
    assert len(await shard.entries()) == 1


# -- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "keys", "args"),
    [
        ("promote", 4, []),
        ("promote", 4, ["bell", "many"]),
        ("promote", 4, ["bell", "-1"]),
        ("promote", 3, ["bell", "1"]),
        ("tidy", 3, []),
        ("tidy", 4, ["now"]),
    ],
)
async def test_wrong_arguments_are_refused(shard: Rig, function: str, keys: int, args: list[str]) -> None:
    own = shard.shard
    named = [own.stream, own.meta, own.expiring, own.timed][:keys]
    with pytest.raises(StoreRefused, match="report it"):
        await shard.call(function, named, *args)
