"""JSON lines from a file descriptor into a queue. Reads what is there: a pipe is followed line by line, a file goes in
blocks. Keeps one block (or one longer line) in memory, and stores nothing itself.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import msgspec

from shardq.core.records import Key
from shardq.errors import InvalidValue, NotStored, UsageError
from shardq.runtime.producer import Producer

BLOCK_BYTES = 1024 * 1024
LINE_BYTES_MAX = 64 * 1024 * 1024


async def produce_lines(
    producer: Producer, descriptor: int, key_field: str | None, on_bytes: Callable[[int], None] = lambda count: None
) -> int:
    """Sends every line; returns how many messages were sent when all are stored. Blank lines are skipped. `on_bytes` is
    told how many bytes were read and sent so far.

    Raises UsageError naming the first line that can't be sent, when all before it are stored; NotStored when Redis did
    not take them.
    """
    lines = _Lines(key_field)
    read = 0
    async for block in _blocks(descriptor):
        try:
            await producer.send_many(lines.messages(block))
        except UsageError as error:
            stored = f"the {lines.sent} messages before it are stored"
            raise type(error)(
                f"line {lines.number}: {error}; {stored}, mend it and send the rest from there"
            ) from error
        except NotStored as error:
            what = f"of {lines.sent} messages up to line {lines.number} not all are stored: {error}"
            raise NotStored(what, error.failed) from error
        read += len(block)
        on_bytes(read)
    return lines.sent


class _Lines:
    """Counts lines and messages over all blocks. `sent` counts messages that were taken before the current line."""

    def __init__(self, key_field: str | None) -> None:
        self._key_field = key_field
        self.number = 0
        self.sent = 0

    def messages(self, block: bytes) -> Iterator[tuple[Key, Any]]:
        lines = block.split(b"\n")
        if not lines[-1]:
            lines.pop()  # what stands behind the last line break is no line
        for line in lines:
            self.number += 1
            if line.strip():
                value = _parse(line)
                yield (self._key(value) if self._key_field is not None else None), value
                # Reached when the producer asks for the next one: it took this one.
                self.sent += 1

    def _key(self, value: Any) -> Key:
        if not isinstance(value, dict) or self._key_field not in value:
            raise InvalidValue(f"it has no field {self._key_field!r} to be the key")
        key = value[self._key_field]
        if isinstance(key, bool) or not isinstance(key, str | int | float):
            raise InvalidValue(f"its field {self._key_field!r} is no string or number and can't be the key")
        return str(key)


def _parse(line: bytes) -> Any:
    try:
        return msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidValue(f"it is not JSON ({error})") from error


async def _blocks(descriptor: int) -> AsyncIterator[bytes]:
    """Whole lines, as many as are there."""
    rest = b""
    while True:
        try:
            await _wait_readable(descriptor)
            chunk = os.read(descriptor, BLOCK_BYTES)
        except OSError as error:
            raise UsageError(
                f"stdin can't be read ({error}): give it a file or a pipe, as in `< file.jsonl`"
            ) from error
        end = chunk.rfind(b"\n") + 1
        if not chunk or end:
            yield rest + chunk[:end]
            rest = chunk[end:]
        else:
            rest += chunk
        if not chunk:
            return
        if len(rest) > LINE_BYTES_MAX:
            raise UsageError(f"stdin has a line of more than {LINE_BYTES_MAX} bytes: send one JSON value on each line")


async def _wait_readable(descriptor: int) -> None:
    try:
        await anyio.wait_readable(descriptor)
    except PermissionError:
        # A file is always readable, which is why the system refuses to wait for one.
        await anyio.lowlevel.checkpoint()
