"""append_each on real servers: messages stored later, once, or as a job; after every test the counters must add up."""

from __future__ import annotations

import anyio
import pytest

from shardq.errors import StoreRefused
from shardq.storage import appends
from shardq.storage.appends import Item
from tests.storage.rig import Rig, batch_of, one

pytestmark = pytest.mark.anyio
HOUR_MS = 3_600_000


async def timed(shard: Rig) -> dict[str, tuple[bytes, float | None]]:
    """What waits for its time: value, and when it goes or is due (Unix ms), by field; the sentinel and
    the counter of names left out."""
    flat = await shard.command("HGETALL", shard.shard.timed)
    found = {}
    for name, value in zip(flat[::2], flat[1::2], strict=True):
        key = shard.shard.delayed if name.startswith(b"d") else shard.shard.expiring
        score = await shard.command("ZSCORE", key, name)
        found[name.decode()] = (value, None if score is None else float(score))
    assert found.pop("") == (b"", float("inf"))
    found.pop("delayed_next", None)
    return found


# -- when -------------------------------------------------------------------------------------------------


async def test_messages_are_stored_now_or_wait_for_their_time(shard: Rig) -> None:
    before = await shard.time_ms()
    answer = await shard.append_each(
        "p", 1, one("now"), one("in", when="in:60000"), one("at", when=f"at:{before + HOUR_MS}"), one("now too")
    )
    after = await shard.time_ms()
    assert answer.status == "OK"
    first, delayed_in, delayed_at, last = answer.entries
    assert await shard.entries() == [first, last]
    assert await shard.values() == ["now", "now too"]
    waiting = await timed(shard)
    assert waiting.keys() == {delayed_in, delayed_at}
    assert all(name[0] == "d" and name[1:].isdigit() for name in waiting)
    assert waiting[delayed_in][0] == batch_of("in")
    assert before + 60000 <= (waiting[delayed_in][1] or 0) <= after + 60000
    assert waiting[delayed_at] == (batch_of("at"), before + HOUR_MS)
    state = await shard.inspect("g")
    assert (state.appended, state.delayed, state.bytes) == (2, 2, len(batch_of("now") + batch_of("now too")))
    assert int(await shard.meta("due") or 0) == waiting[delayed_in][1]


@pytest.mark.parametrize("when", ["at:0", "at:1000", "in:0"])
async def test_what_is_due_already_is_stored_at_once(shard: Rig, when: str) -> None:
    answer = await shard.append_each("p", 1, one("a", when=when))
    assert await shard.entries() == [*answer.entries]
    assert await timed(shard) == {}
    assert await shard.meta("due") is None


async def test_the_owner_hears_of_what_is_due_sooner_only(shard: Rig) -> None:
    """The bell rings for what is stored, and for a time to wake up at that is earlier than the one known."""
    token = await shard.own()

    async def rings(sequence: int, item: Item) -> bool:
        stepped = await shard.step(token, limit=10, wait=True)
        assert stepped.fetched.entries == []
        await shard.append_each("p", sequence, item)
        return await shard.meta("waiting") is None

    assert await rings(1, one("a", when="in:100000", once="x", window_ms=HOUR_MS))
    assert not await rings(2, one("b", when="in:200000"))
    assert await rings(3, one("c", when="in:50000"))
    assert not await rings(4, one("d", once="x", window_ms=HOUR_MS))
    stepped = await shard.step(token)
    assert 0 < (stepped.fetched.due_in_ms or 0) <= 50000
    assert await rings(5, one("e"))


# -- once -------------------------------------------------------------------------------------------------


async def test_a_dedupe_id_is_stored_once_within_its_window(shard: Rig) -> None:
    first = await shard.append_each("p", 1, one("a", once="x", window_ms=HOUR_MS))
    later = await shard.append_each("p", 2, one("b", when="in:1", once="y", window_ms=HOUR_MS))
    await anyio.sleep(0.01)
    assert await shard.promote() == (1, None)
    again = [
        await shard.append_each("q", 1, one("a2", once="x", window_ms=HOUR_MS)),
        await shard.append_each("q", 2, one("b2", once="y", window_ms=HOUR_MS)),
        await shard.append_each("p", 3, one("b3", when="in:50", once="y", window_ms=HOUR_MS)),
    ]
    assert [answer.entries for answer in again] == [first.entries, later.entries, later.entries]
    assert await shard.values() == ["a", "b"]
    assert (await shard.inspect("g")).delayed == 0


