"""The client processes of a run: starts them, hands them out to faults, replaces those that die, stops them.
Writes down what was done to each; judges nothing.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from shardq.ops.processes import die_with_parent
from tests.faults.history import Journal, Process

Role = Literal["producer", "worker", "coordinator"]
ROOT = Path(__file__).parents[2]
_POLL_S = 0.05
_LOG_TAIL = 1500

# They get SIGKILL when the thread that started them ends, so one that lasts starts all (see shardq/ops/processes.py).
_STARTER = ThreadPoolExecutor(1, "shardq-faults-starter")


@dataclass(eq=False)
class Member:
    """One process. `expected`: somebody made it end, or told it to."""

    name: str
    role: Role
    process: subprocess.Popen[bytes]
    log: Path
    expected: bool = False
    paused: bool = False

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-_LOG_TAIL:]


@dataclass
class Crowd:
    """
    common    arguments of every client
    folder    where they write their histories and logs
    sizes     how many of each role there are to be
    """

    url: str
    queue: str
    folder: Path
    journal: Journal
    sizes: dict[Role, int]
    common: Sequence[str] = ()
    members: list[Member] = field(default_factory=list)
    replacing: bool = True
    _count: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def write(self, what: str, member: Member, text: str = "") -> None:
        self.journal.write(Process(what, self.journal.clock(), member.name, text))  # type: ignore[arg-type] # its words

    # -- starting ------------------------------------------------------------------------------------------------------

    def start_all(self) -> None:
        for role, count in self.sizes.items():
            for _ in range(count):
                self.start(role)

    def start(self, role: Role) -> Member:
        with self._lock:
            self._count += 1
            name = f"{role}-{self._count}"
            log = self.folder / f"{name}.log"
            arguments = [sys.executable, "-m", "tests.faults.clients", role, self.url, self.queue, name]
            command = [*arguments, str(self.folder), *self.common]
            member = Member(name, role, _STARTER.submit(_launch, command, log).result(), log)
            self.members.append(member)
            self.write("started", member, f"pid {member.process.pid}")
            return member

    def run_aside(self, module: str, name: str, arguments: Sequence[str], within_s: float) -> tuple[int, str]:
        """A process that belongs to no role, until it ends; returns its status and the end of its log."""
        with self._lock:
            self._count += 1
            name = f"{name}-{self._count}"
        log = self.folder / f"{name}.log"
        command = [sys.executable, "-m", module, self.url, self.queue, name, str(self.folder), *arguments]
        process = _STARTER.submit(_launch, command, log).result()
        try:
            process.wait(within_s)
        except subprocess.TimeoutExpired:
            process.kill()
        return process.wait(), log.read_text(errors="replace")[-_LOG_TAIL:]

    # -- handing out ---------------------------------------------------------------------------------------------------

    def of(self, role: Role) -> list[Member]:
        """Those that live and that no fault has in its hands."""
        with self._lock:
            return [m for m in self.members if m.role == role and m.alive and not m.expected and not m.paused]

    def one_of(self, role: Role, chance: random.Random) -> Member | None:
        found = self.of(role)
        return chance.choice(found) if found else None

    def named(self, name: str) -> Member | None:
        """The member that goes by this name in its group, if no fault has it in its hands."""
        free = [*self.of("worker"), *self.of("coordinator")]
        return next((m for m in free if m.name == name or f"-coordinator-{m.process.pid}-" in name), None)

    # -- what faults do ------------------------------------------------------------------------------------------------

    def kill(self, member: Member) -> None:
        """SIGKILL; not replaced before `fill_up`."""
        with self._lock:
            member.expected = True
            self.write("killed", member)
            member.process.kill()
        member.process.wait()

    def pause(self, member: Member) -> None:
        with self._lock:
            member.paused = True
            self.write("paused", member)
            member.process.send_signal(signal.SIGSTOP)

    def resume(self, member: Member) -> None:
        with self._lock:
            member.process.send_signal(signal.SIGCONT)
            self.write("resumed", member)
            member.paused = False

    def tell(self, member: Member) -> None:
        """SIGTERM: it ends when it has finished what it is doing."""
        with self._lock:
            member.expected = True
            self.write("told", member)
            member.process.terminate()

    def wait(self, member: Member, within_s: float) -> None:
        """Until it has ended well; else that is written down, and one that is there still is killed."""
        deadline = time.monotonic() + within_s
        while member.alive and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if member.alive:
            self.write("overdue", member, f"waited {within_s:g} s; its log ends: {member.log_tail()}")
            self.kill(member)
        elif member.process.returncode not in (0, -signal.SIGTERM):
            self.write("died", member, f"status {member.process.returncode}; its log ends: {member.log_tail()}")
        else:
            self.write("ended", member)

    def fill_up(self, role: Role) -> None:
        """As many as there are to be, those included that a fault has stopped."""
        with self._lock:
            there = sum(1 for m in self.members if m.role == role and m.alive and not m.expected)
            for _ in range(self.sizes[role] - there if self.replacing else 0):
                self.start(role)

    # -- looking after -------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Writes down who died by itself, and replaces it."""
        with self._lock:
            gone = [member for member in self.members if not member.alive and not member.expected]
            for member in gone:
                member.expected = True
                text = f"status {member.process.returncode}; its log ends: {member.log_tail()}"
                self.write("died", member, text)
                self.fill_up(member.role)

    def stop(self, role: Role, within_s: float) -> None:
        """Tells all of a role to end, and waits."""
        told = [member for member in self.members if member.role == role and member.alive]
        for member in told:
            self.tell(member)
        for member in told:
            self.wait(member, within_s)

    def end(self) -> None:
        """Nobody is left afterwards."""
        for member in self.members:
            if member.alive:
                member.process.kill()
                member.process.wait()


def _launch(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,  # a Ctrl-C in the terminal is for the run, which stops them in order
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
