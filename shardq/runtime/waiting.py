"""What the senders of one batch wait on: one future-like object for all of them, and one turn of the event loop that
wakes them all. Knows nothing of batches; never holds up a cancellation.

A future for each send costs more than all else that a send does: the loop's `call_soon`, in Python, and a handle for
each. asyncio takes any object with `_asyncio_future_blocking` in place of a future (`asyncio.isfuture` says so) and
hands it what steps the task that waits. Those are kept here, and called one after the other when the batch has ended.

Invariants:
- Whoever waits is woken after `wake`, in the order in which they began to wait, and never inside another task's step.
- A wait may end early: when any of the tasks is cancelled all are woken, for an object that many wait on is not told
  which one. So whoever waits looks again, and waits again: `while not batch.finished: await batch.waiting`.
- What one of them raises out of its step (KeyboardInterrupt, SystemExit) leaves the others to the next turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterator
from contextvars import Context
from typing import Any

Step = Callable[["asyncio.Future[None]"], None]


class Waiting:
    """`await` it, again and again until what is waited for has come. `woken` is a future of `loop` that is done."""

    __slots__ = ("_asyncio_future_blocking", "_contexts", "_loop", "_rung", "_steps", "_woken")

    def __init__(self, loop: asyncio.AbstractEventLoop, woken: asyncio.Future[None]) -> None:
        self._asyncio_future_blocking = False
        self._loop = loop  # by this name a task finds out that the object is of its own loop
        self._woken = woken
        self._steps: list[Step] = []
        self._contexts: list[Context] = []
        self._rung = False

    def __await__(self) -> Generator[Waiting, None, None]:
        self._asyncio_future_blocking = True  # the task that is given it says so, and takes that back
        yield self

    def wake(self) -> None:
        """Everyone who waits goes on in the next turn of the loop."""
        if not self._rung:
            self._rung = True
            self._loop.call_soon(self._step_all)

    def _step_all(self) -> None:
        self._rung = False
        steps, contexts = self._steps, self._contexts
        self._steps, self._contexts = [], []
        left: Iterator[tuple[Step, Context]] = zip(steps, contexts, strict=True)
        try:
            for step, context in left:
                context.run(step, self._woken)
        except BaseException:
            for step, context in left:
                self.add_done_callback(step, context=context)
            self.wake()
            raise

    # -- what a task asks of a future ------------------------------------------------------------------------

    def add_done_callback(self, step: Step, *, context: Context) -> None:
        """How a task says that it waits."""
        self._steps.append(step)
        self._contexts.append(context)

    def cancel(self, msg: Any = None) -> bool:
        """A task that waits is cancelled, whichever: it finds that out when it is woken."""
        self.wake()
        return False
