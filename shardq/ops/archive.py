"""An archive of a queue: a group of its own that writes every message to disk before it counts as finished, so that a
queue that keeps messages until all groups are done keeps them until they are archived.

Each shard's files are written by the owner of its lease alone. Several processes may share a folder, on a network disk
too: who owns a shard is decided in Redis, and a file belongs to one lease (archive_files.py). Nothing is ever deleted.

A failure to write stops the archive with ArchiveFailed. It never fails messages: they would be tried again out of order
and end as dead letters; so they stay in the queue, and a restart goes on where this ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import anyio
import anyio.to_thread

from shardq.core.history import Record
from shardq.core.ids import entry_key
from shardq.core.jsonlines import read_exact
from shardq.core.message import Message
from shardq.errors import ArchiveFailed, UsageError
from shardq.ops.archive_files import lines_of_shard, open_folder, owner_of, shard_folders
from shardq.ops.archive_write import ShardWriter
from shardq.runtime.client import Client
from shardq.runtime.worker import Worker

ROTATE_BYTES = 64 * 1024 * 1024
LEAST_ROTATE_BYTES = 1024
LEAST_ROTATE_S = 1.0


class Archive:
    """Archives a queue to a folder while `run` runs.

    queue, group   names; the queue must exist when it runs. The group is the archive's own
    folder         made if it does not exist; holds one queue's archive
    rotate_bytes   a shard's file is followed by a new one when it has this size; None: whatever its size
    rotate_s       ... or this age
    concurrency    shards written at a time
    lease          seconds: the shards of a process that crashed rest about this long
    name           this process's name in the group; made up when not given

    Raises UsageError for a name or a number that can't be.
    """

    def __init__(
        self,
        queue: str,
        folder: Path | str,
        *,
        group: str = "archive",
        rotate_bytes: int | None = ROTATE_BYTES,
        rotate_s: float | None = None,
        concurrency: int = 8,
        lease: float = 5.0,
        name: str | None = None,
    ) -> None:
        if rotate_bytes is not None and rotate_bytes < LEAST_ROTATE_BYTES:
            raise UsageError(f"rotate_bytes is at least {LEAST_ROTATE_BYTES}, not {rotate_bytes}")
        if rotate_s is not None and rotate_s < LEAST_ROTATE_S:
            raise UsageError(f"rotate_s is at least {LEAST_ROTATE_S:g}, not {rotate_s}")
        self._folder = Path(folder)
        self._rotate_bytes, self._rotate_s = rotate_bytes, rotate_s
        self._worker = Worker(queue, group=group, name=name, concurrency=concurrency, lease=lease)
        self._worker.batch_handler(self._handle)
        self._writers: dict[int, tuple[int, ShardWriter]] = {}
        self._scope: anyio.CancelScope | None = None
        self._failures: list[Exception] = []
        self._stopping = False

    def stop(self) -> None:
        """Finishes what is being written, hands the shards over and lets `run` return."""
        self._stopping = True
        self._worker.stop()

    async def run(self, client: Client) -> None:
        """Archives until `stop()` or cancellation. Raises ArchiveFailed when something can't be written: nothing is
        lost by that. Raises UsageError when the folder can't be this queue's archive, UnknownQueue, StoreError."""
        self._failures, self._writers, self._stopping = [], {}, False
        await anyio.to_thread.run_sync(open_folder, self._folder, self._worker.queue, self._worker.group)
        if self._stopping:
            return
        with anyio.CancelScope() as self._scope:
            await self._worker.run(client)
        for error in self._failures:
            msg = f"the archive in {self._folder} stopped, nothing is lost by that: it can't be written ({error!r})"
            raise ArchiveFailed(msg) from error

    async def _handle(self, messages: Sequence[Message]) -> None:
        try:
            # Not left before the thread is through: whoever is called next for this shard must find it written.
            await anyio.to_thread.run_sync(self._write, messages)
        except Exception as error:
            self._failures.append(error)
            assert self._scope is not None
            self._scope.cancel()
            await anyio.sleep_forever()  # neither finished nor failed: the messages stay pending

    def _write(self, messages: Sequence[Message]) -> None:
        shard, fence = messages[0].shard, messages[0].fence
        if shard not in self._writers or self._writers[shard][0] != fence:
            folder = self._folder / str(shard)
            writer = ShardWriter(folder, fence, rotate_bytes=self._rotate_bytes, rotate_s=self._rotate_s)
            self._writers[shard] = fence, writer
        self._writers[shard][1].write([record_of(message) for message in messages])


def record_of(message: Message) -> Record:
    return Record(
        message.id,
        message.shard,
        message.key,
        message.value,
        message.headers,
        message.sent_at_ms,
        entry_key(message.batch.entry)[0],
    )


def read(folder: Path | str, shards: Iterable[int] | None = None) -> Iterator[Record]:
    """Every message of an archive, shard by shard, in order and each once; `shards`: only these. Memory does not grow
    with it, and it may be written to meanwhile. Raises UsageError for a folder that is no archive, CorruptData."""
    return map(read_exact, read_lines(folder, shards))


def read_lines(folder: Path | str, shards: Iterable[int] | None = None) -> Iterator[bytes]:
    """The same as lines of JSON (core/jsonlines.py, the exact form), without line breaks."""
    owner_of(Path(folder))
    folders = dict(shard_folders(Path(folder)))
    chosen = folders if shards is None else dict.fromkeys(shards)
    return chain.from_iterable(lines_of_shard(folders[shard]) for shard in chosen if shard in folders)
