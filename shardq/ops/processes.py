"""Child processes and signals, for every command that runs until it is told to stop. Never starts a process itself.

A child started with `preexec_fn=partial(die_with_parent, os.getpid())` can't outlive a parent that was killed with
SIGKILL (Linux only: other systems have no signal for it).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from shardq.errors import ShardqError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

Result = TypeVar("Result")


def die_with_parent(parent_pid: int) -> None:
    """For `preexec_fn`: the child gets SIGKILL when the *thread* that started it ends, so start it from one that lasts.

    Without it a parent killed with SIGKILL, which can clean nothing up, leaves its children working for good.
    """
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() != parent_pid:  # the parent was gone before the line above
            os._exit(1)


def run_async(main: Callable[[], Awaitable[Result]]) -> Result:
    """Runs `main` in an event loop. A ShardqError that comes out of task groups is raised as itself: a person is told
    what went wrong, not how many tasks heard of it."""
    try:
        return anyio.run(main)
    except BaseExceptionGroup as group:
        if group.split(ShardqError)[1] is None:
            raise _first(group) from group
        raise


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


async def until_stopped(work: Callable[[], Awaitable[None]], stop: Callable[[], bool]) -> bool:
    """Runs `work`; the first SIGINT or SIGTERM calls `stop`, a second one, or a first one that `stop` answers with
    False (there is nothing to finish), cancels it. Returns whether it was cut short by a second signal."""
    hurried = False

    async def obey(scope: anyio.CancelScope) -> None:
        nonlocal hurried
        with anyio.open_signal_receiver(*STOP_SIGNALS) as signals:
            ready.set()
            told = False
            async for _ in signals:
                hurried = told
                if told or not stop():
                    scope.cancel()
                told = True

    ready = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(obey, tasks.cancel_scope)
        await ready.wait()
        await work()
        tasks.cancel_scope.cancel()
    return hurried
