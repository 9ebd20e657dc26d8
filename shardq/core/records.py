"""The record batch: what one stream entry holds, byte for byte. Encodes and decodes; knows nothing of streams.

An entry that shardq wrote has exactly these two fields, in this order:

    at      decimal number of messages appended to the shard before this batch (Kafka would say base offset)
    batch   the record batch:

    byte  0      version of this format: 1
    byte  1      flags; a reader refuses those it does not know
                     0x01  the bytes from 4 on are a zlib stream of what is said below (RFC 1950)
                     0x02  they are one zstd frame of it (RFC 8878); never both
                     0x04  some messages were deleted: the array has a sixth item
    bytes 2-3    number of messages, unsigned, big endian, 1..65535; deleted ones count
    bytes 4-     one msgpack array of five:
        0  uint              base time: Unix time in ms, the producer's clock, of the first message
        1  nil | array       nil when all share the base time, else each message's ms after it (may be negative)
        2  array             keys: str, bin, or nil for a message without one
        3  array             values: any msgpack value; bytes travel as bin, text as str
        4  nil | array       nil when no message has headers, else for each nil or a map from str to str or bin
        5  array             only with 0x04: places of the deleted messages, rising from 0; their key, value and headers
                             are nil

A batch is compressed when that makes it smaller and it unpacks to at most 4 MiB; readers take both kinds side by side.

Any other entry is one message of another client: its value is the map of its fields, it has no key.

Bytes from Redis are untrusted: decoding raises CorruptData and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import msgspec

from shardq.core.compression import Compression, compress, decompress
from shardq.errors import CorruptData, InvalidValue

VERSION = 1
HOLES = 0x04
HEADER_BYTES = 4
MAX_MESSAGES = 65535

Key = str | bytes | None
Headers = Mapping[str, str | bytes]
_KEY_TYPES = frozenset((str, bytes, type(None)))

_encoder = msgspec.msgpack.Encoder()
_Short = msgspec.Meta(max_length=MAX_MESSAGES)  # refused before there is room made for more
_Times = Annotated[list[int], _Short] | None
_List = Annotated[list[Any], _Short]
_AllHeaders = Annotated[list[dict[str, Any] | None], _Short] | None
_Holes = Annotated[list[int], _Short]
_decoder = msgspec.msgpack.Decoder(tuple[int, _Times, _List, _List, _AllHeaders])
_decoder_with_holes = msgspec.msgpack.Decoder(tuple[int, _Times, _List, _List, _AllHeaders, _Holes])
_FLAG_OF: dict[Compression, int] = {"zlib": 0x01, "zstd": 0x02}
_COMPRESSION_OF: dict[int, Compression] = {flag: name for name, flag in _FLAG_OF.items()}
PACKED = 0x03


class RecordBatch(NamedTuple):
    """Parallel lists, one item a message; `offsets_ms` and `headers` are None when no message has any. `holes` are the
    places of deleted messages, rising; None when there are none."""

    base_ms: int
    offsets_ms: Sequence[int] | None
    keys: Sequence[Key]
    values: Sequence[Any]
    headers: Sequence[Headers | None] | None
    holes: Sequence[int] | None = None


def pack_value(value: Any) -> Any:
    """Makes a value ready for a batch: bytes and str as they are, all else encoded now, so that a later change to the
    object does not matter and what can't be carried is refused here. Raises InvalidValue."""
    if type(value) is bytes:
        return value
    if type(value) is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            # Not as the cause: it holds the value, which whoever logs errors would log.
            msg = "a str value has surrogates that UTF-8 can't carry: send bytes instead"
            raise InvalidValue(msg) from None
        return value
    try:
        return msgspec.Raw(_encoder.encode(value))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        msg = (
            f"a value of type {type(value).__name__} can't be carried ({error}): send bytes, str, or what msgpack knows"
        )
        raise InvalidValue(msg) from None


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


def encode(batch: RecordBatch, compression: Compression | None = None) -> bytes:
    """The record batch in wire form, compressed if asked for and worth it; values as `pack_value` gave them."""
    return bytes(encode_buffer(batch, compression))


def encode_buffer(batch: RecordBatch, compression: Compression | None = None) -> bytes | bytearray:
    """The same without a last copy, for whoever copies it anyway."""
    count = len(batch.keys)
    if not 1 <= count <= MAX_MESSAGES:
        msg = f"a record batch holds 1 to {MAX_MESSAGES} messages, not {count}"
        raise ValueError(msg)
    flags = HOLES if batch.holes else 0
    out = bytearray((VERSION, flags, count >> 8, count & 0xFF))
    _encoder.encode_into(batch if flags else batch[:5], out, HEADER_BYTES)
    if compression is not None:
        packed = compress(compression, memoryview(out)[HEADER_BYTES:])
        if packed is not None:
            return bytes((VERSION, flags | _FLAG_OF[compression], count >> 8, count & 0xFF)) + packed
    return out


