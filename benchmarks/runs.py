"""One round of one system for the case `pipeline`: a worker process and a producer process, and what they said.

How the two speak is told in peers/protocol.py. A round that does not end, or whose count is off, is an error: no rate
is ever made of it. Nothing here knows what a system is; that is for the programs in peers/.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import anyio
from anyio.abc import Process
from anyio.streams.text import TextReceiveStream

from shardq.errors import CorruptData, StoreTimeout, UsageError

ROOT = Path(__file__).parent.parent
ROUND_WITHIN_S = 120.0


@dataclass(frozen=True, slots=True)
class Program:
    """A module, the Python that runs it and what its environment tells it."""

    module: str
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self, role: str, url: str, count: int) -> list[str]:
        return [self.python, "-m", self.module, role, url, str(count)]


async def one_round(program: Program, url: str, count: int, within_s: float = ROUND_WITHIN_S) -> float:
    """Messages a second, from the first send until the system itself says that the last message is finished.

    Raises CorruptData when other than `count` messages were handled, StoreTimeout after `within_s` seconds and
    UsageError, with its last words, when a process ended before it had said what it was expected to.
    """
    try:
        with anyio.fail_after(within_s):
            async with _running(program, "work", url, count) as worker:
                await worker.expect("up")
                async with _running(program, "produce", url, count) as producer:
                    await producer.expect("ready")
                    await worker.expect("ready")
                    await producer.go()
                    (started,) = await producer.expect("started")
                    await producer.expect("sent")
                    ended, handled = await worker.expect("finished")
    except TimeoutError:
        msg = f"{program.module} did not finish {count} messages in {within_s:g} s: run its two commands by hand"
        raise StoreTimeout(msg) from None
    if int(handled) != count:
        msg = f"{program.module} handled {handled} messages, not {count}: its rate would mean nothing; run it again"
        raise CorruptData(msg)
    return count / (float(ended) - float(started))


class _Talk:
    """What a process says, line by line."""

    def __init__(self, process: Process, errors: IO[bytes], name: str) -> None:
        assert process.stdout is not None
        self._process, self._errors, self._name = process, errors, name
        self._said, self._rest = TextReceiveStream(process.stdout), ""

    async def go(self) -> None:
        assert self._process.stdin is not None
        await self._process.stdin.send(b"go\n")

    async def expect(self, word: str) -> list[str]:
        """What stands behind `word` in the next line that begins with it; other lines are the system's own chatter."""
        while True:
            line = await self._line(word)
            if line.split(" ")[0] == word:
                return line.split(" ")[1:]

    async def _line(self, wanted: str) -> str:
        while "\n" not in self._rest:
            try:
                self._rest += await self._said.receive()
            except anyio.EndOfStream:
                raise UsageError(
                    f"{self._name} ended before it said {wanted!r}; it said: {self._errors_tail()}"
                ) from None
        line, self._rest = self._rest.split("\n", 1)
        return line

    def _errors_tail(self) -> str:
        self._errors.seek(0)
        return " ".join(self._errors.read().decode(errors="replace").split())[-600:] or "nothing"


@asynccontextmanager
async def _running(program: Program, role: str, url: str, count: int) -> AsyncIterator[_Talk]:
    """A process, killed with all its children at the end: its work is done and nobody waits for its farewell."""
    with TemporaryFile() as errors:
        process = await anyio.open_process(
            program.command(role, url, count),
            stdin=subprocess.PIPE,
            stderr=errors,
            cwd=ROOT,
            env={**os.environ, **program.environment},
            start_new_session=True,
        )
        try:
            yield _Talk(process, errors, f"{program.module} {role}")
        finally:
            with anyio.CancelScope(shield=True):
                _kill_group(process.pid)
                await process.aclose()


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of them have ended
