"""What the examples share: their command line, worker processes that can be killed, and what they say at the end.

Each example is one file. `python -m examples.NAME` runs it whole on the cluster that `shardq up` started (or `--url`), and
ends with exit status 0 only if what it promises is what happened.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio

import shardq

ROOT = Path(__file__).parents[1]
GROUP = "example"


class Workers:
    """Worker processes of one example, as `shardq work` runs them."""

    def __init__(self, url: str, target: str, environment: dict[str, str]) -> None:
        self._command = [sys.executable, "-m", "shardq", "work", target, "--url", url, "--log-level", "error"]
        self._environment = os.environ | environment
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._running.append(subprocess.Popen(self._command, env=self._environment, cwd=ROOT, stderr=subprocess.DEVNULL))

    def kill_one(self) -> None:
        """SIGKILL: the process has no chance to say goodbye, as when a node dies or memory runs out."""
        self._running.pop(0).kill()

    @property
    def running(self) -> int:
        return sum(process.poll() is None for process in self._running)

    def stop(self) -> None:
        for process in self._running:
            process.terminate()
        for process in self._running:
            process.wait()


@contextmanager
def workers(url: str, target: str, count: int, **environment: str) -> Iterator[Workers]:
    """So many worker processes; all are stopped at the end."""
    group = Workers(url, target, environment)
    try:
        for _ in range(count):
            group.start()
        yield group
    finally:
        group.stop()


async def until(condition: Callable[[], Awaitable[bool]], what: str, deadline_s: float = 60) -> None:
    """Polls until it holds; the example fails at the deadline."""
    with anyio.move_on_after(deadline_s):
        while not await condition():
            await anyio.sleep(0.05)
        return
    raise SystemExit(f"FAILED: waited {deadline_s:g} s for {what}")


async def finished(queue: shardq.Queue, group: str = GROUP) -> bool:
    """Whether the group has nothing left to do."""
    return all(info.backlog == 0 for info in await queue.groups() if info.name == group)


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
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--url", default=os.environ.get("SHARDQ_URL", "redis://127.0.0.1:7000"), help="the cluster")
    anyio.run(main, parser.parse_args().url)
