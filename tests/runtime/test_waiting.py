"""What the senders of one batch wait on: who is woken, when, and what a cancellation does to the others. No server."""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import sys
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from shardq.errors import StoreTimeout
from shardq.runtime.waiting import Waiting
from shardq.storage.requests import Request
from tests.benchmarks.counts import instant_producer

pytestmark = pytest.mark.anyio


class Ends:
    """Something that many wait for."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()
        woken.set_result(None)
        self.waiting = Waiting(loop, woken)
        self.over = False
        self.order: list[int] = []

    async def wait(self, number: int) -> None:
        while not self.over:
            await self.waiting
        self.order.append(number)

    def end(self) -> None:
        self.over = True
        self.waiting.wake()


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_all_who_wait_go_on_in_order_and_in_their_own_context() -> None:
    ends, named = Ends(), contextvars.ContextVar("named", default=-1)
    seen: list[int] = []

    async def wait(number: int) -> None:
        named.set(number)
        await ends.wait(number)
        seen.append(named.get())

    tasks = [asyncio.create_task(wait(number)) for number in range(5)]
    await turns()
    ends.end()
    await asyncio.gather(*tasks)
    assert ends.order == seen == [0, 1, 2, 3, 4]


async def test_all_go_on_in_one_turn_of_the_loop() -> None:
    ends = Ends()
    tasks = [asyncio.create_task(ends.wait(number)) for number in range(100)]
    await turns()
    ends.end()
    assert not ends.order  # never inside the step of whoever ends it
    await asyncio.sleep(0)
    assert len(ends.order) == 100
    await asyncio.gather(*tasks)


async def test_who_is_cancelled_ends_at_once_and_the_others_wait_on() -> None:
    ends = Ends()
    tasks = [asyncio.create_task(ends.wait(number)) for number in range(5)]
    await turns()
    tasks[2].cancel()
    tasks[3].cancel()
    await turns()
    assert [task.done() for task in tasks] == [False, False, True, True, False]
    assert tasks[2].cancelled()
    assert tasks[3].cancelled()
    ends.end()
    await asyncio.gather(tasks[0], tasks[1], tasks[4])
    assert sorted(ends.order) == [0, 1, 4]


async def test_a_time_limit_ends_a_wait() -> None:
    ends = Ends()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(ends.wait(0), 0.01)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await ends.wait(0)
    assert not ends.order


async def test_who_was_cancelled_before_it_waits_does_not_wait() -> None:
    ends = Ends()

    async def wait() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await ends.wait(0)

    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(wait(), 30)


async def test_what_one_step_raises_leaves_the_others_to_the_next_turn() -> None:
    ends, stepped = Ends(), []

    def broken(_: Any) -> None:
        raise KeyboardInterrupt

    for step in (lambda _: stepped.append(1), broken, lambda _: stepped.append(2), lambda _: stepped.append(3)):
        ends.waiting.add_done_callback(step, context=contextvars.copy_context())
    with pytest.raises(KeyboardInterrupt):
        ends.waiting._step_all()
    assert stepped == [1]
    await turns()
    assert stepped == [1, 2, 3]


async def test_another_loop_may_not_wait() -> None:
    ends = Ends()

    async def wait() -> None:
        await ends.wait(0)

    with pytest.raises(RuntimeError, match="different loop"):
        await asyncio.to_thread(asyncio.run, wait())


async def unanswered(count: int) -> tuple[list[asyncio.Task[str]], list[Request]]:
    """So many sends of one batch, and the requests that nobody answers."""
    rig = instant_producer(1)
    held: list[Request] = []
    pipes: Any = rig.producer._pipes
    pipes.submit = held.append
    sends = [asyncio.create_task(rig.producer.send(b"", key="k")) for _ in range(count)]
    await turns()
    return sends, held


async def test_a_cancelled_send_leaves_the_others_of_its_batch_waiting() -> None:
    sends, held = await unanswered(4)
    sends[1].cancel()
    await turns()
    assert [send.done() for send in sends] == [False, True, False, False]
    (request,) = held
    request.pack()
    request.settle([b"OK", b"7-0"])
    assert [await sends[place] for place in (0, 2, 3)] == ["0/7-0/0", "0/7-0/2", "0/7-0/3"]


async def test_every_send_of_a_batch_that_is_given_up_raises() -> None:
    sends, held = await unanswered(3)
    held[0].fail(StoreTimeout("late"))
    ended = await asyncio.gather(*sends, return_exceptions=True)
    assert [type(error) for error in ended] == [StoreTimeout] * 3


async def test_a_group_that_is_cancelled_cancels_all_who_wait_in_it() -> None:
    ends = Ends()
    outside = asyncio.create_task(ends.wait(9))
    with anyio.move_on_after(0.01) as limit:
        async with anyio.create_task_group() as tasks:
            for number in range(5):
                tasks.start_soon(ends.wait, number)
    assert limit.cancelled_caught
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ends.wait, 5)
            await turns()
            tasks.cancel_scope.cancel()
    assert not ends.order
    assert not ends.waiting._steps[1:], "who was cancelled is forgotten"
    ends.end()
    await outside
    assert ends.order == [9]


def plain_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """asyncio's tasks as they are where its C module is not."""
    tasks: Any = asyncio.tasks
    loop.set_task_factory(lambda loop, coro, **more: tasks._PyTask(coro, loop=loop, **more))


def eager_tasks(loop: asyncio.AbstractEventLoop) -> None:
    # Not asyncio.eager_task_factory: that of Python 3.13.0 does not take what uvloop hands to it.
    task: Any = asyncio.Task
    loop.set_task_factory(lambda loop, coro, **more: task(coro, loop=loop, **{**more, "eager_start": True}))


KINDS = [None, plain_tasks, *([eager_tasks] if sys.version_info >= (3, 12) else [])]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("debug", [False, True])
def test_every_kind_of_task_can_wait(
    loop: str, kind: Callable[[asyncio.AbstractEventLoop], None] | None, debug: bool
) -> None:
    async def wait() -> None:
        if kind is not None:
            kind(asyncio.get_running_loop())
        ends = Ends()
        tasks = [asyncio.create_task(ends.wait(number)) for number in range(4)]
        await turns()
        tasks[1].cancel()
        await turns()
        assert [task.done() for task in tasks] == [False, True, False, False]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await ends.wait(4)
        ends.end()
        await asyncio.gather(tasks[0], tasks[2], tasks[3])
        assert sorted(ends.order) == [0, 2, 3]

    factory = None if loop == "asyncio" else importlib.import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory, debug=debug) as runner:
        runner.run(wait())
