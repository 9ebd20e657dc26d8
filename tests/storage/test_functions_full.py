"""A queue with max_backlog on real servers: when it is full, what it drops, and what it counts of that."""

from __future__ import annotations

import pytest

from shardq.core.step import Put
from tests.storage.rig import Rig, one

pytestmark = pytest.mark.anyio
HOUR_MS = 3_600_000


async def append(shard: Rig, sequence: int, count: int = 1) -> str:
    """A batch of so many messages; how that ended."""
    return (await shard.append("p", sequence, *[str(sequence)] * count)).status


# -- full -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", ["block", "reject"])
async def test_a_full_shard_refuses_and_says_what_to_do(shard: Rig, overflow: str) -> None:
    await shard.tune(max_backlog=4, overflow=overflow)
    assert [await append(shard, 1, 2), await append(shard, 2, 2)] == ["OK", "OK"]
    before = await shard.dumps()
    refused = await shard.append("p", 3, "c")
    assert (refused.status, refused.overflow, refused.entries) == ("FULL", overflow, ())
    assert await shard.append_each("q", 1, one("c")) == refused
    assert await shard.dumps() == before
    token = await shard.own()
    await shard.step(token, acked=2, finished=await shard.fetch(token, 1))
    assert await append(shard, 3, 3) == "FULL", "three do not fit where two do"
    assert await append(shard, 3, 2) == "OK", "nothing was stored under this sequence"
    assert await shard.backlog() == 4


async def test_one_batch_always_fits_into_an_empty_shard(shard: Rig) -> None:
    await shard.tune(max_backlog=2, overflow="block")
    assert await append(shard, 1, 5) == "OK"
    assert await append(shard, 2) == "FULL"
    token = await shard.own()
    await shard.step(token, acked=5, finished=await shard.fetch(token))
    many = [one(str(number), when="in:9000" if number % 2 else "") for number in range(5)]
    assert (await shard.append_each("q", 1, *many)).status == "OK"
    assert await append(shard, 2) == "FULL"
    assert await shard.backlog() == 3


async def test_the_slowest_group_counts_with_all_it_has_not_finished(shard: Rig) -> None:
    await shard.open_group("slow")
    await shard.tune(max_backlog=3, overflow="block")
    fast, slow = await shard.own(), await shard.own("s", "slow")
    assert await append(shard, 1, 3) == "OK"
    finished = await shard.fetch(fast)
    await shard.step(fast, acked=3, finished=finished)
    assert await append(shard, 2) == "FULL", "slow has not read it"
    assert await shard.fetch(slow, group="slow") == finished
    assert await append(shard, 2) == "FULL", "slow has it in hand"
    puts = [Put(0, 60000, 0, b"", b"record")]
    await shard.step(slow, acked=2, retried=1, finished=finished, puts=puts, group="slow")
    assert await append(shard, 2, 3) == "FULL", "slow tries one of it again"
    assert await append(shard, 2, 2) == "OK"
    await shard.step(slow, drops=[1], dead=[(1, b"letter")], group="slow")
    assert await append(shard, 3, 1) == "OK", "a dead letter is finished"
    assert await append(shard, 4) == "FULL"
    ((letter, _),) = await shard.command("XRANGE", shard.shard.dead("slow"), "-", "+")
    await shard.step(slow, acked=2, finished=await shard.fetch(slow, 1, group="slow"), group="slow")
    assert await shard.replay((letter.decode(), 1, [(b"", b"record")]), group="slow") == 1
    assert await shard.backlog("slow") == 2
    await shard.step(fast, acked=3, finished=await shard.fetch(fast))
    assert await append(shard, 4, 2) == "FULL", "what was replayed is not finished"
    assert await append(shard, 4) == "OK"
    assert await shard.backlog("slow") == 3


