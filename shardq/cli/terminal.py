"""A terminal whose keys come one by one, and which is left as it was found. Knows no queue; reads nothing but keys."""

from __future__ import annotations

import os
import termios
import tty
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import anyio

from shardq.ops.top.keys import parse

_READ_BYTES = 1024
_ESCAPE_S = 0.05  # what a terminal sends for one key arrives together, or nearly so


@contextmanager
def keys_one_by_one(descriptor: int) -> Iterator[None]:
    """Within it keys are not shown, and need no Enter; Ctrl-C still is a signal, Ctrl-Z is none: nobody would see the
    shell behind the table."""
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor, termios.TCSANOW)
        attributes = termios.tcgetattr(descriptor)
        attributes[6][termios.VSUSP] = os.fpathconf(descriptor, "PC_VDISABLE").to_bytes(1, "little")
        termios.tcsetattr(descriptor, termios.TCSANOW, attributes)
        yield
    finally:
        try:
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        except termios.error:
            pass  # the terminal is gone


async def keys(descriptor: int) -> AsyncIterator[str]:
    """Every key as it is pressed, named as in ops/top/keys.py, until the terminal is closed."""
    rest = ""
    while True:
        with anyio.move_on_after(_ESCAPE_S if rest else None) as limit:
            await anyio.wait_readable(descriptor)
        data = b"" if limit.cancelled_caught else _read(descriptor)
        if data is None:
            return
        found, rest = parse(rest + data.decode(errors="replace"), more=bool(data))
        for key in found:
            yield key


def _read(descriptor: int) -> bytes | None:
    """None when the terminal is closed."""
    try:
        return os.read(descriptor, _READ_BYTES) or None
    except OSError:
        return None
