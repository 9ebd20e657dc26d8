"""Messages sent to other queues as effects, on real servers: they are there if and only if their cause is finished."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from shardq.core.effects import Effect
from shardq.errors import StoreRefused
from shardq.storage import calls
from tests.storage.rig import Rig, batch_of, ids, one

pytestmark = pytest.mark.anyio


async def queue(shard: Rig, name: str) -> Rig:
    """Another queue's shard in the same slot, with a group of its own."""
    made = Rig(shard.client, f"{shard.keys.queue}-{name}")
    assert await calls.open_shard(made.pipes, made.shard)
    await made.open_group()
    return made


@pytest.fixture
async def other(shard: Rig) -> AsyncIterator[Rig]:
    made = await queue(shard, "other")
    yield made
    await made.backlog()


def send(to: Rig, *values: str) -> Effect:
    args = (to.shard.bell, str(max(len(values), 1)), batch_of(*values))
    return Effect(to.shard.stream, "SEND", args, to.shard.meta)


def put(shard: Rig, value: str) -> Effect:
    return Effect(shard.shard.data("x"), "SET", (value,))


def refused(shard: Rig) -> Effect:
    return Effect(shard.shard.data("x"), "LPUSH", ("not a list",))


async def in_hand(shard: Rig) -> tuple[str, list[str]]:
    await shard.append("p", 1, "a")
    token = await shard.own()
    return token, await shard.fetch(token)


async def test_a_message_is_sent_with_the_commit_once(shard: Rig, other: Rig) -> None:
    token, entries = await in_hand(shard)
    reader = await other.own()
    await other.step(reader, limit=1, wait=True)
    effects = [send(other, "b", "c"), put(shard, "v"), send(other, "d")]
    for number in (2, 2):
        await shard.step(token, number=number, acked=1, finished=entries, effects=effects)
    assert await other.values() == ["b", "c", "d"]
    state = await other.inspect("g")
    assert (state.appended, state.bytes) == (3, len(batch_of("b", "c") + batch_of("d")))
    assert await other.meta("waiting") is None, "the bell was rung"
    assert await other.backlog() == 3
    await other.step(reader, acked=3, finished=await other.fetch(reader))
    assert await other.backlog() == 0
    assert await shard.backlog() == 0


@pytest.mark.parametrize("overflow", ["block", "drop-oldest"])
async def test_nothing_is_sent_when_another_effect_is_refused(shard: Rig, other: Rig, overflow: str) -> None:
    token, _ = await in_hand(shard)
    await other.append("p", 1, "a")
    await other.tune(max_backlog=2, overflow=overflow, waiting=1)
    before = await other.dumps()
    stepped = await shard.step(token, effects=[put(shard, "v"), send(other, "b"), refused(shard), send(other, "c")])
    assert (stepped.status, stepped.effect) == (
        "FULL" if overflow == "block" else "EFFECT",
        2 if overflow == "block" else 3,
    )
    assert await other.dumps() == before, "not even dropped, nor rung"
    assert await shard.command("EXISTS", shard.shard.data("x")) == 0


async def test_a_full_queue_holds_the_step_up_and_uses_no_number(shard: Rig, other: Rig) -> None:
    token, entries = await in_hand(shard)
    await other.append("p", 1, "a", "b")
    await other.tune(max_backlog=2, overflow="reject")
    await shard.command("SET", shard.shard.data("x"), "before")
    before = await shard.dumps(shard.shard.data("x")), await other.dumps()
    effects = [put(shard, "v"), send(other, "c")]
    for _ in range(2):
        stepped = await shard.step(token, number=2, acked=1, finished=entries, effects=effects)
        assert (stepped.status, stepped.effect, stepped.why) == ("FULL", 2, "")
    assert (await shard.dumps(shard.shard.data("x")), await other.dumps()) == before
    await shard.step(token, number=2, acked=1, finished=entries, effects=effects, renew=True)
    assert (await shard.counters()).renewals == "1"
    reader = await other.own()
    await other.step(reader, acked=2, finished=await other.fetch(reader))
    stepped = await shard.step(token, number=2, acked=1, finished=entries, effects=effects)
    assert stepped.status == "OK"
    assert await other.values() == ["c"]
    assert await shard.command("GET", shard.shard.data("x")) == b"v"
    assert await shard.backlog() == 0


