"""Effects on real servers: the writes of a handler happen with its commit or not at all, whatever was there before."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import shardq
from shardq.core.effects import MAX_ARGUMENTS, MAX_EFFECTS, Effect
from shardq.core.step import Put
from shardq.errors import StoreRefused
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.nodes import node_command
from tests.storage.rig import Rig, rig

pytestmark = pytest.mark.anyio
HOST, PASSWORD = "127.0.0.1", "let-me-in"

# How a key of each type is made, and how it is read.
MADE: dict[str, list[str]] = {
    "string": ["SET", "5"],
    "hash": ["HSET", "f", "1", "g", "\0two"],
    "set": ["SADD", "a", "b"],
    "zset": ["ZADD", "1.1", "a", "-inf", "b"],
    "list": ["RPUSH", "a", "b", "a"],
}
READ: dict[bytes, list[str]] = {
    b"string": ["GET"],
    b"hash": ["HGETALL"],
    b"set": ["SMEMBERS"],
    b"zset": ["ZRANGE", "0", "-1", "WITHSCORES"],
    b"list": ["LRANGE", "0", "-1"],
}
# Every effect, by the type of key it is for.
EFFECTS: dict[str, list[list[str]]] = {
    "string": [["INCRBY", "3"], ["INCRBYFLOAT", "0.1"], ["APPEND", "\0x"]],
    "hash": [
        ["HSET", "f", "9", "new", "8", "f", "7"],
        ["HDEL", "g", "other"],
        ["HDEL", "f", "g"],
        ["HINCRBY", "f", "-3"],
        ["HINCRBY", "new", "3"],
        ["HINCRBYFLOAT", "f", "0.1"],
    ],
    "set": [["SADD", "b", "c", "c"], ["SREM", "a", "other"], ["SREM", "a", "b"]],
    "zset": [["ZADD", "7", "a", "8", "c"], ["ZINCRBY", "0.1", "a"], ["ZREM", "a", "other"], ["ZREM", "a", "b"]],
    "list": [["LPUSH", "y", "z"], ["RPUSH", "y", "z"]],
}
ANY = [["SET", "other"], ["SET", "other", "PX", "5000"], ["DEL"], ["PEXPIRE", "5000"]]
CASES = [(kind, command) for kind, commands in EFFECTS.items() for command in [*commands, *ANY]]
CASES += [("none", command) for commands in [*EFFECTS.values(), ANY] for command in commands]


def effect(key: str, command: str, *args: str) -> Effect:
    return Effect(key, command, args)


async def content(shard: Rig, key: str) -> tuple[bytes, Any, int]:
    """Type, value and time of expiry (Unix ms) of a key."""
    kind = await shard.command("TYPE", key)
    value: Any = None
    if kind in READ:
        name, *args = READ[kind]
        value = await shard.command(name, key, *args)
    if kind in (b"set", b"hash"):
        value = sorted(value)
    return kind, value, await shard.command("PEXPIRETIME", key)


async def make(shard: Rig, kind: str, name: str, ttl_ms: int = 0) -> str:
    key = shard.shard.data(name)
    if kind in MADE:
        command, *args = MADE[kind]
        await shard.command(command, key, *args)
    if ttl_ms:
        await shard.command("PEXPIRE", key, ttl_ms)
    return key


# -- carried out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "command"), CASES, ids=lambda part: part if isinstance(part, str) else " ".join(part))
async def test_an_effect_does_what_its_command_does_once(shard: Rig, kind: str, command: list[str]) -> None:
    key, same = await make(shard, kind, "x"), await make(shard, kind, "y")
    name, *args = command
    await shard.command(name, same, *args)
    token = await shard.own()
    stepped = await shard.step(token, effects=[effect(key, *command), effect(shard.shard.data("z"), "SET", "last")])
    assert stepped.status == "OK"
    again = await shard.step(token, number=1, effects=[effect(key, *command)])
    assert again.status == "REPEAT"
    found, expected = await content(shard, key), await content(shard, same)
    assert found[:2] == expected[:2]
    assert (found[2] > 0) == (expected[2] > 0)


# -- taken back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ttl_ms", [0, 10**8])
@pytest.mark.parametrize(("kind", "command"), CASES, ids=lambda part: part if isinstance(part, str) else " ".join(part))
async def test_an_effect_is_taken_back_when_a_later_one_is_refused(
    shard: Rig, kind: str, command: list[str], ttl_ms: int
) -> None:
    key, bad = await make(shard, kind, "x", ttl_ms), await make(shard, "hash", "bad")
    before, dump = await content(shard, key), await shard.command("DUMP", key)
    token = await shard.own()
    for others in ([], [effect(key, *command)], [effect(key, "DEL"), effect(key, "APPEND", "new")]):
        effects = [effect(key, *command), *others, effect(bad, "APPEND", "x")]
        stepped = await shard.step(token, effects=effects)
        assert (stepped.status, stepped.effect) == ("EFFECT", len(effects))
        assert "WRONGTYPE" in stepped.why
        assert await content(shard, key) == before
        if kind in ("none", "string", "list"):  # others may be put back in another order, or encoding
            assert await shard.command("DUMP", key) == dump


async def test_all_effects_of_a_step_are_taken_back_together(shard: Rig) -> None:
    keys = {kind: await make(shard, kind, kind, hours * 3_600_000) for hours, kind in enumerate(["none", *MADE])}
    keys["new"] = shard.shard.data("new")
    before = {key: await content(shard, key) for key in keys.values()}
    effects = [effect(keys[kind], *command) for kind, commands in EFFECTS.items() for command in commands]
    effects += [effect(keys["hash"], *command) for command in ANY]
    effects += [effect(keys["new"], "RPUSH", "a"), effect(keys["new"], "DEL"), effect(keys["new"], "SADD", "a")]
    effects += [effect(keys["zset"], "DEL"), effect(keys["zset"], "SET", "5"), effect(keys["zset"], "INCRBY", "1")]
    token = await shard.own()
    stepped = await shard.step(token, effects=[*effects, effect(keys["new"], "HSET", "f", "1")])
    assert (stepped.status, stepped.effect) == ("EFFECT", len(effects) + 1)
    assert {key: await content(shard, key) for key in keys.values()} == before
    assert (await shard.step(token, effects=effects)).status == "OK"
    assert await shard.command("SMEMBERS", keys["new"]) == [b"a"]
    assert await shard.command("GET", keys["zset"]) == b"6"


async def test_fields_of_a_hash_keep_their_time_to_live(shard: Rig) -> None:
    key, bad = await make(shard, "hash", "x"), await make(shard, "hash", "bad")
    try:
        await shard.command("HPEXPIRE", key, 10**8, "FIELDS", 1, "f")
    except StoreRefused:
        return  # Redis 7.0: its fields have no time to live that could be lost
    before = await shard.command("HPEXPIRETIME", key, "FIELDS", 2, "f", "g")
    token = await shard.own()
    for command in (["HSET", "f", "2"], ["HDEL", "f"], ["HINCRBY", "f", "3"]):
        stepped = await shard.step(token, effects=[effect(key, *command), effect(bad, "APPEND", "x")])
        assert stepped.status == "EFFECT"
        assert await shard.command("HGETALL", key) == [b"f", b"1", b"g", b"\0two"]
        assert await shard.command("HPEXPIRETIME", key, "FIELDS", 2, "f", "g") == before


# -- refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["INCRBY", "1"], "WRONGTYPE"),
        (["SADD", "a"], "WRONGTYPE"),
        (["HINCRBY", "g", "1"], "not an integer"),
        (["HSET", "f"], "rong number"),
        (["SET", "v", "PX", "-1"], "invalid expire"),
        (["PEXPIRE", "soon"], "not an integer"),
        (["FLUSHALL"], "not one of the effects"),
        (["EVAL", "return 1", "0"], "not one of the effects"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
async def test_a_refused_effect_commits_nothing_and_uses_the_number_up(
    shard: Rig, command: list[str], why: str, place: int
) -> None:
    key, other = await make(shard, "hash", "x"), shard.shard.data("other")
    await shard.append("p", 1, "a")
    token = await shard.own()
    entries = await shard.fetch(token)
    before, group = await shard.dumps(key, other), await shard.counters()
    good = effect(other, "SET", "v")
    effects = [good, effect(key, *command)] if place else [effect(key, *command), good]
    content = {"acked": 1, "finished": entries, "puts": [Put(0, 0, 0, b"", b"record")], "jobs": [("j", 9, b"r")]}
    for _ in range(2):  # the answer may be lost: sent again, the step says the same
        stepped = await shard.step(token, number=2, effects=effects, renew=True, **content)  # type: ignore[arg-type]
        assert (stepped.status, stepped.effect) == ("EFFECT", place + 1)
        assert why in stepped.why
    after = await shard.dumps(key, other)
    assert {name for name in before if before[name] != after[name]} == {shard.shard.group("g")}
    own = await shard.counters()
    assert own.renewals == "2"
    assert (own.acked, own.waiting, own.delivered) == (group.acked, group.waiting, group.delivered)
    amended = await shard.step(token, number=3, acked=1, finished=entries, effects=[good])
    assert amended.status == "OK"
    assert await shard.command("GET", other) == b"v"
    assert (await shard.step(token, number=2, effects=effects)).status == "EFFECT", "a late copy"
    assert await shard.lease("release", token) == "OK"
    new = await shard.own("m")
    assert [(await shard.step(new)).status for _ in range(3)] == ["OK"] * 3
    assert (await shard.step(new, number=2)).status == "REPEAT", "another lease's numbers are others"


async def test_as_much_as_a_message_may_write(shard: Rig) -> None:
    token, key = await shard.own(), shard.shard.data("x")
    many = [str(number) for number in range(MAX_ARGUMENTS)]
    effects = [effect(key, "HSET", *many), effect(key, "HDEL", *many[:-2:2])]
    effects += [effect(shard.shard.data("count"), "INCRBY", "1")] * (MAX_EFFECTS - 2)
    bad = effect(key, "APPEND", "x")
    assert (await shard.step(token, effects=[*effects, bad])).effect == MAX_EFFECTS + 1
    assert await shard.command("EXISTS", key, shard.shard.data("count")) == 0
    assert (await shard.step(token, effects=effects)).status == "OK"
    assert await shard.command("HGETALL", key) == [part.encode() for part in many[-2:]]
    assert await shard.command("GET", shard.shard.data("count")) == str(MAX_EFFECTS - 2).encode()


@asynccontextmanager
async def limited(cluster: LocalCluster, queue: str, *rights: str) -> AsyncIterator[Rig]:
    """A shard of a user who may do anything but `rights`."""
    for port in cluster.ports:
        node_command(HOST, port, "ACL", "SETUSER", queue, "on", f">{PASSWORD}", "~*", "&*", "+@all", *rights)
    try:
        async with (
            shardq.connect(cluster.url),
            rig(cluster.url.replace("redis://", f"redis://{queue}:{PASSWORD}@"), queue) as made,
        ):
            await made.open_group()
            yield made
    finally:
        for port in cluster.ports:
            node_command(HOST, port, "ACL", "DELUSER", queue)


async def test_what_could_not_be_taken_back_is_not_done(cluster: LocalCluster, queue_name: str) -> None:
    async with limited(cluster, queue_name, "-restore", "-srem") as made:
        token = await made.own()
        key, text = await make(made, "set", "x"), await make(made, "string", "text")
        before = await content(made, key)
        last = effect(text, "SET", "done")
        for command, missing in (
            (["DEL"], "RESTORE"),
            (["SET", "v"], "RESTORE"),
            (["SADD", "a", "new"], "SREM"),
        ):
            stepped = await made.step(token, effects=[effect(key, *command), last])
            assert (stepped.status, stepped.effect) == ("EFFECT", 1)
            assert missing in stepped.why
            assert await content(made, key) == before
        assert (await made.step(token, effects=[effect(text, "DEL"), effect(key, "DEL")])).status == "OK"
        assert await made.command("EXISTS", key, text) == 0, "nothing comes after the last effect"
