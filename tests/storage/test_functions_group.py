"""Where a group begins that is opened or reset: what it gets, what it does not, and that its counters say so."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from shardq.core.intake import pack_progress
from shardq.core.step import FIRST
from shardq.ops.local_cluster import LocalCluster
from shardq.storage import groups
from shardq.storage.groups import Done, Start
from tests.storage.group_rig import GroupRig, checked_rig

pytestmark = pytest.mark.anyio

EARLIEST, LATEST = Start(), Start("latest")


@pytest.fixture
async def shard(cluster: LocalCluster, queue_name: str) -> AsyncIterator[GroupRig]:
    async with checked_rig(cluster.url, queue_name) as made:
        yield made


async def trimmed(shard: GroupRig) -> list[str]:
    """Entries of 3, 2 and 4 messages, of which the first one is gone, with another client's before the last one."""
    await shard.open("first")
    owner = await shard.own("first")
    entries = [await shard.append(3), await shard.append(2), await shard.foreign(), await shard.append(4)]
    await shard.finish(owner, await shard.fetch(owner, 1))
    assert [entry for entry, *_ in await shard.entries()] == entries[1:]
    return entries


# -- where a group begins -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "backlog", "gets"),
    [
        ("earliest", 6, [1, 2, 3]),
        ("latest", 0, []),
        ("the first, which is gone", 6, [1, 2, 3]),
        ("the second", 6, [1, 2, 3]),
        ("another client's", 4, [2, 3]),
        ("the last", 4, [3]),
        ("the time of the second", 6, [1, 2, 3]),
        ("time 0", 6, [1, 2, 3]),
        ("a time to come", 0, []),
    ],
)
async def test_a_new_group_begins_where_it_is_told(shard: GroupRig, start: str, backlog: int, gets: list[int]) -> None:
    entries = await trimmed(shard)
    at = {
        "the first, which is gone": entries[0],
        "the second": entries[1],
        "another client's": entries[2],
        "the last": entries[3],
        "the time of the second": f"{entries[1].split('-')[0]}-0",
        "time 0": "0-0",
        "a time to come": "253402300799999-0",
    }.get(start, start)
    assert await shard.open("g", Start(at)) == Done("CREATED", backlog)
    assert await shard.backlog() == backlog
    owner = await shard.own()
    got = await shard.fetch(owner)
    assert [entry for entry, _ in got] == [entries[index] for index in gets]
    assert await shard.backlog() == sum(count for _, count in got), "another client's entry counts once it is delivered"
    later = await shard.append(5)
    assert await shard.fetch(owner) == [(later, 5)]
    await shard.finish(owner, [*got, (later, 5)])
    assert await shard.backlog() == 0


@pytest.mark.parametrize("left_out", range(1, 11))
async def test_a_start_inside_a_batch_leaves_out_exactly_the_messages_before_it(shard: GroupRig, left_out: int) -> None:
    await shard.append(2)
    entry = await shard.append(10)
    behind = await shard.append(3)
    assert await shard.open("g", Start(entry, left_out)) == Done("CREATED", 13 - left_out)
    assert await shard.backlog() == 13 - left_out
    owner = await shard.own()
    reply = await shard.step(owner, limit=10, cursor=FIRST)
    if left_out < 10:
        assert [found for found, _ in reply[2]] == [entry.encode()]
        times, _, progress = reply[3][0].partition(b":")
        assert times == b"1", "the first time that it is handed out"
        assert progress == pack_progress(bytearray([1] * left_out + [0] * (10 - left_out)))
        await shard.step(owner, "done", 1, entry, acked=10 - left_out)
    else:
        assert reply[2] == []
    assert await shard.fetch(owner) == [(behind, 3)]
    await shard.finish(owner, [(behind, 3)])
    assert await shard.backlog() == 0
    assert (await shard.counters()).acked == 13 - left_out


