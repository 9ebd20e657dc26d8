"""The functions that reset and delete groups: what is given up, what stays, what is left behind, who is told."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest
from redis.asyncio.connection import Connection

from shardq.core.step import FIRST
from shardq.errors import StoreRefused, UnknownQueue
from shardq.ops.local_cluster import LocalCluster
from shardq.storage import calls, groups
from shardq.storage.groups import Done, Start
from tests.storage.group_rig import GroupRig, checked_rig

pytestmark = pytest.mark.anyio

EARLIEST, LATEST = Start(), Start("latest")


@pytest.fixture
async def shard(cluster: LocalCluster, queue_name: str) -> AsyncIterator[GroupRig]:
    async with checked_rig(cluster.url, queue_name) as made:
        yield made


# -- reset --------------------------------------------------------------------------------------------------


async def busy(shard: GroupRig, owner_of: str = "g") -> list[str]:
    """A group with everything a group can have: entries finished, finished in part, pending, waiting, dead, unread; and
    a second group that holds all of it in the stream."""
    await shard.open("keeper")
    await shard.open(owner_of)
    entries = [await shard.append(count) for count in (1, 2, 3, 1, 1)]
    entries += [await shard.foreign(), await shard.append(9)]
    owner = await shard.own(owner_of, "busy")
    got = await shard.fetch(owner, 6)
    await shard.finish(owner, got[:1])
    await shard.step(owner, "done", 1, entries[1], "dead", 2, 1, b"letter", 1, b"letter")
    await shard.step(owner, "part", 1, entries[2], b"\5", acked=2)
    await shard.put_later(owner, entries[3])
    assert await shard.backlog(owner_of) == 1 + 1 + 1 + 1 + 9
    return entries


@pytest.mark.parametrize("to", ["earliest", "latest", "inside", "a pending one", "a finished one"])
async def test_a_reset_leaves_exactly_what_lies_behind_the_position(shard: GroupRig, to: str) -> None:
    entries = await busy(shard)
    start, backlog = {
        "earliest": (EARLIEST, 17),
        "latest": (LATEST, 0),
        "inside": (Start(entries[6], 4), 5),
        "a pending one": (Start(entries[4]), 10),
        "a finished one": (Start(entries[1]), 16),
    }[to]
    before, hash_before = await shard.totals(), await shard.fields()
    assert await shard.reset(start, force=True) == Done("OK", backlog)
    assert await shard.backlog() == backlog
    after, hash_after = await shard.totals(), await shard.fields()
    assert all(after[name] >= before[name] for name in before)
    assert after["epoch"] > before["epoch"]
    assert {name: after[name] for name in ("acked", "retried", "dead", "replayed", "lost")} == {
        name: before[name] for name in ("acked", "retried", "dead", "replayed", "lost")
    }
    assert after["delivered"] == before["delivered"] + (5 if to == "inside" else 0)
    assert hash_after["later_next"] == hash_before["later_next"]
    assert (hash_after["token"], hash_after["owner"], hash_after["heir_nonce"], hash_after["step"]) == ("", "", "", "0")
    own = await shard.counters()
    assert (own.held, own.waiting, own.dead_letters) == (False, 0, 2)
    assert await shard.command("HKEYS", shard.shard.kept("g")) == [b""]
    progress = [name for name in hash_after if name.startswith("x:")]
    assert progress == ([f"x:{entries[6]}"] if to == "inside" else [])
    owner = await shard.own("g", "next")
    pending = await shard.step(owner, limit=10, cursor=FIRST)
    assert len(pending[2]) == (1 if to == "inside" else 0)
    got = await shard.fetch(owner)
    if to == "inside":
        await shard.step(owner, "done", 1, entries[6], acked=5)
    await shard.finish(owner, got)
    assert await shard.backlog() == 0


async def test_dead_letters_can_be_replayed_after_a_reset(shard: GroupRig) -> None:
    await busy(shard)
    assert await shard.reset(LATEST, force=True) == Done("OK", 0)
    letters = [entry.decode() for entry, _ in await shard.command("XRANGE", shard.shard.dead("g"), "-", "+")]
    await shard.replay(letters[0], 1)
    assert await shard.backlog() == 1
    owner = await shard.own()
    await shard.step(owner, "drop", 1, 2, acked=1)
    assert await shard.backlog() == 0
    assert await shard.reset(LATEST, force=True) == Done("OK", 0)
    assert await shard.backlog() == 0


async def test_a_held_lease_refuses_a_reset_and_a_forced_one_fences_the_owner(shard: GroupRig) -> None:
    await shard.open()
    await shard.append(2)
    owner = await shard.own()
    got = await shard.fetch(owner)
    before, meta = await shard.fields(), await shard.meta()
    assert await shard.reset(LATEST) == Done("HELD", owner="worker-n")
    assert (await shard.fields(), await shard.meta()) == (before, meta)
    assert await shard.reset(LATEST, force=True) == Done("OK", 0)
    assert (await shard.step(owner, "done", 1, got[0][0], acked=2))[0] == b"FENCED"
    assert await calls.lease_call(shard.pipes, shard.shard, "g", "release", [owner.token], timeout_s=10) == "FENCED"
    assert await shard.backlog() == 0
    again = await shard.own()
    assert int(again.token.split(":")[0]) > int(owner.token.split(":")[0])


async def test_a_copy_of_a_reset_does_nothing(shard: GroupRig) -> None:
    """The first one may have been carried out although its answer was lost; a worker may have begun since."""
    await shard.open()
    await shard.append(2)
    assert await shard.reset(EARLIEST, request="once") == Done("OK", 2)
    owner = await shard.own()
    await shard.fetch(owner)
    assert await shard.reset(EARLIEST, request="once") == Done("OK", 2)
    assert (await shard.step(owner))[0] == b"OK"
    assert await shard.reset(EARLIEST, request="twice") == Done("HELD", owner="worker-n")


async def test_nothing_behind_a_new_position_is_trimmed_by_others(shard: GroupRig) -> None:
    await shard.open("fast")
    await shard.open("g", LATEST)
    entries = [await shard.append(1) for _ in range(4)]
    slow = await shard.own("g")
    await shard.finish(slow, await shard.fetch(slow, 2))
    assert await shard.reset(Start(entries[1]), force=True) == Done("OK", 3)
    fast = await shard.own("fast", "f")
    await shard.finish(fast, await shard.fetch(fast))
    assert [entry for entry, *_ in await shard.entries()] == entries[1:]
    assert (await shard.counters()).oldest_unread == entries[1]
    assert await shard.reset(Start(entries[3])) == Done("OK", 1)
    assert [entry for entry, *_ in await shard.entries()] == entries[3:], "what only this group held goes at once"
    assert await shard.reset(EARLIEST) == Done("OK", 1), "what is gone can't be had again"


async def test_retained_messages_stay_for_a_reset_back(shard: GroupRig) -> None:
    await shard.command("HSET", shard.shard.meta, "retention_ms", "3600000")
    await shard.open()
    entries = [await shard.append(1) for _ in range(3)]
    owner = await shard.own()
    await shard.finish(owner, await shard.fetch(owner))
    assert await shard.reset(LATEST, force=True) == Done("OK", 0)
    assert await shard.reset(EARLIEST) == Done("OK", 3)
    assert (await shard.counters()).base == -3
    owner = await shard.own()
    assert await shard.fetch(owner, 2) == [(entry, 1) for entry in entries[:2]]
    assert await shard.backlog() == 3
    assert (await shard.counters()).foreign == 0
    await shard.finish(owner, [*((entry, 1) for entry in entries[:2]), *await shard.fetch(owner)])
    assert await shard.backlog() == 0
    assert (await shard.counters()).acked == 6


async def test_more_progress_than_a_lua_stack_takes_is_removed(shard: GroupRig) -> None:
    await shard.open()
    fields = [part for number in range(9000) for part in (f"x:{number}-0", b"\1")]
    await shard.command("HSET", shard.shard.group("g"), *fields)
    assert await shard.reset(EARLIEST) == Done("OK", 0)
    assert not [name for name in await shard.fields() if name.startswith("x:")]


async def test_a_group_that_is_not_there_is_not_reset(shard: GroupRig) -> None:
    assert await shard.reset(EARLIEST) == Done("ABSENT")
    assert await shard.command("EXISTS", *shard.shard.of_group("g")) == 0


# -- delete -------------------------------------------------------------------------------------------------


async def everything(shard: GroupRig) -> dict[str, object]:
    """Every key of the queue on this node, with what it holds, but for the note of when a group was deleted."""
    names = sorted(name.decode() for name in await shard.command("KEYS", f"shardq:{shard.keys.queue}:*"))
    held: dict[str, object] = {name: await shard.command("DUMP", name) for name in names if name != shard.shard.meta}
    held[shard.shard.stream] = await shard.entries(), await shard.command("XINFO", "GROUPS", shard.shard.stream)
    meta = {name: value for name, value in (await shard.meta()).items() if not name.startswith("gone:")}
    return {**held, shard.shard.meta: meta}


@pytest.mark.parametrize("bounded", [False, True])
async def test_a_deleted_group_leaves_nothing_behind(shard: GroupRig, bounded: bool) -> None:
    if bounded:
        await shard.command("HSET", shard.shard.meta, "max_backlog", "1000", "overflow", "drop-oldest")
    await shard.open("keeper")
    await shard.append(4)
    before = await everything(shard)
    owner = await shard.own_new("g")
    got = await shard.fetch(owner)
    await shard.step(owner, "part", 1, got[0][0], b"\1", "dead", 1, 1, b"letter", "put", 1, 0, 5, 0, "t", b"r", acked=1)
    await shard.step(owner, limit=5, wait=True)
    assert await everything(shard) != before
    assert await shard.delete() == Done("HELD", owner="worker-n")
    assert await shard.delete(force=True) == Done("OK")
    assert await everything(shard) == before
    assert await shard.delete() == Done("ABSENT")
    assert await everything(shard) == before


async def test_the_owner_of_a_deleted_group_is_fenced(shard: GroupRig) -> None:
    await shard.open()
    await shard.append(2)
    owner = await shard.own()
    got = await shard.fetch(owner)
    assert await shard.delete(force=True) == Done("OK")
    assert (await shard.step(owner, "done", 1, got[0][0], acked=2))[0] == b"FENCED"
    assert await shard.command("EXISTS", *shard.shard.of_group("g")) == 0
    assert await shard.open() == Done("CREATED", 2)
    assert await shard.backlog() == 2


async def test_what_a_deleted_group_alone_held_goes_and_what_others_need_stays(shard: GroupRig) -> None:
    await shard.open("slow")
    await shard.open("fast")
    entries = [await shard.append(1) for _ in range(3)]
    fast = await shard.own("fast")
    await shard.finish(fast, (await shard.fetch(fast, 2))[:1])
    assert await shard.delete("slow") == Done("OK")
    assert [entry for entry, *_ in await shard.entries()] == entries[1:]
    assert await shard.delete("fast", force=True) == Done("OK")
    assert [entry for entry, *_ in await shard.entries()] == entries[1:], "stored messages wait for the next group"
    assert (await shard.meta())["groups"] == ""


async def test_names_that_begin_alike_are_told_apart(shard: GroupRig) -> None:
    for group in ("g", "g.1", "g-1", "1.g"):
        await shard.open(group)
    assert await shard.delete("g") == Done("OK")
    meta = await shard.meta()
    assert meta["groups"] == "g.1 g-1 1.g"
    assert {name for name in meta if name.startswith("floor:")} == {"floor:g.1", "floor:g-1", "floor:1.g"}


async def test_owners_are_rung(shard: GroupRig) -> None:
    """Who waits for the lease, or idles with it, looks at once."""
    await shard.open()
    node = shard.client.cluster.node_of(shard.shard.slot)
    assert node is not None
    bell = Connection(host=node.host, port=node.port, protocol=2)
    await bell.connect()
    try:
        await bell.send_command("SSUBSCRIBE", shard.shard.bell)
        assert (await bell.read_response())[0] == b"ssubscribe"
        for change in (shard.reset(LATEST), shard.delete()):
            assert (await change).status == "OK"
            with anyio.fail_after(10):
                assert await bell.read_response() == [b"smessage", shard.shard.bell.encode(), b"lease"]
    finally:
        await bell.disconnect()


# -- misuse -------------------------------------------------------------------------------------------------


async def test_groups_need_their_shard(shard: GroupRig) -> None:
    other = shard.keys.shard(7, "0")
    with pytest.raises(UnknownQueue, match="gone"):
        await groups.open_group(shard.pipes, other, "g", EARLIEST)
    with pytest.raises(UnknownQueue, match="gone"):
        await groups.reset_group(shard.pipes, other, "g", EARLIEST, "r", force=True)
    assert await groups.delete_group(shard.pipes, other, "g", force=True) == Done("ABSENT")
    assert await shard.command("KEYS", f"shardq:{shard.keys.queue}:*:7:*") == []


@pytest.mark.parametrize(
    ("function", "args"),
    [
        ("open_group", []),
        ("open_group", ["g", "earliest"]),
        ("open_group", ["g", "nonsense", "0"]),
        ("open_group", ["g", "5", "0"]),
        ("open_group", ["g", "earliest", "-1"]),
        ("open_group", ["g", "earliest", "x"]),
        ("reset_group", ["g", "r", "1", "$", "0", "bell"]),
        ("reset_group", ["g", "r", "1", "earliest", "0"]),
        ("reset_group", ["g", "r", "1", "earliest", "0.5", "bell"]),
        ("delete_group", ["g"]),
    ],
)
async def test_misuse_is_refused(shard: GroupRig, function: str, args: list[str]) -> None:
    keys = [shard.shard.stream, shard.shard.meta, *shard.shard.of_group("g")]
    if function == "reset_group":
        del keys[3]
    with pytest.raises(StoreRefused, match="report it"):
        await shard.call(function, keys, *args)
    with pytest.raises(StoreRefused, match="report it"):
        await shard.call(function, keys[:1], "g", "1", "bell")
    assert (await shard.meta())["groups"] == ""
