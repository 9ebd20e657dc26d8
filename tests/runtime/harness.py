"""What the runtime tests share: worker processes, traffic, polling with a deadline, the equation of the counters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import anyio

import shardq
from shardq.core import records
from shardq.core.ids import MessageId
from shardq.storage.commands import pack_command
from shardq.storage.counters import ShardCounters

ROOT = Path(__file__).parents[2]
GROUP = "g"


class WorkerProcess:
    """A worker in a process of its own, started by the command its users run."""

    def __init__(
        self,
        url: str,
        queue: str,
        journal: Path,
        *,
        lease: float = 3.0,
        handler_s: float = 0.0,
        target: str = "tests.runtime.app:worker",
        settings: Mapping[str, str] = MappingProxyType({}),
        launcher: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> None:
        """`launcher` is a command that becomes the one behind it, `options` are some of `shardq work`."""
        environment = os.environ | {
            "QUEUE": queue,
            "JOURNAL": str(journal),
            "LEASE": str(lease),
            "HANDLER_S": str(handler_s),
            **settings,
        }
        self.log = journal / f"log-{time.monotonic_ns()}.txt"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*launcher, sys.executable, "-m", "shardq", "work", target, "--url", url, *options],
                env=environment,
                cwd=ROOT,
                stderr=log,
            )
        self.name = f"w{self.process.pid}"

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def says(self, text: str, times: int = 1) -> bool:
        """Whether its log has it so many times."""
        return self.log.read_text().count(text) >= times

    async def wait(self, deadline_s: float = 30) -> int:
        """The exit status."""
        await until(lambda: self.process.poll() is not None, deadline_s, "the worker's end")
        return int(self.process.returncode)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextmanager
def workers(
    url: str,
    queue: str,
    journal: Path,
    *,
    lease: float = 3.0,
    handler_s: float = 0.0,
    target: str = "tests.runtime.app:worker",
) -> Iterator[Callable[..., WorkerProcess]]:
    """Gives a function that starts one more worker, with what it is given in its environment; kills what is left at
    the end."""
    started: list[WorkerProcess] = []

    def start(app: str = target, *, launcher: Sequence[str] = (), **settings: str) -> WorkerProcess:
        started.append(
            WorkerProcess(
                url,
                queue,
                journal,
                lease=lease,
                handler_s=handler_s,
                target=app,
                settings=settings,
                launcher=launcher,
            )
        )
        return started[-1]

    try:
        yield start
    finally:
        for worker in started:
            worker.end()


@asynccontextmanager
async def running(client: shardq.Client, worker: shardq.Worker) -> AsyncIterator[None]:
    """The worker runs in this process, and is stopped gracefully at the end."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run, client)
        yield
        worker.stop()


async def until(condition: Callable[[], bool] | Callable[[], Awaitable[bool]], deadline_s: float, what: str) -> float:
    """Polls until the condition holds; returns how long it took. Fails the test at the deadline."""
    started = time.monotonic()
    while True:
        result = condition()
        if not isinstance(result, bool):
            result = await result
        if result:
            return time.monotonic() - started
        assert time.monotonic() - started < deadline_s, f"waited {deadline_s} s for {what}"
        await anyio.sleep(0.02)


class Traffic:
    """Sends numbered messages over a few keys and remembers the ids of those whose send returned, by key in order."""

    def __init__(self, keys: int = 40) -> None:
        self.keys = keys
        self.sent: dict[str, list[str]] = defaultdict(list)
        self.stopped = False

    async def send(self, producer: shardq.Producer, count: int) -> None:
        async with anyio.create_task_group() as tasks:
            for key in range(self.keys):
                tasks.start_soon(self._send_key, producer, f"key-{key}", range(key, count, self.keys))

    async def keep_sending(self, producer: shardq.Producer, pause_s: float = 0.01) -> None:
        """Until `stopped`."""
        async with anyio.create_task_group() as tasks:
            for key in range(self.keys):
                tasks.start_soon(self._send_forever, producer, f"key-{key}", pause_s)

    async def _send_key(self, producer: shardq.Producer, key: str, numbers: range) -> None:
        for number in numbers:
            self.sent[key].append(await producer.send(number, key=key))

    async def _send_forever(self, producer: shardq.Producer, key: str, pause_s: float) -> None:
        number = 0
        while not self.stopped:
            self.sent[key].append(await producer.send(number, key=key))
            number += 1
            await anyio.sleep(pause_s)

    @property
    def total(self) -> int:
        return sum(map(len, self.sent.values()))


def backlog(shard: ShardCounters, group: str = GROUP) -> int:
    counters = shard.groups[group]
    finished = counters.base + counters.acked + counters.dead - counters.replayed
    return shard.appended + counters.foreign - finished - counters.skip


async def owners(queue: shardq.Queue) -> dict[int, str]:
    """Who holds which shard, held leases only."""
    found = await queue.counters([GROUP])
    return {
        shard: counters.groups[GROUP].owner
        for shard, counters in found.items()
        if GROUP in counters.groups and counters.groups[GROUP].held
    }


async def drained(queue: shardq.Queue, group: str = GROUP) -> bool:
    """Whether the group has finished everything appended."""
    found = await queue.counters([group])
    return all(group in counters.groups and backlog(counters, group) == 0 for counters in found.values())


async def check_equation(queue: shardq.Queue, group: str = GROUP) -> None:
    """appended = finished + backlog on every shard, the backlog counted from what the stream really holds."""
    from shardq.storage.commands import pack_command

    for shard, counters in (await queue.counters([group])).items():
        keys = queue.shards[shard]
        pending = await queue.client.pipes.command(keys.slot, pack_command("XPENDING", keys.stream, group))
        groups = await queue.client.pipes.command(keys.slot, pack_command("XINFO", "GROUPS", keys.stream))
        own = next(dict(zip(item[::2], item[1::2], strict=True)) for item in groups if group.encode() in item)
        last = own[b"last-delivered-id"].decode()
        unread = await queue.client.pipes.command(keys.slot, pack_command("XRANGE", keys.stream, f"({last}", "+"))
        undelivered = sum(int.from_bytes(fields[3][2:4], "big") for _, fields in unread if fields[0] == b"at")
        state = counters.groups[group]
        assert backlog(counters, group) >= 0
        delivered_unfinished = state.delivered - state.acked - state.dead + state.replayed
        assert backlog(counters, group) == undelivered + delivered_unfinished, f"shard {shard}: {counters}"
        if pending[0] == 0:
            assert delivered_unfinished == state.waiting, f"shard {shard}: {counters}"


async def stored(queue: shardq.Queue) -> list[tuple[str, Any, Any]]:
    """Every stored message, (id, key, value), those of parents before those of children, in stream order."""
    await queue.refresh()
    found = []
    for shard, keys in sorted(queue.shards.items()):
        entries = await queue.client.pipes.command(keys.slot, pack_command("XRANGE", keys.stream, "-", "+"))
        for entry, fields in entries:
            batch = records.decode(fields[3])
            for index, (key, value) in enumerate(zip(batch.keys, batch.values, strict=True)):
                found.append((str(MessageId(shard, entry.decode(), index)), key, value))
    return found