@pytest.mark.parametrize("index", [0, 1, 9])
async def test_another_clients_entry_has_one_message(shard: GroupRig, index: int) -> None:
    await shard.append(2)
    entry = await shard.foreign()
    await shard.append(3)
    assert await shard.open("g", Start(entry, index)) == Done("CREATED", 3)
    owner = await shard.own()
    assert len(await shard.fetch(owner)) == (2 if index == 0 else 1)


async def test_an_entry_that_only_looks_like_ours_does_not_move_the_start(shard: GroupRig) -> None:
    await shard.append(2)
    forged = await shard.foreign("at", "99", "batch", "\1\0\0\5forged")
    await shard.append(3)
    assert await shard.open("g", Start(forged, 3)) == Done("CREATED", 3)
    assert await shard.open("h", Start(forged)) == Done("CREATED", 3)
    for group in ("g", "h"):
        owner = await shard.own(group)
        await shard.finish(owner, await shard.fetch(owner))
        assert await shard.backlog(group) == 0


async def test_a_group_stays_where_it_is_when_it_is_opened_again(shard: GroupRig) -> None:
    await shard.append(2)
    assert await shard.open() == Done("CREATED", 2)
    assert await shard.open("g", LATEST) == Done("EXISTS")
    owner = await shard.own()
    assert await shard.open("g", LATEST) == Done("EXISTS")
    assert len(await shard.fetch(owner)) == 1


async def test_a_group_on_an_empty_and_on_an_emptied_shard(shard: GroupRig) -> None:
    for group, start in (("a", EARLIEST), ("b", LATEST), ("c", Start("5-0"))):
        assert await shard.open(group, start) == Done("CREATED", 0)
    for group in ("a", "b", "c"):
        if group == "a":
            await shard.append(2)
        owner = await shard.own(group)
        await shard.finish(owner, await shard.fetch(owner))
    assert await shard.entries() == []
    for group, start in (("d", EARLIEST), ("e", LATEST), ("f", Start("5-0", 3))):
        assert await shard.open(group, start) == Done("CREATED", 0)
        assert (await shard.counters(group)).base == 2


async def test_a_group_that_began_late_holds_up_no_trimming_before_it(shard: GroupRig) -> None:
    await shard.open("g")
    first = await shard.append(2)
    await shard.open("late", LATEST)
    second = await shard.append(2)
    owner = await shard.own()
    await shard.finish(owner, await shard.fetch(owner))
    assert [entry for entry, *_ in await shard.entries()] == [second]
    assert first < second
    assert (await shard.counters("late")).oldest_unread == second
    assert await shard.backlog("late") == 2


@pytest.mark.parametrize("earlier", [0, 1])
async def test_a_full_queue_does_not_count_against_a_group_what_it_does_not_read(shard: GroupRig, earlier: int) -> None:
    if earlier:
        await shard.open("early")
    await shard.append(3)
    await shard.command("HSET", shard.shard.meta, "max_backlog", "3", "overflow", "block")
    await shard.open("g", LATEST)
    keys = [shard.shard.stream, shard.shard.meta]
    batch = b"\1\0\0\1" + b"x"
    reply = await shard.call("append", keys, "q", 1, 1, batch, shard.shard.bell)
    assert reply[0] == (b"FULL" if earlier else b"OK")


async def dropped(shard: GroupRig) -> list[str]:
    """Six batches of 2 of which a full queue dropped the first two and the fourth: the group "slow" has the third."""
    await shard.open("slow")
    owner = await shard.own("slow")
    first = [await shard.append(2) for _ in range(3)]
    await shard.finish(owner, (await shard.fetch(owner, 3))[:2])
    await shard.command("HSET", shard.shard.meta, "max_backlog", "6", "overflow", "drop-oldest")
    await shard.step(owner)  # tells meta how far the group is
    rest = [await shard.append(2) for _ in range(4)]
    left = [entry for entry, *_ in await shard.entries()]
    assert left == [first[2], *rest[2:]], "one in hand, and what fits beside it"
    return left


