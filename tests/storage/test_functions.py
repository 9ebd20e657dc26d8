"""The step function on real servers: commits, fetches, fencing; after every test the counters must add up."""

from __future__ import annotations

import anyio
import msgspec
import pytest

from shardq.core.intake import pack_progress
from shardq.core.step import FIRST, NEW
from shardq.errors import LeaseLost, StoreRefused, UnknownQueue
from shardq.storage import appends
from tests.storage.rig import Rig, ids, progress_of

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("how", ["wrong epoch", "wrong nonce", "no token", "taken", "released"])
async def test_only_the_owner_steps(shard: Rig, how: str) -> None:
    await shard.append("p", 1, "a", "b")
    token = await shard.own("n")
    (entry,) = await shard.fetch(token)
    epoch = int(token.split(":")[0])
    stale = {"wrong epoch": f"{epoch + 1}:n", "wrong nonce": f"{epoch}:m", "no token": ""}.get(how, token)
    if how == "taken":
        assert (await shard.acquire("m", (epoch, "0"))).status == "OK"
    elif how == "released":
        assert await shard.lease("release", token) == "OK"
    before = await shard.counters()
    with pytest.raises(LeaseLost, match="refused"):
        await shard.step(stale, number=9, limit=5, acked=2, finished=[entry], dead=[(1, b"r")], renew=True)
    assert await shard.counters() == before
    assert await shard.command("XLEN", shard.shard.dead("g")) == 0
    assert await shard.backlog() == 2


async def test_a_repeated_step_applies_and_fetches_nothing(shard: Rig) -> None:
    await shard.append("p", 1, "a", "b")
    await shard.append("p", 2, "c")
    await shard.append("p", 3, "d")
    token = await shard.own()
    one, two = await shard.fetch(token, 2)
    await shard.step(token, acked=2, retried=1, finished=[one], dead=[(1, b"r")], partial=[(two, b"\0")])
    before = await shard.counters()
    for number in (1, 2):
        again = await shard.step(token, number=number, limit=5, acked=2, retried=1, finished=[two], dead=[(1, b"r")])
        assert again.status == "REPEAT"
        assert ids(again) == []
    assert await shard.counters() == before
    assert (before.acked, before.retried, before.dead, before.delivered) == (2, 1, 1, 3)
    assert await shard.command("XLEN", shard.shard.dead("g")) == 1
    # The dead letter stands for a message of entry two here, so that the counters add up.
    await shard.step(token, partial=[(two, b"\1")])


async def test_a_gap_in_the_step_numbers_fences_the_owner(shard: Rig) -> None:
    """Steps follow one another, so a gap means that a failover took answered ones back: the owner starts anew."""
    await shard.append("p", 1, "a")
    token = await shard.own("n")
    (entry,) = await shard.fetch(token)
    before = await shard.counters()
    with pytest.raises(LeaseLost, match="refused"):
        await shard.step(token, number=3, acked=1, finished=[entry])
    assert await shard.counters() == before
    again = await shard.acquire("n")
    assert (again.status, again.step) == ("OK", 1)
    assert await shard.fetch(token, cursor="0-0") == [entry]
    await shard.step(token, acked=1, finished=[entry])


async def test_a_repeated_step_still_renews(shard: Rig) -> None:
    """The owner trusts its lease from the call that was answered on, so whoever watches must start anew."""
    token = await shard.own()
    await shard.step(token, renew=True)
    assert (await shard.counters()).renewals == "1"
    assert (await shard.step(token, number=1, renew=True)).status == "REPEAT"
    assert (await shard.counters()).renewals == "2"
    await shard.step(token)
    assert (await shard.counters()).renewals == "2"


async def test_progress_is_kept_and_read_back(shard: Rig) -> None:
    first = await shard.stored("p", 1, "a", "b", "c")
    second = await shard.stored("p", 2, "d")
    token = await shard.own()
    await shard.fetch(token)
    done = pack_progress(bytearray([1, 0, 1]))
    await shard.step(token, acked=2, partial=[(first, done)])
    assert await shard.backlog() == 2
    pending = await shard.step(token, limit=5, cursor=FIRST)
    assert (ids(pending), progress_of(pending)) == ([first, second], [done, b""])
    behind = await shard.step(token, limit=5, cursor=first)
    assert (ids(behind), progress_of(behind)) == ([second], [b""])
    await shard.step(token, acked=2, finished=[first, second])
    assert await shard.backlog() == 0
    fields = await shard.command("HKEYS", shard.shard.group("g"))
    assert not [field for field in fields if field.startswith(b"x:")]


async def test_the_next_owner_finds_what_is_unfinished(shard: Rig) -> None:
    entries = [await shard.stored("p", number, "a", "b") for number in (1, 2, 3)]
    token = await shard.own("n")
    assert await shard.fetch(token, 2) == entries[:2]
    await shard.step(token, acked=1, partial=[(entries[1], b"\2")])
    assert await shard.lease("release", token) == "OK"
    other = await shard.own("m")
    pending = await shard.step(other, limit=5, cursor=FIRST)
    assert (ids(pending), progress_of(pending)) == (entries[:2], [b"", b"\2"])
    assert await shard.fetch(other) == entries[2:]
    await shard.step(other, acked=5, finished=entries)
    assert await shard.backlog() == 0
    assert (await shard.counters()).delivered == 6


