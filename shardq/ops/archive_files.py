"""What an archive is on disk, and how it is read. Writes nothing but the folder and its marker (archive_write.py does).

    <folder>/archive.json                                  {"format": 1, "queue": "orders", "group": "archive"}
    <folder>/<shard>/<first entry id>.<fence>.jsonl.gz     messages of one shard in order, one line of JSON each

A file is a row of gzip members, each with whole lines: any gzip reads it. A member's header holds, in an extra field
`SQ`, the member's length in bytes, so that files are searched without being unpacked.

Invariants:
- A file is written under one lease only (`fence` is its epoch): two owners never write to one file. One whose lease is
  gone may still have added to its own what its successor writes too: reading gives each message once.
- Within a file ids rise.
- Only the end of a file may be torn, and is left out. Damage anywhere else is CorruptData, never a shorter file.
"""

from __future__ import annotations

import heapq
import json
import os
import re
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from shardq.core.ids import MessageId, entry_key
from shardq.errors import CorruptData, UsageError

FORMAT = 1
MARKER = "archive.json"
LEVEL = 6
ROOM_BYTES = 1024 * 1024

MAX_MEMBER_BYTES = 1 << 30
"""No member is unpacked further: more than the largest message that Redis takes makes as a line."""

Place = tuple[int, int, int]
"""Where a message stands in its shard: (ms, seq) of its entry, index in the entry."""

NOWHERE: Place = (-1, -1, -1)
"""Before every message."""

_HEADER = struct.Struct("<4sIBBH2sHI")
_TRAILER_BYTES = 8
_MAGIC, _EXTRA = b"\x1f\x8b\x08\x04", b"SQ"
_NAME = re.compile(r"(\d+)-(\d+)\.(\d+)(?:\.\d+)?\.jsonl\.gz")


class _Id(msgspec.Struct):
    id: str


_id_of = msgspec.json.Decoder(_Id).decode


def place(message_id: str) -> Place:
    """Raises UsageError when the text is no message id."""
    found = MessageId.parse(message_id)
    return (*entry_key(found.entry), found.index)


# -- the folder --------------------------------------------------------------------------------------------------------


def open_folder(folder: Path, queue: str, group: str) -> None:
    """Makes the archive's folder, or joins the one that exists. Raises UsageError when it is another's, or there is no
    room: a worker that takes messages only to fail over and over would make them suspect of killing it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _try_writing(folder)
        marker = folder / MARKER
        if not marker.exists():
            draft = _draft(folder)
            draft.write_text(json.dumps({"format": FORMAT, "queue": queue, "group": group}) + "\n")
            sync(draft)
            draft.replace(marker)  # never half a marker; and two writers of one archive put down the same
            sync(folder)
            sync(folder.parent)
    except OSError as error:
        msg = f"{folder} can't be written to ({error}): make room, or name a folder that this user may write to"
        raise UsageError(msg) from error
    found = owner_of(folder)
    if found != (queue, group):
        msg = f"{folder} is the archive of queue {found[0]!r} by group {found[1]!r}: name another folder"
        raise UsageError(msg)


def _draft(folder: Path) -> Path:
    return folder / f".{MARKER}.{os.getpid()}.{time.monotonic_ns()}"


def _try_writing(folder: Path) -> None:
    draft = _draft(folder)
    try:
        draft.write_bytes(os.urandom(ROOM_BYTES))
        sync(draft)
    finally:
        draft.unlink(missing_ok=True)


def owner_of(folder: Path) -> tuple[str, str]:
    """The queue whose archive this is, and the group that writes it. Raises UsageError when it is no archive."""
    try:
        found = json.loads((folder / MARKER).read_bytes())
        if found["format"] == FORMAT:
            return str(found["queue"]), str(found["group"])
        msg = f"{folder} is an archive of format {found['format']!r}, this shardq reads {FORMAT}: use a newer one"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        msg = f"{folder} is no archive: its {MARKER} can't be read ({error})"
        raise UsageError(msg) from error
    raise UsageError(msg)


def shard_folders(folder: Path) -> list[tuple[int, Path]]:
    return sorted((int(each.name), each) for each in folder.iterdir() if each.name.isdecimal() and each.is_dir())


def sync(path: Path) -> None:
    """Returns when the file, or the folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- members -----------------------------------------------------------------------------------------------------------


def pack_member(lines: bytes) -> bytes:
    """One gzip member."""
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = packer.compress(lines) + packer.flush()
    size = _HEADER.size + len(body) + _TRAILER_BYTES
    header = _HEADER.pack(_MAGIC, 0, 0, 255, 8, _EXTRA, 4, size)
    return header + body + struct.pack("<II", zlib.crc32(lines), len(lines) & 0xFFFFFFFF)


