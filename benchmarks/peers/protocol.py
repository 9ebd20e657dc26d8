"""What the case `pipeline` and the programs beside this file say to each other, and the messages they all send.

Every program runs twice at a time, as `python -m benchmarks.peers.NAME work URL COUNT` and as `... produce URL COUNT`:

    work                                  produce
    says "up": its tasks are declared
                                          starts, connects, sends WARM_UP messages
    says "ready": those are finished      says "ready"
                                          reads a line from its standard input
                                          says "started SECONDS", sends COUNT messages, says "sent SECONDS"
    says "finished SECONDS HANDLED"
    is killed, or ends when its standard input closes, as it does when the benchmark is killed

SECONDS are those of the machine's monotonic clock, which all processes share. A message is finished when the system's
own store says so: each program asks that with its `left`, only once all handlers were called. HANDLED counts the calls.

Standard library only: every peer's environment imports this.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

WARM_UP, VALUE_BYTES, VALUES = 20, 100, 10_000
_LOOK_EVERY_S = 0.002


def messages(count: int) -> list[str]:
    """The messages, in every run the same: text of VALUE_BYTES bytes, which those that speak JSON can carry too."""
    chance = random.Random(1)
    values = [base64.b64encode(chance.randbytes(VALUE_BYTES * 3 // 4)).decode() for _ in range(VALUES)]
    return chance.choices(values, k=count)


def say(*words: object) -> None:
    print(*words, flush=True)


def arguments() -> tuple[str, str, int]:
    """(work or produce, URL, COUNT); logging below errors is switched off, which a peer may do in production too."""
    logging.disable(logging.WARNING)
    return sys.argv[1], sys.argv[2], int(sys.argv[3])


def setting(usual: str) -> str:
    """How this system is run, of the settings among which the case looks for the fastest: mostly how many at a time."""
    return os.environ.get("SETTING", usual)


class Tally:
    """Handler calls of one process."""

    handled = 0

    def add(self, _value: object = None) -> None:
        self.handled += 1

    def total(self) -> int:
        return self.handled


class SharedTally:
    """Handler calls of several threads, or of processes forked later: a byte each at the end of a file, exact without
    a lock."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile("ab", buffering=0)  # noqa: SIM115, as long as the process

    def add(self, _value: object = None) -> None:
        self._file.write(b".")

    def total(self) -> int:
        return os.fstat(self._file.fileno()).st_size


async def watch(tally: Tally | SharedTally, count: int, left: Callable[[], Awaitable[int]]) -> None:
    """The worker's part: says when the first messages are finished, and when all are. Never returns."""

    async def finished(expected: int) -> None:
        while tally.total() < expected or await left():  # noqa: ASYNC110, nothing tells: a handler only counts
            await asyncio.sleep(_LOOK_EVERY_S)

    threading.Thread(target=_end_with_input, daemon=True).start()
    say("up")
    await finished(WARM_UP)
    say("ready")
    await finished(WARM_UP + count)
    say("finished", time.monotonic(), tally.total() - WARM_UP)
    await asyncio.Event().wait()


def beside(run: Callable[[], object]) -> None:
    """Starts `run` in a process of its own. For workers that fork others: this one, which watches, has threads, and a
    lock that one of these holds at a fork is never released in the child."""
    if os.fork() == 0:
        run()
        os._exit(1)


def _end_with_input() -> None:
    """Also ends the processes this one has started: the benchmark makes it the leader of their group."""
    sys.stdin.read()
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def watch_blocking(tally: Tally | SharedTally, count: int, left: Callable[[], int]) -> None:
    """watch() for a worker without an event loop; in a thread of its own, or in a parent of the working processes."""

    async def ask() -> int:
        return left()

    asyncio.run(watch(tally, count, ask))


async def produce(
    count: int,
    send: Callable[[list[Any]], Awaitable[object]],
    made_of: Callable[[list[str]], list[Any]] = list,
) -> None:
    """The producer's part: `send` returns when all it was given are stored. `made_of` is not timed: it makes of the
    messages what a user of this system would have at hand, such as bytes."""
    ahead, values = made_of(messages(WARM_UP)), made_of(messages(count))
    await send(ahead)
    say("ready")
    sys.stdin.readline()
    say("started", time.monotonic())
    await send(values)
    say("sent", time.monotonic())


def produce_blocking(count: int, send: Callable[[list[str]], object]) -> None:
    """produce() for a producer without an event loop."""

    async def sending(values: list[str]) -> None:
        send(values)

    asyncio.run(produce(count, sending))
