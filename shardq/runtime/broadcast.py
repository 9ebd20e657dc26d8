"""Broadcasts: live notices to everyone who listens, at most once each, nothing stored. Sharded Pub/Sub for channels
that are named, ordinary Pub/Sub for patterns.

A broadcast is sent to Redis once: it is not repeated when its outcome is unknown. A listener gets a notice once at
most: by the channel alone when it named the channel and a pattern matches it too, and by its id where several patterns
match or a subscription was made anew.

A listener is told where it may have missed something: `Missed` is put among the notices when a subscription that was
away stands again (so that whoever reads the state anew then misses nothing), or where its full buffer dropped some. It
can't be told of what Redis nodes lose on the way between themselves.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Protocol

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from shardq.core import notices
from shardq.core.notices import Arrived, Buffer, Missed, Notice, RecentIds
from shardq.core.records import pack_value
from shardq.errors import ClosedError, CorruptData, ShardqError, StoreUnavailable, UsageError
from shardq.runtime.subscriptions import Channel, Subscriptions
from shardq.storage.cluster import Cluster
from shardq.storage.commands import pack_command
from shardq.storage.keys import CastNames, check_channel
from shardq.storage.pipes import Pipes

MAX_BUFFERED_BYTES = 64 * 1024 * 1024
REMEMBERED_IDS = 512
TAKEN_WITHOUT_PAUSE = 64

_log = logging.getLogger("shardq")


async def broadcast(pipes: Pipes, prefix: str, channel: str, value: Any) -> None:
    """See `Client.broadcast`."""
    check_channel("channel", channel)
    frame = notices.encode(secrets.token_bytes(notices.ID_BYTES), pack_value(value))
    names = CastNames(prefix)
    # Both to the slot's owner, in one write. Not in a function: a call that names the channel as a key would go to the
    # new node as long as the slot is moving, and the listeners are with the old one till the end.
    await pipes.commands_once(
        names.exact_slot(channel),
        [
            pack_command("SPUBLISH", names.exact(channel), frame),
            pack_command("PUBLISH", names.ordinary(channel), frame),
        ],
    )


class Home(Protocol):
    """What a listener needs of its client."""

    prefix: str
    cluster: Cluster

    @property
    def tasks(self) -> TaskGroup: ...


class _Source(Channel):
    """One channel or pattern of a listener; `label` is how the user wrote it."""

    def __init__(self, listener: Notices, label: str, name: str, slot: int | None) -> None:
        super().__init__(name, slot)
        self._listener = listener
        self._label = label
        self._was_away = False

    def stands(self) -> None:
        self._listener.source_stands(self._label, was_away=self._was_away)
        self._was_away = False

    def lost(self) -> None:
        self._was_away = True
        self._listener.source_lost()

    def came(self, origin: str, payload: bytes) -> None:
        self._listener.arrived(self._label, None if self.slot is not None else origin, payload)


class _Block:
    """What one `async with` needs to end its task."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.ended = anyio.Event()