async def test_what_one_step_sends_to_a_shard_is_one_batch(shard: Rig, other: Rig) -> None:
    """It has to fit as a whole, or into an empty shard: a step can't be cut in two."""
    token = await shard.own()
    await other.tune(max_backlog=3, overflow="block")
    many = [send(other, str(number)) for number in range(5)]
    assert (await shard.step(token, effects=many)).status == "OK"
    assert await other.backlog() == 5
    reader = await other.own()
    await other.step(reader, acked=4, finished=await other.fetch(reader, 4))
    third = await queue(shard, "third")
    three = [send(third, "a"), *(send(other, value) for value in "bcd")]
    stepped = await shard.step(token, number=2, effects=three)
    assert (stepped.status, stepped.effect) == ("FULL", 2)
    assert await third.entries() == []
    assert (await shard.step(token, number=2, effects=three[:-1])).status == "OK"
    assert (await other.backlog(), await third.backlog()) == (3, 1)


async def test_a_queue_that_drops_its_oldest_makes_room(shard: Rig, other: Rig) -> None:
    token = await shard.own()
    await other.tune(max_backlog=3, overflow="drop-oldest")
    for number in range(6):
        await shard.step(token, effects=[send(other, str(number)), send(other, f"{number}'")])
    assert await other.values() == ["4'", "5", "5'"]
    assert (await other.inspect("g")).dropped == 9
    assert await other.backlog() == 3


@pytest.mark.parametrize("why", ["SEALED", "MISSING", "not a batch"])
async def test_what_can_not_be_sent_is_refused(shard: Rig, other: Rig, why: str) -> None:
    token, entries = await in_hand(shard)
    effect = send(other, "b")
    if why == "SEALED":
        await other.tune(state="sealed")
    elif why == "MISSING":
        gone = other.keys.shard(7, other.shard.stream.partition("{")[2].partition("}")[0])
        effect = effect._replace(key=gone.stream, meta=gone.meta)
    else:
        effect = effect._replace(args=(other.shard.bell, "2", batch_of("b")))
    stepped = await shard.step(token, acked=1, finished=entries, effects=[put(shard, "v"), effect])
    assert (stepped.status, stepped.effect, stepped.why) == ("EFFECT", 2, why)
    assert await other.entries() == []
    assert await shard.command("EXISTS", shard.shard.data("x")) == 0


@pytest.mark.parametrize(
    "args", [("bell", "1"), ("bell", "one", batch_of("a")), ("bell", "1", b""), ("bell", "0", b"\1\0\0\0")]
)
async def test_a_send_that_is_none_is_refused(shard: Rig, other: Rig, args: tuple[str | bytes, ...]) -> None:
    token = await shard.own()
    stepped = await shard.step(token, effects=[send(other, "b")._replace(args=args)])
    assert (stepped.status, stepped.why) == ("EFFECT", "not a batch")
    raw = await shard.raw_step(token, 2, "effect", 1, 9, "SEND", 3, "bell", 1, batch_of("a"), more=[other.shard.stream])
    assert raw[0] == b"EFFECT", "a stream without its meta"
    assert await other.entries() == []


async def test_a_shard_can_send_to_itself(shard: Rig) -> None:
    token, entries = await in_hand(shard)
    stepped = await shard.step(token, acked=1, finished=entries, effects=[send(shard, "b", "c")], limit=5)
    assert ids(stepped) == await shard.entries()
    assert (await shard.counters()).foreign == 0
    assert await shard.backlog() == 2
    await shard.tune(max_backlog=2, overflow="block")
    stepped = await shard.step(token, acked=2, finished=ids(stepped), effects=[send(shard, "d")])
    assert stepped.status == "OK", "the acknowledgements that make room for it are in the same step"
    assert await shard.backlog() == 1


async def test_a_stream_is_also_a_key(shard: Rig, other: Rig) -> None:
    """An effect on the very stream that a message is sent to does not hide the stream's meta."""
    token = await shard.own()
    expire = Effect(other.shard.stream, "PEXPIRE", ("100000000",))
    assert (await shard.step(token, effects=[expire, send(other, "b")])).status == "OK"
    assert await other.values() == ["b"]


async def test_what_was_sent_counts_among_what_was_appended(shard: Rig, other: Rig) -> None:
    token = await shard.own()
    await other.append("p", 1, "a")
    await shard.step(token, effects=[send(other, "b")])
    await other.append("p", 2, "c", "d")
    await other.append_each("q", 1, one("e"))
    assert [int(fields[1]) for _, fields in await other.command("XRANGE", other.shard.stream, "-", "+")] == [0, 1, 2, 4]


async def test_effects_do_not_touch_the_shards_own_keys(shard: Rig) -> None:
    token = await shard.own()
    for place in range(1, 9):
        with pytest.raises(StoreRefused, match="report it"):
            await shard.raw_step(token, 1, "effect", 1, place, "DEL", 0, more=[shard.shard.data("x")])