async def test_trimming_spares_what_another_group_has_not_finished(shard: Rig) -> None:
    await shard.open_group("slow")
    entries = [await shard.stored("p", number, "a") for number in (1, 2, 3, 4)]
    fast, slow = await shard.own("n"), await shard.own("s", "slow")
    await shard.step(fast, acked=4, finished=await shard.fetch(fast))
    assert await shard.entries() == entries
    await shard.fetch(slow, 3, group="slow")
    await shard.step(slow, acked=2, finished=[entries[0], entries[2]], group="slow")
    assert await shard.entries() == entries[1:]
    await shard.step(slow, acked=1, finished=[entries[1]], group="slow")
    assert await shard.entries() == entries[3:]
    await shard.open_group("late")
    await shard.step(slow, acked=1, finished=await shard.fetch(slow, group="slow"), group="slow")
    assert await shard.entries() == entries[3:]
    for group in ("g", "slow", "late"):
        await shard.backlog(group)


async def test_dead_letters_are_kept_and_counted(shard: Rig) -> None:
    first = await shard.stored("p", 1, "a", "b", "c")
    broken = b"\1\0\0\5" + b"\xc1"
    (second,) = (await shard.send(appends.pack_append(shard.shard, "p", 2, 5, broken, None))).entries
    token = await shard.own()
    await shard.fetch(token)
    record = msgspec.msgpack.encode({"why": "a"})
    finished = [first, second]
    await shard.step(token, acked=2, finished=finished, dead=[(1, record), (5, b"\0raw")])
    assert (await shard.counters()).dead == 6
    assert await shard.backlog() == 0
    kept = [fields for _, fields in await shard.command("XRANGE", shard.shard.dead("g"), "-", "+")]
    assert kept == [[b"count", b"1", b"record", record], [b"count", b"5", b"record", b"\0raw"]]


@pytest.mark.parametrize(
    "fields",
    [["name", "Ann"], ["at", "0"], ["at", "0", "batch", "junk"], ["at", "x", "batch", "junk"], ["a", "1", "b", "2"]],
)
async def test_another_clients_entry_is_one_message(shard: Rig, fields: list[str]) -> None:
    await shard.append("p", 1, "a", "b")
    await shard.command("XADD", shard.shard.stream, "*", *fields)
    await shard.append("p", 2, "c")
    token = await shard.own()
    entries = await shard.fetch(token)
    own = await shard.counters()
    assert (own.foreign, own.delivered) == (1, 4)
    assert await shard.backlog() == 4
    await shard.step(token, acked=4, finished=entries)
    assert await shard.backlog() == 0


async def test_a_deleted_entry_comes_back_without_fields(shard: Rig) -> None:
    first = await shard.stored("p", 1, "a")
    second = await shard.stored("p", 2, "b")
    token = await shard.own()
    await shard.fetch(token)
    await shard.command("XDEL", shard.shard.stream, first)
    pending = await shard.step(token, limit=5, cursor=FIRST)
    assert ids(pending) == [first, second]
    assert [len(fields) for _, fields in pending.fetched.entries] == [0, 4]
    await shard.step(token, acked=1, finished=[first, second], dead=[(1, b"gone")])
    assert await shard.backlog() == 0


async def test_more_finished_entries_than_a_lua_stack_takes(shard: Rig) -> None:
    most = 9000
    async with anyio.create_task_group() as tasks:
        for number in range(1, most + 1):
            tasks.start_soon(shard.append, "p", number, "a")
    entries = await shard.entries()
    assert len(entries) == most
    token = await shard.own()
    assert await shard.fetch(token, most) == entries
    await shard.step(token, acked=most - 1, finished=entries[:-1])
    assert await shard.entries() == entries[-1:]
    assert await shard.backlog() == 1


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["g", "t", "x", "0", NEW, "1", "0", "0", "0", "0"],
        ["g", "t", "1", "0", NEW, "-1", "0", "0", "0", "0"],
        ["g", "t", "1", "0", "first", "1", "0", "0", "0", "0"],
        ["g", "t", "1", "0", NEW, "1", "0", "0", "0", "0", "left over"],
        ["g", "t", "1", "0", NEW, "1", "0", "0", "0", "0", "done", "5", "1-1"],
        ["g", "t", "1", "0", NEW, "1", "0", "0", "0", "0", "dead", "1", "1", "no key for dead letters"],
    ],
)
async def test_a_malformed_step_is_refused(shard: Rig, args: list[str]) -> None:
    await shard.append("p", 1, "a")
    keys = [shard.shard.stream, shard.shard.meta, shard.shard.group("g")]
    with pytest.raises(StoreRefused, match="report it"):
        await shard.call("step", keys, *args)
    assert await shard.backlog() == 1


async def test_inspect_shows_the_groups_it_is_asked_for_and_changes_nothing(shard: Rig) -> None:
    await shard.append("p", 1, "a")
    before = await shard.dumps()
    state = await shard.inspect("g", "never opened")
    assert (list(state.groups), state.registered, state.state) == (["g"], ("g",), "open")
    assert (state.entries, state.appended, [state.first_entry]) == (1, 1, await shard.entries())
    assert state.groups["g"].oldest_unread == state.first_entry
    keys = [shard.shard.stream, shard.shard.meta, shard.shard.group("g")]
    with pytest.raises(StoreRefused, match="report it"):
        await shard.call("inspect", keys, "g")
    shard.shard, opened = shard.keys.shard(7, "0"), shard.shard
    with pytest.raises(UnknownQueue, match="gone"):
        await shard.inspect("g")
    shard.shard = opened
    assert await shard.dumps() == before
