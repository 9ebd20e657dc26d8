"""take and take_keys on real servers: how much is given in any time, to whoever asks, and what becomes of the state."""

from __future__ import annotations

import math
import time

import anyio
import pytest

from shardq.core.limits import AHEAD_S, KEY_AHEAD_S, Grant, Limit, parse_limit
from shardq.errors import StoreRefused
from shardq.storage import limits
from shardq.storage.commands import pack_command
from tests.storage.rig import Rig

pytestmark = pytest.mark.anyio

PER_HOUR = parse_limit("limit", "2/h burst 8")  # nothing comes back while a test runs


async def take(shard: Rig, limit: Limit, wanted: int) -> Grant:
    """As a worker does, of a group that has members."""
    await control(shard, "HSET", shard.keys.control("g"), "m:w", "n:1:active")
    return await limits.take(shard.pipes, shard.keys, "g", limit, wanted, timeout_s=10)


async def take_keys(shard: Rig, limit: Limit, *wanted: tuple[bytes, int]) -> list[Grant]:
    return await limits.take_keys(shard.pipes, shard.shard, "g", limit, wanted, timeout_s=10)


async def control(shard: Rig, *args: str | int) -> object:
    return await shard.pipes.command(shard.keys.control_slot, pack_command(*args))


async def test_a_full_bucket_is_given_half_by_half_and_then_no_more(shard: Rig) -> None:
    limit = parse_limit("limit", "1/h burst 32")
    given = [await take(shard, limit, 100) for _ in range(6)]
    assert [grant.given for grant in given] == [4, 2, 1, 1, 0, 0]
    assert all(grant.first_us <= 0 and grant.again_us == 0 for grant in given[:4])
    assert 3500e6 < given[-1].again_us <= 3600e6
    assert given[0].hold_us == limit.hold_us
    assert given[0].step_us == 3600e6


async def test_without_the_groups_hash_none_are_given_and_none_is_made(shard: Rig) -> None:
    """It was deleted, or lost until its members join again."""
    grant = await limits.take(shard.pipes, shard.keys, "g", PER_HOUR, 5, timeout_s=10)
    assert (grant.given, grant.again_us > 0) == (0, True)
    assert await control(shard, "EXISTS", shard.keys.control("g")) == 0
    assert (await take(shard, PER_HOUR, 1)).given == 1


async def test_no_more_is_given_than_was_asked_for(shard: Rig) -> None:
    assert [(await take(shard, PER_HOUR, wanted)).given for wanted in (0, 1, 1, 5)] == [0, 1, 1, 0]


async def test_many_at_once_get_no_more_than_the_limit(shard: Rig) -> None:
    """Counted, not timed: what was given is at most what the time that really passed allows."""
    limit, given, asked = parse_limit("limit", "2000/s"), 0, 0
    began = time.monotonic()

    async def worker() -> None:
        nonlocal given, asked
        while given < 600:
            grant = await take(shard, limit, 20)
            given, asked = given + grant.given, asked + 1
            await anyio.sleep(0.002)

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(worker)
    assert given <= 2000 * (time.monotonic() - began + AHEAD_S) + limit.capacity


async def test_the_strictest_limit_asked_with_holds_for_all(shard: Rig) -> None:
    """Until nobody has asked with it for ten seconds; as here, where it is made to be long ago."""
    strict, loose = parse_limit("limit", "2/h burst 8"), parse_limit("limit", "1000/s")
    await take(shard, strict, 0)
    assert (await take(shard, loose, 100)).step_us == 1800e6
    kept = await control(shard, "HGET", shard.keys.control("g"), "limit")
    assert isinstance(kept, bytes)
    *limit, seen = kept.decode().split()
    await control(shard, "HSET", shard.keys.control("g"), "limit", " ".join([*limit, str(int(seen) - 10_000_001)]))
    assert (await take(shard, loose, 100)).step_us == 1000


async def test_of_equal_rates_the_smaller_burst_holds(shard: Rig) -> None:
    await take(shard, parse_limit("limit", "2/h burst 8"), 0)
    assert (await take(shard, parse_limit("limit", "2/h burst 80"), 50)).given == 1


async def test_a_clock_that_was_put_back_makes_nobody_wait_for_it(shard: Rig) -> None:
    limit = parse_limit("limit", "10/s")
    await take(shard, limit, 1)
    await control(shard, "HSET", shard.keys.control("g"), "limit_full", 4_000_000_000_000_000)
    told = await take(shard, limit, 1)
    assert told.given == 0
    assert told.again_us <= 200_000


