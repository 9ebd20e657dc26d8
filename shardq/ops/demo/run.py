"""The demo from start to end: a cluster, two workers, a replay, one SIGKILL half way, a new worker, the report.

Structured: whatever is started here is gone when `run_demo` returns or raises, a cancellation included. It judges
nothing (report.py) and prints nothing (a Show does).
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread

from shardq.core.records import Key
from shardq.errors import UsageError
from shardq.ops.demo.board import Board, WorkerLine
from shardq.ops.demo.crew import Crew
from shardq.ops.demo.flights import Flight
from shardq.ops.demo.journal import JournalReader
from shardq.ops.demo.report import Observed, Report, judge
from shardq.ops.demo.worker import GROUP, QUEUE
from shardq.ops.exporter import serve_metrics
from shardq.ops.local_cluster import LocalCluster, server_version
from shardq.runtime.client import Client, connect
from shardq.runtime.queue import Queue

MASTERS, SHARDS = 3, 12
FIRST, SECOND, JOINING = "worker-1", "worker-2", "worker-3"
LOOK_EVERY_S, PACE_EVERY_S = 0.1, 0.01
CHECKPOINT_EVERY = 1000
READY_WITHIN_S = 30.0
STUCK_AFTER_S = 60.0

Show = Callable[[Board], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """`rate` is messages a second, 0 for no limit; `port` the first node's, None for free ones."""

    server: Path
    flights: Sequence[Flight]
    rate: float
    port: int | None
    metrics_port: int


async def run_demo(settings: Settings, show: Show) -> Report:
    """Runs the whole demo; `show` is called whenever the board changed."""
    board = Board(_server_name(settings.server), len(settings.flights), time.monotonic())
    cluster = LocalCluster(MASTERS, 0, settings.port, settings.server)
    try:
        board.tell(time.monotonic(), f"starting {MASTERS} masters of {board.server}")
        show(board)
        await anyio.to_thread.run_sync(cluster.start)
        with _folder() as folder, Crew(cluster.url, folder) as crew:
            async with connect(cluster.url) as client:
                return await _Demo(settings, board, show, client, crew, JournalReader(folder)).run()
    finally:
        cluster.stop()


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="shardq-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _server_name(server: Path) -> str:
    """ "Redis 7.0.15" of what the binary says of itself."""
    name, _, version = server_version(server).partition(" server v=")
    return f"{name} {version}"


