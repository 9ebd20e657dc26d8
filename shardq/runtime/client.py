"""The client: one connection to a cluster, and the queues declared on it. Routes and handles nothing itself."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Literal

import anyio
from anyio.abc import TaskGroup

from shardq.core.routing import RoutingTable
from shardq.core.slots import key_slot
from shardq.errors import ClosedError, QueueMismatch, UnknownQueue, UsageError
from shardq.runtime.producer import Producer
from shardq.runtime.tasks import task_group
from shardq.storage import calls, counters, safety
from shardq.storage.cluster import Cluster, Confirm, confirm_fsync, confirm_replicas, pack_command
from shardq.storage.keys import Keys, ShardKeys, check_name, registry
from shardq.storage.pipes import Pipes

# Well under PRODUCER_IDLE_MS in scripts/common.lua: a retry must find the sequence it repeats.
LONGEST_DELIVERY_S = 1800

Durability = Literal["leader", "replica", "fsync"]


class Queue:
    """A declared queue: its routing table and the names of its keys. Get one from `Client.queue`."""

    def __init__(self, client: Client, keys: Keys, table: RoutingTable) -> None:
        self.client = client
        self.keys = keys
        self.table = table
        self.name = keys.queue
        self.shards: dict[int, ShardKeys] = {shard.id: keys.shard(shard.id, shard.tag) for shard in table.shards}

    def producer(
        self,
        *,
        durability: Durability | None = None,
        replicas: int = 1,
        max_batch_messages: int = 1000,
        max_batch_bytes: int = 256 * 1024,
        max_message_bytes: int = 1024 * 1024,
        max_buffered_bytes: int = 32 * 1024 * 1024,
        delivery_timeout: float = 120.0,
    ) -> Producer:
        """A producer of this queue; enter it with `async with`.

        durability          when a send counts as stored: "leader" (the master has it), "replica" (`replicas` replicas
                            have it too), "fsync" (on the master's disk too). Default: "replica" where every master has
                            enough replicas, else "leader"
        max_batch_*         bounds of one record batch
        max_message_bytes   a larger message is refused before it is sent (MessageTooLarge)
        max_buffered_bytes  beyond it `send` waits
        delivery_timeout    seconds after which a batch that could not be stored is given up
        """
        for name, value in (
            ("max_batch_messages", max_batch_messages),
            ("max_batch_bytes", max_batch_bytes),
            ("max_message_bytes", max_message_bytes),
            ("max_buffered_bytes", max_buffered_bytes),
            ("delivery_timeout", delivery_timeout),
        ):
            if value <= 0:
                msg = f"{name} must be above 0, not {value}"
                raise UsageError(msg)
        if delivery_timeout > LONGEST_DELIVERY_S:
            msg = (
                f"delivery_timeout is at most {LONGEST_DELIVERY_S} s: a producer's sequence is forgotten after an hour"
            )
            raise UsageError(msg)
        confirm = self.client.confirm(durability, replicas)
        return Producer(
            self.client.cluster,
            self.table,
            self.shards,
            confirm,
            min(max_batch_messages, 65535),
            max_batch_bytes,
            max_message_bytes,
            max_buffered_bytes,
            delivery_timeout,
        )

    async def open_group(self, group: str) -> None:
        """Registers a consumer group on every shard; safe to repeat. It reads from the first stored message."""
        check_name("group", group)
        async with task_group() as tasks:
            for shard in self.shards.values():
                tasks.start_soon(calls.open_group, self.client.pipes, shard, group)

    async def counters(self, groups: Sequence[str] | None = None) -> dict[int, counters.ShardCounters]:
        """The counters of every shard, and of the named groups (default: every registered one)."""
        found: dict[int, counters.ShardCounters] = {}
        if groups is None:
            first = await counters.inspect(self.client.pipes, next(iter(self.shards.values())), ())
            groups = first.registered

        async def look(shard: int) -> None:
            found[shard] = await counters.inspect(self.client.pipes, self.shards[shard], groups)

        async with task_group() as tasks:
            for shard in self.shards:
                tasks.start_soon(look, shard)
        return dict(sorted(found.items()))


class Client:
    """A connection to a Redis Cluster. Make one with `shardq.connect(url)` and enter it with `async with`."""

    def __init__(self, url: str, *, prefix: str = "shardq") -> None:
        check_name("prefix", prefix)
        self.prefix = prefix
        self.cluster = Cluster(url)
        self._stack: contextlib.AsyncExitStack | None = None
        self._pipes: Pipes | None = None

    async def __aenter__(self) -> Client:
        if self._stack is not None:
            msg = "this client is open already: make another one with shardq.connect(url)"
            raise ClosedError(msg)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self.cluster.aclose)
            await safety.check_startup(self.cluster)
            await self.cluster.connect()
            await safety.check_primaries(self.cluster)
            tasks: TaskGroup = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(tasks.cancel_scope.cancel)
            self._pipes = Pipes(self.cluster, tasks)
            stack.callback(self._pipes.close)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._stack, self._pipes = self._stack, None, None
        assert stack is not None
        # Without the block's own error: a task group that sees it would hand it on inside an ExceptionGroup.
        await stack.aclose()

    @property
    def pipes(self) -> Pipes:
        if self._pipes is None:
            msg = "this client is not open: use it inside `async with client:`"
            raise ClosedError(msg)
        return self._pipes

    def confirm(self, durability: str | None, replicas: int = 1) -> Confirm | None:
        """What a write waits for at this durability; None is the master's own answer."""
        available = self.cluster.least_replicas()
        match durability or ("replica" if available >= replicas else "leader"):
            case "leader":
                return None
            case "fsync":
                return confirm_fsync(0)
            case "replica" if available >= replicas >= 1:
                return confirm_replicas(replicas)
            case "replica":
                msg = (
                    f"durability='replica' with replicas={replicas}, but a master has {available}: "
                    "add replicas, or choose durability='leader' knowing what it may lose"
                )
            case other:
                msg = f"durability {other!r} is not one of 'leader', 'replica', 'fsync'"
        raise UsageError(msg)

    async def queue(self, name: str, *, shards: int | None = None) -> Queue:
        """Declares the queue `name` with `shards` shards, or joins the one that exists.

        Raises UnknownQueue when it does not exist and `shards` is not given, QueueMismatch when it has another number.
        """
        keys = Keys(self.prefix, name)
        table = await self._stored_table(keys)
        if table is None:
            if shards is None:
                msg = f"queue {name!r} does not exist: declare it with client.queue({name!r}, shards=N)"
                raise UnknownQueue(msg)
            wanted = RoutingTable.equal(shards)
            _, data = await calls.declare(self.pipes, keys, wanted.version, wanted.to_bytes())
            table = RoutingTable.from_bytes(data)
        if shards is not None and len(table.shards) != shards:
            msg = f"queue {name!r} has {len(table.shards)} shards, not {shards}: join it with client.queue({name!r})"
            raise QueueMismatch(msg)
        queue = Queue(self, keys, table)
        if shards is not None:
            await self._open_shards(queue)
        return queue

    async def queue_names(self) -> list[str]:
        """Names of every queue declared under this prefix."""
        key = registry(self.prefix)
        names = await self.pipes.command(key_slot(key.encode()), pack_command("SMEMBERS", key))
        return sorted(name.decode() for name in names)

    async def _stored_table(self, keys: Keys) -> RoutingTable | None:
        data = await self.pipes.command(keys.control_slot, pack_command("HGET", keys.routing, "table"))
        return RoutingTable.from_bytes(data) if data is not None else None

    async def _open_shards(self, queue: Queue) -> None:
        async with task_group() as tasks:
            for shard in queue.shards.values():
                tasks.start_soon(calls.open_shard, self.pipes, shard)
        key = registry(self.prefix)
        await self.pipes.command(key_slot(key.encode()), pack_command("SADD", key, queue.name))


def connect(url: str, *, prefix: str = "shardq") -> Client:
    """A client for the cluster that `url` (redis://[user:password@]host:port, rediss:// for TLS) is a node of.

    Connects when it is entered: `async with shardq.connect(url) as client:`. Entering raises StoreUnavailable (no node
    answers), AuthenticationFailed, UnsafeStore (not a cluster, too old, may evict keys) or FunctionsMissing.
    """
    return Client(url, prefix=prefix)