async def test_what_a_failover_took_back_is_given_once_more_and_no_oftener(shard: Rig) -> None:
    """The replica that takes over heard of nothing: what is begun twice is no more than a bucket and what was given
    ahead."""
    limit, key_limit = parse_limit("limit", "1/h burst 32"), parse_limit("key_limit", "1/h burst 32")
    for _ in range(2):
        await control(shard, "HDEL", shard.keys.control("g"), "limit_full")
        await shard.command("DEL", shard.shard.limits("g"))
        given = [(await take(shard, limit, 100)).given for _ in range(6)]
        (first,), (second,) = (
            await take_keys(shard, key_limit, (b"k", 100)),
            await take_keys(shard, key_limit, (b"k", 9)),
        )
        assert (sum(given), first.given, second.given) == (limit.capacity, key_limit.capacity, 0)


@pytest.mark.parametrize("stored", ["", "x", "1 2", "0 0 0 0 0", "9e99 1 1 1 1", "-1 -1 -1 -1 -1"])
async def test_what_is_no_limit_in_redis_counts_as_none(shard: Rig, stored: str) -> None:
    await control(shard, "HSET", shard.keys.control("g"), "limit", stored, "limit_full", stored)
    assert (await take(shard, PER_HOUR, 1)).given == 1


async def test_each_key_has_a_bucket_of_its_own(shard: Rig) -> None:
    first, second = await take_keys(shard, PER_HOUR, (b"kone", 5), (b"ktwo", 1))
    assert (first.given, second.given) == (2, 1)
    again = await take_keys(shard, PER_HOUR, (b"kone", 5), (b"ktwo", 5), (b"kthree", 5))
    assert [grant.given for grant in again] == [0, 1, 2]
    assert again[0].again_us > 1700e6


async def test_a_key_is_given_leave_for_moments_to_come(shard: Rig) -> None:
    (grant,) = await take_keys(shard, parse_limit("key_limit", "5/s"), (b"k", 100))
    assert grant.given == 1 + math.floor(KEY_AHEAD_S * 5)
    (none,) = await take_keys(shard, parse_limit("key_limit", "5/s"), (b"k", 100))
    assert 0 <= none.given <= 3, "but for what passed since"


async def test_the_limits_of_idle_keys_go_by_themselves(shard: Rig) -> None:
    quick = parse_limit("key_limit", "1000/s")
    await take_keys(shard, quick, *((b"k%d" % number, 1) for number in range(50)))
    lasting = parse_limit("key_limit", "3/m")
    with anyio.fail_after(10):
        while await shard.command("ZCARD", shard.shard.limits("g")) != 1:
            await anyio.sleep(0.01)
            await take_keys(shard, lasting, (b"one", 1))
    left_ms = await shard.command("PTTL", shard.shard.limits("g"))
    assert 0 < left_ms <= 40_000, "the whole set goes when the last bucket is full"


@pytest.mark.parametrize("score", ["inf", "-inf", "1e300", "1.5"])
async def test_a_score_that_nobody_stored_counts_as_the_most_or_the_least(shard: Rig, score: str) -> None:
    await shard.command("ZADD", shard.shard.limits("g"), score, "k")
    (grant,) = await take_keys(shard, parse_limit("key_limit", "5/s"), (b"k", 1))
    assert grant.given in (0, 1)
    assert grant.again_us <= 2_000_000


@pytest.mark.parametrize(
    ("function", "args"),
    [
        ("take", ["0", "1000000", "5", "1", "1", "1"]),
        ("take", ["1", "0", "5", "1", "1", "1"]),
        ("take", ["1", "1000000", "0", "1", "1", "1"]),
        ("take", ["1", "1000000", "5", "x", "1", "1"]),
        ("take", ["1", "1000000", "5", "1", "1"]),
        ("take", ["1000001", "1000000", "5", "1", "1", "1"]),
        ("take_keys", ["1", "1000000", "5"]),
        ("take_keys", ["1", "1000000", "5", "1", "k"]),
        ("take_keys", ["1", "1000000", "5", "1", "k", "-1"]),
    ],
)
async def test_misuse_is_refused_and_nothing_is_stored(shard: Rig, function: str, args: list[str]) -> None:
    with pytest.raises(StoreRefused, match=f"{function} takes"):
        await shard.call(function, [shard.shard.limits("g")], *args)
    assert await shard.command("EXISTS", shard.shard.limits("g")) == 0
