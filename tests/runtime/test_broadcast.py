"""Broadcasts to those who listen: channels, patterns, values, slow readers, bad input, and nothing left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest

import shardq
from shardq import Missed, Notice
from shardq.core.notices import Arrived, decode, encode
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.commands import pack_command
from shardq.storage.keys import CastNames
from shardq.storage.nodes import node_command
from tests.runtime.harness import until
from tests.runtime.listening import by_node, connections, read, read_until, subscribers

pytestmark = pytest.mark.anyio

HOST = "127.0.0.1"
DEADLINE_S = 30.0


# -- what comes ---------------------------------------------------------------------------------------------


async def test_channels_on_several_nodes(cluster: LocalCluster, queue_name: str) -> None:
    channels = list(by_node(cluster, queue_name).values())
    async with shardq.connect(cluster.url) as client, client.listen(*channels) as notices:
        assert notices.complete
        for number in range(30):
            for channel in channels:
                await client.broadcast(channel, number)
        came = await read(notices, 90)
        for channel in channels:
            assert [item for item in came if isinstance(item, Notice) and item.channel == channel] == [
                Notice(channel, number) for number in range(30)
            ]


async def test_only_what_is_listened_to_comes(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client, client.listen(f"{queue_name}-a") as notices:
        for channel in ("b", "a2", "A", "a"):
            await client.broadcast(f"{queue_name}-{channel}", channel)
        assert await read(notices, 1) == [Notice(f"{queue_name}-a", "a")]


async def test_two_prefixes_are_two_worlds(cluster: LocalCluster, queue_name: str) -> None:
    async with (
        shardq.connect(cluster.url, prefix="one") as one,
        shardq.connect(cluster.url, prefix="one-more") as more,
        one.listen(queue_name, patterns=["*"]) as notices,
    ):
        await more.broadcast(queue_name, "more")
        await more.broadcast(f"{queue_name}-x", "more")
        await one.broadcast(queue_name, "one")
        assert await read(notices, 1) == [Notice(queue_name, "one")]


class Price(msgspec.Struct):
    cents: int


@pytest.mark.parametrize(
    ("value", "comes"),
    [
        (b"\x00\xff", b"\x00\xff"),
        ("été", "été"),
        (None, None),
        ({"a": [1, 2.5, None, b"x"]}, {"a": [1, 2.5, None, b"x"]}),
        (Price(5), {"cents": 5}),
        ("x" * 1024 * 1024, "x" * 1024 * 1024),
        ("", ""),
    ],
    ids=["bytes", "str", "none", "nested", "struct", "largest", "empty"],
)
async def test_values(cluster: LocalCluster, queue_name: str, value: Any, comes: Any) -> None:
    async with (
        shardq.connect(cluster.url) as client,
        client.listen(queue_name) as exact,
        client.listen(patterns=[f"{queue_name}*"]) as matched,
    ):
        await client.broadcast(queue_name, value)
        assert await read(exact, 1) == await read(matched, 1) == [Notice(queue_name, comes)]


@pytest.mark.parametrize("odd", ["{", "}", "{}", "a{b}c", "}{", "user:42 *?[", "\\", "x" * 200, "印刷"])
async def test_any_printable_channel(cluster: LocalCluster, queue_name: str, odd: str) -> None:
    channel = f"{odd}{queue_name}"
    async with (
        shardq.connect(cluster.url) as client,
        client.listen(channel) as exact,
        client.listen(patterns=[f"*{queue_name}"]) as matched,
    ):
        await client.broadcast(channel, 1)
        assert await read(exact, 1) == await read(matched, 1) == [Notice(channel, 1)]


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("*-user:*", ["user:1", "user:"], ["users", "user"]),
        ("*-a?", ["ab", "a{"], ["a", "abc"]),
        ("*-[ab]", ["a", "b"], ["c", "[ab]"]),
        ("*-[^a]", ["b"], ["a"]),
        ("*-\\*", ["*"], ["x"]),
        ("*-{[ab", ["{a", "{b"], ["{c"]),
        ("*-x", ["x"], ["x}"]),
    ],
)
async def test_patterns(
    cluster: LocalCluster, queue_name: str, pattern: str, matching: list[str], others: list[str]
) -> None:
    async with (
        shardq.connect(cluster.url) as client,
        client.listen(patterns=[pattern.replace("*", queue_name, 1)]) as notices,
    ):
        # Several times, as notices of two channels come by different nodes, in whatever order.
        for _ in range(5):
            for end in [*others, *matching]:
                await client.broadcast(f"{queue_name}-{end}", end)
        came = await read(notices, 5 * len(matching))
        assert {item.channel for item in came if isinstance(item, Notice)} == {
            f"{queue_name}-{end}" for end in matching
        }


async def test_a_notice_comes_once_however_often_it_is_matched(cluster: LocalCluster, queue_name: str) -> None:
    async with (
        shardq.connect(cluster.url) as client,
        client.listen(
            queue_name, queue_name, patterns=[f"{queue_name}*", f"*{queue_name}", f"*{queue_name}*"]
        ) as notices,
    ):
        for number in range(50):
            await client.broadcast(queue_name, number)
            await client.broadcast(f"x{queue_name}y", number)
        for channel in (queue_name, f"x{queue_name}y"):
            await client.broadcast(channel, "last")
        ends = {queue_name, f"x{queue_name}y"}
        came: list[Any] = []
        while ends:
            came += await read_until(notices, lambda item: isinstance(item, Notice) and item.value == "last")
            ends.discard(came[-1].channel)
        for channel in (queue_name, f"x{queue_name}y"):
            assert [item.value for item in came if item.channel == channel] == [*range(50), "last"]


async def test_listeners_are_independent(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client, client.listen(queue_name) as first:
        async with client.listen(queue_name) as second:
            await client.broadcast(queue_name, 1)
            assert await read(second, 1) == [Notice(queue_name, 1)]
        await client.broadcast(queue_name, 2)
        assert await read(first, 2) == [Notice(queue_name, 1), Notice(queue_name, 2)]
        with pytest.raises(StopAsyncIteration):
            await anext(second)


async def test_blocks_may_be_left_in_any_order(cluster: LocalCluster, queue_name: str) -> None:
    """And by another task than the one that entered, as fixtures do."""
    async with shardq.connect(cluster.url) as client:
        first, second = client.listen(queue_name), client.listen(queue_name)
        await first.__aenter__()
        await second.__aenter__()
        await asyncio.create_task(first.__aexit__(None, None, None))
        await client.broadcast(queue_name, 1)
        assert await read(second, 1) == [Notice(queue_name, 1)]
        await asyncio.create_task(second.__aexit__(None, None, None))


async def test_nobody_has_to_listen(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        await client.broadcast(queue_name, 1)
        async with client.listen(queue_name) as notices:
            await client.broadcast(queue_name, 2)
            assert await read(notices, 1) == [Notice(queue_name, 2)], "what came before is not stored"


# -- slow and broken ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_pattern", [False, True])
async def test_a_slow_listener_is_told_what_it_lost(cluster: LocalCluster, queue_name: str, by_pattern: bool) -> None:
    channels, patterns = ([], [f"{queue_name}*"]) if by_pattern else ([queue_name], [])
    async with (
        shardq.connect(cluster.url) as client,
        client.listen(*channels, patterns=patterns, buffer=10) as notices,
        client.listen(queue_name) as quick,
    ):
        for number in range(100):
            await client.broadcast(queue_name, number)
        await read(quick, 100)
        # It has a connection of its own, a pattern maybe to another node. Full is not enough: what comes while it is
        # read already takes the place of what was read, and so as many more than `buffer` come out of it.
        await until(lambda: newest(notices) == 99, DEADLINE_S, "the last one to have come")
        items = await read_until(notices, lambda item: item == Notice(queue_name, 99))
        assert items == [
            Missed(tuple(channels or patterns), 90),
            *(Notice(queue_name, number) for number in range(90, 100)),
        ], "what was dropped is told where it stood, and `buffer` are left"


def newest(notices: shardq.Notices) -> Any:
    """The value of the last notice that came and was not read."""
    items = notices._buffer._items
    return decode(items[-1].frame) if items and isinstance(items[-1], Arrived) else None


async def test_large_notices_do_not_fill_the_memory(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardq.runtime.broadcast.MAX_BUFFERED_BYTES", 1_000_000)
    async with (
        shardq.connect(cluster.url) as client,
        client.listen(queue_name) as notices,
        client.listen(queue_name) as quick,
    ):
        for number in range(20):
            await client.broadcast(queue_name, bytes([number]) * 300_000)
            await read(quick, 1)
        items = await read_until(notices, lambda item: isinstance(item, Notice) and item.value[0] == 19)
        assert isinstance(items[0], Missed)
        assert sum(item.dropped for item in items if isinstance(item, Missed)) >= 16


async def test_bytes_that_are_no_notice_are_a_gap(cluster: LocalCluster, queue_name: str) -> None:
    names = CastNames("shardq")
    newer = b"\x02" + encode(b"i" * 16, "x")[1:]
    async with (
        shardq.connect(cluster.url) as client,
        client.listen(queue_name, patterns=[f"x{queue_name}"]) as notices,
    ):
        for data in (b"", b"garbage", newer):
            await client.pipes.command(
                names.exact_slot(queue_name), pack_command("SPUBLISH", names.exact(queue_name), data)
            )
        await client.broadcast(queue_name, "sound")
        assert await read(notices, 4) == [Missed((queue_name,), 1)] * 3 + [Notice(queue_name, "sound")]
        await client.pipes.command(0, pack_command("PUBLISH", names.ordinary(f"x{queue_name}"), b"\xff"))
        assert await read(notices, 1) == [Missed((f"x{queue_name}",), 1)]


async def test_a_full_buffer_starves_nobody(cluster: LocalCluster, queue_name: str) -> None:
    """A loop over notices that are all there already lets the others run."""
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1

    async with shardq.connect(cluster.url) as client, client.listen(queue_name, buffer=2000) as notices:
        async with anyio.create_task_group() as tasks:
            for number in range(1000):
                tasks.start_soon(client.broadcast, queue_name, number)
        await until(lambda: notices._buffer._notices == 1000, DEADLINE_S, "all notices to be in the buffer")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count_turns)
            await anyio.lowlevel.checkpoint()
            before = turns
            for _ in range(1000):
                await anext(notices)
            assert turns - before >= 10
            tasks.cancel_scope.cancel()


# -- bad input ----------------------------------------------------------------------------------------------

BAD_CHANNELS = ["", "x" * 257, "a\nb", "\x00", "\ud800", b"bytes", None, 7]


@pytest.mark.parametrize("channel", BAD_CHANNELS)
async def test_bad_channels(cluster: LocalCluster, channel: Any) -> None:
    async with shardq.connect(cluster.url) as client:
        with pytest.raises(shardq.UsageError, match=r"channel .* is not valid"):
            await client.broadcast(channel, 1)
        with pytest.raises(shardq.UsageError, match=r"channel .* is not valid"):
            client.listen("fine", channel)
        with pytest.raises(shardq.UsageError, match=r"pattern .* is not valid"):
            client.listen(patterns=["fine*", channel])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "nothing to listen to"),
        ({"patterns": "user:*"}, "patterns is a list"),
        ({"patterns": None}, "patterns is a list"),
        ({"patterns": ["a"], "buffer": 0}, "buffer must be"),
        ({"patterns": ["a"], "buffer": "many"}, "buffer must be"),
        ({"patterns": ["a"], "timeout": -1}, "timeout must be"),
        ({"patterns": ["a"], "timeout": float("nan")}, "timeout must be"),
    ],
)
async def test_bad_arguments(cluster: LocalCluster, arguments: dict[str, Any], words: str) -> None:
    async with shardq.connect(cluster.url) as client:
        with pytest.raises(shardq.UsageError, match=words):
            client.listen(**arguments)


async def test_bad_values(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        with pytest.raises(shardq.InvalidValue):
            await client.broadcast(queue_name, object())
        with pytest.raises(shardq.InvalidValue):
            await client.broadcast(queue_name, "\ud800")
        with pytest.raises(shardq.MessageTooLarge, match="at most 1048576"):
            await client.broadcast(queue_name, b"x" * (1024 * 1024 + 1))


async def test_a_client_that_is_not_open(cluster: LocalCluster) -> None:
    client = shardq.connect(cluster.url)
    with pytest.raises(shardq.ClosedError, match="not open"):
        await client.broadcast("a", 1)
    with pytest.raises(shardq.ClosedError, match="not open"):
        async with client.listen("a"):
            raise AssertionError("entered")


async def test_notices_are_entered_once_and_first(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        notices = client.listen(queue_name)
        with pytest.raises(shardq.ClosedError, match="enter it first"):
            await anext(notices)
        async with notices:
            with pytest.raises(shardq.ClosedError, match=r"call client.listen\(...\) again"):
                await notices.__aenter__()
        with pytest.raises(shardq.ClosedError, match=r"call client.listen\(...\) again"):
            await notices.__aenter__()


# -- nothing left behind ------------------------------------------------------------------------------------


async def gone(cluster: LocalCluster, before: int) -> None:
    await until(lambda: subscribers(cluster) == before, DEADLINE_S, "the connections to be closed")


async def test_leaving_ends_the_iteration_of_others(cluster: LocalCluster, queue_name: str) -> None:
    ended: list[bool] = []

    async def iterate(notices: shardq.Notices) -> None:
        async for _ in notices:
            pass
        ended.append(True)

    before = subscribers(cluster)
    async with shardq.connect(cluster.url) as client, anyio.create_task_group() as tasks:
        async with client.listen(queue_name, patterns=[f"{queue_name}?"]) as notices:
            for _ in range(3):
                tasks.start_soon(iterate, notices)
            await client.broadcast(queue_name, 1)
            assert subscribers(cluster) > before
        assert not notices.complete
        await until(lambda: len(ended) == 3, DEADLINE_S, "every iteration to end")
        await gone(cluster, before)


async def test_closing_the_client_ends_its_listeners(cluster: LocalCluster, queue_name: str) -> None:
    before = subscribers(cluster)
    client = shardq.connect(cluster.url)
    async with client:
        notices = client.listen(queue_name, patterns=[f"{queue_name}?"])
        await notices.__aenter__()
        await client.broadcast(queue_name, 1)
        await until(lambda: notices._buffer._notices == 1, DEADLINE_S, "the notice")
    assert await read(notices, 1) == [Notice(queue_name, 1)]
    with pytest.raises(shardq.ClosedError, match="client was closed"):
        await anext(notices)
    assert not notices.complete
    await notices.__aexit__(None, None, None)
    await gone(cluster, before)


async def test_an_error_in_the_block_comes_out_as_it_is(cluster: LocalCluster, queue_name: str) -> None:
    before = subscribers(cluster)
    async with shardq.connect(cluster.url) as client:
        with pytest.raises(ZeroDivisionError):
            async with client.listen(queue_name):
                raise ZeroDivisionError
        await gone(cluster, before)


async def test_cancellation_at_every_point_leaves_nothing(cluster: LocalCluster, queue_name: str) -> None:
    """Cancelled after so many turns of the event loop: while connecting, subscribing, iterating, leaving."""
    before, connections_before = subscribers(cluster), connections(cluster)
    entered = 0

    async def listen(client: shardq.Client) -> None:
        nonlocal entered
        async with client.listen(queue_name, f"{queue_name}-2", patterns=[f"{queue_name}?"]) as notices:
            entered += 1
            async for _ in notices:
                pass

    async with shardq.connect(cluster.url) as client:
        await client.broadcast(queue_name, 0)
        tasks_before = len(asyncio.all_tasks())
        for turns in range(60):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listen, client)
                for _ in range(turns):
                    await anyio.lowlevel.checkpoint()
                if turns % 10 == 9:
                    await anyio.sleep(0.05)
                    await client.broadcast(queue_name, 1)
                tasks.cancel_scope.cancel()
        assert entered, "none came as far as iterating"
        await until(lambda: len(asyncio.all_tasks()) <= tasks_before, DEADLINE_S, "every task to end")
        await gone(cluster, before)
        async with client.listen(queue_name) as notices:
            await client.broadcast(queue_name, "usable")
            assert await read(notices, 1) == [Notice(queue_name, "usable")]
    await gone(cluster, before)
    await until(lambda: connections(cluster) <= connections_before, DEADLINE_S, "all connections to be closed")


async def test_a_cancelled_wait_loses_no_notice(cluster: LocalCluster, queue_name: str) -> None:
    cancelled = sent = 0
    came: list[Any] = []

    def proves() -> bool:
        """How many waits are cut short, and how many notices come in between, is up to the machine."""
        return sent >= 300 and cancelled > 10 and len(came) > 10

    async def cancel_after(turns: int, scope: anyio.CancelScope) -> None:
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
        scope.cancel()

    async with shardq.connect(cluster.url) as client, client.listen(queue_name) as notices:
        async with anyio.create_task_group() as tasks:
            while not proves() and sent < 10_000:
                tasks.start_soon(client.broadcast, queue_name, sent)
                with anyio.CancelScope() as scope:
                    tasks.start_soon(cancel_after, sent % 6, scope)
                    came.append(await anext(notices))
                cancelled += scope.cancelled_caught
                sent += 1
        assert proves(), "too few waits were cut short, or notices came in between, to prove anything"
        await client.broadcast(queue_name, -1)
        came += await read_until(notices, lambda item: item == Notice(queue_name, -1))
        assert sorted(item.value for item in came) == [-1, *range(sent)]


async def test_a_user_without_the_channel_is_refused(cluster: LocalCluster, queue_name: str) -> None:
    def on_every_node(*command: str) -> None:
        for port in cluster.ports:
            node_command(HOST, port, *command)

    on_every_node("ACL", "SETUSER", queue_name, "on", ">secret", "~*", "resetchannels", "&shardq:cast:*", "+@all")
    url = cluster.url.replace("redis://", f"redis://{queue_name}:secret@")
    before = subscribers(cluster)
    try:
        async with shardq.connect(url) as client:
            with pytest.raises(shardq.StoreRefused, match=HOST):
                async with client.listen(patterns=[queue_name]):
                    raise AssertionError("entered")
            async with client.listen(queue_name) as notices:
                with pytest.raises(shardq.StoreRefused, match=HOST):
                    await client.broadcast(queue_name, 1)
                assert await read(notices, 1) == [Notice(queue_name, 1)], "the half that was allowed"
                on_every_node("ACL", "SETUSER", queue_name, "resetchannels")
                with pytest.raises(shardq.StoreRefused, match=HOST):
                    await read(notices, 1)
        await gone(cluster, before)
    finally:
        on_every_node("ACL", "DELUSER", queue_name)