@pytest.mark.parametrize("index", [0, 1, 2])
async def test_what_a_full_queue_dropped_is_no_backlog_of_a_group_that_begins_before_it(
    shard: GroupRig, index: int
) -> None:
    left = await dropped(shard)
    start = (EARLIEST, Start(left[1]), LATEST)[index]
    backlog = (6, 4, 0)[index]
    assert await shard.open("g", start) == Done("CREATED", backlog)
    assert (await shard.counters("g")).skip == (4 if index == 0 else 0)
    owner = await shard.own()
    got = await shard.fetch(owner)
    assert await shard.backlog() == sum(count for _, count in got) == backlog
    assert (await shard.counters("g")).lost == (4 if index == 0 else 0)
    await shard.finish(owner, got)
    assert await shard.backlog() == 0
    before = await shard.totals()
    assert await shard.reset(EARLIEST, force=True) == Done("OK", 6)
    again = await shard.own()
    await shard.finish(again, await shard.fetch(again))
    assert await shard.backlog() == 0
    after = await shard.totals()
    assert all(after[name] >= before[name] for name in before)


async def test_what_is_dropped_before_its_start_is_nothing_to_a_group(shard: GroupRig) -> None:
    await shard.open("early")
    entries = [await shard.append(2) for _ in range(3)]
    await shard.open("late", Start(entries[2]))
    await shard.command("HSET", shard.shard.meta, "max_backlog", "6", "overflow", "drop-oldest")
    entries.append(await shard.append(4))
    assert [entry for entry, *_ in await shard.entries()] == entries[2:]
    assert [(await shard.counters(group)).skip for group in ("early", "late")] == [4, 0]
    assert await shard.backlog("late") == 6


async def test_dropped_messages_that_a_reset_passes_by_are_lost_all_the_same(shard: GroupRig) -> None:
    left = await dropped(shard)
    for start, behind in ((EARLIEST, 4), (Start(left[1]), 0), (LATEST, 0)):
        assert (await shard.reset(start, "slow", force=True)).status == "OK"
        own = await shard.counters("slow")
        assert (own.skip, own.lost) == (behind, 4 - behind)


@pytest.mark.parametrize("erased", [0, 2, 3, 4])
async def test_an_entry_that_was_erased_is_no_backlog_of_a_group_that_begins_before_it(
    shard: GroupRig, erased: int
) -> None:
    """As the deletion of all its messages leaves it: the entry is gone, `erased` counts its messages."""
    entries = [await shard.append(2), await shard.append(3), await shard.foreign(), await shard.append(4)]
    entries.append(await shard.append(1))
    await shard.command("XDEL", shard.shard.stream, entries[erased])
    await shard.command("HSET", shard.shard.meta, "erased", [2, 3, 1, 4, 1][erased])
    left = {0: 8, 2: 10, 3: 6, 4: 9}[erased]
    assert await shard.open() == Done("CREATED", left)
    owner = await shard.own()
    await shard.finish(owner, await shard.fetch(owner, 2))
    await shard.backlog()
    await shard.finish(owner, await shard.fetch(owner))
    assert await shard.backlog() == 0
    assert (await shard.counters()).foreign == (0 if erased == 2 else 1)


async def test_a_deletion_is_noted_until_the_group_is_opened_again_or_an_hour_is_over(shard: GroupRig) -> None:
    async def noted() -> bool:
        return await groups.was_deleted(shard.pipes, shard.shard, "g")

    async def tidy() -> None:
        own = shard.shard
        await shard.call("tidy", [own.stream, own.meta, own.expiring, own.timed])

    await groups.delete_group(shard.pipes, shard.shard, "g", force=False)
    assert not await noted(), "it was never there"
    await shard.open()
    await groups.delete_group(shard.pipes, shard.shard, "g", force=False)
    assert await noted()
    await shard.open()
    assert not await noted()
    await groups.delete_group(shard.pipes, shard.shard, "g", force=False)
    await tidy()
    assert await noted()
    await shard.command("HINCRBY", shard.shard.meta, "gone:g", -3_601_000)
    await tidy()
    assert not await noted()
