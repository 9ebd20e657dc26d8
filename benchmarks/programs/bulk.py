"""One process of the case `processes`: sends or handles in bulk when it is told to, and says what CPU it used.

    python -m benchmarks.programs.bulk send URL PREFIX          send QUEUE COUNT -> ready; go -> result
    python -m benchmarks.programs.bulk work URL PREFIX QUEUE    hold -> held; go; report -> result

Between `hold` and `go` the worker's event loop stands still: it reads nothing before the clock starts (see steady.py).
"""

from __future__ import annotations

import json
import resource
import sys
from time import perf_counter

import anyio
from anyio import to_thread

from benchmarks.steady import make_worker
from shardq.ops.bench_shardq import make_pairs
from shardq.runtime.client import Client, connect


def say(line: str) -> None:
    print(line, flush=True)


async def told() -> list[str]:
    """The next line on stdin as words; none at its end."""
    line: str = await to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
    return line.split()


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def send(client: Client) -> None:
    say("ready")
    while words := await told():
        queue = await client.queue(words[1])
        pairs = make_pairs(int(words[2]))
        async with queue.producer() as producer:
            say("ready")
            await told()
            cpu, started = cpu_s(), perf_counter()
            await producer.send_many(pairs)
            ended = perf_counter()
        say(json.dumps({"started": started, "ended": ended, "cpu_s": cpu_s() - cpu}))


async def work(client: Client, queue: str) -> None:
    handled, cpu = 0, 0.0

    def add(count: int) -> None:
        nonlocal handled
        handled += count

    worker = make_worker(queue, add, lists=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run, client)
        say("ready")
        while words := await told():
            if words == ["hold"]:
                handled = 0
                say("held")
                sys.stdin.readline()  # blocks the event loop, and with it the worker
                cpu = cpu_s()
            else:
                say(json.dumps({"handled": handled, "cpu_s": cpu_s() - cpu}))
        worker.stop()


async def main(*arguments: str) -> None:
    role, url, prefix, *queue = arguments
    async with connect(url, prefix=prefix) as client:
        await (send(client) if role == "send" else work(client, queue[0]))


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
