"""The steps of a reshard as Python calls (scripts/reshard.lua). Decides nothing: which steps, and in which order, is
runtime/reshard.py's. Replies are untrusted: what does not have the shape stated there raises CorruptData.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardq.core.reshard import Reshard
from shardq.core.routing import RoutingTable
from shardq.errors import UnknownQueue
from shardq.storage.calls import missing_shard
from shardq.storage.commands import Confirm, confirm_replicas, pack_command
from shardq.storage.keys import Keys, ShardKeys
from shardq.storage.pipes import Pipes
from shardq.storage.reply import shape, text, texts

MOVE_AT_ONCE = 500

_LEAVING = b"leaving:"


def _confirm(pipes: Pipes) -> Confirm | None:
    """A replica has it too, where every master has one: a failover must not undo a step that others build on."""
    return confirm_replicas(1) if pipes.cluster.least_replicas() >= 1 else None


async def begin(pipes: Pipes, keys: Keys, plan: Reshard) -> tuple[str, bytes]:
    """Notes a plan: OK; BUSY and the plan that is under way; CHANGED when the table is another one; MISSING."""
    reply = await pipes.call(
        keys.control_slot, "begin_reshard", [keys.routing], [plan.to_bytes(), plan.version], confirm=_confirm(pipes)
    )
    with shape("begin_reshard"):
        status = reply[0].decode()
        return status, text(reply[1]) if status == "BUSY" else b""


async def commit(pipes: Pipes, keys: Keys, plan: bytes) -> bool:
    """From here on the plan is carried out; false when it is not under way any more."""
    reply = await pipes.call(keys.control_slot, "commit_reshard", [keys.routing], [plan], confirm=_confirm(pipes))
    with shape("commit_reshard"):
        return bool(reply[0] == b"OK")


async def end(
    pipes: Pipes,
    keys: Keys,
    plan: bytes,
    table: RoutingTable,
    *,
    given_up: bool = False,
    leaving: Iterable[int] = (),
    bells: Sequence[str] = (),
) -> str:
    """Publishes the table that follows and rings the bells: OK; GONE when the plan is not under way any more; HELD when
    it can't be given up because it is committed. `leaving` are shards that no table names, and whose keys are to go."""
    args: list[str | bytes | int] = [plan, int(given_up), table.version, table.to_bytes()]
    args += [" ".join(map(str, leaving)), *bells]
    reply = await pipes.call(keys.control_slot, "end_reshard", [keys.routing], args, confirm=_confirm(pipes))
    with shape("end_reshard"):
        return str(reply[0].decode())


async def open_child(
    pipes: Pipes,
    shard: ShardKeys,
    parents: Iterable[int],
    settings_version: int,
    settings: Mapping[str, str | int],
) -> bool:
    """Makes the keys of a shard that takes keys over from `parents`; true when they were not there."""
    keys = [shard.stream, shard.meta, shard.delayed, shard.expiring, shard.timed]
    args: list[str | bytes | int] = [" ".join(map(str, parents)), settings_version]
    for pair in settings.items():
        args += pair
    reply = await pipes.call(shard.slot, "open_child", keys, args, confirm=_confirm(pipes))
    with shape("open_child"):
        return bool(reply[0] == b"CREATED")


async def seal(pipes: Pipes, shard: ShardKeys, children: Sequence[ShardKeys]) -> None:
    """The shard takes no more messages. Raises UnknownQueue when its keys are gone."""
    keys = [shard.meta, *(child.meta for child in children)]
    reply = await pipes.call(shard.slot, "seal", keys, [child.bell for child in children], confirm=_confirm(pipes))
    with shape("seal"):
        missing = reply[0] == b"MISSING"
    if missing:
        raise UnknownQueue(missing_shard(shard))


async def groups_of(pipes: Pipes, shard: ShardKeys) -> set[str] | None:
    """The groups that are registered on a shard; None when its keys are gone."""
    reply = await pipes.command(shard.slot, pack_command("HMGET", shard.meta, "state", "groups"))
    with shape("HMGET"):
        state, groups = reply
        return set((groups or b"").decode().split()) if state is not None else None


