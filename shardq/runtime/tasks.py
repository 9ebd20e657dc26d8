"""Task groups: one that lets its one error out as itself, one that outlives a cancelled block. Decides nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from shardq.errors import ShardqError


@contextmanager
def one_error() -> Iterator[None]:
    """When all that failed inside are ShardqErrors, the first of them is raised, not a group of groups of them."""
    try:
        yield
    except BaseExceptionGroup as group:
        leaves = list(_leaves(group))
        if all(isinstance(leaf, ShardqError) for leaf in leaves):
            raise leaves[0] from leaves[0].__cause__
        raise


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


@asynccontextmanager
async def task_group() -> AsyncIterator[TaskGroup]:
    """Like anyio's, within `one_error`."""
    with one_error():
        async with anyio.create_task_group() as tasks:
            yield tasks


@asynccontextmanager
async def outliving_tasks() -> AsyncIterator[TaskGroup]:
    """Its tasks go on until the block has ended, also when the block is cancelled from outside.

    A plain task group would be cancelled together with its block, and a goodbye in the block's `finally`, shielded or
    not, would find no task left to send it.
    """
    async with anyio.create_task_group() as outside:
        async with anyio.create_task_group() as tasks:
            tasks.cancel_scope.shield = True
            with anyio.CancelScope() as block:
                outside.start_soon(_pass_on, block)
                yield tasks
            tasks.cancel_scope.cancel()
        outside.cancel_scope.cancel()
    # The caller's own cancellation was heard inside; it goes on from here.
    await anyio.lowlevel.checkpoint_if_cancelled()


async def _pass_on(scope: anyio.CancelScope) -> None:
    """The shield keeps a cancellation from the block too; this task hears it and hands it on."""
    try:
        await anyio.sleep_forever()
    finally:
        scope.cancel()
