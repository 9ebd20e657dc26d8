"""Writes one shard's messages to an archive so that a crash at any moment neither loses nor repeats one. What the files
are is archive_files.py's. Blocks: call it from a thread.

Invariants, beside those of the files:
- `write` returns when the messages are on disk, and the name of the file too (fsync).
- A message is left out only when it was read back from a sound member that is on disk.
- Only bytes behind the last whole member are ever cut off by another than their writer, and only while nobody is
  writing that file (flock). Where the disk has no locks nothing is cut off.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from shardq.core.history import Record
from shardq.core.jsonlines import exact
from shardq.ops.archive_files import (
    NOWHERE,
    ArchiveFile,
    FileReader,
    Place,
    file_name,
    files_of,
    pack_member,
    place,
    sync,
)

_NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL))


class ShardWriter:
    """Writes one shard's messages under one lease. Not for two threads at once.

    rotate_bytes, rotate_s   a new file is begun when the last one has this size or age; None: no limit

    Making one and `write` raise OSError and CorruptData.
    """

    def __init__(self, folder: Path, fence: int, *, rotate_bytes: int | None, rotate_s: float | None) -> None:
        self._folder, self._fence = folder, fence
        self._rotate_bytes, self._rotate_s = rotate_bytes, rotate_s
        self._path: Path | None = None
        self._begun_monotonic_s = 0.0
        self._size = 0
        self._last = NOWHERE
        folder.mkdir(parents=True, exist_ok=True)
        sync(folder.parent)
        self._highest = self._find_highest()

    def write(self, records: Sequence[Record]) -> None:
        """Returns when all are in the archive. Those that are there already, found by their ids, are not written again:
        a lease's first messages may be ones whose handling was not committed."""
        pairs = [(place(record.id), record) for record in records]
        low = [at for at, _ in pairs if at <= self._highest]
        known = self._find(min(low), max(low)) if low else frozenset[Place]()
        rest = [pair for pair in pairs if pair[0] not in known]
        begin = 0
        for end in range(1, len(rest) + 1):
            if end == len(rest) or rest[end][0] <= rest[end - 1][0]:
                self._append(rest[begin:end])
                begin = end

    def _append(self, pairs: Sequence[tuple[Place, Record]]) -> None:
        """A rising run: behind the file's last line if it fits there, else in a new file."""
        first, last = pairs[0][0], pairs[-1][0]
        member = pack_member(b"".join(exact(record) + b"\n" for _, record in pairs))
        fresh = self._path is None or first <= self._last or self._is_full()
        with self._opened(first, fresh=fresh) as descriptor:
            self._size = _append_bytes(descriptor, member)
        if fresh:
            sync(self._folder)
        self._last, self._highest = last, max(self._highest, last)

    def _is_full(self) -> bool:
        age_s = time.monotonic() - self._begun_monotonic_s
        too_large = self._rotate_bytes is not None and self._size >= self._rotate_bytes
        return too_large or (self._rotate_s is not None and age_s >= self._rotate_s)

    @contextmanager
    def _opened(self, first: Place, *, fresh: bool) -> Iterator[int]:
        """The file to write to. It is not kept open: a worker may have thousands of shards."""
        if fresh or self._path is None:
            descriptor = self._create(first)
        else:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            with _without_locks_too():
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _create(self, first: Place) -> int:
        number = 0
        while True:
            path = self._folder / file_name(first, self._fence, number)
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:  # a failover may give out an epoch twice
                number += 1
                continue
            self._path, self._begun_monotonic_s = path, time.monotonic()
            return descriptor

    # -- what is there already -------------------------------------------------------------------------------

    def _newest_first(self) -> list[ArchiveFile]:
        return sorted(files_of(self._folder), key=lambda file: (file.fence, file.first), reverse=True)

    def _find_highest(self) -> Place:
        """The last message of the newest file. Where an owner wrote on after its lease it is not the last of all: then
        a message may be written twice, to be read once."""
        for each in self._newest_first():
            with FileReader(each.path) as reader:
                members = reader.members()
                _cut(each.path, members[-1][1] if members else 0)
                if members:
                    return reader.lines(*members[-1])[-1][0]
        return NOWHERE

    def _find(self, low: Place, high: Place) -> frozenset[Place]:
        """Which places between these, both inclusive, are in the archive and on disk. It looks from the newest file
        back to the first one that begins before them; what it misses so is written twice, and read once."""
        found: set[Place] = set()
        for each in self._newest_first():
            with FileReader(each.path) as reader:
                os.fsync(reader.descriptor)  # its writer may have died before it did
                for member in reversed(reader.members()):
                    places = [at for at, _ in reader.lines(*member)]
                    found.update(at for at in places if low <= at <= high)
                    if places[0] <= low:
                        break
            if each.first <= low[:2]:
                break
        return frozenset(found)


@contextmanager
def _without_locks_too() -> Iterator[None]:
    """Where the disk has no locks one can't be taken; then nobody cuts anything off there either."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _append_bytes(descriptor: int, data: bytes) -> int:
    """Appends and waits for the disk; returns the file's size. When that fails, the file is what it was."""
    size = os.fstat(descriptor).st_size
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except OSError:
        # Also when only fsync failed: a second fsync may say that all is well although it is not.
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise
    return size + len(data)


def _cut(path: Path, end: int) -> None:
    """Takes away what is torn behind `end`, and a file that is nothing else. Not while its owner is writing to it."""
    if 0 < end == path.stat().st_size:
        return
    descriptor = os.open(path, os.O_WRONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with FileReader(path) as reader:
            members = reader.members()  # once more, now that nobody writes
        if members:
            os.ftruncate(descriptor, members[-1][1])
            os.fsync(descriptor)
        else:
            path.unlink()
    except OSError:
        return  # it is being written to, or the disk has no locks: readers leave a torn end out by themselves
    finally:
        os.close(descriptor)
