"""Settings in Redis: declared once, changed by comparison, and never older on a shard than they were before."""

from __future__ import annotations

import pytest

from shardq.core.slots import tag_for_slot
from shardq.errors import CorruptData, StoreRefused, UnknownQueue
from shardq.storage import calls, queues
from shardq.storage.commands import pack_command
from shardq.storage.queues import Declared
from tests.storage.rig import Rig

pytestmark = pytest.mark.anyio

NAMES = ("settings_version", "max_backlog", "overflow", "retention_ms", "retention_bytes")
FULL: dict[str, str | int] = {"max_backlog": 5, "overflow": "reject", "retention_ms": 1000}


async def declare(shard: Rig, settings: bytes = b"one") -> Declared:
    return await queues.declare(shard.pipes, shard.keys, 1, b"table", settings)


async def put(shard: Rig, read_version: int, settings: bytes) -> int | None:
    return await queues.put_settings(shard.pipes, shard.keys, read_version, settings)


async def stored(shard: Rig) -> Declared:
    found = await queues.stored_queue(shard.pipes, shard.keys)
    assert found is not None
    return found


async def on_shard(shard: Rig) -> dict[str, str]:
    values = await shard.command("HMGET", shard.shard.meta, *NAMES)
    return {name: value.decode() for name, value in zip(NAMES, values, strict=True) if value is not None}


# -- the queue --------------------------------------------------------------------------------------------------------


async def test_the_first_settings_stand(shard: Rig) -> None:
    assert await queues.stored_queue(shard.pipes, shard.keys) is None
    first = await declare(shard, b"one")
    assert (first.settings, first.settings_version > 0) == (b"one", True)
    assert await declare(shard, b"two") == first == await stored(shard)


async def test_a_change_names_what_it_read(shard: Rig) -> None:
    first = await declare(shard)
    second = await put(shard, first.settings_version, b"two")
    assert second is not None
    assert second > first.settings_version
    assert await put(shard, first.settings_version, b"three") is None
    assert await stored(shard) == Declared(b"table", b"two", second)
    third = await put(shard, second, b"three")
    assert third is not None
    assert third > second


async def test_a_repeated_change_changes_nothing_more(shard: Rig) -> None:
    first = await declare(shard)
    second = await put(shard, first.settings_version, b"two")
    assert await put(shard, first.settings_version, b"two") == second
    assert await put(shard, second or 0, b"two") == second


async def test_a_queue_from_before_there_were_settings(shard: Rig) -> None:
    packed = pack_command("HSET", shard.keys.routing, "version", 1, "table", "table")
    await shard.pipes.command(shard.keys.control_slot, packed)
    old = Declared(b"table", b"", 0)
    assert await stored(shard) == await declare(shard) == old
    assert await put(shard, 7, b"one") is None
    version = await put(shard, 0, b"one")
    assert await stored(shard) == Declared(b"table", b"one", version or 0)


async def test_a_queue_that_does_not_exist_has_no_settings(shard: Rig) -> None:
    with pytest.raises(UnknownQueue, match="shards=N"):
        await put(shard, 0, b"one")
    assert await queues.stored_queue(shard.pipes, shard.keys) is None


async def test_a_broken_version_is_corrupt(shard: Rig) -> None:
    await declare(shard)
    packed = pack_command("HSET", shard.keys.routing, "settings_version", "soon")
    await shard.pipes.command(shard.keys.control_slot, packed)
    with pytest.raises(CorruptData, match="shape"):
        await stored(shard)


# -- its shards -------------------------------------------------------------------------------------------------------


async def test_a_shard_is_opened_with_its_share(shard: Rig) -> None:
    other = shard.keys.shard(7, tag_for_slot(0))
    assert await calls.open_shard(shard.pipes, other, 3, FULL)
    values = await shard.pipes.command(other.slot, pack_command("HMGET", other.meta, *NAMES))
    assert values == [b"3", b"5", b"reject", b"1000", None]


async def test_a_shard_takes_newer_settings_and_forgets_what_they_leave_out(shard: Rig) -> None:
    await queues.tune(shard.pipes, shard.shard, 3, FULL)
    assert await on_shard(shard) == {
        "settings_version": "3",
        "max_backlog": "5",
        "overflow": "reject",
        "retention_ms": "1000",
    }
    await queues.tune(shard.pipes, shard.shard, 4, {"retention_bytes": 10**12})
    assert await on_shard(shard) == {"settings_version": "4", "retention_bytes": str(10**12)}
    await queues.tune(shard.pipes, shard.shard, 5, {})
    assert await on_shard(shard) == {"settings_version": "5"}


async def test_a_late_change_does_not_bring_older_settings_back(shard: Rig) -> None:
    await queues.tune(shard.pipes, shard.shard, 4, FULL)
    before = await on_shard(shard)
    await queues.tune(shard.pipes, shard.shard, 3, {"max_backlog": 9})
    assert not await calls.open_shard(shard.pipes, shard.shard, 3, {"max_backlog": 9})
    assert not await calls.open_shard(shard.pipes, shard.shard)
    assert await on_shard(shard) == before
    await queues.tune(shard.pipes, shard.shard, 4, FULL)
    assert await on_shard(shard) == before


async def test_opening_again_completes_a_change_that_was_cut_short(shard: Rig) -> None:
    assert not await calls.open_shard(shard.pipes, shard.shard, 3, FULL)
    assert (await on_shard(shard))["max_backlog"] == "5"


async def test_settings_leave_the_rest_of_a_shard_alone(shard: Rig) -> None:
    await shard.append("p", 1, "a", "b")
    await queues.tune(shard.pipes, shard.shard, 3, FULL)
    assert await shard.backlog() == 2
    assert (await shard.append("p", 1, "a", "b")).status == "OK"
    assert await shard.backlog() == 2


async def test_a_shard_that_is_gone(shard: Rig) -> None:
    other = shard.keys.shard(7, "0")
    with pytest.raises(UnknownQueue, match="gone"):
        await queues.tune(shard.pipes, other, 1, FULL)


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["x"],
        ["-1"],
        ["1", "max_backlog"],
        ["1", "max_backlog", "many"],
        ["1", "max_backlog", "-5"],
        ["1", "overflow", "spill"],
        ["1", "state", "sealed"],
        ["1", "retention_ms", "1.5"],
    ],
    ids=" ".join,
)
async def test_malformed_settings_are_refused(shard: Rig, args: list[str]) -> None:
    own = shard.shard
    with pytest.raises(StoreRefused, match="report it"):
        await shard.call("tune", [own.meta], *args)
    with pytest.raises(StoreRefused, match="report it"):
        await shard.call("open_shard", [own.stream, own.meta, own.delayed, own.expiring, own.timed], *args)
    assert await on_shard(shard) in ({}, {"settings_version": "0"})