def count_of(data: bytes) -> int:
    """Messages an entry of ours holds by its header; 1 when there is no sound header. Same rule as entry_count in
    scripts/common.lua: both sides must count a broken entry alike."""
    if len(data) >= HEADER_BYTES and data[0] == VERSION:
        return (data[2] << 8 | data[3]) or 1
    return 1


def compression_of(data: bytes) -> Compression | None:
    """How the batch in `data` is compressed, for whoever writes it anew; None when it is not, or has no header."""
    return _COMPRESSION_OF.get(data[1] & PACKED) if len(data) >= HEADER_BYTES else None


def unpack(data: bytes) -> bytes | None:
    """What `decode` takes as `body`: the bytes after the header, unpacked; None when they are not compressed. Raises
    CorruptData."""
    compression = compression_of(data)
    if compression is None or data[0] != VERSION or data[1] > HOLES | PACKED:
        return None  # what `decode` refuses stays its to refuse
    return decompress(compression, memoryview(data)[HEADER_BYTES:])


def decode(data: bytes, body: bytes | None = None) -> RecordBatch:
    """The batch in `data`; `body` is what `unpack` made of it, where that was done before. Raises CorruptData."""
    if len(data) < HEADER_BYTES:
        msg = f"a record batch of {len(data)} bytes has no header"
        raise CorruptData(msg)
    flags = data[1]
    if data[0] != VERSION or flags > HOLES | PACKED or flags & PACKED == PACKED:
        msg = (
            f"a record batch of version {data[0]}, flags {flags}: this shardq reads version {VERSION}, flags 1, 2 and 4"
        )
        raise CorruptData(msg)
    if body is None and flags & PACKED:
        body = decompress(_COMPRESSION_OF[flags & PACKED], memoryview(data)[HEADER_BYTES:])
    try:
        decoder = _decoder_with_holes if flags & HOLES else _decoder
        fields = decoder.decode(memoryview(data)[HEADER_BYTES:] if body is None else body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError, ValueError, TypeError) as error:
        msg = f"a record batch does not decode: {error}"
        raise CorruptData(msg) from error
    batch = RecordBatch(*fields)
    _check(batch, data[2] << 8 | data[3])
    return batch


def _check(batch: RecordBatch, count: int) -> None:
    offsets, headers = batch.offsets_ms, batch.headers
    sound = len(batch.keys) == len(batch.values) == count > 0
    if not sound or (offsets is not None and len(offsets) != count) or (headers is not None and len(headers) != count):
        msg = f"a record batch whose header says {count} messages holds lists of other lengths"
        raise CorruptData(msg)
    if not _KEY_TYPES.issuperset(map(type, batch.keys)):
        msg = "a record batch holds a key that is neither str nor bytes"
        raise CorruptData(msg)
    for own in headers or ():
        if own and any(type(value) not in (str, bytes) for value in own.values()):
            msg = "a record batch holds a header that is neither str nor bytes"
            raise CorruptData(msg)
    if batch.holes is not None:
        _check_holes(batch, batch.holes)


def _check_holes(batch: RecordBatch, holes: Sequence[int]) -> None:
    if not holes or holes[0] < 0 or holes[-1] >= len(batch.keys) or any(a >= b for a, b in pairwise(holes)):
        msg = "a record batch has deleted messages at places it does not have"
        raise CorruptData(msg)
    columns = [batch.keys, batch.values, batch.headers or [None] * len(batch.keys)]
    if any(column[hole] is not None for column in columns for hole in holes):
        msg = "a record batch still holds parts of a message that was deleted from it"
        raise CorruptData(msg)


def without(batch: RecordBatch, index: int) -> RecordBatch:
    """The batch with the message at `index` deleted: its place stays, so that the others keep theirs. Raises IndexError
    where it has no such place."""
    holes = sorted({*(batch.holes or ()), range(len(batch.keys))[index]})
    keys, values = list(batch.keys), list(batch.values)
    headers = list(batch.headers) if batch.headers is not None else None
    for column in (keys, values, headers):
        if column is not None:
            column[index] = None
    return batch._replace(keys=keys, values=values, headers=headers, holes=holes)


def foreign_value(fields: Sequence[bytes]) -> dict[str | bytes, bytes]:
    """The value of another client's entry: its fields by name; a name that is not UTF-8 stays bytes."""
    value: dict[str | bytes, bytes] = {}
    for name, item in zip(fields[::2], fields[1::2], strict=True):
        try:
            value[name.decode()] = item
        except UnicodeDecodeError:
            value[name] = item
    return value