async def test_a_dedupe_id_is_stored_again_after_its_window(shard: Rig) -> None:
    first = await shard.append_each("p", 1, one("a", once="x", window_ms=1))
    await anyio.sleep(0.01)
    second = await shard.append_each("p", 2, one("b", once="x", window_ms=HOUR_MS))
    third = await shard.append_each("p", 3, one("c", once="x", window_ms=1))
    assert second.entries != first.entries
    assert third == second
    assert await shard.values() == ["a", "b"]
    ((_, expires),) = (await timed(shard)).values()
    assert (expires or 0) > await shard.time_ms() + HOUR_MS / 2, "the window runs from the send that was stored"


async def test_a_dedupe_id_twice_in_one_call(shard: Rig) -> None:
    answer = await shard.append_each(
        "p",
        1,
        one("a", once="x", window_ms=HOUR_MS),
        one("b", when="in:1000", once="x", window_ms=HOUR_MS),
        one("c", when="in:1000", once="y", window_ms=HOUR_MS),
        one("d", once="y", window_ms=HOUR_MS),
        one("e"),
    )
    a, b, c, d, e = answer.entries
    assert (a, c) == (b, d)
    assert await shard.entries() == [a, e]
    assert (await timed(shard)).keys() == {c, "o:x", "o:y"}


async def test_dedupe_ids_of_any_bytes(shard: Rig) -> None:
    names = ["o:x", "d1", "j:1", "a b|c", "ü\n", ""]
    items = [one(name, once=name, window_ms=HOUR_MS) for name in names]
    first = await shard.append_each("p", 1, *items)
    assert len(set(first.entries)) == len(names)
    second = await shard.append_each("p", 2, *items)
    assert second.entries[:-1] == first.entries[:-1]
    assert second.entries[-1] != first.entries[-1], "no id: stored every time"


# -- jobs -------------------------------------------------------------------------------------------------


async def test_the_record_of_a_job_is_stored_with_its_message(shard: Rig) -> None:
    before = await shard.time_ms()
    answer = await shard.append_each(
        "p",
        1,
        one("a", job="q/0/1", job_ms=HOUR_MS, job_record=b"\0one"),
        one("b", when="in:60000", once="x", window_ms=1000, job="q/0/2", job_ms=2 * HOUR_MS, job_record=b"two"),
        one("c", once="x", window_ms=1000, job="q/0/3", job_ms=HOUR_MS, job_record=b"never sent"),
    )
    after = await shard.time_ms()
    found = await timed(shard)
    assert found.keys() == {answer.entries[1], "o:x", "j:q/0/1", "j:q/0/2"}
    for name, record, keep in (("j:q/0/1", b"\0one", HOUR_MS), ("j:q/0/2", b"two", 2 * HOUR_MS)):
        assert found[name][0] == record
        assert before + keep <= (found[name][1] or 0) <= after + keep


# -- sequences --------------------------------------------------------------------------------------------


async def test_a_repeated_sequence_gives_the_same_ids_whatever_happened_since(shard: Rig) -> None:
    items = [one("a"), one("b", when="in:1"), one("c", once="x", window_ms=1), one("d", when="in:60000")]
    first = await shard.append_each("p", 1, *items)
    await anyio.sleep(0.01)
    assert (await shard.promote())[0] == 1
    assert await shard.append_each("p", 1, *items) == first
    await shard.tune(state="sealed", max_backlog=1)
    assert await shard.append_each("p", 1, *items) == first
    assert await shard.values() == ["a", "c", "b"]
    assert (await shard.inspect("g")).delayed == 1


