"""A queue's routing table and settings as Python calls (scripts/declare.lua). Knows no setting: for that is
core/queue_settings.py. Replies are untrusted: what does not have the shape stated there raises CorruptData.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardq.errors import UnknownQueue
from shardq.storage.calls import missing_shard
from shardq.storage.commands import pack_command
from shardq.storage.keys import Keys, ShardKeys
from shardq.storage.pipes import Pipes
from shardq.storage.reply import shape, text


@dataclass(frozen=True, slots=True)
class Declared:
    """What is stored of a queue; `settings` is empty and `settings_version` 0 for one from before there were any.
    `reshard` is the plan under way, empty when there is none; `committed` means that it can't be given up any more."""

    table: bytes
    settings: bytes
    settings_version: int
    reshard: bytes = b""
    committed: bool = False


async def stored_queue(pipes: Pipes, keys: Keys) -> Declared | None:
    """What is stored; None when the queue does not exist."""
    packed = pack_command("HMGET", keys.routing, "table", "settings", "settings_version", "reshard", "committed")
    reply = await pipes.command(keys.control_slot, packed)
    with shape("HMGET"):
        table, settings, version, reshard, committed = reply
        if table is None:
            return None
        plan = text(reshard or b"")
        return Declared(text(table), text(settings or b""), int(version or 0), plan, bool(plan and committed))


async def read_changes(pipes: Pipes, keys: Keys) -> tuple[int, bytes]:
    """The version of the routing table, and the plan of a reshard under way, empty when there is none. Small where
    nothing goes on. Raises UnknownQueue."""
    reply = await pipes.command(keys.control_slot, pack_command("HMGET", keys.routing, "version", "reshard"))
    with shape("HMGET"):
        version, plan = reply
        if version is not None:
            return int(version), text(plan or b"")
    msg = f"queue {keys.queue!r} does not exist (any more)"
    raise UnknownQueue(msg)


async def reshard_phase(pipes: Pipes, keys: Keys, *, timeout_s: float) -> str:
    """ "opening" or "sealing" (it is committed) while a reshard is under way, else empty."""
    packed = pack_command("HMGET", keys.routing, "reshard", "committed")
    reply = await pipes.command(keys.control_slot, packed, timeout_s=timeout_s)
    with shape("HMGET"):
        plan, committed = reply
        return ("sealing" if committed else "opening") if plan else ""


async def declare(pipes: Pipes, keys: Keys, version: int, table: bytes, settings: bytes) -> Declared:
    """Publishes a routing table and settings unless the queue has them; returns those that stand."""
    reply = await pipes.call(keys.control_slot, "declare", [keys.routing], [version, table, settings])
    with shape("declare"):
        _, _, stored_table, stored_settings, settings_version = reply
        return Declared(text(stored_table), text(stored_settings), int(settings_version))


async def put_settings(pipes: Pipes, keys: Keys, read_version: int, settings: bytes) -> int | None:
    """Puts new settings in place of those that were read with `read_version`; returns their version, or None when
    others were faster. Raises UnknownQueue."""
    reply = await pipes.call(keys.control_slot, "settings", [keys.routing], [read_version, settings])
    with shape("settings"):
        missing = reply[0] == b"MISSING"
        if not missing:
            return int(reply[1]) if reply[0] == b"OK" else None
    msg = f"queue {keys.queue!r} does not exist any more: declare it with client.queue({keys.queue!r}, shards=N)"
    raise UnknownQueue(msg)


async def tune(pipes: Pipes, shard: ShardKeys, settings_version: int, settings: Mapping[str, str | int]) -> None:
    """Gives a shard its share of the queue's settings (QueueSettings.for_shard) unless it has newer ones. Raises
    UnknownQueue when the shard's keys are gone."""
    args: list[str | bytes | int] = [settings_version]
    for pair in settings.items():
        args += pair
    reply = await pipes.call(shard.slot, "tune", [shard.meta], args)
    with shape("tune"):
        missing = reply[0] == b"MISSING"
    if missing:
        raise UnknownQueue(missing_shard(shard))
