"""What a fork, and the end of the program, mean for the SyncProducers of a process. Sends nothing; `background.py`
knows nothing of either.

- After a fork the child starts its own thread at its first use. What was under way belongs to the parent, which stores
  it. The child leaves the inherited loop and connections alone, and does not even let them be collected: a connection
  that is closed where a loop runs is taken off its epoll object, which a forked child shares with its parent.
- When the interpreter exits, what is under way gets EXIT_WITHIN_S to be stored; the rest is logged and given up.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
import weakref
from importlib import import_module
from typing import TYPE_CHECKING

from shardq.runtime.background import Background
from shardq.storage.functions import library_source

if TYPE_CHECKING:
    from shardq.runtime.sync import SyncProducer

_log = logging.getLogger("shardq")

EXIT_WITHIN_S = 10.0

producers: weakref.WeakSet[SyncProducer] = weakref.WeakSet()
running: set[Background] = set()
_inherited: list[Background] = []  # a parent's, kept as they are: see above


def _after_fork_in_child() -> None:
    _inherited.extend(running)
    running.clear()
    for producer in list(producers):
        producer._leave_to_parent()


def _at_exit() -> None:
    deadline = time.monotonic() + EXIT_WITHIN_S
    ending = list(running)
    for background in ending:
        background.stop()
    for background in ending:
        if not background.join(max(0.0, deadline - time.monotonic())):
            _log.warning("the program ended with %d messages not known to be stored", background.open)
    for producer in list(producers):
        lost = producer._losses.take()
        if lost is not None:
            _log.warning("the program ended: %s (queue %s)", lost, producer._queue)


def _load_ahead() -> None:
    """What the thread would import at its first use: where a process forks while a thread of it is importing, the child
    waits for ever for that import's end."""
    library_source()
    try:
        import_module("anyio._backends._asyncio")
    except ImportError:
        return  # anyio keeps it elsewhere


_load_ahead()
os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
