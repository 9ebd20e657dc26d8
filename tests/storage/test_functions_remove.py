"""The function that takes a whole shard out of Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from shardq.errors import StoreRefused, UnknownQueue
from shardq.ops.local_cluster import LocalCluster
from shardq.storage import calls, groups, removal
from shardq.storage.groups import Start
from shardq.storage.removal import Removed
from tests.storage.group_rig import GroupRig, group_rig

pytestmark = pytest.mark.anyio


@pytest.fixture
async def shard(cluster: LocalCluster, queue_name: str) -> AsyncIterator[GroupRig]:
    """A shard with groups "g" and "h" and some messages."""
    async with group_rig(cluster.url, queue_name) as made:
        await made.open("g")
        await made.open("h")
        await made.append(3)
        yield made


async def keys_of(shard: GroupRig) -> list[str]:
    return sorted(name.decode() for name in await shard.command("KEYS", f"shardq:{shard.keys.queue}:*"))


async def test_nothing_of_the_shard_is_left_but_what_is_the_users(shard: GroupRig) -> None:
    owned = shard.shard.data("total")
    await shard.command("SET", owned, "7")
    owner = await shard.own("g")
    got = await shard.fetch(owner)
    await shard.step(owner, "part", 1, got[0][0], b"\1", "dead", 1, 1, b"letter", "put", 1, 0, 5, 0, "t", b"r", acked=1)
    assert len(await keys_of(shard)) == 5 + 2 * 4 + 1
    held = Removed("HELD", "worker-n", "g")
    assert await removal.remove_shard(shard.pipes, shard.shard, ["g", "h"], force=False) == held
    assert len(await keys_of(shard)) == 5 + 2 * 4 + 1
    assert await removal.remove_shard(shard.pipes, shard.shard, ["g", "h"], force=True) == Removed("OK")
    assert await keys_of(shard) == [owned]
    assert await removal.remove_shard(shard.pipes, shard.shard, ["g", "h"], force=True) == Removed("ABSENT")
    assert await keys_of(shard) == [owned]


@pytest.mark.parametrize("known", [[], ["g"], ["g", "hh"]])
async def test_a_group_that_the_caller_does_not_know_refuses_it(shard: GroupRig, known: list[str]) -> None:
    before = await keys_of(shard)
    assert await removal.remove_shard(shard.pipes, shard.shard, known, force=True) == Removed("CHANGED")
    assert await keys_of(shard) == before
    assert await removal.remove_shard(shard.pipes, shard.shard, ["f", "g", "h"], force=False) == Removed("OK")
    assert await keys_of(shard) == []


async def test_nothing_comes_back_by_itself(shard: GroupRig) -> None:
    owner = await shard.own("g")
    await removal.remove_shard(shard.pipes, shard.shard, ["g", "h"], force=True)
    assert (await shard.step(owner, limit=5))[0] == b"FENCED"
    acquired = await calls.acquire(shard.pipes, shard.shard, "g", "w", "n", 0, None, timeout_s=5, confirm=None)
    assert acquired.status == "MISSING"
    with pytest.raises(UnknownQueue):
        await groups.open_group(shard.pipes, shard.shard, "g", Start())
    keys = [shard.shard.stream, shard.shard.meta]
    assert await shard.call("append", keys, "p", 9, 1, b"\1\0\0\1x", shard.shard.bell) == [b"MISSING"]
    assert await keys_of(shard) == []


@pytest.mark.parametrize(
    ("keys", "args"), [(4, ["1", "bell"]), (5, ["1"]), (5, ["1", "bell", "g"]), (9, ["1", "bell"])]
)
async def test_misuse_is_refused(shard: GroupRig, keys: int, args: list[str]) -> None:
    names = [shard.shard.stream, shard.shard.meta, shard.shard.delayed, shard.shard.expiring, shard.shard.timed]
    names += shard.shard.of_group("g")
    with pytest.raises(StoreRefused, match="report it"):
        await shard.call("remove_shard", names[:keys], *args)
    assert len(await keys_of(shard)) == 5 + 2 * 4