async def test_one_sequence_for_both_kinds_of_append(shard: Rig) -> None:
    assert (await shard.append("p", 1, "a")).status == "OK"
    assert (await shard.append_each("p", 1, one("a"))).status == "STALE"
    assert (await shard.append_each("p", 2, one("b"), one("c"))).status == "OK"
    assert (await shard.append("p", 2, "b")).status == "STALE"
    assert (await shard.append_each("p", 1, one("a"))).status == "STALE"
    assert (await shard.append("p", 1, "a")).status == "STALE"
    assert (await shard.append("p", 3, "d")).status == "OK"
    assert await shard.values() == ["a", "b", "c", "d"]


@pytest.mark.parametrize(("setting", "status"), [({"state": "sealed"}, "SEALED"), ({"max_backlog": 2}, "FULL")])
async def test_what_is_refused_changes_nothing(shard: Rig, setting: dict[str, str | int], status: str) -> None:
    await shard.append("q", 1, "z", "z")
    await shard.tune(**setting)
    before = await shard.dumps()
    for items in ([one("a")], [one("a", when="in:1000")], [one("a", once="x", window_ms=9, job="j", job_ms=9)]):
        assert (await shard.append_each("p", 1, *items)).status == status
    assert await shard.dumps() == before


async def test_a_shard_that_was_never_opened(shard: Rig) -> None:
    opened, shard.shard = shard.shard, shard.keys.shard(7, "0")
    assert (await shard.append_each("p", 1, one("a"), one("b", when="in:5"))).status == "MISSING"
    assert await shard.promote() == (0, None)
    assert not await shard.tidy()
    assert set((await shard.dumps()).values()) == {None}
    shard.shard = opened


# -- what is refused --------------------------------------------------------------------------------------

GOOD: list[str | bytes] = ["", "", "0", "", "0", "", batch_of("a")]


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["p", "1", "bell"],
        ["p", "x", "bell", *GOOD],
        ["p", "1", "bell", *GOOD[:-1]],
        ["p", "1", "bell", *GOOD, "more"],
        ["p", "1", "bell", *GOOD, *GOOD[:-1], batch_of("a", "b")],
        ["p", "1", "bell", *GOOD, *GOOD[:-1], b""],
        ["p", "1", "bell", *GOOD, "soon", *GOOD[1:]],
        ["p", "1", "bell", *GOOD, "in:", *GOOD[1:]],
        ["p", "1", "bell", *GOOD, "in:-1", *GOOD[1:]],
        ["p", "1", "bell", *GOOD, "on:1", *GOOD[1:]],
        ["p", "1", "bell", *GOOD, "in:1.5", *GOOD[1:]],
        ["p", "1", "bell", *GOOD, "at:99999999999999999999", *GOOD[1:]],
        ["p", "1", "bell", *GOOD, "", "x", "", *GOOD[3:]],
        ["p", "1", "bell", *GOOD, "", "", "0", "job", "long", *GOOD[5:]],
    ],
)
async def test_malformed_messages_are_refused_all_together(shard: Rig, args: list[str | bytes]) -> None:
    keys = shard.shard
    before = await shard.dumps()
    with pytest.raises(StoreRefused, match="report it"):
        await shard.call("append_each", [keys.stream, keys.meta, keys.delayed, keys.expiring, keys.timed], *args)
    with pytest.raises(StoreRefused, match="report it"):
        await shard.call("append_each", [keys.stream, keys.meta], "p", 1, "bell", *GOOD)
    assert await shard.dumps() == before


async def test_as_many_messages_as_a_call_takes(shard: Rig) -> None:
    """More than a Lua stack takes, of every kind."""
    items = [one(str(number), when="in:60000" if number % 3 == 0 else "") for number in range(3000)]
    packed = appends.pack_append_each(shard.shard, "p", 1, items, None)
    answer = await shard.send(packed, each=3000)
    assert len(set(answer.entries)) == 3000
    assert await shard.send(packed, each=3000) == answer
    state = await shard.inspect("g")
    assert (state.appended, state.delayed) == (2000, 1000)
