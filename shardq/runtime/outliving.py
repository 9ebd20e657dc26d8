"""A task group for what a cancelled block needs while it cleans up: connections and heartbeats. Decides nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup

from shardq.runtime.tasks import task_group


@asynccontextmanager
async def outliving_tasks() -> AsyncIterator[TaskGroup]:
    """Its tasks go on until the block has ended, also when the block is cancelled from outside.

    A plain task group would be cancelled together with its block, and a goodbye in the block's `finally`, shielded or
    not, would find no task left to send it. A ShardqError comes out as itself, not in a group.
    """
    async with task_group() as outside:
        async with anyio.create_task_group() as tasks:
            tasks.cancel_scope.shield = True
            with anyio.CancelScope() as block:
                outside.start_soon(_pass_on, block)
                yield tasks
            tasks.cancel_scope.cancel()
        outside.cancel_scope.cancel()


async def _pass_on(scope: anyio.CancelScope) -> None:
    """The shield keeps a cancellation from the block too; this task hears it and hands it on."""
    try:
        await anyio.sleep_forever()
    finally:
        scope.cancel()
