"""The consumer groups of one queue, over all its shards: open, list, reset, pause, delete. Reads no message and owns
no shard.

Each shard is changed atomically by itself (scripts/group.lua); all of them together are not. So every operation looks
at all shards first and refuses before it has changed anything, and each can be repeated: what was cut short is
completed. Where the queue was resharded, a group is opened and reset on old shards before it is on those that took keys
over from them: what it may own of these waits for what it has to do on those.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from shardq.core.ids import MessageId, entry_key
from shardq.core.routing import RoutingTable
from shardq.errors import GroupInUse, UnknownGroup, UnknownQueue, UsageError
from shardq.runtime.reshard_state import backlog_of
from shardq.runtime.tasks import task_group
from shardq.storage import groups as calls
from shardq.storage.control import control_call, control_state
from shardq.storage.counters import GroupCounters, ShardCounters, inspect
from shardq.storage.groups import Done, Start
from shardq.storage.keys import Keys
from shardq.storage.pipes import Pipes

Result = TypeVar("Result")

Position = str | float | datetime
"""Where a group begins: "earliest", "latest", an aware datetime, Unix seconds, or a message id."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FORMS = "'earliest', 'latest', an aware datetime, Unix seconds, or a message id such as 3/1795231414661-0/7"


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """A group of a queue at one moment; its shards are not read in the same instant. Counts are messages.

    backlog   stored and not finished
    waiting   of these, retries and what they hold back
    dead      dead letters kept
    shards    shards that have the group: all of the queue's, unless opening or deleting it was cut short
    owned     shards whose lease is held, also by a worker that died and was not replaced yet
    workers   names of its members, which may hold some that died a moment ago
    paused    its workers take no shards until it is resumed
    """

    name: str
    backlog: int
    waiting: int
    dead: int
    shards: int
    owned: int
    workers: tuple[str, ...]
    paused: bool = False


class Groups:
    """The groups of the queue with these keys and this table."""

    def __init__(self, pipes: Pipes, keys: Keys, table: RoutingTable) -> None:
        self._pipes, self._keys, self._table = pipes, keys, table
        self._shards = {shard.id: keys.of(shard) for shard in table.by_id.values()}

    async def open(self, group: str, start: Position) -> bool:
        """Registers the group on every shard; false when it was there on all of them."""
        starts = starts_of(start, self._shards)
        done = await self._in_turn(lambda shard: self._open(shard, group, starts[shard]))
        return any(each.status == "CREATED" for each in done.values())

    async def open_coming(self, group: str, start: Position, shards: Iterable[int]) -> None:
        """Registers the group on those of these shards that are there."""
        starts = starts_of(start, self._shards)

        async def open_one(shard: int) -> None:
            with contextlib.suppress(UnknownQueue):
                await self._open(shard, group, starts[shard])

        await self._on_each(shards, open_one)

    async def list_all(self) -> list[GroupInfo]:
        """Every registered group, by name."""
        found = await self._inspect(())
        names = sorted({name for counters in found.values() for name in counters.registered})
        if not names:
            return []
        found = await self._inspect(names)
        return [await self._info(name, found) for name in names]

    async def reset(self, group: str, to: Position, *, force: bool) -> int:
        """Puts the group at `to` on every shard; returns how many messages there are from there on."""
        starts = starts_of(to, self._shards)
        there = await self._existing(group)
        if not there:
            raise self._unknown(group)
        if not force:
            self._refuse_if_held(group, there)
        request = secrets.token_hex(8)

        async def reset_one(shard: int) -> Done:
            keys = self._shards[shard]
            try:
                done = await calls.reset_group(self._pipes, keys, group, starts[shard], request, force=force)
            except UnknownQueue as error:
                return self._absent(shard, error)
            # Not there: its opening or deleting was cut short. This completes the opening.
            return await self._open(shard, group, starts[shard]) if done.status == "ABSENT" else done

        done = await self._in_turn(reset_one)
        self._refuse_rest(group, "reset", done)
        return sum(each.backlog for each in done.values())

    async def pause(self, group: str, *, paused: bool) -> None:
        """Pauses the group, or lets it go on; safe to repeat."""
        if not await self._existing(group):
            raise self._unknown(group)
        bell = self._keys.control_bell(group)
        await control_call(self._pipes, self._keys, group, "pause", ["1" if paused else "", bell], timeout_s=10.0)

    async def delete(self, group: str, *, force: bool) -> None:
        """Takes the group off every shard, and then its members, leader and plan."""
        there = await self._existing(group)
        if not force:
            self._refuse_if_held(group, there)
            await self._refuse_if_joined(group)
        done = await self._on_each(
            self._shards, lambda shard: calls.delete_group(self._pipes, self._shards[shard], group, force=force)
        )
        self._refuse_rest(group, "deleted", done)
        forgotten = await calls.forget_members(self._pipes, self._keys, group)
        if not forgotten and all(each.status == "ABSENT" for each in done.values()):
            raise self._unknown(group)

    async def delete_coming(self, group: str, shards: Iterable[int], *, force: bool) -> None:
        """Takes the group off those of these shards that are there and have it."""
        done = await self._on_each(
            shards, lambda shard: calls.delete_group(self._pipes, self._shards[shard], group, force=force)
        )
        self._refuse_rest(group, "deleted", done)

    # -- the shards ------------------------------------------------------------------------------------------

    async def _on_each(self, shards: Iterable[int], do: Callable[[int], Awaitable[Result]]) -> dict[int, Result]:
        done: dict[int, Result] = {}

        async def one(shard: int) -> None:
            done[shard] = await do(shard)

        async with task_group() as tasks:
            for shard in shards:
                tasks.start_soon(one, shard)
        return dict(sorted(done.items()))

    async def _in_turn(self, do: Callable[[int], Awaitable[Result]]) -> dict[int, Result]:
        """On all shards, side by side, those that others took keys over from first."""
        done: dict[int, Result] = {}
        for shards in self._table.generations:
            done |= await self._on_each(shards, do)
        return dict(sorted(done.items()))

    async def _open(self, shard: int, group: str, start: Start) -> Done:
        try:
            return await calls.open_group(self._pipes, self._shards[shard], group, start)
        except UnknownQueue as error:
            return self._absent(shard, error)

    def _absent(self, shard: int, error: UnknownQueue) -> Done:
        """A retired shard that is gone by now has nothing to do for any group; of another one it is an error."""
        if shard in self._table.retired_by_id:
            return Done("ABSENT")
        raise error

    async def _inspect(self, groups: Sequence[str]) -> dict[int, ShardCounters]:
        async def look(shard: int) -> ShardCounters | None:
            try:
                return await inspect(self._pipes, self._shards[shard], groups)
            except UnknownQueue as error:
                self._absent(shard, error)
                return None

        found = await self._on_each(self._shards, look)
        return {shard: counters for shard, counters in found.items() if counters is not None}

    async def _existing(self, group: str) -> dict[int, GroupCounters]:
        """The group's counters on the shards that have it."""
        found = await self._inspect([group])
        return {shard: counters.groups[group] for shard, counters in found.items() if group in counters.groups}

    async def _info(self, name: str, found: Mapping[int, ShardCounters]) -> GroupInfo:
        state = await control_state(self._pipes, self._keys, name)
        parts = [(counters, counters.groups[name]) for counters in found.values() if name in counters.groups]
        return GroupInfo(
            name,
            sum(backlog_of(shard, group) for shard, group in parts),
            sum(group.waiting for _, group in parts),
            sum(group.dead_letters for _, group in parts),
            len(parts),
            sum(group.held for _, group in parts),
            tuple(sorted(state.members)),
            state.paused,
        )

    # -- refusing --------------------------------------------------------------------------------------------

    def _unknown(self, group: str) -> UnknownGroup:
        return UnknownGroup(f"queue {self._keys.queue!r} has no group {group!r}: queue.groups() lists those there are")

    @staticmethod
    def _refuse_if_held(group: str, there: Mapping[int, GroupCounters]) -> None:
        held = {shard: counters.owner for shard, counters in there.items() if counters.held}
        if held:
            raise GroupInUse(f"group {group!r} is in use, nothing was changed: {_held(held)}. {_STOP_FIRST}")

    async def _refuse_if_joined(self, group: str) -> None:
        members = sorted((await control_state(self._pipes, self._keys, group)).members)
        if members:
            raise GroupInUse(
                f"group {group!r} is in use, nothing was changed: its members are {', '.join(members[:5])}"
                f"{' and others' if len(members) > 5 else ''}. {_STOP_FIRST}"
            )

    @staticmethod
    def _refuse_rest(group: str, what: str, done: Mapping[int, Done]) -> None:
        """A worker came between the look at all shards and the change: says how far that went."""
        held = {shard: each.owner for shard, each in done.items() if each.status == "HELD"}
        if held:
            raise GroupInUse(
                f"a worker took shards of group {group!r} while it was {what}: {len(done) - len(held)} of {len(done)} "
                f"shards are {what}, {_held(held)}. {_STOP_FIRST}; then repeat this"
            )