class _Demo:
    """One run on a cluster that is up."""

    def __init__(
        self, settings: Settings, board: Board, show: Show, client: Client, crew: Crew, journals: JournalReader
    ) -> None:
        self._settings, self._board, self._show = settings, board, show
        self._client, self._crew, self._journals = client, crew, journals
        self._looked = anyio.Event()
        self._observed = Observed(board.server, MASTERS, SHARDS, sent=0, first_send_ns=0)
        self._sent: int | None = None
        self._first_send_ns = 0

    async def run(self) -> Report:
        queue = await self._client.queue(QUEUE, shards=SHARDS)
        await queue.open_group(GROUP)
        self._tell(f"queue {QUEUE!r} of {SHARDS} shards, empty")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch, queue)
            tasks.start_soon(self._serve_metrics)
            await self._gather()
            tasks.start_soon(self._send, queue)
            half = len(self._settings.flights) / 2
            if await self._until(lambda: self._board.handled >= half, STUCK_AFTER_S) and FIRST in self._crew.names:
                await self._kill(queue, FIRST)
                self._start(JOINING)
                await self._until(lambda: self._sent is not None and self._board.handled >= self._sent, STUCK_AFTER_S)
            tasks.cancel_scope.cancel()
        self._look_at_journals()
        observed = replace(
            self._observed,
            sent=self._sent or 0,
            first_send_ns=self._first_send_ns,
            workers=tuple(self._board.workers),
        )
        return judge(self._settings.flights, self._board.handlings, observed)

    # -- what happens -------------------------------------------------------------------------------------------------

    async def _gather(self) -> None:
        # One after the other, so that the first one is the coordinator too: that is the one to be killed.
        for count, name in enumerate((FIRST, SECOND), 1):
            self._start(name)
            if not await self._until(partial(self._is_spread, count), READY_WITHIN_S):
                said = " ".join(event.text for event in self._board.events if event.grave) or "none has ended."
                raise UsageError(f"The workers did not come to hold even shares of the shards: {said}")
        self._tell(f"{FIRST} (also the coordinator) and {SECOND} share the shards, the replay begins")

    async def _send(self, queue: Queue) -> None:
        flights, rate = self._settings.flights, self._settings.rate
        async with queue.producer() as producer:
            self._first_send_ns = time.monotonic_ns()
            if rate:
                self._sent = await producer.send_many(_paced(flights, rate))
            else:
                self._sent = await producer.send_many((flight.tail, flight.value()) for flight in flights)
        self._tell(f"all {self._sent:,} flights are sent")

    def _start(self, name: str) -> None:
        pid = self._crew.start(name)
        self._board.workers[name] = WorkerLine(pid)
        self._tell(f"{name} (pid {pid}) joins")

    async def _kill(self, queue: Queue, name: str) -> None:
        counters = await queue.counters([GROUP])
        groups = {shard: counter.groups[GROUP] for shard, counter in counters.items()}
        owned = frozenset(shard for shard, group in groups.items() if group.held and group.owner == name)
        killed_ns = self._crew.kill(name)
        self._observed = replace(self._observed, killed_worker=name, killed_ns=killed_ns, killed_shards=owned)
        self._board.killed(self._observed)
        line = self._board.workers[name]
        line.state = "killed"
        self._tell(f"{name} (pid {line.pid}) is killed with SIGKILL, it had {len(owned)} shards", grave=True)

    # -- looking ------------------------------------------------------------------------------------------------------

    async def _watch(self, queue: Queue) -> None:
        while True:
            counters = await queue.counters([GROUP])
            nodes = {shard: self._node(keys.slot) for shard, keys in queue.shards.items()}
            self._board.see_counters(time.monotonic(), counters, nodes)
            self._look_at_journals()
            for name, words in self._crew.ended().items():
                self._board.workers[name].state = "ended"
                self._tell(f"{name} ended by itself with {words}", grave=True)
            self._show(self._board)
            looked, self._looked = self._looked, anyio.Event()
            looked.set()
            await anyio.sleep(LOOK_EVERY_S)

    async def _serve_metrics(self) -> None:
        def listening(url: str) -> None:
            self._board.metrics_url = url
            self._tell(f"metrics on {url}")

        await serve_metrics(self._client, self._settings.metrics_port, on_listening=listening)

    def _look_at_journals(self) -> None:
        self._board.see_handlings(time.monotonic(), self._journals.read_new())

    def _node(self, slot: int) -> str:
        node = self._client.cluster.node_of(slot)
        return str(node.name) if node is not None else ""

    async def _until(self, reached: Callable[[], bool], patience_s: float) -> bool:
        """True when it is reached; false when nothing was handled for so long, or no worker is left. The report then
        says what is missing."""
        handled, since = -1, time.monotonic()
        while not reached():
            if self._board.handled != handled:
                handled, since = self._board.handled, time.monotonic()
            if not self._crew.names or time.monotonic() - since > patience_s:
                return False
            await self._looked.wait()
        return True

    def _is_spread(self, workers: int) -> bool:
        names = (FIRST, SECOND)[:workers]
        return all(self._board.owned_by(name) == SHARDS // workers for name in names)

    def _tell(self, text: str, *, grave: bool = False) -> None:
        self._board.tell(time.monotonic(), text, grave=grave)
        self._show(self._board)


async def _paced(flights: Sequence[Flight], rate: float) -> AsyncIterator[tuple[Key, Any]]:
    """Keys and values, so many a second."""
    began = anyio.current_time()
    for count, flight in enumerate(flights):
        ahead_s = began + count / rate - anyio.current_time()
        if ahead_s > PACE_EVERY_S:
            await anyio.sleep(ahead_s)
        elif count % CHECKPOINT_EVERY == 0:
            await anyio.lowlevel.checkpoint()  # one that can't keep up must not starve what sends
        yield flight.tail, flight.value()
