"""How a case starts a program, tells it things and hears from it: lines on its stdin and stdout. Measures nothing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

ROOT = Path(__file__).parents[2]
_ANSWER_WITHIN_S = 60.0
_LONGEST_LINE = 1000


class Program:
    """One running program."""

    def __init__(self, process: Process) -> None:
        assert process.stdout is not None
        self.process = process
        self._lines = BufferedByteReceiveStream(process.stdout)

    @property
    def pid(self) -> int:
        return self.process.pid

    async def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send(f"{line}\n".encode())

    async def hear(self, within_s: float = _ANSWER_WITHIN_S) -> str:
        """The next line. Raises TimeoutError, and anyio's IncompleteRead when the program ended instead."""
        with anyio.fail_after(within_s):
            return (await self._lines.receive_until(b"\n", _LONGEST_LINE)).decode()

    async def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Sends the signal and waits for the end. Safe to repeat."""
        if self.process.returncode is None:
            self.process.send_signal(number)
            await self.process.wait()


@asynccontextmanager
async def running(name: str, *arguments: str | int | Path) -> AsyncIterator[Program]:
    """`python -m benchmarks.programs.NAME`, once it has said that it is ready; killed at the end if it runs still."""
    command = [sys.executable, "-m", f"benchmarks.programs.{name}", *map(str, arguments)]
    process = await anyio.open_process(command, cwd=ROOT, env=os.environ, stderr=None)
    program = Program(process)
    try:
        said = await program.hear()
        assert said == "ready", said
        yield program
    finally:
        with anyio.CancelScope(shield=True):
            await program.end(signal.SIGKILL)
            await process.aclose()
