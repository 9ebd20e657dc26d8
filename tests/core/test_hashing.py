"""The key hash: published MurmurHash3 vectors, str as UTF-8, and what is refused and how."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core.hashing import key_hash
from shardq.errors import InvalidKey


# MurmurHash3 x86_32, seed 0. Bytes: Ian Boyd's vectors, checked by him against SMHasher's own verification
# (stackoverflow.com/a/31929528). Text: the test table that implementations share (en.wikipedia.org/wiki/MurmurHash).
@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (b"", 0),
        (b"\xff\xff\xff\xff", 0x76293B50),
        (b"\x21\x43\x65\x87", 0xF55B516B),
        (b"\x21\x43\x65", 0x7E4A8634),
        (b"\x21\x43", 0xA0F7B07A),
        (b"\x21", 0x72661CF4),
        (b"\x00\x00\x00\x00", 0x2362F9DE),
        (b"\x00\x00\x00", 0x85F0B427),
        (b"\x00\x00", 0x30F4C306),
        (b"\x00", 0x514E28B7),
        ("test", 0xBA6BD213),
        ("Hello, world!", 0xC0363E43),
        ("The quick brown fox jumps over the lazy dog", 0x2E4FF723),
    ],
)
def test_published_vectors(key: str | bytes, expected: int) -> None:
    assert key_hash(key) == expected


def murmur3(data: bytes) -> int:
    """MurmurHash3 x86_32 with seed 0, from the reference description."""
    mask, h = 0xFFFFFFFF, 0
    padded = data + bytes(-len(data) % 4)
    for i in range(0, len(padded), 4):
        k = int.from_bytes(padded[i : i + 4], "little") * 0xCC9E2D51 & mask
        k = ((k << 15 | k >> 17) & mask) * 0x1B873593 & mask
        h ^= k
        if i + 4 <= len(data):
            h = ((h << 13 | h >> 19) & mask) * 5 + 0xE6546B64 & mask
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & mask
    h = (h ^ h >> 13) * 0xC2B2AE35 & mask
    return h ^ h >> 16


@given(st.binary(max_size=200))
def test_bytes_hash_as_the_algorithm_says(key: bytes) -> None:
    assert key_hash(key) == murmur3(key)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_hashes_like_its_utf8(key: str) -> None:
    assert key_hash(key) == key_hash(key.encode())


@pytest.mark.parametrize("key", [None, 7, 1.5, True, ["k"], ("k",), bytearray(b"k"), memoryview(b"k"), object()])
def test_other_types_are_refused(key: object) -> None:
    with pytest.raises(InvalidKey, match=r"must be str or bytes, not .*; convert it"):
        key_hash(key)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["\ud800", "a\udcffb", "\udfff\ud800"])
def test_lone_surrogates_are_refused(key: str) -> None:
    with pytest.raises(InvalidKey, match=r"UTF-8.*pass its bytes"):
        key_hash(key)


def test_the_way_out_of_lone_surrogates_works() -> None:
    assert key_hash("a\udcffb".encode("utf-8", "surrogateescape")) == key_hash(b"a\xffb")
