"""A queue's schedules and their ticks as Python calls (scripts/schedule.lua). Knows definitions as bytes: what they
mean is core/schedule.py's, what is due runtime/scheduler.py's.
"""

from __future__ import annotations

from shardq.core.schedule import tick_producer
from shardq.errors import UnknownQueue
from shardq.storage import appends, calls
from shardq.storage.commands import Confirm, pack_command
from shardq.storage.keys import Keys, ShardKeys
from shardq.storage.pipes import Pipes
from shardq.storage.reply import shape, text, texts

_VERSION = ""  # the field beside the names


async def version(pipes: Pipes, keys: Keys) -> bytes:
    """Another one after every change; empty while there never was a schedule."""
    reply = await pipes.command(keys.control_slot, pack_command("HGET", keys.schedules, _VERSION))
    with shape("HGET"):
        return text(reply or b"")


async def read_all(pipes: Pipes, keys: Keys) -> tuple[bytes, dict[str, bytes]]:
    """The version and every definition by name, of one moment."""
    flat = await pipes.command(keys.control_slot, pack_command("HGETALL", keys.schedules))
    with shape("HGETALL"):
        texts(flat)
        stored = {name.decode(errors="replace"): value for name, value in zip(flat[::2], flat[1::2], strict=True)}
        return stored.pop(_VERSION, b""), stored


async def read_one(pipes: Pipes, keys: Keys, name: str) -> bytes:
    """One definition; empty when there is none."""
    reply = await pipes.command(keys.control_slot, pack_command("HGET", keys.schedules, name))
    with shape("HGET"):
        return text(reply or b"")


async def swap(pipes: Pipes, keys: Keys, name: str, seen: bytes, new: bytes, confirm: Confirm | None) -> bool:
    """Puts `new` in the place of `seen` (empty: none); false when something else stands there."""
    reply = await pipes.call(keys.control_slot, "swap_schedule", [keys.schedules], [name, seen, new], confirm=confirm)
    with shape("swap_schedule"):
        return bool(reply[0] == b"OK")


async def close_ticks(pipes: Pipes, shard: ShardKeys, name: str, until_s: int, confirm: Confirm | None) -> int | None:
    """From now on the shard takes no tick up to `until_s`; returns the last one sent, 0 for none. None when the shard
    was sealed: its schedules are its children's."""
    args: list[str | bytes | int] = [tick_producer(name), until_s]
    reply = await pipes.call(shard.slot, "close_ticks", [shard.meta], args, confirm=confirm)
    with shape("close_ticks"):
        if reply[0] != b"MISSING":
            return int(reply[1]) if reply[0] == b"OK" else None
    raise UnknownQueue(calls.missing_shard(shard))


async def open_ticks(pipes: Pipes, shard: ShardKeys, name: str, last_s: int, confirm: Confirm | None) -> bool:
    """The shard takes ticks after `last_s` (and after its own last one); false when it was sealed."""
    args: list[str | bytes | int] = [tick_producer(name), last_s]
    reply = await pipes.call(shard.slot, "open_ticks", [shard.meta], args, confirm=confirm)
    with shape("open_ticks"):
        if reply[0] != b"MISSING":
            return bool(reply[0] == b"OK")
    raise UnknownQueue(calls.missing_shard(shard))


async def last_tick(pipes: Pipes, shard: ShardKeys, name: str) -> tuple[int, bool]:
    """The tick up to which the shard takes none any more, and whether that is because it is closed to the schedule; if
    not, it is the last one sent, 0 for none."""
    field = f"p:{tick_producer(name)}"
    reply = await pipes.command(shard.slot, pack_command("HGET", shard.meta, field))
    with shape("HGET"):
        stored = text(reply or b"0")
        return int(stored.replace(b"|", b":").partition(b":")[0]), b"|" in stored


async def append_tick(
    pipes: Pipes, shard: ShardKeys, name: str, tick_s: int, batch: bytes, confirm: Confirm | None
) -> str:
    """Stores the tick's message unless it was stored before: the status of append."""
    packed = appends.pack_append(shard, tick_producer(name), tick_s, 1, batch, confirm)
    return appends.read_append(await pipes.command(shard.slot, packed.data, confirm=confirm)).status