async def test_delayed_messages_count(shard: Rig) -> None:
    await shard.tune(max_backlog=3, overflow="block")
    delayed = await shard.append_each("q", 1, one("a", when="in:60000"), one("b", when="in:60000"))
    assert await append(shard, 1, 2) == "FULL"
    assert await append(shard, 1) == "OK"
    assert (await shard.append_each("q", 2, one("c", when="in:60000"))).status == "FULL"
    await shard.command("ZADD", shard.shard.delayed, "XX", 1, delayed.entries[0])
    assert (await shard.promote())[0] == 1
    assert await append(shard, 2) == "FULL", "promoted, not gone"
    token = await shard.own()
    await shard.step(token, acked=2, finished=await shard.fetch(token))
    assert await append(shard, 2, 2) == "OK"


async def test_what_was_sent_before_needs_no_room(shard: Rig) -> None:
    """A dedupe id that is remembered gives its answer also where nothing fits; what is twice in a call counts once."""
    await shard.tune(max_backlog=2, overflow="block")
    once = one("a", once="x", window_ms=HOUR_MS)
    first = await shard.append_each("p", 1, once, one("b"))
    assert (await shard.append_each("q", 1, once, once)).entries == first.entries[:1] * 2
    assert (await shard.append_each("q", 2, once, one("c"))).status == "FULL"
    token = await shard.own()
    await shard.step(token, acked=1, finished=await shard.fetch(token, 1))
    twice = one("d", once="y", window_ms=HOUR_MS)
    assert (await shard.append_each("q", 2, once, twice, twice)).status == "OK"


async def test_without_groups_what_is_stored_counts(shard: Rig) -> None:
    await shard.command("XADD", shard.shard.stream, "*", "name", "Ann")
    await shard.tune(groups="", max_backlog=3, overflow="block")
    assert await append(shard, 1, 2) == "OK"
    assert await append(shard, 2, 2) == "FULL"
    assert await append(shard, 2) == "OK"
    await shard.tune(overflow="drop-oldest")
    assert await append(shard, 3, 2) == "OK"
    assert len(await shard.entries()) == 3, "another client's stays"
    assert await shard.meta("dropped") == "2"
    await shard.tune(groups="g", **{"skip:g": 2})


async def test_a_bound_that_comes_later_knows_how_far_the_groups_are(shard: Rig) -> None:
    token = await shard.own()
    for sequence in range(1, 6):
        assert await append(shard, sequence) == "OK"
    first, second, *_ = await shard.fetch(token, 3)
    await shard.step(token, acked=2, finished=[first, second])
    await shard.tune(max_backlog=4, overflow="block")
    assert await append(shard, 6) == "OK"
    assert await append(shard, 7) == "FULL"
    await shard.tune(max_backlog=1, overflow="drop-oldest")
    in_hand = await shard.fetch(token, 1)
    assert await append(shard, 7) == "OK"
    assert await shard.values() == ["3", "4", "7"], "two in hand and the new one"
    assert await shard.fetch(token, cursor="0-0") == [(await shard.entries())[0], *in_hand]
    assert await shard.backlog() == 3


# -- drop-oldest ------------------------------------------------------------------------------------------


async def test_the_oldest_unread_make_room(shard: Rig) -> None:
    await shard.tune(max_backlog=4, overflow="drop-oldest")
    for sequence in (1, 2, 3):
        assert await append(shard, sequence, 2) == "OK"
    assert await shard.values() == ["2", "2", "3", "3"]
    own = await shard.counters()
    assert (own.skip, own.lost, (await shard.inspect("g")).dropped) == (2, 0, 2)
    assert await shard.backlog() == 4
    token = await shard.own()
    finished = await shard.fetch(token)
    own = await shard.counters()
    assert (own.skip, own.lost, own.base, own.delivered) == (0, 2, 2, 4)
    await shard.step(token, acked=4, finished=finished)
    assert await shard.backlog() == 0
    assert await append(shard, 4, 9) == "OK"
    assert await append(shard, 5, 1) == "OK", "a batch beyond the bound goes whole"
    assert await shard.values() == ["5"]
    assert (await shard.inspect("g")).dropped == 11


