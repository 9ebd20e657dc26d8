"""Commands in wire form: calls of our functions, any other command, and the one that asks how far a write got. Sends
nothing, reads no reply but that one's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import hiredis

from shardq.storage.functions import READERS, function_name

EMPTY = b"$0\r\n\r\n"  # an argument

WAIT_TIMEOUT_S = 1.0
WAIT_TIMEOUT_MS = int(WAIT_TIMEOUT_S * 1000)
FSYNC_TIMEOUT_MS = 2500  # `appendfsync everysec` takes a second, on master and replica side by side, and a bad one two


def pack_command(*args: str | bytes | int) -> bytes:
    """Any command, in wire form."""
    packed: bytes = hiredis.pack_command(args)  # type: ignore[arg-type]  # its stub knows only one-item tuples
    return packed


@dataclass(frozen=True, slots=True)
class Confirm:
    """How far a write must have got before its reply counts: the command that asks, and the answer that suffices."""

    packed: bytes
    replicas: int
    fsync: bool = False

    def shortfall(self, reply: Any) -> int | None:
        """How many replicas confirmed, when that is too few; None when it suffices."""
        counts = reply if self.fsync else [1, reply]
        if type(counts) is not list or len(counts) < 2 or not {int}.issuperset(map(type, counts)):
            return 0  # no answer of a server that is in order
        return None if counts[1] >= self.replicas and counts[0] >= 1 else int(counts[1])


@functools.cache
def confirm_replicas(replicas: int) -> Confirm:
    return Confirm(pack_command("WAIT", replicas, WAIT_TIMEOUT_MS), replicas)


@functools.cache
def confirm_fsync(replicas: int) -> Confirm:
    """On the master's disk and on those of so many replicas."""
    return Confirm(pack_command("WAITAOF", 1, replicas, FSYNC_TIMEOUT_MS), replicas, fsync=True)


class Packed(NamedTuple):
    """One call on the wire."""

    data: bytes
    asking: bool = False
    confirm: Confirm | None = None


def pack_call(function: str, keys: Sequence[str], args: Sequence[str | bytes | int]) -> bytes:
    """One of our functions in wire form; those that only read take no right to write."""
    command = "FCALL_RO" if function in READERS else "FCALL"
    return pack_command(command, function_name(function), len(keys), *keys, *args)
