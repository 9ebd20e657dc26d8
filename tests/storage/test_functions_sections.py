"""The sections of step on real servers: later, dead letters, jobs; all of a step is applied once or not at all."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from shardq.core.intake import KeptRecord
from shardq.core.step import Put
from shardq.errors import LeaseLost, StoreRefused
from shardq.storage.calls import Stepped
from tests.storage.rig import Rig, ids

pytestmark = pytest.mark.anyio


async def in_hand(shard: Rig, *values: str) -> tuple[str, list[str]]:
    """A token and the ids of entries of one message each, fetched."""
    token = await shard.own()
    for number, value in enumerate(values, start=1):
        await shard.append("p", number, value)
    return token, await shard.fetch(token)


async def kept(shard: Rig) -> dict[bytes, bytes]:
    flat = await shard.command("HGETALL", shard.shard.kept("g"))
    found = dict(zip(flat[::2], flat[1::2], strict=True))
    assert found.pop(b"") == b""
    return found


def parts(stepped: Stepped) -> list[tuple[int, int, int, bytes]]:
    """Id, due, gets and tag of each item that the step brought."""
    found = []
    for member in stepped.fetched.items or ():
        item, due, gets, tag = member.split(b":", 3)
        found.append((int(item), int(due), int(gets), tag))
    return found


# -- what is handled later --------------------------------------------------------------------------------


async def test_items_get_ids_in_the_order_they_were_put(shard: Rig) -> None:
    token, entries = await in_hand(shard, "a", "b", "c")
    before = await shard.time_ms()
    puts = [
        Put(0, wait, 0, tag, record) for wait, tag, record in [(9000, b"ka", b"1"), (0, b"", b"\0"), (5, b"k:b", b"")]
    ]
    stepped = await shard.step(token, retried=2, finished=entries, puts=puts, known=0)
    after = await shard.time_ms()
    assert [(item, gets, tag) for item, _, gets, tag in parts(stepped)] == [(1, 0, b"ka"), (2, 0, b""), (3, 0, b"k:b")]
    waits = [due - stepped.fetched.now_ms for _, due, _, _ in parts(stepped)]
    assert waits == [9000, 0, 5]
    assert before <= stepped.fetched.now_ms <= after
    assert stepped.fetched.next_item == 4
    assert await kept(shard) == {b"1": b"1", b"2": b"\0", b"3": b""}
    assert await shard.entries() == [], "put off is finished for the stream"
    own = await shard.counters()
    assert (own.waiting, own.retried, own.acked, own.pending_entries) == (3, 2, 0, 0)
    assert await shard.backlog() == 3
    stepped = await shard.step(token, puts=[Put(0, 0, 0, b"", b"d")], drops=[1], acked=1, known=3)
    assert [item for item, *_ in parts(stepped)] == [4], "ids are not given twice"
    await shard.step(token, drops=[2, 3, 4], acked=2)
    assert await shard.backlog() == 0


async def test_the_oldest_of_what_waits_is_the_one_that_was_put_off_first(shard: Rig) -> None:
    token, entries = await in_hand(shard, "a", "b", "c")
    assert (await shard.counters()).oldest_waiting == ""

    def kept_of(entry: str) -> bytes:
        return msgspec.msgpack.encode(KeptRecord(entry, 0, "k", 1, None, 1, 2, "LookupError"))

    puts = [Put(0, 9000, 0, b"kk", kept_of(entries[1])), Put(0, 0, 0, b"kk", kept_of(entries[0]))]
    await shard.step(token, retried=2, finished=entries[:2], puts=puts)
    assert (await shard.counters()).oldest_waiting == entries[1]
    await shard.step(token, acked=1, drops=[1])
    assert (await shard.counters()).oldest_waiting == entries[0]
    own = shard.shard
    older = [own.stream, own.meta, own.group("g"), own.dead("g"), own.later("g")]
    reply = await shard.call("inspect", older, "g")
    assert reply[5][4:] == [1, 0, 0, b""], "a client of an older build is answered, too"
    for forged in (b"", b"1-1", b"\x98", b"\x98\xbf1-1", b"\x98\xa31-x", b"\x98\xd9\x031-1"):
        await shard.command("HSET", own.kept("g"), "2", forged)
        assert (await shard.counters()).oldest_waiting == "", forged
    await shard.step(token, acked=1, drops=[2])


async def test_an_item_that_is_put_back_keeps_its_id(shard: Rig) -> None:
    token, entries = await in_hand(shard, "a", "b")
    puts = [Put(0, 0, 0, b"ka", b"first"), Put(0, 0, 0, b"kb", b"b")]
    await shard.step(token, retried=2, finished=entries, puts=puts)
    stepped = await shard.step(token, gets=[1])
    assert stepped.fetched.records == [b"first"]
    stepped = await shard.step(token, retried=1, puts=[Put(1, 7000, 2, b"ka", b"second")], known=0)
    assert [(item, gets, tag) for item, _, gets, tag in parts(stepped)] == [(1, 2, b"ka"), (2, 0, b"kb")]
    assert parts(stepped)[0][1] == stepped.fetched.now_ms + 7000
    assert stepped.fetched.next_item == 3
    assert await kept(shard) == {b"1": b"second", b"2": b"b"}
    assert await shard.backlog() == 2


async def test_every_get_is_counted(shard: Rig) -> None:
    token, entries = await in_hand(shard, "a", "b")
    puts = [Put(0, 60000, 0, b"k:a:b", b"record"), Put(0, 0, 3, b"", b"other")]
    await shard.step(token, finished=entries, puts=puts)
    stepped = await shard.step(token, gets=[1, 2, 1], known=0)
    assert stepped.fetched.records == [b"record", b"other", b"record"]
    assert [(item, gets, tag) for item, _, gets, tag in parts(stepped)] == [(1, 2, b"k:a:b"), (2, 4, b"")]
    due = parts(stepped)[0][1]
    assert await shard.lease("release", token) == "OK"
    other = await shard.own("m")
    stepped = await shard.step(other, gets=[1], known=0)
    assert parts(stepped)[0] == (1, due, 3, b"k:a:b"), "the next owner sees what the last one fetched"


async def test_unknown_items_are_no_error(shard: Rig) -> None:
    token, entries = await in_hand(shard, "a")
    await shard.step(token, finished=entries, puts=[Put(0, 0, 0, b"", b"record")])
    stepped = await shard.step(token, gets=[7, 1, 10**15], drops=[9])
    assert stepped.fetched.records == [b"", b"record", b""]
    stepped = await shard.step(token, gets=[1], drops=[1, 1], acked=1, known=0)
    assert stepped.fetched.records == [b""], "dropped in the same step"
    assert parts(stepped) == []
    assert await shard.backlog() == 0


async def test_the_index_comes_in_pages(shard: Rig) -> None:
    token, entries = await in_hand(shard, *["a"] * 3)
    many = [Put(0, 0, 0, b"", b"record")] * 2500
    stepped = await shard.step(token, finished=entries, puts=many, known=0)
    assert [item for item, *_ in parts(stepped)] == list(range(1, 1001))
    assert stepped.fetched.next_item == 2501
    await shard.step(token, drops=list(range(501, 1501)))
    pages = [
        [item for item, *_ in parts(await shard.step(token, known=known))] for known in (0, 1500, 2499, 2500, 9000)
    ]
    assert pages == [[*range(1, 501), *range(1501, 2001)], list(range(1501, 2501)), [2500], [], []]
    assert (await shard.step(token)).fetched.items is None, "not asked for"
    await shard.step(token, drops=list(range(1, 2498)), acked=0)
    assert (await shard.counters()).waiting == 3
    assert await shard.backlog() == 3


async def test_the_index_holds_its_place_when_nothing_waits(shard: Rig) -> None:
    """Its keys exist from the beginning on, so that no call meets a missing one while its slot moves."""
    token, entries = await in_hand(shard, "a")
    await shard.step(token, finished=entries, puts=[Put(0, 0, 0, b"", b"record")])
    await shard.step(token, drops=[1], acked=1)
    await shard.tidy()
    await shard.promote()
    assert None not in (await shard.dumps()).values()


# -- dead letters and jobs --------------------------------------------------------------------------------


async def test_the_record_of_a_job_is_stored_with_the_commit(shard: Rig) -> None:
    token, entries = await in_hand(shard, "a")
    before = await shard.time_ms()
    jobs = [("q/0/1", 60000, b"\0done"), ("q/0/2", 9, b"running"), ("q/0/1", 70000, b"done")]
    await shard.step(token, acked=1, finished=entries, jobs=jobs)
    after = await shard.time_ms()
    assert await shard.command("HMGET", shard.shard.timed, "j:q/0/1", "j:q/0/2") == [b"done", b"running"]
    expires = float(await shard.command("ZSCORE", shard.shard.expiring, "j:q/0/1"))
    assert before + 70000 <= expires <= after + 70000


# -- once or not at all -----------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "acked": 1,
    "retried": 1,
    "dead": [(1, b"letter")],
    "puts": [Put(0, 5, 0, b"", b"new"), Put(1, 5, 1, b"", b"again")],
    "drops": [2],
    "gets": [3],
    "jobs": [("q/0/1", 60000, b"record")],
    "limit": 5,
    "known": 0,
}


async def items_in_hand(shard: Rig) -> tuple[str, list[str]]:
    """As in_hand, with three items that wait and two entries that are pending."""
    token, entries = await in_hand(shard, *"abcde")
    await shard.step(token, finished=entries[:3], puts=[Put(0, 0, 0, b"", b"record")] * 3)
    return token, entries[3:]


async def test_a_repeated_step_applies_nothing_twice(shard: Rig) -> None:
    token, entries = await items_in_hand(shard)
    await shard.append("q", 1, "new")
    stepped = await shard.step(token, finished=entries, **EVERYTHING)
    assert (len(ids(stepped)), stepped.fetched.records) == (1, [b"record"])
    before = await shard.dumps()
    for number in (1, 2, 3):
        again = await shard.step(token, number=number, finished=entries, **EVERYTHING)
        assert again.status == "REPEAT"
        assert again.fetched.next_item == 1
    assert await shard.dumps() == before
    own = await shard.counters()
    assert (own.acked, own.retried, own.dead, own.waiting, own.dead_letters) == (1, 1, 1, 3, 1)
    assert await shard.backlog() == 4


@pytest.mark.parametrize("how", ["a gap", "another token"])
async def test_a_fenced_step_changes_nothing(shard: Rig, how: str) -> None:
    token, entries = await items_in_hand(shard)
    before = await shard.dumps()
    other, number = (token, 4) if how == "a gap" else ("1:other", 3)
    with pytest.raises(LeaseLost, match="refused"):
        await shard.step(other, number=number, finished=entries, **EVERYTHING)
    assert await shard.dumps() == before
    await shard.step(token, finished=entries, **EVERYTHING)


@pytest.mark.parametrize(
    "sections",
    [
        ["what", 1, "1-1"],
        ["done"],
        ["done", "x"],
        ["done", -1, "1-1"],
        ["done", 2, "1-1"],
        ["done", 1, "soon"],
        ["done", 1, "1-1", "1-2"],
        ["done", 1, "*"],
        ["drop", 1, 7, "drop", 1, 8],
        ["part", 1, "1-1"],
        ["part", 1, "-", "\1"],
        ["dead", 1, "many", "letter"],
        ["dead", 1, 1],
        ["put", 1, 0, 5, 0, ""],
        ["put", 1, "first", 5, 0, "", "record"],
        ["put", 1, "00", 5, 0, "", "record"],
        ["put", 1, -1, 5, 0, "", "record"],
        ["put", 1, 0, "soon", 0, "", "record"],
        ["put", 1, 0, 5, "often", "", "record"],
        ["put", 1, 4, 5, 0, "", "never given"],
        ["put", 1, 10**15, 5, 0, "", "never given"],
        ["drop", 1, 0],
        ["drop", 1, ""],
        ["drop", 1, "+inf"],
        ["get", 1, "0"],
        ["get", 1, "-1"],
        ["job", 1, "q/0/1", "long", "record"],
        ["job", 1, "q/0/1", 5],
        ["effect", 1, 9, "SET", 1, "x"],
        ["effect", 1, 3, "SET", 1, "x"],
        ["effect", 1, 10, "SET", 2, "x"],
        ["effect", 1, 10, "SET", "one", "x"],
        ["effect", 2, 10, "SET", 1, "x"],
    ],
)
async def test_a_malformed_section_is_refused_with_all_that_came_with_it(shard: Rig, sections: list[str | int]) -> None:
    token, entries = await items_in_hand(shard)
    data = shard.shard.data("x")
    before = await shard.dumps(data)
    good: list[str | int] = ["done", 1, entries[0], "put", 1, 0, 5, 0, "", "record"]
    more: list[str] = [] if sections[0] == "effect" and sections[2] == 9 else [shard.shard.data("y"), data]
    for all_sections in ([*good, *sections], [*sections, *good]):
        with pytest.raises(StoreRefused, match="report it"):
            await shard.raw_step(token, 3, *all_sections, more=more)
    assert await shard.dumps(data) == before
    assert (await shard.raw_step(token, 3, *good))[0] == b"OK"


@pytest.mark.parametrize("name", ["dead", "put", "drop", "get", "job", "effect"])
async def test_sections_that_need_more_keys_have_them(shard: Rig, name: str) -> None:
    token = await shard.own()
    keys = [shard.shard.stream, shard.shard.meta, shard.shard.group("g"), shard.shard.dead("g")]
    with pytest.raises(StoreRefused, match="report it"):
        await shard.call("step", keys, "g", token, 1, 0, ">", 0, 0, 0, 0, 0, name, 0)
