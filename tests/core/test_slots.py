"""Slots and hash tags: the Redis hash-tag rule, every tag's slot, and a digest that pins the tags for ever."""

from __future__ import annotations

import itertools
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core.slots import SLOTS, key_slot, slot_of_range, tag_for_slot
from shardq.errors import UsageError

HASHES = st.integers(0, 2**32 - 1)


def crc16_xmodem(data: bytes) -> int:
    """Bit by bit, from the definition: polynomial 0x1021, initial value 0, nothing reflected."""
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1) ^ (0x1021 if crc & 0x8000 else 0)
            crc &= 0xFFFF
    return crc


def hashed_part(key: bytes) -> bytes:
    """The hash-tag rule, written as the Redis Cluster specification's sample code is."""
    start = next((i for i, byte in enumerate(key) if byte == ord("{")), len(key))
    if start == len(key):
        return key
    end = next((i for i in range(start + 1, len(key)) if key[i] == ord("}")), len(key))
    return key if end == len(key) or end == start + 1 else key[start + 1 : end]


# 0x31C3 for "123456789" and the examples of hash tags: Redis Cluster specification.
@pytest.mark.parametrize(
    ("key", "slot"),
    [
        (b"", 0),
        (b"123456789", 0x31C3),
        (b"foo", 12182),
        (b"{user1000}.following", key_slot(b"user1000")),
        (b"{user1000}.followers", key_slot(b"user1000")),
        (b"foo{}{bar}", crc16_xmodem(b"foo{}{bar}") % SLOTS),
        (b"foo{{bar}}zap", crc16_xmodem(b"{bar") % SLOTS),
        (b"foo{bar}{zap}", crc16_xmodem(b"bar") % SLOTS),
        (b"{}", crc16_xmodem(b"{}") % SLOTS),
        (b"}{", crc16_xmodem(b"}{") % SLOTS),
    ],
)
def test_slot_of_known_keys(key: bytes, slot: int) -> None:
    assert key_slot(key) == slot


@given(st.one_of(st.binary(), st.text("{}ab").map(str.encode)))
def test_slot_follows_the_specification(key: bytes) -> None:
    assert key_slot(key) == crc16_xmodem(hashed_part(key)) % SLOTS


def test_every_tag_has_its_slot() -> None:
    for slot in range(SLOTS):
        tag = tag_for_slot(slot)
        assert key_slot(tag.encode()) == slot
        assert key_slot(f"shardq:{{{tag}}}:x".encode()) == slot


def test_tags_are_the_first_of_the_documented_order() -> None:
    first: dict[int, str] = {}
    for length in (1, 2):
        for letters in itertools.product("0123456789abcdefghijklmnopqrstuvwxyz", repeat=length):
            first.setdefault(key_slot("".join(letters).encode()), "".join(letters))
    assert {slot: tag_for_slot(slot) for slot in first} == first


def test_tags_never_change() -> None:
    # Wire format: if this fails, every queue ever stored has lost its keys. Mend the code, not the digest.
    tags = ",".join(map(tag_for_slot, range(SLOTS)))
    assert sha256(tags.encode()).hexdigest() == "7f86067662df7528834aac4ae3af3190b457b00f5390ababd04f5ec7b99ffc11"


@pytest.mark.parametrize("slot", [-1, SLOTS, 2**40])
def test_no_tag_for_what_is_no_slot(slot: int) -> None:
    with pytest.raises(UsageError):
        tag_for_slot(slot)


@given(HASHES, HASHES)
def test_slot_of_range_sits_where_its_middle_sits(one: int, other: int) -> None:
    low, high = min(one, other), max(one, other) + 1
    slot = slot_of_range(low, high)
    assert 0 <= slot < SLOTS
    assert slot * 2**18 <= (low + high) // 2 < (slot + 1) * 2**18


def test_slot_of_range_at_the_ends() -> None:
    assert slot_of_range(0, 1) == 0
    assert slot_of_range(2**32 - 1, 2**32) == SLOTS - 1
    assert slot_of_range(0, 2**32) == SLOTS // 2
