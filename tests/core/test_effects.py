"""`message.atomic()`: each command in wire form, what is refused before anything runs, and that a block counts whole or
not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core.effects import MAX_ARGUMENTS, MAX_EFFECTS, Atomic, Effect, redirected
from shardq.core.message import Batch, Message, Ownership
from shardq.core.records import Headers, Key
from shardq.core.slots import key_slot, tag_for_slot
from shardq.errors import UsageError

SLOT = key_slot(b"{t}")
KEY = "{t}:k"
NOW_MS = 1_700_000_000_000
Use = Callable[[Atomic], None]


def collected(*uses: Use) -> list[Effect]:
    """What one block with these uses keeps."""
    kept: list[Effect] = []

    async def block() -> None:
        async with Atomic(SLOT, lambda: NOW_MS, kept.extend) as tx:
            for use in uses:
                use(tx)

    anyio.run(block)
    return kept


def refused(why: str, use: Use) -> None:
    kept: list[Effect] = []

    async def block() -> None:
        async with Atomic(SLOT, lambda: NOW_MS, kept.extend) as tx:
            tx.incrby(KEY)
            with pytest.raises(UsageError, match=why):
                use(tx)

    anyio.run(block)
    assert kept == [Effect(KEY, "INCRBY", ("1",))], "a refused effect left something behind"


@pytest.mark.parametrize(
    ("use", "command", "args"),
    [
        (lambda tx: tx.set(KEY, "v"), "SET", ("v",)),
        (lambda tx: tx.set(KEY, b"\xff"), "SET", (b"\xff",)),
        (lambda tx: tx.set(KEY, ""), "SET", ("",)),
        (lambda tx: tx.set(KEY, 5, ttl=1.5), "SET", ("5", "PX", "1500")),
        (lambda tx: tx.set(KEY, 0.1, ttl=0.001), "SET", ("0.1", "PX", "1")),
        (lambda tx: tx.incrby(KEY), "INCRBY", ("1",)),
        (lambda tx: tx.incrby(KEY, -(2**63)), "INCRBY", ("-9223372036854775808",)),
        (lambda tx: tx.incrby(KEY, 2**63 - 1), "INCRBY", ("9223372036854775807",)),
        (lambda tx: tx.incrbyfloat(KEY, 1.5), "INCRBYFLOAT", ("1.5",)),
        (lambda tx: tx.incrbyfloat(KEY, 2), "INCRBYFLOAT", ("2.0",)),
        (lambda tx: tx.append(KEY, "tail"), "APPEND", ("tail",)),
        (lambda tx: tx.hset(KEY, {"a": 1, "b": b"x"}), "HSET", ("a", "1", "b", b"x")),
        (lambda tx: tx.hdel(KEY, "a", "b"), "HDEL", ("a", "b")),
        (lambda tx: tx.hincrby(KEY, "a"), "HINCRBY", ("a", "1")),
        (lambda tx: tx.hincrby(KEY, "a", -3), "HINCRBY", ("a", "-3")),
        (lambda tx: tx.hincrbyfloat(KEY, "a", 0.5), "HINCRBYFLOAT", ("a", "0.5")),
        (lambda tx: tx.sadd(KEY, "a", 1, 2.5, b"b"), "SADD", ("a", "1", "2.5", b"b")),
        (lambda tx: tx.srem(KEY, "a"), "SREM", ("a",)),
        (lambda tx: tx.zadd(KEY, {"a": 1, "b": 2.5}), "ZADD", ("1.0", "a", "2.5", "b")),
        (lambda tx: tx.zadd(KEY, {"a": math.inf, "b": -math.inf}), "ZADD", ("inf", "a", "-inf", "b")),
        (lambda tx: tx.zincrby(KEY, 1.5, "a"), "ZINCRBY", ("1.5", "a")),
        (lambda tx: tx.zrem(KEY, "a", "b"), "ZREM", ("a", "b")),
        (lambda tx: tx.lpush(KEY, "a", "b"), "LPUSH", ("a", "b")),
        (lambda tx: tx.rpush(KEY, 1), "RPUSH", ("1",)),
        (lambda tx: tx.delete(KEY), "DEL", ()),
        (lambda tx: tx.expire(KEY, 60), "PEXPIRE", ("60000",)),
        (lambda tx: tx.expire(KEY, 1e10), "PEXPIRE", ("10000000000000",)),
    ],
)
def test_commands_in_wire_form(use: Use, command: str, args: tuple[str | bytes, ...]) -> None:
    assert collected(use) == [Effect(KEY, command, args)]


def test_effects_keep_their_order() -> None:
    kept = collected(lambda tx: tx.set(KEY, 1), lambda tx: tx.delete(KEY), lambda tx: tx.incrby(KEY))
    assert [effect.command for effect in kept] == ["SET", "DEL", "INCRBY"]


BAD_VALUES = [True, None, math.nan, [1], {"a": 1}, bytearray(b"x"), object(), "\ud800", 10**5000]
BAD_NUMBERS = ["1", b"1", True, None, math.nan, [1], 1j, 10**400]


@pytest.mark.parametrize(
    "use",
    [
        lambda tx, value: tx.set(KEY, value),
        lambda tx, value: tx.append(KEY, value),
        lambda tx, value: tx.hset(KEY, {"field": value}),
        lambda tx, value: tx.hdel(KEY, "a", value),
        lambda tx, value: tx.hincrby(KEY, value, 1),
        lambda tx, value: tx.sadd(KEY, "a", value),
        lambda tx, value: tx.srem(KEY, value),
        lambda tx, value: tx.zincrby(KEY, 1, value),
        lambda tx, value: tx.zrem(KEY, value),
        lambda tx, value: tx.lpush(KEY, value),
        lambda tx, value: tx.rpush(KEY, "a", value),
    ],
    ids=["set", "append", "hset", "hdel", "hincrby", "sadd", "srem", "zincrby", "zrem", "lpush", "rpush"],
)
@pytest.mark.parametrize("value", BAD_VALUES, ids=lambda value: type(value).__name__)
def test_values_that_redis_can_not_take(use: Callable[[Atomic, Any], None], value: Any) -> None:
    refused("argument|number|surrogates", lambda tx: use(tx, value))


@pytest.mark.parametrize(
    "use",
    [
        lambda tx, number: tx.incrbyfloat(KEY, number),
        lambda tx, number: tx.hincrbyfloat(KEY, "a", number),
        lambda tx, number: tx.zadd(KEY, {"a": 1, "b": number}),
        lambda tx, number: tx.zincrby(KEY, number, "a"),
        lambda tx, number: tx.expire(KEY, number),
        lambda tx, number: tx.set(KEY, 1, ttl=number if number is not None else -1),
        lambda tx, number: tx.incrby(KEY, number),
        lambda tx, number: tx.hincrby(KEY, "a", number),
    ],
    ids=["incrbyfloat", "hincrbyfloat", "zadd", "zincrby", "expire", "ttl", "incrby", "hincrby"],
)
@pytest.mark.parametrize("number", BAD_NUMBERS, ids=lambda number: f"{type(number).__name__} {number!r:.5}")
def test_numbers_that_are_none(use: Callable[[Atomic, Any], None], number: Any) -> None:
    refused("number|increment|time to live", lambda tx: use(tx, number))


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (lambda tx: tx.incrbyfloat(KEY, math.inf), "infinite"),
        (lambda tx: tx.hincrbyfloat(KEY, "a", -math.inf), "infinite"),
        (lambda tx: tx.incrby(KEY, 2**63), "64 bits"),
        (lambda tx: tx.incrby(KEY, -(2**63) - 1), "64 bits"),
        (lambda tx: tx.incrby(KEY, 1.0), "64 bits"),
        (lambda tx: tx.expire(KEY, 0), "time to live"),
        (lambda tx: tx.expire(KEY, -1), "time to live"),
        (lambda tx: tx.expire(KEY, 1e11), "time to live"),
        (lambda tx: tx.set(KEY, 1, ttl=0.0001), "time to live"),
        (lambda tx: tx.hset(KEY, {}), "nothing to write"),
        (lambda tx: tx.zadd(KEY, {}), "nothing to write"),
        (lambda tx: tx.hdel(KEY), "nothing to write"),
        (lambda tx: tx.sadd(KEY), "nothing to write"),
        (lambda tx: tx.srem(KEY), "nothing to write"),
        (lambda tx: tx.zrem(KEY), "nothing to write"),
        (lambda tx: tx.lpush(KEY), "nothing to write"),
        (lambda tx: tx.rpush(KEY), "nothing to write"),
        (lambda tx: tx.hset(KEY, {"\ud800": 1}), "surrogates"),
        (lambda tx: tx.hset(KEY, {None: 1}), "argument"),
        (lambda tx: tx.hset(KEY, [("a", 1)]), "mapping"),
        (lambda tx: tx.zadd(KEY, ["a"]), "mapping"),
        (lambda tx: tx.rpush(KEY, *range(MAX_ARGUMENTS + 1)), "at most 2000 arguments"),
        (lambda tx: tx.hset(KEY, dict.fromkeys(map(str, range(MAX_ARGUMENTS // 2 + 1)), 1)), "at most 2000 arguments"),
    ],
    ids=map(str, range(23)),
)
def test_wrong_arguments(use: Use, why: str) -> None:
    refused(why, use)


def test_as_many_arguments_as_allowed() -> None:
    ((_, _, args, _, _),) = collected(lambda tx: tx.rpush(KEY, *range(MAX_ARGUMENTS)))
    assert len(args) == MAX_ARGUMENTS


@pytest.mark.parametrize("key", [b"{t}:k", None, 5, ["{t}"], bytearray(b"{t}")], ids=repr)
def test_keys_that_are_no_text(key: Any) -> None:
    refused("a key is a str", lambda tx: tx.delete(key))


def test_a_key_that_utf8_can_not_carry() -> None:
    refused("surrogates", lambda tx: tx.delete("{t}\ud800"))


@pytest.mark.parametrize("key", ["k", "{u}:k", "{}t", "t{u}", "", "{t"])
def test_a_key_on_another_slot(key: str) -> None:
    refused(rf"is in slot {key_slot(key.encode())}, this message in {SLOT}: name it with", lambda tx: tx.incrby(key))


@given(st.integers(0, 16383), st.text(st.characters(exclude_categories=["Cs"])))
def test_keys_of_the_slot_and_no_others(slot: int, name: str) -> None:
    key = f"{{{tag_for_slot(slot)}}}{name}"
    if slot == SLOT:
        assert collected(lambda tx: tx.delete(key))
    else:
        refused("is in slot", lambda tx: tx.delete(key))


# -- the block -----------------------------------------------------------------------------------------------


def test_use_before_the_block() -> None:
    with pytest.raises(UsageError, match="inside `async with"):
        Atomic(SLOT, lambda: NOW_MS, list[Effect]().extend).incrby(KEY)


def test_use_after_the_block() -> None:
    kept: list[Effect] = []
    tx = Atomic(SLOT, lambda: NOW_MS, kept.extend)

    async def block() -> None:
        async with tx:
            tx.incrby(KEY)

    anyio.run(block)
    with pytest.raises(UsageError, match="inside `async with"):
        tx.incrby(KEY)
    assert len(kept) == 1


async def failing(tx: Atomic, error: type[BaseException]) -> None:
    async with tx:
        tx.incrby(KEY)
        raise error("by hand")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, UsageError])
def test_an_exception_in_the_block_leaves_nothing(error: type[BaseException]) -> None:
    kept: list[Effect] = []
    tx = Atomic(SLOT, lambda: NOW_MS, kept.extend)

    async def block() -> None:
        with pytest.raises(error, match="by hand"):
            await failing(tx, error)
        async with tx:  # it may be used again
            tx.delete(KEY)

    anyio.run(block)
    assert [effect.command for effect in kept] == ["DEL"]


def test_a_cancelled_block_leaves_nothing() -> None:
    kept: list[Effect] = []

    async def block() -> None:
        with anyio.CancelScope() as scope:
            async with Atomic(SLOT, lambda: NOW_MS, kept.extend) as tx:
                tx.incrby(KEY)
                scope.cancel()
                await anyio.sleep(1)

    anyio.run(block)
    assert kept == []


def test_one_block_inside_itself() -> None:
    kept: list[Effect] = []
    tx = Atomic(SLOT, lambda: NOW_MS, kept.extend)

    async def block() -> None:
        async with tx:
            tx.incrby(KEY)
            async with tx:
                pass

    with pytest.raises(UsageError, match="in use already"):
        anyio.run(block)
    assert kept == []


def test_too_many_effects() -> None:
    kept: list[Effect] = []

    async def block() -> None:
        async with Atomic(SLOT, lambda: NOW_MS, kept.extend) as tx:
            for _ in range(MAX_EFFECTS):
                tx.incrby(KEY)
            with pytest.raises(UsageError, match="at most 1000 effects"):
                tx.incrby(KEY)

    anyio.run(block)
    assert len(kept) == MAX_EFFECTS


# -- sending -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spot:
    slot: int
    stream: str = "{t}:stream"
    meta: str = "{t}:meta"
    bell: str = "{t}:bell"


class Other:
    """A queue whose shard of every key lies on one slot."""

    name = "other"

    def __init__(self, slot: int) -> None:
        self.slot, self.stream = slot, "{t}:stream"

    def place_of(self, key: Key) -> Spot:
        return Spot(self.slot, self.stream)

    async def refresh(self) -> bool:
        return False

    def encode_one(self, key: Key, value: Any, headers: Headers | None, now_ms: int) -> bytes:
        return repr((key, value, headers, now_ms)).encode()


def test_sending_in_wire_form() -> None:
    other = Other(SLOT)
    kept = collected(lambda tx: tx.send(other, 5, key="a", headers={"h": "x"}))
    batch = repr(("a", 5, {"h": "x"}, NOW_MS)).encode()
    assert kept == [Effect("{t}:stream", "SEND", ("{t}:bell", "1", batch), "{t}:meta", (other, "a"))]


def test_sending_to_another_slot() -> None:
    refused(f"key 'a' of queue 'other' is in slot 7, this message in {SLOT}", lambda tx: tx.send(Other(7), 5, key="a"))


def test_what_is_sent_follows_its_key_to_another_shard() -> None:
    other = Other(SLOT)
    (sent,) = collected(lambda tx: tx.send(other, 5, key="a"))
    other.stream = "{t}:child"
    new = redirected(sent, SLOT)
    assert new is not None
    assert (new.key, new.meta, new.args, new.to) == ("{t}:child", "{t}:meta", sent.args, sent.to)
    other.slot = 7
    assert redirected(sent, SLOT) is None, "out of the commit's reach"
    (written,) = collected(lambda tx: tx.delete(KEY))
    assert redirected(written, SLOT) is None


# -- of a message --------------------------------------------------------------------------------------------


class Owner(Ownership):
    def local_key(self, name: str) -> str:
        return f"{{t}}:{name}"

    def now_ms(self) -> int:
        return NOW_MS


def test_blocks_of_one_message_add_up() -> None:
    owner = Owner("q", "g", 0, 1, "n", SLOT)
    one, other = (Message("k", 1, None, 0, index, Batch(owner, "7-0", 2)) for index in range(2))

    async def blocks() -> None:
        for amount in (1, 2):
            async with one.atomic() as tx:
                tx.incrby(one.local_key("total"), amount)
        async with other.atomic():
            pass
        with pytest.raises(ValueError, match="by hand"):
            await failing(other.atomic(), ValueError)

    anyio.run(blocks)
    assert owner.effects == {one.id: [Effect("{t}:total", "INCRBY", (amount,)) for amount in "12"]}


def test_two_blocks_of_one_message_at_once() -> None:
    owner = Owner("q", "g", 0, 1, "n", SLOT)
    message = Message("k", 1, None, 0, 0, Batch(owner, "7-0", 1))

    async def blocks() -> None:
        async with message.atomic() as outer, message.atomic() as inner:
            outer.incrby(message.local_key("outer"))
            inner.incrby(message.local_key("inner"))

    anyio.run(blocks)
    assert [effect.key for effect in owner.effects[message.id]] == ["{t}:inner", "{t}:outer"]
