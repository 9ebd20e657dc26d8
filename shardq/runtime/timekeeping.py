"""What time brings on an owned shard, beside its messages: delayed ones that are due, and what has had its time and is
forgotten. Steps come first: what fails here is tried again when they have had their turn.
"""

from __future__ import annotations

import random

from shardq.errors import CorruptData, StoreError
from shardq.runtime.delete import redact_marked
from shardq.runtime.owning import Owning
from shardq.runtime.shard import OwnedShard
from shardq.storage import calls

PAUSE_AFTER_ERROR_S = 1.0
TIDY_EVERY_S = 60.0
TIDY_TOGETHER_S = 5.0  # the shards of a worker that are due within so much share a write
PROMOTE_AT_ONCE = 500

CANT_KEEP_TIME = "can't look after what is due"


def first_tidy_s(now_s: float) -> float:
    """When a shard whose lease was just taken is tidied first."""
    return _together(now_s + random.uniform(1, 1 + TIDY_EVERY_S))


async def keep_time(owning: Owning, held: OwnedShard, now_s: float) -> bool:
    """Moves delayed messages that are due into the stream, true when there were any; now and then forgets what has
    had its time. Calls nothing while nothing is due."""
    moved, pipes, timeout_s = 0, owning.pipes, owning.settings.lease_s / 3
    try:
        if now_s >= held.promote_at_monotonic_s:
            moved, next_ms = await calls.promote(pipes, held.keys, most=PROMOTE_AT_ONCE, timeout_s=timeout_s)
            held.promoted(now_s, next_ms)
        if now_s >= held.tidy_at_monotonic_s:
            more = await calls.tidy(pipes, held.keys, timeout_s=timeout_s)
            held.tidy_at_monotonic_s = now_s if more else _together(now_s + TIDY_EVERY_S * random.uniform(0.8, 1.2))
            if held.marked:
                await redact_marked(pipes, held.keys, held.marked)
            owning.well(CANT_KEEP_TIME, held.shard)
    except (StoreError, CorruptData) as error:
        owning.failed(CANT_KEEP_TIME, error, held.shard)
        held.promote_at_monotonic_s = max(held.promote_at_monotonic_s, now_s + PAUSE_AFTER_ERROR_S)
        held.tidy_at_monotonic_s = now_s + TIDY_EVERY_S
    return moved > 0


def _together(moment_s: float) -> float:
    return moment_s - moment_s % TIDY_TOGETHER_S