async def delayed_batches(pipes: Pipes, shard: ShardKeys, after: int) -> list[tuple[str, bytes | None]]:
    """Names and batches of messages that are not due yet, at most MOVE_AT_ONCE of them, without the first `after`. A
    batch is None when it is gone, moved by somebody else."""
    packed = pack_command("ZRANGE", shard.delayed, after, after + MOVE_AT_ONCE - 1)
    found = await pipes.command(shard.slot, packed)
    with shape("ZRANGE"):
        names = [name.decode() for name in texts(found) if name]
    if not names:
        return []
    batches = await pipes.command(shard.slot, pack_command("HMGET", shard.timed, *names))
    with shape("HMGET"):
        return [(name, None if raw is None else text(raw)) for name, raw in zip(names, batches, strict=True)]


async def move_delayed(
    pipes: Pipes,
    shard: ShardKeys,
    children: Sequence[ShardKeys],
    moves: Sequence[tuple[str, int]],
    bells: Sequence[str],
) -> int:
    """Hands delayed messages, each named with the index of its child, over; returns how many are left. `bells` are rung
    when the last one went. Raises UnknownQueue when keys of one of the shards are gone."""
    keys = [shard.meta, shard.delayed]
    for child in children:
        keys += [child.meta, child.delayed]
    args: list[str | bytes | int] = [" ".join(bells), *(child.bell for child in children)]
    for name, child_index in moves:
        args += [name, child_index + 1]
    reply = await pipes.call(shard.slot, "move_delayed", keys, args, confirm=_confirm(pipes))
    with shape("move_delayed"):
        missing = reply[0] == b"MISSING"
        if not missing:
            return int(reply[2])
    raise UnknownQueue(missing_shard(shard))


@dataclass(frozen=True, slots=True)
class Retired:
    """`status` is OK, BUSY (`why`, of `group`, `count`, as the script has it), CHANGED (there are groups that were not
    named) or MISSING."""

    status: str
    why: str = ""
    group: str = ""
    count: int = 0


async def retire(
    pipes: Pipes, shard_id: int, shard: ShardKeys, groups: Sequence[str], descendants: Iterable[ShardKeys]
) -> Retired:
    """Whether nobody needs a sealed shard any more; if so, it is marked, and its descendants do not wait for it."""
    keys = [shard.stream, shard.meta, shard.delayed]
    for group in groups:
        keys += [shard.group(group), shard.dead(group), shard.later(group)]
    keys += [each.meta for each in descendants]
    reply = await pipes.call(shard.slot, "retire", keys, [shard_id, len(groups), *groups], confirm=_confirm(pipes))
    with shape("retire"):
        status = reply[0].decode()
        if status != "BUSY":
            return Retired(status)
        why, group, count = reply[1:]
        return Retired(status, why.decode(), group.decode(), int(count))


async def forget_shard(pipes: Pipes, keys: Keys, table: RoutingTable, after: RoutingTable, shard: int) -> bool:
    """Publishes the table without a retired shard; false when another table stands there, or a plan is under way."""
    args: list[str | bytes | int] = [table.version, after.version, after.to_bytes(), shard]
    reply = await pipes.call(keys.control_slot, "forget_shard", [keys.routing], args, confirm=_confirm(pipes))
    with shape("forget_shard"):
        return bool(reply[0] == b"OK")


async def remove_retired(pipes: Pipes, shard: ShardKeys, groups: Sequence[str], *, unused: bool) -> str:
    """Deletes a shard's keys: OK, ABSENT, CHANGED (there are other groups), or BUSY (it is in use). `unused`: also
    those of a child that nothing was sent to."""
    keys = [shard.stream, shard.meta, shard.delayed]
    for group in groups:
        keys += shard.of_group(group)
    reply = await pipes.call(shard.slot, "remove_retired", keys, [int(unused), shard.bell, *groups])
    with shape("remove_retired"):
        return str(reply[0].decode())


async def leaving(pipes: Pipes, keys: Keys) -> list[int]:
    """Shards that no table names any more and whose keys are to go."""
    fields = await pipes.command(keys.control_slot, pack_command("HKEYS", keys.routing))
    with shape("HKEYS"):
        return sorted(int(name[len(_LEAVING) :]) for name in texts(fields) if name.startswith(_LEAVING))


async def left(pipes: Pipes, keys: Keys, shard: int) -> None:
    """A shard's keys are gone."""
    await pipes.command(keys.control_slot, pack_command("HDEL", keys.routing, _LEAVING + str(shard).encode()))
