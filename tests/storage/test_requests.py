"""Calls whose reply is taken as it comes: by whom, in which order, and when it is not."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio.lowlevel
import pytest

from shardq.errors import CorruptData
from shardq.storage.commands import Packed
from shardq.storage.requests import TakenCall

pytestmark = pytest.mark.anyio


class Waiter:
    """A task that waits for a call, and what happened, in order."""

    def __init__(self) -> None:
        self.happened: list[Any] = []
        self.call = TakenCall(0, Packed(b""), float("inf"), self.take)
        self.task = asyncio.get_running_loop().create_task(self.wait())

    def take(self, reply: Any) -> Any:
        self.happened.append(f"taken {reply}")
        asyncio.get_running_loop().call_soon(self.happened.append, "woken by what was taken")
        if reply == "broken":
            raise CorruptData(reply)
        return reply.upper()

    async def wait(self) -> Any:
        answered = await self.call.wait()
        self.happened.append(f"waited: {answered}")
        return self.call.outcome() if answered else None


async def test_what_is_taken_comes_before_whoever_waits() -> None:
    waiter = Waiter()
    await anyio.lowlevel.checkpoint()
    waiter.call.settle("ok")
    assert waiter.happened == ["taken ok"]
    assert await waiter.task == "OK"
    assert waiter.happened == ["taken ok", "woken by what was taken", "waited: True"]


async def test_what_taking_raises_is_raised_to_whoever_waits() -> None:
    waiter = Waiter()
    await anyio.lowlevel.checkpoint()
    waiter.call.settle("broken")
    with pytest.raises(CorruptData, match="broken"):
        await waiter.task


async def test_nothing_is_taken_for_a_task_that_was_cancelled() -> None:
    waiter = Waiter()
    await anyio.lowlevel.checkpoint()
    waiter.task.cancel()
    waiter.call.settle("late")
    with pytest.raises(asyncio.CancelledError):
        await waiter.task
    assert waiter.happened == []


async def test_nothing_is_taken_of_an_answer_that_came_too_late() -> None:
    waiter = Waiter()
    await anyio.lowlevel.checkpoint()
    waiter.call.expire()
    waiter.call.settle("late")
    assert await waiter.task is None
    assert waiter.happened == ["waited: False"]
