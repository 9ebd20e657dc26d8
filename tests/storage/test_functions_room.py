"""What one step brings on real servers when its owner says how much room there is: pending entries and new ones in one
call, never more than the room, and whether that was all.
"""

from __future__ import annotations

import pytest

from shardq.core.step import FIRST, LEFT_NEW, LEFT_NOTHING, LEFT_PENDING, NEW, Put, Step
from shardq.errors import CorruptData, StoreRefused
from shardq.storage import calls
from shardq.storage.calls import Stepped
from tests.storage.rig import Rig, ids

pytestmark = pytest.mark.anyio

MUCH = (500, 10_000, 1 << 20)


async def appended(shard: Rig, *batches: int, first: int = 1) -> list[str]:
    """The ids of entries of so many messages each."""
    before = len(await shard.entries())
    for sequence, count in enumerate(batches, start=first):
        await shard.append("p", sequence, *["v"] * count)
    return (await shard.entries())[before:]


def brought(stepped: Stepped) -> tuple[list[str], str]:
    return ids(stepped), stepped.fetched.left


async def waits(shard: Rig) -> bool:
    return bool(await shard.command("HGET", shard.shard.meta, "waiting") == b"1")


async def test_pending_entries_and_new_ones_come_in_one_step(shard: Rig) -> None:
    before = await shard.own()
    old = await appended(shard, 2, 2, 2)
    await shard.fetch(before)
    await shard.step(before, partial=[(old[1], b"\x01")], finished=old[2:], acked=3)
    assert await shard.lease("release", before) == "OK"
    new = await appended(shard, 1, 1, first=4)
    stepped = await shard.step(await shard.own("m"), cursor=FIRST, limit=16, room=MUCH, known=0)
    assert brought(stepped) == ([*old[:2], *new], LEFT_NOTHING)
    assert stepped.fetched.progress == [b"2:", b"2:\x01"], "of the pending ones"
    counters = await shard.counters()
    assert (counters.delivered, counters.pending_entries) == (8, 4)


async def test_new_entries_wait_until_the_pending_ones_are_through(shard: Rig) -> None:
    before = await shard.own()
    old = await appended(shard, 1, 1, 1)
    await shard.fetch(before)
    assert await shard.lease("release", before) == "OK"
    new = await appended(shard, 1, first=4)
    token = await shard.own("m")
    assert brought(await shard.step(token, cursor=FIRST, limit=2, room=MUCH)) == (old[:2], LEFT_PENDING)
    assert brought(await shard.step(token, cursor=old[1], limit=2, room=MUCH)) == ([old[2], *new], LEFT_NOTHING)


async def test_nothing_is_read_while_there_is_news_of_what_is_handled_later(shard: Rig) -> None:
    before = await shard.own()
    await appended(shard, 1, 1)
    one, other = await shard.fetch(before)
    await shard.step(before, finished=[one], puts=[Put(0, 0, 0, b"", b"record")])
    assert await shard.lease("release", before) == "OK"
    token = await shard.own("m")
    stepped = await shard.step(token, cursor=FIRST, limit=16, room=MUCH, known=0, wait=True)
    assert brought(stepped) == ([], LEFT_PENDING)
    assert len(stepped.fetched.items or ()) == 1
    assert not await waits(shard)
    stepped = await shard.step(token, cursor=FIRST, limit=16, room=MUCH, known=1, wait=True)
    assert brought(stepped) == ([other], LEFT_NOTHING)
    assert stepped.fetched.progress == [b"2:"], "looking at the index alone delivered nothing"
    stepped = await shard.step(token, cursor=NEW, limit=16, room=MUCH, known=0)
    assert len(stepped.fetched.items or ()) == 1, "with new entries alone the index may come at any time"
    assert stepped.fetched.left == LEFT_NOTHING


