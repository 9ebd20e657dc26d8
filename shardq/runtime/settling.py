"""What becomes of the batches of one producer: opened with it, sent through its pipes, stored or given up, and nobody
left waiting when it is closed. Takes no messages; producer.py does.

Invariants:
- `buffered_bytes` counts every message that is not yet stored or given up; beyond the limit senders wait.
- Every batch ends: stored, given up at its time, or with the producer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from time import monotonic
from types import TracebackType
from typing import Self

import anyio

from shardq.core.compression import Compression
from shardq.core.meters import SendMeters
from shardq.core.routing import RoutingTable
from shardq.errors import ClosedError, NotStored, ShardqError, StoreRefused, StoreTimeout, StoreUnavailable
from shardq.runtime.batches import PendingBatch, all_ended
from shardq.runtime.buffers import ShardBuffer
from shardq.runtime.filling import Limits
from shardq.runtime.holding import LONGEST_S
from shardq.runtime.rerouting import Rerouting, Source
from shardq.runtime.staging import Filler
from shardq.storage.cluster import Cluster
from shardq.storage.commands import Confirm
from shardq.storage.keys import ShardKeys
from shardq.storage.pipes import Pipes

_log = logging.getLogger("shardq")


class Settling:
    """A producer but for its sends. `id` is the one by which shards know its batches."""

    def __init__(
        self,
        producer_id: str,
        cluster: Cluster,
        table: RoutingTable,
        shards: Mapping[int, ShardKeys],
        confirm: Confirm | Callable[[], Confirm | None] | None,
        limits: Limits,
        max_buffered_bytes: int,
        delivery_timeout_s: float,
        compression: Compression | None,
        meters: SendMeters | None,
        on_retry: Callable[[str], None] | None,
        source: Source | None,
    ) -> None:
        self.id = producer_id
        self._choose = confirm if callable(confirm) else None
        self._confirm = None if callable(confirm) else confirm
        self._falls = 0
        self.compression = compression
        self._meters, self._on_retry = meters, on_retry
        self.delivery_timeout_s = delivery_timeout_s
        self._cluster = cluster
        self._max_buffered_bytes = max_buffered_bytes
        self._most_messages, self._source = limits.batch_messages, source
        if source is not None:
            limits = limits._replace(batch_messages=source.most_in_batch(limits.batch_messages))
        buffers = [ShardBuffer(self, index, shard.id, shards[shard.id]) for index, shard in enumerate(table.shards)]
        self._filler = Filler(buffers, table, limits, cluster.node_of)
        self._rerouting: Rerouting | None = None
        self._space: anyio.Event | None = None
        self._unreported: dict[PendingBatch, None] = {}
        self._bulk_failures: list[list[PendingBatch]] = []  # one list for each send_many under way
        self._failed_batches = 0
        self._stack: AsyncExitStack | None = None
        self._pipes: Pipes | None = None

    async def __aenter__(self) -> Self:
        if self._stack is not None:
            msg = "this producer is open already: make another one with queue.producer()"
            raise ClosedError(msg)
        async with AsyncExitStack() as stack:
            tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(tasks.cancel_scope.cancel)
            self.loop = asyncio.get_running_loop()
            self.woken = self.loop.create_future()
            self.woken.set_result(None)
            self._pipes = Pipes(self._cluster, tasks, self._on_retry)
            if self._source is not None:
                self._rerouting = Rerouting(self, self._filler, self._source, self._most_messages, tasks.start_soon)
            if self._meters is not None:
                self._meters.buffered.append(self._read_buffered)
                stack.callback(self._meters.buffered.remove, self._read_buffered)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self.close()
            return
        if self._filler.unsettled:
            lost = self._unsettled_messages()
            _log.warning("producer left by %s with %d messages not known to be stored", kind.__name__, lost)
        await self._shut()

    async def close(self) -> None:
        """Flushes, within the time that takes, then closes. Raises NotStored like `flush`; closed it is in any case."""
        try:
            await self.flush()
        finally:
            await self._shut()

    async def _shut(self) -> None:
        self._pipes = None
        self._filler.gather_all()
        stack, self._stack = self._stack, AsyncExitStack()
        try:
            if stack is not None:
                await stack.aclose()
        finally:
            for batch in list(self._filler.unsettled):
                # Whoever still waits for a send must not wait for ever.
                self.ended(batch, StoreTimeout("the producer was closed with this message under way"), ())
            if self._space is not None:
                self._space.set()

    @property
    def confirm(self) -> Confirm | None:
        """What its batches wait for. The default is looked at anew while there is no replica to wait for, so that a
        producer opened while replicas were away does not go without them for ever; it goes back only when nodes were
        forgotten, which an operator does."""
        if self._choose is not None:
            falls = self._cluster.replicas.falls
            if self._confirm is None or falls != self._falls:
                self._confirm, self._falls = self._choose(), falls
        return self._confirm

    @property
    def pipes(self) -> Pipes:
        if self._pipes is None:
            msg = "this producer is not open: use it inside `async with queue.producer() as producer:`"
            raise ClosedError(msg)
        return self._pipes

    def _read_buffered(self) -> int:
        return self._filler.buffered_bytes

    @property
    def buffered_bytes(self) -> int:
        """Bytes of the messages that are neither stored nor given up."""
        return self._filler.buffered_bytes

    async def flush(self) -> None:
        """Waits until every message sent so far is stored or given up: `delivery_timeout` and one try at most.

        Raises NotStored when some are not, or not known to be: those that no `send` has raised an error for.
        """
        self._filler.gather_all()
        waited = await all_ended(self._filler.unsettled)
        self._raise_lost([batch for batch in waited if batch.error is not None])

    def _raise_lost(self, failed: list[PendingBatch]) -> None:
        lost = list(dict.fromkeys([*self._unreported, *failed]))
        self._unreported = {}
        if lost:
            count = sum(batch.count for batch in lost)
            where = ", ".join(str(shard) for shard in sorted({batch.shard.id for batch in lost}))
            unknown = any(getattr(batch.error, "outcome_unknown", False) for batch in lost)
            state = "are not known to be stored" if unknown else "are not stored"
            msg = f"{count} messages of shards {where} {state}: {lost[0].error}"
            raise NotStored(msg, count) from lost[0].error

    # -- room for more ---------------------------------------------------------------------------------------

    async def _wait_before_chunk(self) -> None:
        if self._filler.buffered_bytes <= self._max_buffered_bytes:
            _ = self.pipes  # raises ClosedError
            return
        with self._filler.holding.paced(), anyio.move_on_after(LONGEST_S):
            await self._wait_for_space()
        if self._filler.buffered_bytes > self._max_buffered_bytes:
            with self._filler.holding.off():
                await self._wait_for_space()

    async def _wait_for_space(self, within_s: float | None = None) -> None:
        _ = self.pipes  # raises ClosedError
        if self._filler.buffered_bytes <= self._max_buffered_bytes:
            return
        with anyio.move_on_after(within_s):
            while self._filler.buffered_bytes > self._max_buffered_bytes:
                if self._space is None:
                    self._space = anyio.Event()
                await self._space.wait()
                _ = self.pipes  # it may have been closed while this waited
            return
        msg = (
            f"not sent: {self.buffered_bytes} bytes that were sent before it wait still after {within_s:g} s; is every "
            "master up, or max_buffered_bytes too small?"
        )
        raise StoreUnavailable(msg)

    # -- what shards' buffers tell ---------------------------------------------------------------------------

    def full(self, batch: PendingBatch) -> bool:
        """Whether a batch takes no more messages."""
        return self._filler.full(batch)

    def gather(self, shard: ShardBuffer) -> None:
        """Takes what is staged for a shard into its batches."""
        self._filler.gather(shard)

    def ended(self, batch: PendingBatch, error: ShardqError | None, entries: tuple[str, ...]) -> None:
        """A batch was stored, or given up."""
        if self._meters is not None:
            self._measure(self._meters, batch, error)
        self._filler.left(batch)
        self._filler.holding.call_ended(batch.shard)
        if error is not None:
            self._failed_batches += 1
            self._unreported[batch] = None
            for failures in self._bulk_failures:
                failures.append(batch)
        batch.end(error, entries)
        if self._space is not None and self._filler.buffered_bytes <= self._max_buffered_bytes:
            self._space.set()
            self._space = None

    def _measure(self, meters: SendMeters, batch: PendingBatch, error: ShardqError | None) -> None:
        if error is None:
            meters.stored += batch.count
            meters.batches.observe(monotonic() - batch.opened_monotonic_s)
        else:
            meters.failed += batch.count

    def restart(self, shard: ShardBuffer) -> None:
        """A shard has more to send; nothing is sent any more once the producer is closed."""
        if self._pipes is not None:
            self._filler.holding.ready(shard)

    def refused(self, shard: ShardBuffer, error: ShardqError | None) -> None:
        """A shard takes no messages any more, or its keys are gone (`error`)."""
        if self._rerouting is not None:
            self._rerouting.refused(shard, error)
        else:
            shard.give_up(error or StoreRefused(f"{shard.keys.stream} takes no messages: open the queue again"))

    def _unsettled_messages(self) -> int:
        self._filler.gather_all()
        return sum(len(batch.keys) or batch.count for batch in self._filler.unsettled)
