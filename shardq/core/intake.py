"""From stream entries and kept records to messages, and back to what is kept of them. Pure; knows nothing of steps.

A message that is put off is kept as a record: the msgpack array
    [entry id, index, key, value, headers, sent_at_ms, attempt, error]
with attempt the number of the next try and error the text of the last failure ('' when it was only held back).

Bytes from Redis are untrusted: decoding raises CorruptData and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from threading import Thread
from typing import Any, TypeVar

import msgspec

from shardq.core import records
from shardq.core.message import Batch, Message, Ownership
from shardq.errors import CorruptData

T = TypeVar("T")
_MAX_MS = (1 << 63) - 1
_DIGITS = bytes([48, 49]) + bytes(range(2, 256))


class KeptRecord(msgspec.Struct, array_like=True):
    """What is kept of a message that is handled later."""

    entry: str
    index: int
    key: Any
    value: Any
    headers: dict[str, Any] | None
    sent_at_ms: int
    attempt: int
    error: str


_kept_decoder = msgspec.msgpack.Decoder(KeptRecord)


def unhindered(make: Callable[[], T]) -> T:
    """Makes what is made of a value that was decoded before. How deep a value may be nested depends on how deep the
    caller stands: one that could just be decoded there might not be encoded here, so then it is done on a stack of its
    own, where there is more room than there was."""
    try:
        return make()
    except (RecursionError, CorruptData):
        return _on_own_stack(make)


def _on_own_stack(make: Callable[[], T]) -> T:
    made: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            made.append(make())
        except Exception as error:
            failed.append(error)

    thread = Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def build_messages(decoded: records.RecordBatch, batch: Batch) -> list[Message]:
    """One Message for each record of a batch. Raises CorruptData for times that could not be written again."""
    base, offsets, keys, values, headers = decoded[:5]
    times: Iterable[int] = repeat(base)
    if offsets:
        at = {offset: base + offset for offset in set(offsets)}  # a batch spans few milliseconds: each is one object
        if min(at.values()) < -_MAX_MS or max(at.values()) > _MAX_MS:
            msg = f"a record batch holds times beyond {_MAX_MS} ms"
            raise CorruptData(msg)
        times = map(at.__getitem__, offsets)
    own = headers if headers is not None else repeat(None)
    return list(map(Message, keys, values, own, times, range(len(keys)), repeat(batch)))


def pristine_value(message: Message) -> Any:
    """The message's value as it was stored, whatever a handler did to the object it was given."""
    batch = message.batch
    if batch.item:
        return unhindered(lambda: _kept_decoder.decode(batch.raw)).value
    if batch.pristine is None:
        if not batch.raw:
            return message.value
        batch.pristine = unhindered(
            lambda: records.decode(batch.raw)
        )  # once a batch, however many of its messages fail
    return batch.pristine.values[message.index]


def restore_value(message: Message) -> None:
    """Undoes what a handler that was stopped did to the message's value: it is handled anew, or kept."""
    value = pristine_value(message)  # must stay so: this is a copy; deepcopy would refuse what is deeply nested
    message.value = unhindered(lambda: msgspec.msgpack.decode(msgspec.msgpack.encode(value)))


def keep(message: Message, value: Any, attempt: int, error: str) -> bytes:
    """The record of a message that is handled later."""
    headers = dict(message.headers) if message.headers else None
    where = message.batch.entry, message.index
    kept = KeptRecord(*where, message.key, value, headers, message.sent_at_ms, attempt, error)
    return unhindered(lambda: msgspec.msgpack.encode(kept))


def open_kept(owner: Ownership, item: int, raw: bytes) -> tuple[Message, str]:
    """The message of a kept record, and the error of its last failure. Raises CorruptData."""
    try:
        kept = _kept_decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError, ValueError, TypeError) as error:
        msg = f"a message that was put off does not decode: {error}"
        raise CorruptData(msg) from error
    key: Any = kept.key
    if not isinstance(key, (str, bytes, type(None))):
        msg = "a message that was put off has a key that is neither str nor bytes"
        raise CorruptData(msg)
    if kept.headers and any(type(value) not in (str, bytes) for value in kept.headers.values()):
        msg = "a message that was put off has a header that is neither str nor bytes"
        raise CorruptData(msg)
    if kept.index < 0 or kept.attempt < 1:
        msg = f"a message that was put off has the index {kept.index} and the attempt {kept.attempt}"
        raise CorruptData(msg)
    batch = Batch(owner, kept.entry, 1, raw, item)
    return Message(key, kept.value, kept.headers, kept.sent_at_ms, kept.index, batch, kept.attempt), kept.error


def pack_progress(done: bytearray) -> bytes:
    """One bit a message, the first message in the lowest bit of the first byte."""
    # int() reads the flags as binary digits, highest first: one C call instead of a loop over a thousand flags.
    number = int(done[::-1].translate(_DIGITS), 2)
    return number.to_bytes((len(done) + 7) // 8, "little")


def unpack_progress(progress: bytes, count: int) -> bytearray:
    """The reverse of `pack_progress`. Bytes that don't fit the batch are no progress: handled again, never lost."""
    if len(progress) != (count + 7) // 8:
        return bytearray(count)
    number = int.from_bytes(progress, "little")
    return bytearray(number >> index & 1 for index in range(count))


def is_batch(fields: Sequence[bytes]) -> bool:
    """Whether an entry's fields are those of a record batch of ours."""
    return len(fields) >= 4 and fields[0] == b"at" and fields[2] == b"batch"


def dead_letter(entry: str, index: int | None, raw: bytes, error: str) -> bytes:
    """The dead letter of an entry that could not be read."""
    return msgspec.msgpack.encode({"entry": entry, "index": index, "raw": raw, "error": error})
