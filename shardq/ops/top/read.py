"""Looks at the queues again and again in the background, for `shardq top`. Reads only; an outage becomes the board's
trouble, never an error.
"""

from __future__ import annotations

import anyio

from shardq.errors import ShardqError
from shardq.ops.inspect import QueueView, read_queue, read_queues
from shardq.ops.top.board import Board
from shardq.runtime.client import Client

CALL_S = 2.0
SILENCE_S = 3.0


class Watcher:
    """The board, kept up to date by `run`. `queue` is the only one that is read, None for all; it may be changed."""

    def __init__(self, client: Client, queue: str | None, interval_s: float) -> None:
        self.board = Board()
        self._client, self._queue, self._interval_s = client, queue, interval_s
        self._at_once = anyio.Event()
        self._changed = anyio.Event()
        self._asked_at_s: float | None = None

    async def look(self) -> None:
        """Reads once. What can't be read is said in the board."""
        self._asked_at_s = anyio.current_time()
        queue = self._queue
        try:
            views, unreadable = await self._read(queue)
        except ShardqError as error:
            self.board = self.board.failed(str(error))
        else:
            self.board = self.board.updated(views, unreadable, whole=queue is None)
        self._asked_at_s = None
        self._changed.set()
        self._changed = anyio.Event()

    async def _read(self, queue: str | None) -> tuple[dict[str, QueueView], dict[str, str]]:
        if queue is None:
            return await read_queues(self._client, await self._client.queue_names(), timeout_s=CALL_S)
        try:
            return {queue: await read_queue(self._client, queue, timeout_s=CALL_S)}, {}
        except ShardqError as error:
            return {}, {queue: str(error)}

    async def run(self) -> None:
        """Waits for the interval, then looks; as often as a look takes where that is longer. Until cancelled."""
        due_s = anyio.current_time() + self._interval_s
        while True:
            with anyio.move_on_after(due_s - anyio.current_time()):
                await self._at_once.wait()
            self._at_once = anyio.Event()
            due_s = anyio.current_time() + self._interval_s
            await self.look()

    def watch(self, queue: str | None) -> None:
        """Reads this queue only from now on, or all; at once when that is a change."""
        if queue != self._queue:
            self._queue = queue
            self._at_once.set()

    async def changed(self) -> None:
        """Waits for the next look to end."""
        await self._changed.wait()

    @property
    def silence(self) -> str:
        """What to say while a look takes too long, else ''."""
        if self._asked_at_s is None or (gone_s := anyio.current_time() - self._asked_at_s) < SILENCE_S:
            return ""
        return f"no answer for {gone_s:.0f} s: these are the last values"
