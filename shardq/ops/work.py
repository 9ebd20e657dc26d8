"""What `shardq work` does: finds the worker that MODULE:WORKER names, runs it in this process, or watches over several
processes that run it. Handles no message itself; the supervising process never connects to Redis.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import anyio

from shardq.core.meters import Meters
from shardq.errors import StoreError, WorkerNotFound
from shardq.ops.processes import STOP_SIGNALS, Listen, die_with_parent, until_stopped
from shardq.runtime.client import Client, connect
from shardq.runtime.outages import Outages
from shardq.runtime.worker import Worker
from shardq.runtime.workers import Workers
from shardq.storage.keys import check_name

WAITS = "waiting for Redis"
REACH_EVERY_S = 2.0
INTERRUPTED = 130  # the exit status of a worker that a second signal cut short
USAGE = 2  # the exit status of a supervised worker that would fail the same way again

FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 30.0
STEADY_AFTER_S = 60.0

_log = logging.getLogger("shardq")

Join = Callable[[Client], Awaitable[object]]


def log_to_stderr(level: str) -> None:
    """shardq's own log on stderr, one line for each fact, with the time and the level."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _log.addHandler(handler)
    _log.setLevel(level.upper())
    _log.propagate = False


# -- finding the worker -----------------------------------------------------------------------------------------------


