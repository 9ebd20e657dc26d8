"""The demo's worker processes: each one is a `shardq work` with a process group of its own. Never restarts one, and
leaves none behind: not at the end, and on Linux not even when the demo itself is killed with SIGKILL.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Self

from shardq.ops.demo.worker import JOURNAL_VARIABLE
from shardq.ops.processes import die_with_parent

_TARGET = "shardq.ops.demo.worker:worker"
_STOP_WITHIN_S, _POLL_S = 5.0, 0.02


class Crew:
    """Starts and kills workers by name; a context that ends with all of them gone."""

    def __init__(self, url: str, folder: Path) -> None:
        self._folder = folder
        self._environment = {**os.environ, "SHARDQ_URL": url, JOURNAL_VARIABLE: str(folder)}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, name: str) -> int:
        """Starts a worker and returns its pid. Call it in the main thread: the worker dies with the thread."""
        command = [sys.executable, "-m", "shardq", "work", _TARGET, "--name", name, "--log-level", "warning"]
        with self._log(name).open("wb") as log:
            self._processes[name] = subprocess.Popen(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # a Ctrl-C in the terminal is for the demo, which stops its workers itself
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
        return self._processes[name].pid

    def kill(self, name: str) -> int:
        """SIGKILL, to the worker and whatever it started; returns when that was, on CLOCK_MONOTONIC."""
        process = self._processes.pop(name)
        killed_ns = time.monotonic_ns()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return killed_ns

    def ended(self) -> Mapping[str, str]:
        """Workers that ended unasked, with the last of what they said; each is told once."""
        gone = [name for name, process in self._processes.items() if process.poll() is not None]
        return {name: f"status {self._processes.pop(name).returncode}: {self._last_words(name)}" for name in gone}

    @property
    def names(self) -> list[str]:
        return list(self._processes)

    def stop(self) -> None:
        """SIGTERM to all, then SIGKILL to whoever is still there."""
        for process in self._processes.values():
            process.terminate()
        deadline = time.monotonic() + _STOP_WITHIN_S
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes.values()):
            time.sleep(_POLL_S)
        for name in self.names:
            if self._processes[name].poll() is None:
                self.kill(name)
        self._processes.clear()

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _last_words(self, name: str) -> str:
        lines = self._log(name).read_text(errors="replace").splitlines()
        return " | ".join(lines[-3:]) or "it said nothing"