@pytest.mark.parametrize(
    ("room", "limit", "count", "left"),
    [
        (MUCH, 1, 40, LEFT_NOTHING),
        (MUCH, 40, 40, LEFT_NOTHING),
        (MUCH, 41, 40, LEFT_NOTHING),
        ((7, 10_000, 1 << 20), 2, 7, LEFT_NEW),
        ((40, 10_000, 1 << 20), 2, 40, LEFT_NEW),
        ((500, 30, 1 << 20), 2, 10, LEFT_NEW),
        ((500, 31, 1 << 20), 2, 11, LEFT_NEW),
        ((500, 1, 1 << 20), 2, 2, LEFT_NEW),
        ((500, 10_000, 1), 2, 2, LEFT_NEW),
        ((0, 0, 0), 2, 2, LEFT_NEW),
    ],
)
async def test_new_entries_are_read_until_the_room_is_full(
    shard: Rig, room: tuple[int, int, int], limit: int, count: int, left: str
) -> None:
    entries = await appended(shard, *[3] * 40)
    token = await shard.own()
    assert brought(await shard.step(token, limit=limit, room=room)) == (entries[:count], left)
    assert (await shard.counters()).delivered == 3 * count
    rest = await shard.step(token, limit=limit, room=MUCH)
    assert brought(rest) == (entries[count:], LEFT_NOTHING), "none is left out, none comes twice"


async def test_the_bell_is_asked_for_as_soon_as_all_was_read(shard: Rig) -> None:
    token = await shard.own()
    await appended(shard, 1, 1)
    await shard.step(token, limit=1, room=(1, 10, 1000), wait=True)
    assert not await waits(shard), "there is more"
    await shard.step(token, limit=2, room=MUCH)
    assert not await waits(shard), "it did not ask"
    await appended(shard, 1, first=3)
    await shard.step(token, limit=2, room=MUCH, wait=True)
    assert await waits(shard)


@pytest.mark.parametrize(
    "room", [("room", 1, 5, 5), ("room", 1, 5, 5, "x"), ("room", 1, -1, 5, 5), ("room", "x", 5, 5, 5)]
)
async def test_a_malformed_room_is_refused(shard: Rig, room: tuple[str | int, ...]) -> None:
    token = await shard.own()
    with pytest.raises(StoreRefused, match="malformed"):
        await shard.raw_step(token, 1, *room)


@pytest.mark.parametrize("cursor", ["x>", ">>", "1-1>>", "0-0 >", ""])
async def test_a_malformed_cursor_is_refused(shard: Rig, cursor: str) -> None:
    token = await shard.own()
    keys = [shard.shard.stream, shard.shard.meta, shard.shard.group("g")]
    with pytest.raises(StoreRefused, match="malformed"):
        await shard.call("step", keys, "g", token, 1, 0, cursor, 5, 0, 0, 0, 0, "room", 1, 5, 5, 5)


@pytest.mark.parametrize("key", ["stream", "meta", "group"])
@pytest.mark.parametrize("busy", [False, True])
async def test_a_key_of_another_type_is_told_and_nothing_is_done(shard: Rig, key: str, busy: bool) -> None:
    token = await shard.own()
    (entry,) = await appended(shard, 1)
    await shard.fetch(token)
    name = shard.shard.group("g") if key == "group" else getattr(shard.shard, key)
    await shard.command("RENAME", name, shard.shard.data("aside"))
    await shard.command("SET", name, "x")
    finished = [entry] if busy else []
    with pytest.raises(CorruptData, match="is a string, not a"):
        await shard.step(token, number=2, limit=5, room=MUCH, finished=finished, acked=len(finished))
    await shard.command("RENAME", shard.shard.data("aside"), name)
    stepped = await shard.step(token, number=2, limit=5, room=MUCH, finished=finished, acked=len(finished))
    assert stepped.status == "OK", "the number was not used up"
    assert (await shard.counters()).acked == len(finished)


async def test_an_idle_step_where_nothing_came_gets_the_answer_that_its_sender_expects(shard: Rig) -> None:
    token = await shard.own()
    content = Step(0, NEW, 16, 0, False, 0, 0, [], [], [], room=(500, 100, 1_000_000))
    before, after = calls.pack_idle_step(shard.shard, "g", token, content)
    renewals = []
    for number in (b"1", b"2"):
        reply = await shard.pipes.command(shard.shard.slot, before + b"$1\r\n" + number + b"\r\n" + after)
        assert reply == calls.idle_reply(1, b"")
        renewals.append((await shard.acquire("other")).renewals)
    assert renewals == ["1", "2"]
    await shard.append("p", 1, "v")
    reply = await shard.pipes.command(shard.shard.slot, before + b"$1\r\n3\r\n" + after)
    content.number = 3
    assert len(calls.read_step(shard.shard, "g", content, reply).fetched.entries) == 1