def unpack_member(member: bytes) -> bytes | None:
    """Its lines; None when it is not sound."""
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        lines = unpacker.decompress(member, MAX_MEMBER_BYTES)
    except zlib.error:
        return None
    return lines if unpacker.eof and not unpacker.unused_data else None


def file_name(first: Place, fence: int, number: int) -> str:
    """The name of a file that begins with this message; `number` is 0 unless that name is taken."""
    more = f".{number}" if number else ""
    return f"{first[0]}-{first[1]}.{fence}{more}.jsonl.gz"


@dataclass(frozen=True, slots=True)
class ArchiveFile:
    """One file, by its name: the entry it begins in, and the lease it was written under."""

    path: Path
    first: tuple[int, int]
    fence: int


def files_of(folder: Path) -> list[ArchiveFile]:
    """The files of one shard, by the entry they begin in."""
    found = [(each, _NAME.fullmatch(each.name)) for each in folder.iterdir()]
    files = [ArchiveFile(path, (int(m[1]), int(m[2])), int(m[3])) for path, m in found if m is not None]
    return sorted(files, key=lambda file: (file.first, file.fence, file.path.name))


class FileReader:
    """A file, open for reading, as it was when it was opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.descriptor = os.open(path, os.O_RDONLY)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.descriptor)

    def members(self) -> list[tuple[int, int]]:
        """(offset, end) of every whole member; what is torn behind them is left out. Raises CorruptData."""
        found: list[tuple[int, int]] = []
        file_end = os.fstat(self.descriptor).st_size
        offset = 0
        while offset + _HEADER.size <= file_end:
            end = offset + self._length(offset)
            if not offset < end <= file_end:
                break
            found.append((offset, end))
            offset = end
        if found and self._unpacked(*found[-1]) is None:
            found.pop()
        return found

    def _length(self, offset: int) -> int:
        """Of the member that begins here; 0 when only zeros follow, which is what a power failure may leave."""
        header = os.pread(self.descriptor, _HEADER.size, offset)
        magic, _, _, _, _, extra, _, length = _HEADER.unpack(header)
        if magic == _MAGIC and extra == _EXTRA and length > _HEADER.size + _TRAILER_BYTES:
            return int(length)
        while chunk := os.pread(self.descriptor, 1 << 20, offset):
            if any(chunk):
                raise self._damaged(offset)
            offset += len(chunk)
        return 0

    def lines(self, offset: int, end: int) -> list[tuple[Place, bytes]]:
        """The lines of one member, each with its message's place. Raises CorruptData."""
        unpacked = self._unpacked(offset, end)
        if unpacked is None:
            raise self._damaged(offset)
        try:
            return [(place(_id_of(line).id), line) for line in unpacked.splitlines()]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, UsageError) as error:
            raise self._damaged(offset) from error

    def _unpacked(self, offset: int, end: int) -> bytes | None:
        return unpack_member(os.pread(self.descriptor, end - offset, offset))

    def _damaged(self, offset: int) -> CorruptData:
        return CorruptData(f"{self._path} is damaged at byte {offset}: put back a sound copy of it")


# -- reading -----------------------------------------------------------------------------------------------------------


def lines_of_shard(folder: Path) -> Iterator[bytes]:
    """The lines of one shard by id, each once. A file is open only while its ids are due. Raises CorruptData, and
    UsageError for a file that this user may not read."""
    waiting = files_of(folder)[::-1]
    heap: list[tuple[Place, int, bytes, Iterator[tuple[Place, bytes]]]] = []
    last = NOWHERE
    while waiting or heap:
        if waiting and (not heap or waiting[-1].first <= heap[0][0][:2]):
            lines = _lines_of(waiting[-1].path)
            _push(heap, len(waiting), lines)
            waiting.pop()
            continue
        at, number, line, lines = heapq.heappop(heap)
        if at < last:
            raise CorruptData(f"a file in {folder} holds {at[0]}-{at[1]}/{at[2]} behind a later message: it is damaged")
        if at > last:
            yield line
        last = at
        _push(heap, number, lines)


def _push(
    heap: list[tuple[Place, int, bytes, Iterator[tuple[Place, bytes]]]],
    number: int,
    lines: Iterator[tuple[Place, bytes]],
) -> None:
    found = next(lines, None)
    if found is not None:
        heapq.heappush(heap, (found[0], number, found[1], lines))


def _lines_of(path: Path) -> Iterator[tuple[Place, bytes]]:
    try:
        reader = FileReader(path)
    except FileNotFoundError:  # it held nothing whole, and its writer's successor took it away
        return
    except OSError as error:
        msg = f"{path} can't be read ({error}): give this user the right to"
        raise UsageError(msg) from error
    with reader:
        for offset, end in reader.members():
            yield from reader.lines(offset, end)
