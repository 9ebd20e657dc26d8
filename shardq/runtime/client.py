"""The client: one connection to a cluster, and the queues declared on it. Routes and handles nothing itself."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Unpack

import anyio
from anyio.abc import TaskGroup

from shardq.core.meters import Meters
from shardq.core.queue_settings import SettingsChange
from shardq.core.records import Headers, Key
from shardq.core.schedule import Missed, Schedule
from shardq.core.slots import key_slot
from shardq.core.values import KeyOf, ValueType
from shardq.errors import ClosedError, StoreUnavailable, UsageError
from shardq.runtime import broadcast, schedules
from shardq.runtime.broadcast import Notices
from shardq.runtime.declaring import declare_or_join, open_shards
from shardq.runtime.queue import Queue
from shardq.runtime.replica_watch import watch_replicas
from shardq.runtime.tracing import Tracer
from shardq.storage import safety
from shardq.storage.cluster import Cluster
from shardq.storage.commands import Confirm, confirm_fsync, confirm_replicas, pack_command
from shardq.storage.keys import Keys, check_name, registry
from shardq.storage.pipes import Pipes
from shardq.storage.reply import shape

_log = logging.getLogger("shardq")

OPEN_TIMEOUT_S = 15.0


class Client:
    """A connection to a Redis Cluster. Make one with `shardq.connect(url)` and enter it with `async with`.

    Time limits. Entering takes 15 s at most, leaving 2 s. Any other call of a client, and of the queues, groups, dead
    letters, jobs, schedules and histories it gives, ends with its result or a StoreError once Redis has not answered
    one of its requests for 10 s, unless its own text says otherwise.
    """

    def __init__(
        self, url: str, *, prefix: str = "shardq", meters: Meters | None = None, only_looks: bool = False
    ) -> None:
        """`only_looks` is for examining a cluster: nothing is refused, and no functions are loaded."""
        check_name("prefix", prefix)
        self.prefix = prefix
        self.meters = meters
        self.tracing: Tracer | None = None  # set by shardq.otel.instrument
        self.cluster = Cluster(url, may_load=not only_looks)
        self._only_looks = only_looks
        self._stack: contextlib.AsyncExitStack | None = None
        self._pipes: Pipes | None = None
        self._tasks: TaskGroup | None = None
        self._values: dict[str, ValueType] = {}

    async def __aenter__(self) -> Client:
        if self._stack is not None:
            msg = "this client is open already: make another one with shardq.connect(url)"
            raise ClosedError(msg)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self.cluster.aclose)
            await self._connect()
            tasks: TaskGroup = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(tasks.cancel_scope.cancel)
            self._pipes = Pipes(self.cluster, tasks, self.on_retry)
            self._tasks = tasks
            if not self._only_looks:
                tasks.start_soon(watch_replicas, self.cluster)
            stack.callback(self._pipes.close)
            self._stack = stack.pop_all()
        return self

    async def _connect(self) -> None:
        with anyio.move_on_after(OPEN_TIMEOUT_S) as limit:
            if not self._only_looks:
                await safety.check_startup(self.cluster)
            await self.cluster.connect()
            if not self._only_looks:
                await safety.check_primaries(self.cluster)
        if limit.cancelled_caught:
            msg = f"the cluster at {self.cluster.startup_addresses()} did not answer within {OPEN_TIMEOUT_S:g} s"
            raise StoreUnavailable(msg)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._stack, self._pipes, self._tasks = self._stack, None, None, None
        assert stack is not None
        # Without the block's own error: a task group that sees it would hand it on inside an ExceptionGroup.
        await stack.aclose()

    @property
    def pipes(self) -> Pipes:
        if self._pipes is None:
            msg = "this client is not open: use it inside `async with client:`"
            raise ClosedError(msg)
        return self._pipes

    @property
    def tasks(self) -> TaskGroup:
        """Where what lives as long as the client runs; it must not raise."""
        if self._tasks is None:
            msg = "this client is not open: use it inside `async with client:`"
            raise ClosedError(msg)
        return self._tasks

    @property
    def on_retry(self) -> Callable[[str], None] | None:
        """What the pipes of this client's parts tell of calls that are sent again."""
        return self.meters.retried if self.meters is not None else None

    def confirm(self, durability: str | None, replicas: int | None = None) -> Confirm | None:
        """What a write waits for at this durability; None is the master's own answer.

        `replicas` not given means 1, and with "fsync" none where a master has none. Raises UsageError for more than
        every master has.
        """
        available = self.cluster.least_replicas()
        wanted = 1 if replicas is None else replicas
        match durability or ("replica" if available >= wanted else "leader"):
            case "leader":
                return None
            case "fsync" if replicas is None:
                # A disk that a failover passes over saves nothing: where there is a replica, it counts too.
                return confirm_fsync(min(available, 1))
            case "fsync" if available >= wanted >= 0:
                return confirm_fsync(wanted)
            case "replica" if available >= wanted >= 1:
                return confirm_replicas(wanted)
            case "replica" | "fsync" as asked:
                msg = (
                    f"durability={asked!r} with replicas={wanted}, but a master has {available}: "
                    "add replicas, or choose durability='leader' knowing what it may lose"
                )
            case other:
                msg = f"durability {other!r} is not one of 'leader', 'replica', 'fsync'"
        raise UsageError(msg)

    async def queue(
        self,
        name: str,
        *,
        shards: int | None = None,
        type: Any = None,
        key: KeyOf | None = None,
        **settings: Unpack[SettingsChange],
    ) -> Queue:
        """Declares the queue `name` with `shards` shards, or joins the one that exists.

        retention     how long messages stay that every group has finished: "done" (not at all, the default), a time
                      since they were stored ("7d", "12h", "30m", "45s"), or while the queue is smaller than a size
                      ("10GB", "512MB")
        max_backlog   messages in the whole queue that the slowest group has not finished, at most; None: no bound
        overflow      what a send does beyond it: "block" (waits, the default), "reject" (raises QueueFull),
                      "drop-oldest" (makes room by dropping the oldest messages, whoever still wanted them)
        compression   None, "zlib" or "zstd": how producers compress what they send
        jobs          True: every message of `send` and `submit` is a tracked job; those of `send_many`, `tx.send` and
                      schedules are not
        type, key     known to this client only: the type of the values (a Struct, dataclass, TypedDict, anything that
                      msgspec converts to), and the field that is a message's key or a function from value to key.
                      Producers then refuse other values and take the key from the value; workers of this client hand
                      out values of the type. They are remembered until the client joins the queue with others

        A queue that exists keeps the settings that are not named. Raises UnknownQueue when it does not exist and
        `shards` is not given, QueueMismatch when it has other shards or settings than those named, UsageError for what
        is wrong. After a reshard `shards` may be the number that it was declared with, or the number it has now.
        """
        keys = Keys(self.prefix, name)
        values = ValueType(type, key) if type is not None or key is not None else self._values.get(name)
        known = await declare_or_join(self.pipes, keys, shards, settings)
        if values is not None:
            self._values[name] = values
        queue = Queue(self, keys, known.table, known.settings, values)
        if shards is not None:
            await open_shards(self.pipes, keys, known)
            registered = registry(self.prefix)
            await self.pipes.command(key_slot(registered.encode()), pack_command("SADD", registered, name))
        return queue

    async def queue_names(self) -> list[str]:
        """Names of every queue declared under this prefix."""
        key = registry(self.prefix)
        names = await self.pipes.command(key_slot(key.encode()), pack_command("SMEMBERS", key))
        with shape("SMEMBERS"):
            return sorted(name.decode() for name in names)

    # -- schedules -------------------------------------------------------------------------------------------

    async def broadcast(self, channel: str, value: Any) -> None:
        """Tells `value` to everyone who listens right now to `channel`, or to a pattern it matches; it is not stored.

        channel  1 to 256 printable characters; it need not be declared
        value    bytes, str, or what msgpack carries, at most 1 MiB of it

        Each listener gets it once at most. Returned means that Redis has it, not that anybody listened. Raises
        UsageError (the channel), InvalidValue, MessageTooLarge, or StoreError: when `outcome_unknown` is set some may
        have been told, and a second try may tell them twice.
        """
        await broadcast.broadcast(self.pipes, self.prefix, channel, value)

    def listen(
        self, *channels: str, patterns: Iterable[str] = (), timeout: float = 10.0, buffer: int = 10_000
    ) -> Notices:
        """Listens to channels, and to every channel that one of the patterns matches, while it is entered.

            async with client.listen("prices", patterns=["user:*"]) as notices:
                async for notice in notices:
                    if isinstance(notice, shardq.Missed): ...   # some may be missing here: read the state anew
                    else: ...                                   # notice.channel, notice.value

        patterns  glob patterns as Redis has them: * ? [ab] [^a] [a-z], a backslash takes away a meaning. They match
                  bytes of UTF-8: a ? is no match for a character beyond ASCII
        timeout   seconds within which every subscription must stand; entering raises StoreUnavailable otherwise
        buffer    notices that wait for a slow reader; beyond them, or 64 MiB, the oldest are dropped and a Missed
                  stands in their place

        What is broadcast after it was entered comes, once at most, and what one sender broadcast on one channel in its
        order (for patterns: unless the channel's slot moves in between). Where something may have been lost a Missed
        stands among the notices, as soon as the subscription stands again. `notices.complete` tells whether all do.
        Raises UsageError here for bad channels, patterns and limits; StoreRefused on entering, or later while
        iterating, when the user may not subscribe.
        """
        return Notices(self, channels, patterns, timeout, buffer)

    async def schedule(
        self,
        queue: str,
        name: str,
        cron: str,
        *,
        key: Key = None,
        value: Any = None,
        headers: Headers | None = None,
        timezone: str = "UTC",
        missed: Missed = "last",
    ) -> Schedule:
        """From now on `queue` gets a message at every tick of `cron`, once. Returns the schedule as it stands.

        Safe to repeat: what stands already goes on; another definition of that name takes its place.

        name      of the schedule, unique in the queue
        cron      minute, hour, day of month, month, day of week; a sixth field in front of them are seconds
        timezone  whose clocks `cron` means, as "Europe/Berlin"
        key, value, headers   of each message; its headers say `shardq-schedule` and `shardq-tick` (ISO time) besides
        missed    ticks at which no worker or coordinator of the queue was up: "last" (only the latest is sent, with
                  their number less one in the header `shardq-missed`), "all" (each, the latest 1000) or "skip" (none
                  that is over a minute late)

        The leader of any group of the queue sends, by the clock of its machine: with no worker and no coordinator
        nothing is sent. Raises UnknownQueue, UsageError, InvalidKey, InvalidValue, MessageTooLarge (over 64 KiB).
        """
        wanted = schedules.make_schedule(
            name, cron, key=key, value=value, headers=headers, timezone=timezone, missed=missed
        )
        return await self.put_schedule(queue, wanted)

    async def put_schedule(self, queue: str, schedule: Schedule) -> Schedule:
        """`schedule` for one that is made already."""
        joined = await self.queue(queue)
        return await schedules.put(self.pipes, joined.keys, joined.table, schedule, self.confirm(None))

    async def unschedule(self, queue: str, name: str) -> bool:
        """Removes a schedule; false when there was none. When this returned, it sends nothing any more."""
        joined = await self.queue(queue)
        return await schedules.remove(self.pipes, joined.keys, joined.table, name, self.confirm(None))

    async def schedules(self, queue: str) -> list[Schedule]:
        """The schedules of a queue, by name."""
        joined = await self.queue(queue)
        return await schedules.read(self.pipes, joined.keys)


def connect(url: str, *, prefix: str = "shardq", meters: Meters | None = None) -> Client:
    """A client for the cluster that `url` (redis://[user:password@]host:port, rediss:// for TLS) is a node of.

    Connects when it is entered: `async with shardq.connect(url) as client:`. Entering raises StoreUnavailable (no node
    answers), AuthenticationFailed, UnsafeStore (not a cluster, too old, may evict keys) or FunctionsMissing.

    `meters` (shardq.Meters) counts what producers and workers of this client do; without it nothing is measured.
    """
    return Client(url, prefix=prefix, meters=meters)
