"""Whose turn it is among the keys of a shard, with a clock of the test's own; and the waker of the loop that commits.
No server.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import anyio
import anyio.lowlevel
import pytest

from shardq.core.intake import build_messages
from shardq.core.lease import Trust
from shardq.core.message import Batch, Message
from shardq.core.records import RecordBatch
from shardq.runtime import message_runners, runners
from shardq.runtime.message_runners import MessageRunners
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.shard import OwnedShard
from shardq.runtime.waker import Signal, Waker
from shardq.storage.keys import ShardKeys

pytestmark = pytest.mark.anyio


class Rig:
    """One shard and one runner; `handled` are the values of the messages in the order their handlers began."""

    now_s = 100.0
    turns = 0  # of the event loop

    def __init__(
        self, keys: str, handler: Callable[[Message], Awaitable[Any]] | None = None, took_s: float = 0
    ) -> None:
        self.handled: list[str] = []
        self.took_s, self.handler = took_s, handler
        self.runners = MessageRunners(WorkerSettings(concurrency=1), self.handle)
        self.shard = OwnedShard(
            "q",
            "g",
            0,
            1,
            "n",
            keys=cast("ShardKeys", SimpleNamespace(slot=1)),
            step=0,
            trust=Trust(5000.0, self.now_s),
            ready=self.runners.ready,
            by_key=True,
        )
        values = [f"{key}{keys[:place].count(key)}" for place, key in enumerate(keys)]
        batch = Batch(self.shard, "1-0", len(keys))
        self.shard.hand.entries["1-0"] = batch
        self.shard.hand.outstanding = len(keys)
        self.messages = build_messages(RecordBatch(1, None, list(keys), values, None), batch)

    async def handle(self, message: Message) -> None:
        self.handled.append(message.value)
        self.now_s += self.took_s
        if self.handler is not None:
            await self.handler(message)

    async def run(self, monkeypatch: pytest.MonkeyPatch) -> str:
        for module in (runners, message_runners):
            monkeypatch.setattr(module, "monotonic", lambda: self.now_s)
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                self.runners.start(tasks)
                self.runners.deliver(self.shard, [self.messages])
                while self.shard.hand.outstanding:
                    self.turns += 1
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
        assert self.shard.running == 0
        return " ".join(self.handled)


async def test_what_follows_in_a_key_goes_on_while_handlers_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await Rig("abaab").run(monkeypatch) == "a0 a1 a2 b0 b1"


async def test_keys_take_turns_when_handlers_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig("aaabbc", took_s=2 * message_runners.YIELD_AFTER_S)
    assert await rig.run(monkeypatch) == "a0 b0 c0 a1 b1 a2"


async def test_a_key_with_much_to_do_gives_way_after_its_share_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig("a" * 50 + "b", took_s=message_runners.YIELD_AFTER_S / 4)
    order = (await rig.run(monkeypatch)).split()
    assert order.index("b0") in range(1, 8)
    assert [value for value in order if value != "b0"] == [f"a{number}" for number in range(50)]


async def test_a_runner_that_is_interrupted_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupt(message: Message) -> None:
        if message.value == "a0":
            rig.runners.interrupt(rig.shard)

    rig = Rig("aab", interrupt)
    assert await rig.run(monkeypatch) == "a0 a1 b0"


async def test_what_follows_in_a_shard_that_is_lost_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lose(message: Message) -> None:
        rig.shard.lose()
        rig.shard.hand.outstanding = 0

    rig = Rig("aab", lose)
    assert await rig.run(monkeypatch) == "a0"


async def test_what_follows_in_a_shard_that_is_handed_over_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async def drain(message: Message) -> None:
        rig.shard.drain()
        rig.shard.hand.outstanding = 1  # which `run` waits for

    rig = Rig("aab", drain)
    assert await rig.run(monkeypatch) == "a0"


async def test_a_message_that_was_deleted_meanwhile_is_finished_unhandled(monkeypatch: pytest.MonkeyPatch) -> None:
    async def delete(message: Message) -> None:
        rig.shard.set_marks(b"1", frozenset({("1-0", 1), ("1-0", 2)}))

    rig = Rig("aabb", delete)
    assert await rig.run(monkeypatch) == "a0 b1"
    assert rig.shard.hand.acked == 4


async def test_trust_that_ends_in_a_turn_stops_the_next_message(monkeypatch: pytest.MonkeyPatch) -> None:
    async def settle(message: Message) -> None:
        if message.value == "a1":
            rig.shard.hand.outstanding = 1  # which `run` waits for

    monkeypatch.setattr(message_runners, "YIELD_AFTER_S", 1e9)
    rig = Rig("aaabb", settle, took_s=3000.0)  # the lease is trusted for 4,500 s
    assert await rig.run(monkeypatch) == "a0 a1"
    assert [message.value for message in rig.shard.suspended] == ["a2", "b0"]


async def test_what_is_ready_of_another_shard_is_handled_as_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, other = Rig("ab"), Rig("cd")
    for message in other.messages:
        message.batch.owner = other.shard
    other.shard.ready = rig.runners.ready
    assert rig.runners.ready is not None
    rig.runners.ready.extend(other.messages)
    other.shard.drain()
    assert await rig.run(monkeypatch) == "a0 b0"
    assert (rig.shard.hand.acked, other.shard.hand.acked) == (2, 0)


async def test_as_many_runners_are_woken_as_messages_come(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig("abc")
    for module in (runners, message_runners):
        monkeypatch.setattr(module, "monotonic", lambda: rig.now_s)
    rig.runners = MessageRunners(WorkerSettings(concurrency=8), rig.handle)
    assert rig.shard.lanes is not None
    assert rig.runners.ready is not None
    rig.shard.lanes.ready = rig.runners.ready
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            rig.runners.start(tasks)
            while len(rig.runners._idle) < 8:
                await anyio.lowlevel.checkpoint()
            for message in rig.messages:  # all in one turn of the loop: the one before waits still for its runner
                rig.runners.deliver(rig.shard, [[message]])
            assert len(rig.runners._idle) == 5
            while rig.shard.hand.outstanding:
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
    assert rig.handled == ["a0", "b0", "c0"]


async def test_a_waker_ends_a_wait_once_and_at_its_time() -> None:
    waker = Waker()
    waker.set()  # nobody waits: not kept
    with anyio.fail_after(30):
        await waker.wait(0.01)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(waker.wait)
            await anyio.lowlevel.checkpoint()
            waker.set()
            waker.set()
    with anyio.move_on_after(0.01) as limit:
        await waker.wait()
    assert limit.cancelled_caught
    waker.set()


async def test_a_signal_keeps_what_came_before_the_wait() -> None:
    signal = Signal()
    with anyio.fail_after(30):
        signal.set()
        await signal.wait()
        await signal.wait()
        signal.clear()
        await signal.wait(0.01)
        signal.clear()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(signal.wait)
            await anyio.lowlevel.checkpoint()
            signal.set()
    signal.clear()
    with anyio.move_on_after(0.01) as limit:
        await signal.wait()
    assert limit.cancelled_caught


async def test_whoever_is_woken_handles_something_however_long_a_turn_of_the_loop_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = "".join(chr(ord("a") + place) for place in range(24)) * 4
    rig = Rig(keys, took_s=2 * message_runners.YIELD_AFTER_S)
    rig.runners = MessageRunners(WorkerSettings(concurrency=8), rig.handle)
    rig.shard.ready = rig.runners.ready
    assert rig.shard.lanes is not None
    assert rig.runners.ready is not None
    rig.shard.lanes.ready = rig.runners.ready
    handled = (await rig.run(monkeypatch)).split()
    assert len(handled) == len(keys)
    assert rig.turns <= 2 * len(keys) / 8  # it took turns of 16 times the share of time: 8 messages in each