class Notices:
    """What `client.listen` gives: enter it, then iterate. Notices in the order of each channel, `Missed` where some may
    be missing. The iteration ends when the block is left, by whichever task."""

    def __init__(
        self, home: Home, channels: Sequence[str], patterns: Iterable[str], timeout: float, buffer: int
    ) -> None:
        self._channels = dict.fromkeys(check_channel("channel", channel) for channel in channels)
        self._patterns = dict.fromkeys(check_channel("pattern", pattern) for pattern in _listed(patterns))
        if not self._channels and not self._patterns:
            msg = "nothing to listen to: name a channel, or patterns=[...]"
            raise UsageError(msg)
        self._home = home
        self._names = CastNames(home.prefix)
        self._timeout_s = _at_least("timeout", timeout, 0)
        self._buffer = Buffer(int(_at_least("buffer", buffer, 1)), MAX_BUFFERED_BYTES)
        self._recent = RecentIds(REMEMBERED_IDS)
        self._away = len(self._channels) + len(self._patterns)
        self._wake = anyio.Event()
        self._block: _Block | None = None
        self._entered = self._left = False
        self._failure: ShardqError | None = None
        self._taken = 0

    @property
    def complete(self) -> bool:
        """Whether every subscription stands right now: if not, what is broadcast now will be missing."""
        return self._entered and self._failure is None and not self._left and self._away == 0

    # -- the block --------------------------------------------------------------------------------------

    async def __aenter__(self) -> Notices:
        if self._block is not None:
            msg = "these notices were listened to already: call client.listen(...) again"
            raise ClosedError(msg)
        tasks = self._home.tasks
        self._block = block = _Block()
        tasks.start_soon(self._listen, block)
        try:
            await self._until_complete()
        except BaseException:
            await self._end(block)
            raise
        self._entered = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._block is not None
        self._left = True
        self._wake.set()
        await self._end(self._block)

    async def _until_complete(self) -> None:
        with anyio.move_on_after(self._timeout_s):
            while self._away and self._failure is None:
                await self._next_wake()
        if self._failure is not None:
            raise self._failure
        if self._away:
            total = len(self._channels) + len(self._patterns)
            msg = f"{self._away} of {total} subscriptions did not stand in {self._timeout_s:g} s: is every master up?"
            raise StoreUnavailable(msg)

    @staticmethod
    async def _end(block: _Block) -> None:
        block.scope.cancel()
        with anyio.CancelScope(shield=True):
            await block.ended.wait()

    async def _listen(self, block: _Block) -> None:
        """Runs among the client's tasks: entering and leaving the block then needs no order among blocks and tasks."""
        subscriptions = Subscriptions(self._home.cluster, self._fail)
        for channel in self._channels:
            name, slot = self._names.exact(channel), self._names.exact_slot(channel)
            subscriptions.add(_Source(self, channel, name, slot))
        for pattern in self._patterns:
            subscriptions.add(_Source(self, pattern, self._names.ordinary(pattern), None))
        try:
            with block.scope:
                async with anyio.create_task_group() as tasks:
                    await subscriptions.run(tasks)
        finally:
            self._fail(ClosedError("the client was closed, and its listeners with it"))
            block.ended.set()

    # -- from the subscriptions -------------------------------------------------------------------------

    def source_stands(self, label: str, *, was_away: bool) -> None:
        self._away -= 1
        if was_away and self._entered:
            self._buffer.gap(label)
        self._wake.set()

    def source_lost(self) -> None:
        self._away += 1

    def arrived(self, label: str, origin: str | None, frame: bytes) -> None:
        channel = label if origin is None else self._names.channel_of(origin)
        if origin is not None and channel in self._channels:
            return  # it comes by the channel itself
        notice_id = notices.id_of(frame)
        if notice_id is None or self._recent.add(notice_id):
            self._buffer.put(Arrived(label, channel, frame))
            self._wake.set()

    def _fail(self, error: ShardqError) -> None:
        self._failure = self._failure or error
        if self._block is not None:
            self._block.scope.cancel()
        self._wake.set()

    # -- the iteration ----------------------------------------------------------------------------------

    def __aiter__(self) -> Notices:
        return self

    async def __anext__(self) -> Notice | Missed:
        if not self._entered:
            msg = "enter it first: `async with client.listen(...) as notices`"
            raise ClosedError(msg)
        self._taken += 1
        if self._taken % TAKEN_WITHOUT_PAUSE == 0:  # a full buffer must not keep all other tasks waiting
            await anyio.lowlevel.checkpoint()
        while not self._left:
            item = self._buffer.take()
            if item is not None:
                return self._read(item)
            if self._failure is not None:
                raise self._failure
            await self._next_wake()
        raise StopAsyncIteration

    @staticmethod
    def _read(item: Arrived | Missed) -> Notice | Missed:
        if isinstance(item, Missed):
            return item
        try:
            return Notice(item.channel, notices.decode(item.frame))
        except CorruptData as error:
            _log.warning("on channel %r: %s", item.channel, error)
            return Missed((item.source,), 1)

    async def _next_wake(self) -> None:
        if self._wake.is_set():
            self._wake = anyio.Event()
        await self._wake.wait()


def _listed(patterns: object) -> list[object]:
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        msg = f"patterns is a list of str, not {type(patterns).__name__}: write patterns=[...]"
        raise UsageError(msg)
    return list(patterns)


def _at_least(name: str, value: object, least: int) -> float:
    if not isinstance(value, int | float) or not value >= least:
        msg = f"{name} must be a number of at least {least}, not {value!r}"
        raise UsageError(msg)
    return value
