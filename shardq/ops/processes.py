"""Child processes, signals and where to listen, for every command that runs until it is told to stop. Never starts a
process itself.

A child started with `preexec_fn=partial(die_with_parent, os.getpid())` can't outlive a parent that was killed with
SIGKILL (Linux only: other systems have no signal for it).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import anyio

from shardq.runtime.tasks import one_error

# A closed terminal stops a command too, unless it was started to outlive it (nohup).
_HANGUP = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *_HANGUP)
ONE_SIGNAL_S = 0.5  # a terminal and a wrapper (timeout, npm) may both pass on the same one: that is no impatience

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Listen:
    """Where a process serves its own metrics and probes."""

    host: str
    port: int

    def for_process(self, number: int) -> Listen:
        """The place of process `number` (1, 2, ...) of several: ports count up, unless free ones are taken (0)."""
        return Listen(self.host, self.port and self.port + number - 1)


def die_with_parent(parent_pid: int) -> None:
    """For `preexec_fn`: the child gets SIGKILL when the *thread* that started it ends, so start it from one that lasts.

    Without it a parent killed with SIGKILL, which can clean nothing up, leaves its children working for good.
    """
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() != parent_pid:  # the parent was gone before the line above
            os._exit(1)


def end_when_told() -> None:
    """For the start of a command that runs until it is stopped: before it listens (`until_stopped`) a SIGTERM finds
    nothing to finish, and ends the process with status 0.

    It ends in the handler itself. An exception raised there may come up where Python can only ignore it (a callback of
    an import, a destructor), and then the process would run on although it was told to end.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def run_async(main: Callable[[], Awaitable[Result]]) -> Result:
    """Runs `main` in an event loop. A ShardqError that comes out of task groups is raised as itself: a person is told
    what went wrong, not how many tasks heard of it."""
    with one_error():
        return anyio.run(main)


async def until_stopped(work: Callable[[], Awaitable[None]], stop: Callable[[], bool]) -> bool:
    """Runs `work` as the last thing a process does: the first SIGINT or SIGTERM calls `stop`; a second one, or a first
    one that `stop` answers with False (there is nothing to finish), cancels it. Returns whether a second one did."""
    hurried = False
    listening = anyio.Event()

    async def obey(scope: anyio.CancelScope) -> None:
        nonlocal hurried
        told_s: float | None = None
        with anyio.open_signal_receiver(*STOP_SIGNALS) as signals:
            listening.set()
            async for _ in signals:
                now_s = anyio.current_time()
                if told_s is None:
                    told_s = now_s
                    if not stop():
                        scope.cancel()
                elif now_s - told_s > ONE_SIGNAL_S:
                    hurried = True
                    scope.cancel()

    async def obey_then_ignore(scope: anyio.CancelScope) -> None:
        try:
            await obey(scope)
        finally:
            # The work may still be saying goodbye, which is short: one more signal must not kill it there.
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(obey_then_ignore, tasks.cancel_scope)
        await listening.wait()
        await work()
        tasks.cancel_scope.cancel()
    return hurried