_STOP_FIRST = (
    "Stop its workers first; force=True (--force) takes the leases away, also those of workers that were killed"
)


def _held(held: Mapping[int, str]) -> str:
    shard, owner = next(iter(held.items()))
    others = f" ({len(held)} shards are held)" if len(held) > 1 else ""
    return f"worker {owner} holds shard {shard}{others}"


# -- positions -----------------------------------------------------------------------------------------------


def starts_of(position: Position, shards: Iterable[int]) -> dict[int, Start]:
    """Where each shard begins. Raises UsageError for what is no position, or names a shard that is not there."""
    shards = list(shards)
    if isinstance(position, str) and "/" in position:
        return _from_message(MessageId.parse(position), shards)
    if isinstance(position, str):
        if position not in ("earliest", "latest"):
            raise UsageError(f"{position!r} is no start of a group: give {_FORMS}")
        start = Start(position)
    else:
        start = Start(f"{_milliseconds(position)}-0")
    return dict.fromkeys(shards, start)


def _from_message(message: MessageId, shards: list[int]) -> dict[int, Start]:
    if message.shard not in shards:
        raise UsageError(f"{message} names shard {message.shard}, which this queue does not have")
    others = Start(f"{entry_key(message.entry)[0]}-0")
    return {shard: Start(message.entry, message.index) if shard == message.shard else others for shard in shards}


def _milliseconds(moment: float | datetime) -> int:
    """Unix time in whole ms, never later than `moment`."""
    if isinstance(moment, (int, float)) and not isinstance(moment, bool):
        try:
            moment = datetime.fromtimestamp(moment, UTC)
        except (ValueError, OverflowError, OSError) as error:
            raise UsageError(f"{moment!r} is no time: give Unix seconds (not milliseconds)") from error
    if not isinstance(moment, datetime):
        raise UsageError(f"{moment!r} is no start of a group: give {_FORMS}")
    if moment.utcoffset() is None:
        raise UsageError(f"{moment!r} has no time zone: give an aware datetime, such as datetime.now(UTC)")
    if moment < _EPOCH:
        raise UsageError(f"{moment!r} is before 1970, when no entry was stored: use 'earliest'")
    return (moment - _EPOCH) // timedelta(milliseconds=1)
