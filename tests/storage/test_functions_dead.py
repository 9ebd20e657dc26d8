"""replay and purge on real servers: a dead letter is dead or handled again, never both, and the counters know."""

from __future__ import annotations

import anyio
import pytest

from shardq.core.step import Put
from shardq.errors import StoreRefused, UnknownGroup
from shardq.storage import dead
from tests.storage.rig import Rig, ids

pytestmark = pytest.mark.anyio
Items = list[tuple[bytes, bytes]]


async def letters(shard: Rig) -> list[str]:
    return [entry.decode() for entry, _ in await shard.command("XRANGE", shard.shard.dead("g"), "-", "+")]


async def bury(shard: Rig, *counts: int) -> tuple[str, list[str]]:
    """The owner's token, and dead letters that stand for so many messages each."""
    for number, count in enumerate(counts, start=1):
        await shard.append("p", number, *["v"] * count)
    token = await shard.own()
    finished = await shard.fetch(token)
    await shard.step(token, finished=finished, dead=[(count, b"letter") for count in counts])
    return token, await letters(shard)


async def keys_of(shard: Rig) -> list[str]:
    own = shard.shard
    return [own.meta, own.group("g"), own.dead("g"), own.later("g"), own.kept("g")]


async def test_a_dead_letter_goes_back_to_its_group(shard: Rig) -> None:
    token, (first, second) = await bury(shard, 1, 3)
    before = await shard.time_ms()
    items: Items = [(b"ka", b"one"), (b"", b"two"), (b"k:b", b"\0")]
    assert await shard.replay((second, 3, items), (first, 1, [(b"kc", b"four")])) == 2
    after = await shard.time_ms()
    assert await letters(shard) == []
    own = await shard.counters()
    assert (own.dead, own.replayed, own.waiting, own.dead_letters) == (4, 4, 4, 0)
    assert await shard.backlog() == 4
    stepped = await shard.step(token)
    assert stepped.fetched.next_item == 5, "the owner notices"
    stepped = await shard.step(token, known=0, gets=[1, 2, 3, 4])
    assert stepped.fetched.records == [b"one", b"two", b"\0", b"four"]
    found = [member.split(b":", 3) for member in stepped.fetched.items or ()]
    assert [(item, gets, tag) for item, _, gets, tag in found] == [
        (b"1", b"1", b"ka"),
        (b"2", b"1", b""),
        (b"3", b"1", b"k:b"),
        (b"4", b"1", b"kc"),
    ]
    assert all(before <= int(due) <= after for _, due, _, _ in found)
    await shard.step(token, acked=3, drops=[1, 2, 3])
    await shard.step(token, drops=[4], dead=[(1, b"again")])
    assert await shard.backlog() == 0
    assert (await shard.counters()).dead == 5


async def test_the_record_of_a_job_is_written_with_the_letter_that_is_handed_back(shard: Rig) -> None:
    _, (first, second) = await bury(shard, 1, 1)
    item: Items = [(b"k", b"record")]
    jobs = {first: ("q/0/ab", 60_000, b"state"), "1-1": ("q/0/cd", 60_000, b"state")}
    before = await shard.time_ms()
    handed = await dead.replay(
        shard.pipes, shard.shard, "g", [(first, 1, item), (second, 1, item), ("1-1", 1, item)], jobs
    )
    assert handed == 2
    assert await shard.command("HGET", shard.shard.timed, "j:q/0/ab") == b"state"
    assert await shard.command("HGET", shard.shard.timed, "j:q/0/cd") is None, "its letter was not there"
    ends = int(await shard.command("ZSCORE", shard.shard.expiring, "j:q/0/ab"))
    assert before + 60_000 <= ends <= await shard.time_ms() + 60_000
    assert (await shard.counters()).waiting == 2
    keys = [*await keys_of(shard), shard.shard.expiring, shard.shard.timed]
    bad: list[list[str | int]] = [["1-1", 1, 0], ["1-1", 1, 0, "j", "x", "s"], ["1-1", 1, 1, "j", 1, "s", "tag"]]
    for args in bad:
        with pytest.raises(StoreRefused, match="report it"):
            await shard.call("replay", keys, "g", "bell", *args)


async def test_a_repeated_replay_hands_nothing_back_twice(shard: Rig) -> None:
    token, (first, second) = await bury(shard, 1, 1)
    item: Items = [(b"", b"record")]
    assert await shard.replay((first, 1, item)) == 1
    before = await shard.dumps()
    assert await shard.replay((first, 1, item), (first, 1, item), ("1-1", 1, item)) == 0
    assert await shard.replay() == 0
    assert await shard.dumps() == before
    assert await shard.replay((first, 1, item), (second, 1, item), (second, 1, item)) == 1
    await shard.step(token, acked=2, drops=[1, 2])
    assert await shard.backlog() == 0


