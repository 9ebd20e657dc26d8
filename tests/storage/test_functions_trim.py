"""What tidy gives back of a stream, on real servers: by age or size, and never what a group has not finished."""

from __future__ import annotations

import anyio
import pytest

from tests.storage.rig import Rig

pytestmark = pytest.mark.anyio
HOUR_MS = 3_600_000


async def finish_some(shard: Rig, count: int, group: str = "g") -> None:
    token = await shard.own(group, group)
    finished = await shard.fetch(token, count, group=group)
    await shard.step(token, acked=len(finished), finished=finished, group=group)


async def large(shard: Rig, count: int) -> list[str]:
    """Entries that Redis keeps in a node each."""
    return [await shard.stored("p", number, "x" * 10_000) for number in range(1, count + 1)]


@pytest.mark.parametrize("setting", [{"retention_ms": HOUR_MS}, {"retention_bytes": 10**9}])
async def test_what_is_within_its_retention_stays_when_it_is_finished(shard: Rig, setting: dict[str, int]) -> None:
    entries = await large(shard, 5)
    await shard.tune(**setting)
    await finish_some(shard, 5)
    assert not await shard.tidy()
    assert await shard.entries() == entries
    assert await shard.backlog() == 0
    await shard.command("HDEL", shard.shard.meta, *setting)
    await shard.tidy()
    assert await shard.entries() == [], "without a retention, what is finished goes"


@pytest.mark.parametrize("setting", [{"retention_ms": 0}, {"retention_bytes": 1}])
async def test_no_retention_trims_what_a_group_has_not_finished(shard: Rig, setting: dict[str, int]) -> None:
    entries = await large(shard, 6)
    await shard.open_group("slow")
    await shard.tune(**setting)
    await anyio.sleep(0.01)
    await finish_some(shard, 5)
    await finish_some(shard, 2, "slow")
    assert await shard.entries() == entries, "a step trims nothing where there is a retention"
    await shard.tidy()
    assert await shard.entries() == entries[2:]
    assert (await shard.backlog(), await shard.backlog("slow")) == (1, 4)
    token = await shard.own("slow", "slow")
    assert await shard.fetch(token, group="slow") == entries[2:]
    await shard.tidy()
    assert await shard.entries() == entries[2:], "pending is not finished"


@pytest.mark.parametrize("setting", [{"retention_ms": 0}, {"retention_bytes": 1}])
async def test_a_group_without_a_floor_holds_everything(shard: Rig, setting: dict[str, int]) -> None:
    entries = await large(shard, 3)
    await shard.tune(**setting)
    await finish_some(shard, 3)
    await shard.command("HDEL", shard.shard.meta, "floor:g")
    await anyio.sleep(0.01)
    assert not await shard.tidy()
    assert await shard.entries() == entries


async def test_entries_go_by_their_age(shard: Rig) -> None:
    for number in (1, 2, 3):
        await shard.command("XADD", shard.shard.stream, f"{number}-1", "name", "Ann")
    entry = await shard.stored("p", 1, "a")
    token = await shard.own()
    finished = await shard.fetch(token)
    await shard.tune(retention_ms=HOUR_MS)
    await shard.step(token, acked=4, finished=finished)
    assert await shard.entries() == finished
    await shard.tidy()
    assert await shard.entries() == [entry]


@pytest.mark.parametrize("groups", [True, False])
async def test_a_stream_is_held_to_its_size(shard: Rig, groups: bool) -> None:
    entries = await large(shard, 40)
    await shard.tune(retention_bytes=200_000)
    if groups:
        await finish_some(shard, 40)
    else:
        await shard.tune(groups="")
    while await shard.tidy():
        pass
    left = await shard.entries()
    assert left == entries[-len(left) :]
    assert await shard.command("MEMORY", "USAGE", shard.shard.stream) <= 200_000
    assert len(left) > 8, "and not more than needed"
    await shard.tidy()
    assert await shard.entries() == left
    if not groups:  # the fixture's group, which was not asked
        await shard.tune(groups="g", **{"skip:g": 40 - len(left)})


async def test_a_stream_far_over_its_size_is_trimmed_in_portions(shard: Rig) -> None:
    async with anyio.create_task_group() as tasks:
        for number in range(1, 2501):
            tasks.start_soon(shard.append, f"p{number % 50}", number, "a")
    await shard.tune(retention_bytes=1)
    await finish_some(shard, 2500)
    count = len(await shard.entries())
    for _ in range(2):
        assert await shard.tidy(), "there is more"
        count -= 1000
        assert count <= len(await shard.entries()) <= count + 100
    assert not await shard.tidy()
    assert len(await shard.entries()) <= 400


async def test_no_groups_keep_all_that_is_within_the_retention(shard: Rig) -> None:
    entries = await large(shard, 3)
    await shard.tune(groups="")
    assert not await shard.tidy()
    assert await shard.entries() == entries, "the first group begins with it"
    await shard.tune(retention_ms=0)
    await anyio.sleep(0.01)
    await shard.tidy()
    assert await shard.entries() == []
    await shard.tune(groups="g", **{"skip:g": 3})
