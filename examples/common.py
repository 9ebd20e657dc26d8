"""What the examples share: their command line, processes that can be killed, and what they say at the end.

Each example is one file. `python -m examples.NAME` runs it whole on the cluster that `shardq up` started (or `--url`),
and ends with exit status 0 only if what it promises is what happened. Nothing here is needed to use shardq.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import anyio
from redis.asyncio import RedisCluster

import shardq

ROOT = Path(__file__).parents[1]
GROUP = "example"
ENDS_WITHIN_S = 45.0
LEASE_S = 1.0  # a killed worker's shards rest about so long: short, as an example should be


class Processes:
    """Processes of one kind, each as `python ARGUMENTS`. What they write to stderr is shown when the example fails."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self._command = [sys.executable, "-X", "faulthandler", *arguments]
        self._environment = os.environ | environment
        self._running: list[subprocess.Popen[bytes]] = []
        self._errors = TemporaryFile()  # noqa: SIM115 # closed by `stop`

    def start(self) -> None:
        process = subprocess.Popen(self._command, env=self._environment, cwd=ROOT, stderr=self._errors)
        self._running.append(process)

    def kill_one(self) -> None:
        """SIGKILL to the oldest: it has no chance to say goodbye, as when a machine dies or memory runs out."""
        oldest = self._running.pop(0)
        if oldest.poll() is not None:
            raise SystemExit(f"FAILED: the process to be killed had ended by itself: {self.said()}")
        oldest.kill()
        oldest.wait()

    def alive(self) -> int:
        return sum(process.poll() is None for process in self._running)

    def said(self) -> str:
        """The end of what they wrote to stderr."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-3000:]

    def stop(self) -> None:
        """SIGTERM: they finish what they are doing."""
        for process in self._running:
            process.terminate()
        deadline = time.monotonic() + ENDS_WITHIN_S
        for process in self._running:
            try:
                process.wait(deadline - time.monotonic())
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGABRT)  # it says where it is
                process.wait()
                raise SystemExit(f"FAILED: a process did not end when it was told to: {self.said()}") from None
        self._errors.close()


@contextmanager
def _running(processes: Processes, count: int) -> Iterator[Processes]:
    with ExitStack() as stack:
        stack.callback(processes.stop)
        try:
            for _ in range(count):
                processes.start()
            yield processes
        except BaseException:
            print(processes.said(), file=sys.stderr)
            raise


@contextmanager
def workers(url: str, target: str, count: int, **environment: str) -> Iterator[Processes]:
    """So many processes of `shardq work MODULE:WORKER`; all are stopped at the end."""
    arguments = ["-m", "shardq", "work", target, "--url", url, "--log-level", "error"]
    with _running(Processes(arguments, environment), count) as processes:
        yield processes


@contextmanager
def programs(url: str, module: str, **environment: str) -> Iterator[Processes]:
    """One process of `python -m MODULE`, for an example that plays another part when its environment says so."""
    with _running(Processes(["-m", module, "--url", url], environment), 1) as processes:
        yield processes


@asynccontextmanager
async def plain_redis(url: str) -> AsyncIterator[Any]:
    """redis-py's own client, for what an application keeps beside its queues. Answers are str."""
    redis = RedisCluster.from_url(url, decode_responses=True)
    try:
        yield redis
    finally:
        await redis.aclose()


async def until(condition: Callable[[], Awaitable[bool]], what: str, deadline_s: float = 40) -> None:
    """Polls until it holds; the example fails at the deadline."""
    with anyio.move_on_after(deadline_s):
        while not await condition():  # noqa: ASYNC110 # what it waits for happens in other processes
            await anyio.sleep(0.02)
        return
    raise SystemExit(f"FAILED: waited {deadline_s:g} s for {what}")


async def unfinished(queue: shardq.Queue, group: str = GROUP) -> int:
    """How many messages the group has not finished."""
    return sum(info.backlog for info in await queue.groups() if info.name == group)


async def finished(queue: shardq.Queue, group: str = GROUP) -> bool:
    """Whether the group is there and has nothing left to do. A dead letter is finished, too."""
    return any(info.backlog == 0 for info in await queue.groups() if info.name == group)


def unique(name: str) -> str:
    """A queue name of this run's own, so that an example can be run again and again."""
    return f"{name}-{secrets.token_hex(3)}"


def check(holds: bool, promise: str) -> None:
    """Says whether a promise was kept; the example fails when not."""
    print(f"  {'yes' if holds else 'NO '}  {promise}")
    if not holds:
        raise SystemExit(1)


def run(main: Callable[[str], Awaitable[None]], about: str | None) -> None:
    """The command line of every example."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default=os.environ.get("SHARDQ_URL", "redis://127.0.0.1:7000"), help="the cluster")
    anyio.run(main, parser.parse_args().url)