async def test_of_many_that_replay_at_once_one_hands_a_letter_back(shard: Rig) -> None:
    token, found = await bury(shard, *[1] * 30)
    handed: list[int] = []

    async def replays() -> None:
        handed.extend([await shard.replay((entry, 1, [(b"k", entry.encode())])) for entry in found])

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(replays)
    assert sum(handed) == 30
    stepped = await shard.step(token, gets=list(range(1, 31)))
    assert sorted(stepped.fetched.records) == sorted(entry.encode() for entry in found)
    assert (await shard.counters()).replayed == 30
    assert await shard.backlog() == 30


async def test_what_is_counted_is_what_is_handed_back(shard: Rig) -> None:
    """Of an entry of five that could not be read, three messages are left; and of another one none is."""
    token, (first, second) = await bury(shard, 5, 2)
    assert await shard.replay((first, 5, [(b"", b"record")] * 3), (second, 2, [])) == 2
    assert (await shard.counters()).replayed == 3
    assert await shard.backlog() == 3
    await shard.step(token, acked=3, drops=[1, 2, 3])
    assert await shard.backlog() == 0


async def test_ids_of_replayed_messages_are_not_given_twice(shard: Rig) -> None:
    token, (letter,) = await bury(shard, 1)
    await shard.append("q", 1, "a")
    entries = await shard.fetch(token)
    await shard.replay((letter, 1, [(b"", b"replayed")]))
    stepped = await shard.step(token, retried=1, finished=entries, puts=[Put(0, 0, 0, b"", b"put")], known=0)
    assert len(stepped.fetched.items or ()) == 2
    assert (await shard.step(token, gets=[1, 2])).fetched.records == [b"replayed", b"put"]
    assert await shard.backlog() == 2


async def test_a_replay_rings_the_bell_and_counts_against_the_bound(shard: Rig) -> None:
    token, (letter,) = await bury(shard, 1)
    await shard.tune(max_backlog=1, overflow="block")
    await shard.replay((letter, 1, [(b"", b"record")]))
    assert (await shard.append("q", 1, "a")).status == "FULL"
    await shard.step(token, acked=1, drops=[1])
    assert (await shard.append("q", 1, "a")).status == "OK"
    assert ids(await shard.step(token, limit=5)) == await shard.entries()


async def test_a_purged_letter_is_forgotten_its_count_is_not(shard: Rig) -> None:
    _, (first, second, third) = await bury(shard, 1, 2, 1)
    assert await dead.purge(shard.pipes, shard.shard, "g", [first, third, third, "1-1"]) == 2
    assert await dead.purge(shard.pipes, shard.shard, "g", [first]) == 0
    assert await letters(shard) == [second]
    assert await shard.replay((first, 1, [(b"", b"record")])) == 0
    own = await shard.counters()
    assert (own.dead, own.replayed, own.dead_letters) == (4, 0, 1)
    assert await shard.backlog() == 0


async def test_a_group_that_is_not_there(shard: Rig) -> None:
    with pytest.raises(UnknownGroup, match="not there"):
        await shard.replay(("1-1", 1, [(b"", b"record")]), group="other")
    assert await shard.command("EXISTS", *shard.shard.of_group("other")) == 0


@pytest.mark.parametrize(
    "args",
    [
        ["g"],
        ["g", "bell", "1-1"],
        ["g", "bell", "1-1", 1],
        ["g", "bell", "1-1", 1, "x"],
        ["g", "bell", "1-1", 1, -1],
        ["g", "bell", "1-1", "x", 0],
        ["g", "bell", "1-1", 1, 2, "", "record"],
        ["g", "bell", "1-1", 1, 1, "", "record", "more"],
        ["g", "bell", "soon", 1, 1, "", "record"],
        ["g", "bell", "*", 1, 0],
        ["g", "bell", "1-1", 1, 0, "", 0, b""],  # a job, and no keys for it
    ],
)
async def test_a_malformed_replay_hands_nothing_back(shard: Rig, args: list[str | int]) -> None:
    _, (letter,) = await bury(shard, 1)
    keys = await keys_of(shard)
    before = await shard.dumps()
    good: list[str | int] = [letter, 1, 1, "", "record"]
    for arguments in (args, [*args[:2], *good, *args[2:]] if len(args) > 2 else args):
        with pytest.raises(StoreRefused, match="report it"):
            await shard.call("replay", keys, *arguments)
    with pytest.raises(StoreRefused, match="report it"):
        await shard.call("replay", keys[:4], "g", "bell", *good)
    assert await shard.dumps() == before


@pytest.mark.parametrize("entries", [[], ["soon"], ["1-1", ""], ["1-1"] * 1001])
async def test_a_malformed_purge_forgets_nothing(shard: Rig, entries: list[str]) -> None:
    _, (letter,) = await bury(shard, 1)
    with pytest.raises(StoreRefused, match="report it"):
        await shard.call("purge", [shard.shard.dead("g")], *entries)
    with pytest.raises(StoreRefused, match="report it"):
        await shard.call("purge", [shard.shard.dead("g"), shard.shard.kept("g")], letter)
    assert await letters(shard) == [letter]
