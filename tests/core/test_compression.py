"""Compressed batches: what goes in comes out, old and new alike; what anybody may write is bounded or refused."""

from __future__ import annotations

import random
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardq.core import compression, records
from shardq.core.compression import MAX_UNPACKED_BYTES, MIN_BYTES, Compression
from shardq.core.records import RecordBatch
from shardq.errors import CorruptData, UsageError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

KINDS: list[Compression] = ["zlib", "zstd"]
FLAGS: dict[Compression, int] = {"zlib": 1, "zstd": 2}
TEXT = "a user, an order, a price. "


def batch_of(*values: Any) -> RecordBatch:
    return RecordBatch(7, None, ["k"] * len(values), list(values), None)


def squeeze(kind: Compression, body: bytes) -> bytes:
    """As any other writer might: whatever its size, whatever comes of it."""
    return zlib.compress(body, 9) if kind == "zlib" else zstd.compress(body, 9)


def entry(kind: Compression, stream: bytes, count: int = 1) -> bytes:
    return bytes((1, FLAGS[kind], count >> 8, count & 255)) + stream


@pytest.mark.parametrize("kind", KINDS)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.binary() | st.integers(0, 9), min_size=1), st.data()
)
def test_what_goes_in_comes_out(kind: Compression, values: list[Any], data: st.DataObject) -> None:
    many = values * data.draw(st.integers(1, 30))
    batch = RecordBatch(7, None, [None] * len(many), many, [{"a": b"b"}] * len(many))
    if data.draw(st.booleans()):
        batch = records.without(batch, data.draw(st.integers(0, len(many) - 1)))
    plain, packed = records.encode(batch), records.encode(batch, kind)
    assert records.decode(packed) == records.decode(plain)
    assert records.count_of(packed) == len(many)
    assert len(packed) <= len(plain)
    smaller = len(packed) < len(plain)
    assert packed[1] - plain[1] == (FLAGS[kind] if smaller else 0)
    assert records.compression_of(packed) == (kind if smaller else None)
    assert records.compression_of(plain) is None


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_gets_smaller_is_compressed(kind: Compression) -> None:
    chance = random.Random(1)
    small = batch_of("x" * (MIN_BYTES // 2))
    noise = batch_of(*(chance.randbytes(1000) for _ in range(3)))
    for batch in (small, noise):
        assert records.encode(batch, kind) == records.encode(batch)
    large = batch_of(TEXT * 100)
    assert len(records.encode(large, kind)) < len(records.encode(large)) / 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_body_and_one_byte_more(kind: Compression) -> None:
    overhead = len(records.encode(batch_of(b"x" * 70_000))) - 4 - 70_000
    most = batch_of(b"x" * (MAX_UNPACKED_BYTES - overhead))
    packed = records.encode(most, kind)
    assert packed[1] == FLAGS[kind]
    assert records.decode(packed) == most
    more = batch_of(b"x" * (MAX_UNPACKED_BYTES - overhead + 1))
    assert records.encode(more, kind)[1] == 0
    with pytest.raises(CorruptData, match="unpacks to more than"):
        records.decode(entry(kind, squeeze(kind, records.encode(more)[4:])))


# Written out by hand from the module's docstring; the streams are the two formats' own way to store bytes as they are.
PLAIN = bytes.fromhex("01 00 0001 95 07 c0 91 c0 91 c4 00 c0")
GOLDEN = {
    "zlib": bytes.fromhex("01 01 0001 7801 01 0900 f6ff 9507c091c091c400c0")
    + zlib.adler32(PLAIN[4:]).to_bytes(4, "big"),
    "zstd": bytes.fromhex("01 02 0001 28b52ffd 20 09 490000 9507c091c091c400c0"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_golden_bytes(kind: Compression) -> None:
    assert records.decode(GOLDEN[kind]) == records.decode(PLAIN) == RecordBatch(7, None, [None], [b""], None)


# -- what anybody may write -------------------------------------------------------------------------------------------


BLOCK, BLOCKS = bytes(1024 * 1024), 256


def zstd_stream() -> bytes:
    """A frame that does not say its size, as a writer gives it that does not know it yet."""
    stream = zstd.ZstdCompressor(3)
    return b"".join(stream.compress(BLOCK) for _ in range(BLOCKS)) + stream.flush()


BOMBS: list[tuple[Compression, Callable[[], bytes]]] = [
    ("zlib", lambda: zlib.compress(BLOCK * BLOCKS, 9)),
    ("zstd", lambda: zstd.compress(BLOCK * BLOCKS, 9)),
    ("zstd", zstd_stream),
]


@pytest.mark.parametrize(("kind", "make"), BOMBS, ids=["zlib", "zstd", "zstd stream"])
def test_a_bomb_takes_no_more_than_the_bound(kind: Compression, make: Callable[[], bytes]) -> None:
    bomb = make()
    assert len(bomb) < 300_000
    tracemalloc.start()
    try:
        with pytest.raises(CorruptData, match=f"unpacks to more than {MAX_UNPACKED_BYTES}"):
            records.decode(entry(kind, bomb))
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_UNPACKED_BYTES
    finally:
        tracemalloc.stop()


def test_a_stream_that_asks_for_a_huge_window_is_refused() -> None:
    # Frame header: no size, window descriptor 0xa8 = 2 GiB; then one empty last block.
    with pytest.raises(CorruptData, match=r"does not unpack as zstd: .*memory"):
        records.decode(entry("zstd", bytes.fromhex("28b52ffd 00 a8 010000")))
    # The same with a window of 1 KiB is a sound stream of nothing, which is no batch.
    with pytest.raises(CorruptData, match="does not decode"):
        records.decode(entry("zstd", bytes.fromhex("28b52ffd 00 00 010000")))


@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_and_every_tail_is_refused(kind: Compression) -> None:
    raw = records.encode(batch_of(*(f"{TEXT}{number}" for number in range(20))), kind)
    assert raw[1] == FLAGS[kind]
    for end in range(len(raw)):
        with pytest.raises(CorruptData, match="record batch"):
            records.decode(raw[:end])
    for tail in (b"\0", raw[4:], squeeze(kind, b""), bytes.fromhex("502a4d18 00000000")):
        with pytest.raises(CorruptData, match="behind its end"):
            records.decode(raw + tail)


def test_a_skippable_frame_is_no_batch() -> None:
    raw = records.encode(batch_of(TEXT * 20), "zstd")
    with pytest.raises(CorruptData, match="behind its end"):
        records.decode(raw[:4] + bytes.fromhex("502a4d18 00000000") + raw[4:])


@pytest.mark.parametrize("kind", KINDS)
def test_streams_of_the_other_kind_and_inner_garbage(kind: Compression) -> None:
    other: Compression = "zstd" if kind == "zlib" else "zlib"
    body = PLAIN[4:]
    with pytest.raises(CorruptData, match=f"does not unpack as {kind}"):
        records.decode(entry(kind, squeeze(other, body)))
    with pytest.raises(CorruptData, match="does not decode"):
        records.decode(entry(kind, squeeze(kind, body + b"\0")))
    with pytest.raises(CorruptData, match="other lengths"):
        records.decode(entry(kind, squeeze(kind, body), count=2))


def decode_or_refuse(data: bytes) -> None:
    records.compression_of(data)
    try:
        batch = records.decode(data)
    except CorruptData:
        return
    assert records.count_of(data) == len(batch.keys) == len(batch.values)


SOUND = {kind: records.encode(batch_of(*(f"{TEXT}{number}" for number in range(20))), kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_mutated_batches(kind: Compression, data: st.DataObject) -> None:
    raw = SOUND[kind]
    at = data.draw(st.integers(0, len(raw)))
    cut = data.draw(st.integers(0, 3))
    decode_or_refuse(raw[:at] + data.draw(st.binary(max_size=3)) + raw[at + cut :])


@pytest.mark.parametrize("kind", KINDS)
@given(st.binary())
@example(b"")
def test_arbitrary_streams_and_arbitrary_bodies(kind: Compression, tail: bytes) -> None:
    decode_or_refuse(entry(kind, tail))
    decode_or_refuse(entry(kind, squeeze(kind, tail)))
    decode_or_refuse(entry(kind, squeeze(kind, b"\x95" + tail)))


# -- without the library ----------------------------------------------------------------------------------------------


@pytest.fixture
def _no_zstd(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Python that lacks the module."""
    compression._zstd.cache_clear()
    monkeypatch.setitem(sys.modules, zstd.__name__, None)
    monkeypatch.delattr(sys.modules[zstd.__name__.rpartition(".")[0]], "zstd")
    yield
    compression._zstd.cache_clear()


@pytest.mark.usefixtures("_no_zstd")
def test_without_the_library_the_error_names_the_package() -> None:
    with pytest.raises(CorruptData, match=r"compressed with zstd.*pip install backports\.zstd"):
        records.decode(SOUND["zstd"])
    with pytest.raises(UsageError, match=r"pip install backports\.zstd"):
        compression.check_available("zstd")
    assert records.decode(SOUND["zlib"]).values[0] == f"{TEXT}0"
    compression.check_available("zlib")
    compression.check_available(None)


def test_with_the_library_zstd_is_available() -> None:
    compression.check_available("zstd")
