"""A command on a terminal of its own: keys go in, the screen can be read. What the tests of live views share."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyte

DEADLINE_S = 40.0


class Terminal:
    """`shardq ARGUMENTS` on a terminal of so many columns and lines."""

    def __init__(self, arguments: tuple[str, ...], columns: int, lines: int) -> None:
        self._master, slave = pty.openpty()
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.written = b""
        self.resize(columns, lines)
        self.settings = termios.tcgetattr(slave)
        self._slave = slave  # open here too, so that its settings can be read after the command's end
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shardq", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment | {"TERM": "xterm-256color"},
            preexec_fn=_own_terminal,
        )

    def resize(self, columns: int, lines: int) -> None:
        """As if somebody pulled at the window."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.screen.resize(lines, columns)

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display)

    def until(self, condition: Callable[[str], bool], what: str) -> str:
        """Reads the screen until it is as it should be, and returns it."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition(self.text):
            assert time.monotonic() < deadline, f"not on the screen in time: {what}\n{self.text}"
            assert self.process.poll() is None, f"ended before {what}: {self.written[-2000:]!r}"
            self._read()
        return self.text

    def _read(self) -> None:
        if select.select([self._master], [], [], 0.05)[0]:
            data = os.read(self._master, 65536)
            self.written += data
            self._stream.feed(data)

    def end(self) -> int:
        """The exit status; what it wrote last is read first."""
        deadline = time.monotonic() + DEADLINE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it does not end\n{self.text}"
            self._read()
        self._read()
        return self.process.returncode

    @property
    def is_as_it_was(self) -> bool:
        """The main screen is shown again, the cursor too, and keys do what they did."""
        shown = self.written.rfind(b"\x1b[?1049l") > self.written.rfind(b"\x1b[?1049h") > -1
        cursor = self.written.rfind(b"\x1b[?25h") > self.written.rfind(b"\x1b[?25l")
        return shown and cursor and termios.tcgetattr(self._slave) == self.settings

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)


def _own_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that a Ctrl-C that is typed is a signal


@contextmanager
def terminal(*arguments: str, columns: int = 80, lines: int = 24) -> Iterator[Terminal]:
    """Runs the command; kills what is left of it at the end."""
    running = Terminal(arguments, columns, lines)
    try:
        yield running
    finally:
        running.close()