def load_worker(target: str) -> Worker | Workers:
    """What `MODULE:WORKER` names, looked for in the current directory first. Raises WorkerNotFound."""
    module_name, colon, name = target.partition(":")
    if not colon or not name or not all(part.isidentifier() for part in module_name.split(".")):
        what = "is no MODULE:WORKER: name the module as in `import`, then a colon and the worker, as in billing:worker"
        raise WorkerNotFound(f"{target!r} {what}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = _import(module_name)
    found = getattr(module, name, None)
    if not isinstance(found, Worker | Workers):
        there = sorted(other for other, value in vars(module).items() if isinstance(value, Worker | Workers))
        what = f"is {type(found).__name__}, not a shardq.Worker" if hasattr(module, name) else "does not exist"
        named = ", ".join(f"{module_name}:{other}" for other in there)
        instead = f"its workers are {named}" if there else "it has no worker, make one with shardq.Worker(...)"
        raise WorkerNotFound(f"{name!r} in module {module_name!r} {what}: {instead}")
    if not found.has_handler:
        which = f"the worker {target}" if isinstance(found, Worker) else f"one of the workers {target}"
        how = f"decorate an async function with @{name}.handler or @{name}.batch_handler"
        if not isinstance(found, Worker):
            how = "decorate an async function with the handler or batch_handler of each"
        raise WorkerNotFound(f"{which} has no handler: {how}")
    return found


def _import(name: str) -> object:
    try:
        return import_module(name)
    except (Exception, SystemExit) as error:
        # Only the module that was named may be "not there"; one that it imports in turn is its own fault to mend.
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            where = f"is it in {os.getcwd()}, or installed, and spelled as in `import`?"
            raise WorkerNotFound(f"there is no module {error.name!r}: {where}") from error
        cause = traceback.format_exception_only(error)[-1].strip()
        where = f"`python -c 'import {name}'` shows where"
        raise WorkerNotFound(f"importing the module {name!r} failed, mend it: {cause} ({where})") from error


# -- one process ------------------------------------------------------------------------------------------------------


async def run_worker(worker: Worker | Workers, url: str, name: str | None, listen: Listen | None = None) -> int:
    """Runs the worker until SIGTERM or SIGINT, with its metrics at `listen`; returns the exit status."""
    if name is not None:
        worker.name = check_name("worker", name)
    running = False

    async def work() -> None:
        nonlocal running
        async with serving_client(url, listen, worker.join) as client:
            running = True
            await worker.run(client)

    def stop() -> bool:
        worker.stop()
        return running

    return INTERRUPTED if await until_stopped(work, stop) else 0


@asynccontextmanager
async def serving_client(url: str, listen: Listen | None, join: Join) -> AsyncIterator[Client]:
    """A client for a process that runs until it is stopped; with `listen`, its metrics and probes are served there.

    With probes an orchestrator looks after the process: then it waits for Redis, alive and not ready, until `join` has
    gone well, for one that ends is started again later and later. Without them a person does, who is told at once:
    StoreUnavailable.
    """
    async with AsyncExitStack() as stack:
        if listen is None:
            yield await stack.enter_async_context(connect(url))
            return
        from shardq.ops.own_metrics import watched  # and Prometheus' client with it, for those who listen

        meters = Meters()
        await stack.enter_async_context(watched(meters, listen))
        yield await _reach(stack, url, meters, join)


async def _reach(stack: AsyncExitStack, url: str, meters: Meters, join: Join) -> Client:
    outages = Outages()
    client: Client | None = None
    while True:
        try:
            if client is None:
                client = await stack.enter_async_context(connect(url, meters=meters))
            await join(client)  # nodes that answer are not enough: a cluster that lacks a master serves no key
        except StoreError as error:
            if not error.retryable:
                raise
            outages.failed(WAITS, error)
            await anyio.sleep(random.uniform(0.5, 1.0) * REACH_EVERY_S)
        else:
            outages.well(WAITS)
            return client


# -- several processes ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Place:
    """One of the N processes, over all its restarts."""

    number: int
    process: subprocess.Popen[bytes] | None = None
    started_monotonic_s: float = 0.0
    due_monotonic_s: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    over: bool = False


class Supervisor:
    """Keeps `count` processes running: `command` and the place's number as its last argument, `environment` its own.

    A child that ends by itself is started again after a pause that grows each time and shrinks back once it ran for a
    minute; unless it ended well (status 0: it was asked to) or with USAGE: then it would only fail again.
    """

    def __init__(self, command: Sequence[str], count: int, environment: dict[str, str]) -> None:
        self._command, self._environment = list(command), environment
        self._places = [_Place(number) for number in range(1, count + 1)]
        self._stopping = False
        self._status = 0

    async def run(self) -> int:
        """Returns when all children are gone, with the exit status of the whole."""
        with anyio.open_signal_receiver(signal.SIGCHLD, *STOP_SIGNALS) as signals:
            try:
                while True:
                    self._reap()
                    self._start_due()
                    if all(place.over for place in self._places):
                        return self._status
                    number = None
                    with anyio.move_on_after(self._until_due()):
                        number = await anext(signals)
                    if number is not None and number in STOP_SIGNALS:
                        self._stop(number)
            finally:
                for place in self._places:
                    if place.process is not None:
                        place.process.kill()
                        place.process.wait()

    def _start_due(self) -> None:
        now = time.monotonic()
        for place in self._places:
            if place.process is None and not place.over and place.due_monotonic_s <= now:
                place.process = subprocess.Popen(
                    [*self._command, str(place.number)],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    process_group=0,  # a Ctrl-C in the terminal reaches it once, through the supervisor
                    preexec_fn=partial(die_with_parent, os.getpid()),
                )
                place.started_monotonic_s = now

    def _until_due(self) -> float:
        waiting = [place.due_monotonic_s for place in self._places if place.process is None and not place.over]
        return max(0.0, min(waiting) - time.monotonic()) if waiting else float("inf")

    def _reap(self) -> None:
        for place in self._places:
            status = place.process.poll() if place.process is not None else None
            if status is not None:
                self._ended(place, status)

    def _ended(self, place: _Place, status: int) -> None:
        assert place.process is not None
        pid, place.process = place.process.pid, None
        if self._stopping or status == 0:
            # One that was told to stop before it could listen died of the signal: that is what was asked for.
            place.over = True
            if status not in (0, -signal.SIGTERM, -signal.SIGINT):
                self._status = self._status or (status if status == INTERRUPTED else 1)
        elif status == USAGE:
            _log.error("process %d (pid %d) can't run as it is set up: all are stopped", place.number, pid)
            place.over, self._status = True, 1
            self._stop(signal.SIGTERM)
        else:
            ran_s = time.monotonic() - place.started_monotonic_s
            pause_s = FIRST_PAUSE_S if ran_s > STEADY_AFTER_S else place.pause_s
            place.due_monotonic_s, place.pause_s = time.monotonic() + pause_s, min(pause_s * 2, LAST_PAUSE_S)
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            _log.error(
                "process %d (pid %d) ended with %s after %.1f s, it is started again in %g s",
                place.number,
                pid,
                how,
                ran_s,
                pause_s,
            )

    def _stop(self, number: signal.Signals) -> None:
        """The first signal lets every child finish, the next ones hurry them: each child counts for itself."""
        self._stopping = True
        for place in self._places:
            if place.process is not None:
                place.process.send_signal(number)
            else:
                place.over = True


async def supervise(target: str, count: int, url: str, options: Sequence[str]) -> int:
    """Runs `count` processes of the worker, with these options of `shardq work`; returns the exit status."""
    command = [sys.executable, "-m", "shardq", "work", target, *options, "--number"]
    # The URL may hold a password, which would stand in every list of processes as an argument.
    return await Supervisor(command, count, {**os.environ, "SHARDQ_URL": url}).run()