async def test_what_any_group_has_in_hand_is_not_dropped(shard: Rig) -> None:
    await shard.open_group("other")
    await shard.tune(max_backlog=3, overflow="drop-oldest")
    token, other = await shard.own(), await shard.own("o", "other")
    assert [await append(shard, sequence) for sequence in (1, 2, 3)] == ["OK"] * 3
    assert len(await shard.fetch(token, 1)) == 1
    assert len(await shard.fetch(other, 2, group="other")) == 2
    assert [await append(shard, sequence) for sequence in (4, 5, 6)] == ["OK"] * 3
    assert await shard.values() == ["1", "2", "6"], "1 is with both, 2 with one"
    assert (await shard.counters()).skip == (await shard.counters("other")).skip == 3
    assert await append(shard, 7) == "OK"
    assert await shard.values() == ["1", "2", "7"]
    await shard.step(token, acked=3, finished=[*await shard.fetch(token, cursor="0-0"), *await shard.fetch(token)])
    assert await shard.backlog() == 0
    finished = [*await shard.fetch(other, cursor="0-0", group="other"), *await shard.fetch(other, group="other")]
    await shard.step(other, acked=3, finished=finished, group="other")
    assert await shard.backlog("other") == 0
    assert (await shard.counters()).lost == (await shard.counters("other")).lost == 4
    assert await shard.entries() == []


async def test_what_is_kept_after_it_was_finished_is_not_counted_as_dropped(shard: Rig) -> None:
    await shard.tune(max_backlog=2, overflow="drop-oldest", retention_ms=HOUR_MS)
    token = await shard.own()
    assert await append(shard, 1, 2) == "OK"
    await shard.step(token, acked=2, finished=await shard.fetch(token))
    assert [await append(shard, sequence) for sequence in (2, 3, 4)] == ["OK"] * 3
    assert await shard.values() == ["1", "1", "3", "4"]
    assert (await shard.inspect("g")).dropped == 1
    assert await shard.backlog() == 2


async def test_a_group_behind_with_its_retries_costs_others_nothing(shard: Rig) -> None:
    await shard.open_group("other")
    token = await shard.own()
    assert await append(shard, 1, 3) == "OK"
    puts = [Put(0, 60000, 0, b"", b"record")] * 3
    await shard.step(token, retried=3, finished=await shard.fetch(token), puts=puts)
    other = await shard.own("o", "other")
    await shard.step(other, acked=3, finished=await shard.fetch(other, group="other"), group="other")
    assert await append(shard, 2) == "OK"
    assert len(await shard.fetch(token)) == 1
    await shard.tune(max_backlog=3, overflow="drop-oldest")
    assert await append(shard, 3) == "OK"
    assert await shard.values() == ["2", "3"], "dropping what other has not read would not help g"
    assert await append(shard, 4) == "OK"
    assert await shard.values() == ["2", "4"]
    assert ((await shard.counters()).skip, (await shard.counters("other")).skip) == (1, 1)
    assert (await shard.backlog(), await shard.backlog("other")) == (5, 2)


async def test_delayed_messages_and_those_of_other_clients_are_not_dropped(shard: Rig) -> None:
    await shard.tune(max_backlog=2, overflow="drop-oldest")
    await shard.append_each("q", 1, one("a", when="in:60000"), one("b", when="in:60000"))
    foreign = (await shard.command("XADD", shard.shard.stream, "*", "name", "Ann")).decode()
    assert [await append(shard, sequence) for sequence in (1, 2)] == ["OK"] * 2
    assert await shard.entries() == [foreign, *(await shard.append("p", 2)).entries]
    assert (await shard.inspect("g")).delayed == 2
    token = await shard.own()
    assert len(await shard.fetch(token)) == 2
    own = await shard.counters()
    assert (own.foreign, own.lost, own.skip) == (1, 1, 0)
    assert await shard.backlog() == 2


async def test_a_bound_that_falls_far_is_reached_in_portions(shard: Rig) -> None:
    items = [one(str(number)) for number in range(2500)]
    await shard.append_each("q", 1, *items)
    await shard.tune(max_backlog=1, overflow="drop-oldest")
    left = []
    for sequence in (1, 2, 3):
        assert await append(shard, sequence) == "OK"
        left.append(await shard.backlog())
    assert left == [1501, 502, 1]
    assert await shard.values() == ["3"]
