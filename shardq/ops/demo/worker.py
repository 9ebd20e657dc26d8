"""The demo's worker, as `shardq work shardq.ops.demo.worker:worker` runs it: each flight handled is a journal line.

Totals are computed from the journals (report.py), so a killed process takes none with it. Sends nothing.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from time import monotonic_ns

import anyio.lowlevel

import shardq
from shardq.errors import UsageError
from shardq.ops.demo.journal import Handling, Journal

QUEUE, GROUP = "flights", "totals"
JOURNAL_VARIABLE = "SHARDQ_DEMO_JOURNAL"

worker = shardq.Worker(QUEUE, group=GROUP)


@worker.handler
async def count(message: shardq.Message) -> None:
    """One flight."""
    start_ns = monotonic_ns()
    flight = message.value
    # Lets other handlers run before this one ends, as one that waits for a database would: order by key is then the
    # queue's doing, not an accident of handlers that never overlap.
    await anyio.lowlevel.checkpoint()
    tail, carrier, delay = flight["tail"], flight["carrier"], flight["dep_delay"]
    name, pid = worker.name or "", os.getpid()
    _journal().write(Handling(name, flight["row"], tail, carrier, delay, start_ns, monotonic_ns(), pid, message.shard))


@functools.cache
def _journal() -> Journal:
    folder = os.environ.get(JOURNAL_VARIABLE)
    if not folder:
        raise UsageError(f"{JOURNAL_VARIABLE} names no folder: this worker is for `shardq demo`, run that.")
    return Journal(Path(folder))
