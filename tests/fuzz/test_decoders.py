"""Untrusted bytes: every decoder takes any bytes, or refuses them with an error of ours, in bounded room."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardq.core import records
from shardq.core.compression import MAX_UNPACKED_BYTES
from shardq.errors import CorruptData, ShardqError
from tests.fuzz.mutate import PIECES, mutated
from tests.fuzz.targets import BOMBS, TARGETS, Target

EACH = settings(max_examples=40, suppress_health_check=list(HealthCheck))

# A byte of msgpack may be an empty map, which takes 72; the lists of a batch hold as many again.
ROOM_PER_BYTE, ROOM = 120, 2 * 1024 * 1024


def withstands(target: Target, data: bytes) -> bool:
    """Whether it was taken; what is not an error of the target's comes out."""
    try:
        target.decode(data)
    except target.errors:
        return False
    return True


def room_for(target: Target, data: bytes) -> int:
    return ROOM + ROOM_PER_BYTE * (len(data) + (MAX_UNPACKED_BYTES if target.packed else 0))


def peak_of(target: Target, data: bytes) -> int:
    tracemalloc.start()
    try:
        withstands(target, data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_decoder_refuses_with_errors_of_ours_only() -> None:
    assert all(issubclass(error, ShardqError) for target in TARGETS.values() for error in target.errors)


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_are_taken(name: str) -> None:
    """Otherwise fuzzing would start from what is thrown away at once."""
    target = TARGETS[name]
    assert any(withstands(target, seed) for seed in target.seeds)


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes(name: str) -> None:
    target = TARGETS[name]

    @EACH
    @given(st.binary(max_size=200))
    def check(data: bytes) -> None:
        withstands(target, data)

    check()


@pytest.mark.parametrize("name", TARGETS)
def test_bytes_that_are_nearly_right(name: str) -> None:
    target = TARGETS[name]

    @EACH
    @given(mutated(target.seeds))
    def check(data: bytes) -> None:
        withstands(target, data)

    check()


@pytest.mark.parametrize("name", TARGETS)
def test_room_is_bounded_by_the_bytes_given(name: str) -> None:
    target = TARGETS[name]
    withstands(target, target.seeds[0])  # what is imported or cached on first use does not count
    for seed in target.seeds[:3]:
        for piece in PIECES:
            data = seed[: len(seed) // 2] + piece + seed[len(seed) // 2 :]
            assert peak_of(target, data) <= room_for(target, data)


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_batch_never_unpacks_to_much(name: str) -> None:
    data = BOMBS[name]()
    assert len(data) < 300_000
    tracemalloc.start()
    try:
        with pytest.raises(CorruptData):
            records.decode(data)
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_UNPACKED_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("depth", [100, 400, 500, 900, *range(940, 1000, 3)])
def test_a_value_that_can_be_decoded_can_be_kept(depth: int) -> None:
    """However deep it is nested: one that could not be put off would stop its shard for ever."""
    for nest in (b"\x91", b"\x81\xa1a"):
        body = b"\x95\x00\xc0\x91\xc0\x91" + nest * depth + b"\xc0" + b"\xc0"
        for name in ("session", "receive", "entry"):
            data = bytes((1, 0, 0, 1)) + body
            TARGETS[name].decode(b"\x029:" + data if name == "receive" else data)


HAS_WHEEL = (sys.platform, platform.machine()) == ("linux", "x86_64") and sys.version_info < (3, 14)
NEEDED = HAS_WHEEL and os.environ.get("CI") == "true"


@pytest.mark.skipif(
    not find_spec("atheris") and not NEEDED, reason="atheris is not installed: it is in the extra `dev`"
)
def test_coverage_guided_fuzzing_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "batch", "--seconds", "2", "--artifacts", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1 targets, 0 broken" in ended.stdout
