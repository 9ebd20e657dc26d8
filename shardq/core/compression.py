"""Compressing the body of a record batch, and unpacking one that anybody may have written. Knows no wire format.

Levels and the least size are measured, on batches of 500 messages of 100 bytes (orders, and the demo's flights). zstd 1
takes 0.2 us a message to compress and 0.1 to unpack, and leaves 20 to 29 %; zlib 1 takes 0.6 and 0.2 and leaves 24 to
35 %. Higher levels take up to eight times as long to leave a tenth less. One message alone hardly shrinks.

Compressed bytes are untrusted: whatever they are, unpacking gives at most MAX_UNPACKED_BYTES or raises CorruptData.
"""

from __future__ import annotations

import sys
import zlib
from functools import cache
from typing import Any, Literal

from shardq.errors import CorruptData, UsageError

Compression = Literal["zlib", "zstd"]

MIN_BYTES = 256
"""A smaller body is not worth the time: zlib takes 6 us and the zstd reader 8 us for the smallest."""

MAX_UNPACKED_BYTES = 4 * 1024 * 1024
"""A larger body travels as it is (a producer's default bounds keep bodies below 1.5 MiB), so that no reader has to make
room for more because of a few bytes in Redis: this, and up to 80 times this for the objects that it says (a byte of
msgpack may be an empty map)."""

ZLIB_LEVEL = 1
ZSTD_LEVEL = 1

_WINDOW_LOG_MAX = MAX_UNPACKED_BYTES.bit_length() - 1
_MISSING = "this Python has no zstd: install what shardq asks for with `pip install backports.zstd`"


@cache
def _zstd() -> Any:
    """The zstd module; ImportError where there is none. Imported by those who use it: it takes a millisecond."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


@cache
def _compressor() -> Any:
    # Kept, because making one takes as long as compressing 3 kB. It locks itself, and a call is one whole frame.
    return _zstd().ZstdCompressor(ZSTD_LEVEL)


def check_available(compression: Compression | None) -> None:
    """Raises UsageError when this Python can't do it."""
    if compression == "zstd":
        try:
            _zstd()
        except ImportError as error:
            msg = f"the queue's batches are compressed with zstd, and {_MISSING}"
            raise UsageError(msg) from error


def compress(compression: Compression, body: bytes | memoryview) -> bytes | None:
    """The body compressed; None where it stays as it is, because that is no larger or its size is out of bounds."""
    if not MIN_BYTES <= len(body) <= MAX_UNPACKED_BYTES:
        return None
    if compression == "zstd":
        compressor = _compressor()
        packed: bytes = compressor.compress(body, compressor.FLUSH_FRAME)
    else:
        packed = zlib.compress(body, ZLIB_LEVEL)
    return packed if len(packed) < len(body) else None


def decompress(compression: Compression, packed: bytes | memoryview) -> bytes:
    """The body. Raises CorruptData."""
    if compression == "zstd":
        body, rest, complete = _unpack_zstd(packed)
    else:
        body, rest, complete = _unpack_zlib(packed)
    if len(body) > MAX_UNPACKED_BYTES:
        msg = f"a record batch of {len(packed)} bytes unpacks to more than {MAX_UNPACKED_BYTES}: no shardq wrote it"
        raise CorruptData(msg)
    if not complete or rest:
        msg = f"a record batch's {compression} stream {'has bytes behind its end' if rest else 'is cut off'}"
        raise CorruptData(msg)
    return body


def _unpack_zlib(packed: bytes | memoryview) -> tuple[bytes, bytes, bool]:
    stream = zlib.decompressobj()
    try:
        body = stream.decompress(packed, MAX_UNPACKED_BYTES + 1)
    except zlib.error as error:
        msg = f"a record batch does not unpack as zlib: {error}"
        raise CorruptData(msg) from error
    return body, stream.unused_data, stream.eof


def _unpack_zstd(packed: bytes | memoryview) -> tuple[bytes, bytes, bool]:
    try:
        zstd = _zstd()
    except ImportError as error:
        msg = f"a record batch is compressed with zstd, and {_MISSING}"
        raise CorruptData(msg) from error
    # The window is memory that the stream asks for, whatever it unpacks to.
    stream = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX})
    try:
        body = stream.decompress(packed, max_length=MAX_UNPACKED_BYTES + 1)
    except zstd.ZstdError as error:
        msg = f"a record batch does not unpack as zstd: {error}"
        raise CorruptData(msg) from error
    return body, stream.unused_data, stream.eof
