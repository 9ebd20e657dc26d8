"""The record batch: what one stream entry holds, byte for byte. Encodes and decodes; knows nothing of streams.

An entry that shardq wrote has exactly these two fields, in this order:

    at      decimal number of messages appended to the shard before this batch (Kafka would say base offset)
    batch   the record batch:

    byte  0      version of this format: 1
    byte  1      flags: 0. A reader refuses flags it does not know (compression will use them)
    bytes 2-3    number of messages, unsigned, big endian, 1..65535
    bytes 4-     one msgpack array of five:
        0  uint              base time: Unix time in ms, the producer's clock, of the first message
        1  nil | array       nil when all share the base time, else each message's ms after it (may be negative)
        2  array             keys: str, bin, or nil for a message without one
        3  array             values: any msgpack value; bytes travel as bin, text as str
        4  nil | array       nil when no message has headers, else for each nil or a map from str to str or bin

Any other entry is one message of another client: its value is the map of its fields, it has no key.

Bytes from Redis are untrusted: decoding raises CorruptData and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from shardq.errors import CorruptData, InvalidValue

VERSION = 1
HEADER_BYTES = 4
MAX_MESSAGES = 65535

Key = str | bytes | None
Headers = Mapping[str, str | bytes]
_KEY_TYPES = frozenset((str, bytes, type(None)))

_encoder = msgspec.msgpack.Encoder()
_Body = tuple[int, list[int] | None, list[Any], list[Any], list[dict[str, Any] | None] | None]
_decoder = msgspec.msgpack.Decoder(_Body)


class RecordBatch(NamedTuple):
    """Parallel lists, one item a message; `offsets_ms` and `headers` are None when no message has any."""

    base_ms: int
    offsets_ms: Sequence[int] | None
    keys: Sequence[Key]
    values: Sequence[Any]
    headers: Sequence[Headers | None] | None


def pack_value(value: Any) -> Any:
    """Makes a value ready for a batch: bytes and str as they are, all else encoded now, so that a later change to the
    object does not matter and what can't be carried is refused here. Raises InvalidValue."""
    if type(value) is bytes:
        return value
    if type(value) is str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            msg = "a str value has surrogates that UTF-8 can't carry: send bytes instead"
            raise InvalidValue(msg) from error
        return value
    try:
        return msgspec.Raw(_encoder.encode(value))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        msg = (
            f"a value of type {type(value).__name__} can't be carried ({error}): send bytes, str, or what msgpack knows"
        )
        raise InvalidValue(msg) from error


def check_headers(headers: Any) -> Headers:
    """Returns `headers`; raises InvalidValue unless it maps str to str or bytes."""
    if not isinstance(headers, Mapping):
        msg = f"headers are a mapping from str to str or bytes, not {type(headers).__name__}"
        raise InvalidValue(msg)
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, (str, bytes)):
            msg = f"header {name!r}: names are str, values str or bytes"
            raise InvalidValue(msg)
        pack_value(name)
        pack_value(value)
    return headers


def value_bytes(value: Any) -> int:
    """About what a packed value takes in a batch (exact to the few bytes of msgpack's own)."""
    if type(value) is str:
        return len(value) if value.isascii() else len(value.encode())
    return len(value) if type(value) is bytes else memoryview(value).nbytes


def encode(batch: RecordBatch) -> bytes:
    """The record batch in wire form; values as `pack_value` gave them."""
    count = len(batch.keys)
    if not 1 <= count <= MAX_MESSAGES:
        msg = f"a record batch holds 1 to {MAX_MESSAGES} messages, not {count}"
        raise ValueError(msg)
    out = bytearray((VERSION, 0, count >> 8, count & 0xFF))
    _encoder.encode_into(batch, out, HEADER_BYTES)
    return bytes(out)


def count_of(data: bytes) -> int:
    """Messages an entry of ours holds by its header; 1 when there is no sound header. Same rule as entry_count in
    scripts/common.lua: both sides must count a broken entry alike."""
    if len(data) >= HEADER_BYTES and data[0] == VERSION:
        return (data[2] << 8 | data[3]) or 1
    return 1


def decode(data: bytes) -> RecordBatch:
    """The batch in `data`. Raises CorruptData."""
    if len(data) < HEADER_BYTES:
        msg = f"a record batch of {len(data)} bytes has no header"
        raise CorruptData(msg)
    if data[0] != VERSION or data[1] != 0:
        msg = f"a record batch of version {data[0]}, flags {data[1]}: this shardq reads version {VERSION}, flags 0"
        raise CorruptData(msg)
    count = data[2] << 8 | data[3]
    try:
        body = _decoder.decode(memoryview(data)[HEADER_BYTES:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError, ValueError, TypeError) as error:
        msg = f"a record batch does not decode: {error}"
        raise CorruptData(msg) from error
    batch = RecordBatch(*body)
    _check(batch, count)
    return batch


def _check(batch: RecordBatch, count: int) -> None:
    lists = (batch.keys, batch.values, batch.offsets_ms, batch.headers)
    if count < 1 or any(part is not None and len(part) != count for part in lists):
        msg = f"a record batch whose header says {count} messages holds lists of other lengths"
        raise CorruptData(msg)
    if not _KEY_TYPES.issuperset(map(type, batch.keys)):
        msg = "a record batch holds a key that is neither str nor bytes"
        raise CorruptData(msg)
    for headers in batch.headers or ():
        if headers and any(type(value) not in (str, bytes) for value in headers.values()):
            msg = "a record batch holds a header that is neither str nor bytes"
            raise CorruptData(msg)


def foreign_value(fields: Sequence[bytes]) -> dict[str | bytes, bytes]:
    """The value of another client's entry: its fields by name; a name that is not UTF-8 stays bytes."""
    value: dict[str | bytes, bytes] = {}
    for name, item in zip(fields[::2], fields[1::2], strict=True):
        try:
            value[name.decode()] = item
        except UnicodeDecodeError:
            value[name] = item
    return value
