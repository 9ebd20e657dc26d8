"""Whether a retention by size would have dropped what a retired shard still keeps. Reads only.

Such a retention keeps the newest bytes of each range of hashes, and drops the oldest as others come. Nothing comes to a
retired shard any more, so by itself it would keep its part for ever. But its heirs took its keys over: once each of
them has as much as its own part, what the retired one keeps is older than anything the range has room for.
"""

from __future__ import annotations

from shardq.core.queue_settings import QueueSettings
from shardq.core.routing import RoutingTable, Shard
from shardq.storage import queues
from shardq.storage.commands import pack_command
from shardq.storage.keys import Keys
from shardq.storage.pipes import Pipes
from shardq.storage.reply import shape

LAST_ENTRY = "18446744073709551615-18446744073709551615"
_FULL = 0.9  # what is dropped goes by whole nodes of a stream, so that a full one may lie a little below


async def outgrown(pipes: Pipes, keys: Keys, table: RoutingTable, shard: int) -> bool:
    """False also for a queue that is not kept by size. Raises StoreError, CorruptData."""
    stored = await queues.stored_queue(pipes, keys)
    settings = QueueSettings.from_bytes(stored.settings) if stored is not None else QueueSettings()
    if settings.retention_bytes is None:
        return False
    own = table.by_id[shard]
    heirs = [each for each in table.homes[own.home_id] if each.overlaps(own)]
    return bool(heirs) and all([await _is_full(pipes, keys, settings, heir) for heir in heirs])


async def _is_full(pipes: Pipes, keys: Keys, settings: QueueSettings, heir: Shard) -> bool:
    asked = pack_command("MEMORY", "USAGE", keys.of(heir).stream)
    size = await pipes.command(heir.slot, asked)
    with shape("MEMORY USAGE"):
        return int(size or 0) >= _FULL * int(settings.for_range(heir.low, heir.high)["retention_bytes"])
