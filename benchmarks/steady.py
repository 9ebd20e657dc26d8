"""A worker that holds all its shards before there is anything to handle: its rate is without the taking of leases, and
nothing is read before the clock starts.

While messages are sent from a thread the worker's event loop is blocked, on purpose: nothing else keeps a worker from
reading ahead. Its lease is long enough for that. Case `processes` does the same with processes.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from time import perf_counter

import anyio
from redis.cluster import RedisCluster

from benchmarks.rig import Rig, send_all
from shardq.ops.bench_peers import GROUP, Counted
from shardq.ops.bench_shardq import Pairs, check_count
from shardq.runtime.client import connect
from shardq.runtime.queue import Queue
from shardq.runtime.worker import Worker
from shardq.storage.commands import pack_command

LEASE_S = 60.0
WITHIN_S = 120.0
ASK_EVERY_S = 0.001
QUIET_S, QUIET_COMMANDS, QUIET_WITHIN_S = 0.1, 50, 5.0


class Tally:
    """Messages handled so far, and when it is all of them."""

    def __init__(self, expected: int) -> None:
        self.handled, self.expected, self.complete = 0, expected, anyio.Event()

    def add(self, count: int) -> None:
        self.handled += count
        if self.handled >= self.expected:
            self.complete.set()


def make_worker(queue: str, add: Callable[[int], None], *, lists: bool) -> Worker:
    """With a handler that does nothing but count, for one message at a time or for lists of them."""
    worker = Worker(queue, group=GROUP, lease=LEASE_S)
    if lists:

        @worker.batch_handler
        async def handle(messages: Sequence[object]) -> None:
            add(len(messages))
    else:

        @worker.handler
        async def handle_one(_message: object) -> None:
            add(1)

    return worker


@asynccontextmanager
async def steady(
    one: Rig, queue: Queue, pairs: Pairs, *, lists: bool
) -> AsyncIterator[Callable[[], Awaitable[Counted]]]:
    """Gives what handles `pairs`, from a standing start until Redis has counted all as acknowledged. Call it at once:
    the worker starts as soon as anything waits."""
    await queue.open_group(GROUP, "latest")
    tally = Tally(len(pairs))
    worker = make_worker(queue.name, tally.add, lists=lists)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run, queue.client)
        await all_held(queue, 1)
        await quiet(one)
        before = await acked_by_shard(queue)
        wanted = _send_from_a_thread(one, queue.name, pairs)

        async def run() -> Counted:
            started = perf_counter()
            await tally.complete.wait()
            await _all_acked(queue, {shard: count + wanted[shard] for shard, count in before.items()})
            return Counted(tally.handled, perf_counter() - started)

        yield run
        worker.stop()
    check_count("acknowledged", sum((await acked_by_shard(queue)).values()) - sum(before.values()), len(pairs))
    await queue.delete_group(GROUP)


def _send_from_a_thread(one: Rig, name: str, pairs: Pairs) -> Mapping[int, int]:
    """Blocks this thread until all are stored; returns how many on each shard."""
    stored: dict[int, int] = {}

    async def send() -> None:
        async with connect(one.url, prefix=one.prefix) as client:
            queue = await client.queue(name)
            before = await queue.counters(())
            check_count("filling the queue", (await send_all(queue, pairs)).messages, len(pairs))
            after = await queue.counters(())
            stored.update({shard: found.appended - before[shard].appended for shard, found in after.items()})

    thread = threading.Thread(target=anyio.run, args=(send,))
    thread.start()
    thread.join()
    check_count("filling the queue", sum(stored.values()), len(pairs))
    return stored


async def all_held(queue: Queue, workers: int) -> None:
    """Waits until so many workers hold all shards, spread evenly."""
    with anyio.fail_after(WITHIN_S):
        while True:
            found = [shard.groups[GROUP] for shard in (await queue.counters([GROUP])).values() if shard.groups]
            shares = Counter(group.owner for group in found if group.held)
            if len(shares) == workers and shares.total() == len(queue.shards) and even(shares):
                return
            await anyio.sleep(0.05)


def even(shares: Counter[str]) -> bool:
    return max(shares.values()) - min(shares.values()) <= 1


async def quiet(one: Rig) -> None:
    """Waits until hardly a command arrives any more, some seconds at most: what a worker that has just taken a thousand
    shards still says to them would time out while its event loop is blocked."""
    with anyio.move_on_after(QUIET_WITHIN_S):
        before, more = commands_so_far(one), QUIET_COMMANDS + 1
        while more > QUIET_COMMANDS:
            await anyio.sleep(QUIET_S)
            now = commands_so_far(one)
            before, more = now, now - before


def commands_so_far(one: Rig) -> int:
    found: dict[str, dict[str, int]] = one.peers.redis.info("stats", target_nodes=RedisCluster.PRIMARIES)
    return sum(stats["total_commands_processed"] for stats in found.values())


async def acked_by_shard(queue: Queue) -> dict[int, int]:
    found = await queue.counters([GROUP])
    return {shard: one.groups[GROUP].acked for shard, one in found.items()}


async def _all_acked(queue: Queue, wanted: Mapping[int, int]) -> None:
    """Asks for this one counter, and only of the shards that are not through yet: what asking costs is in the worker's
    rate and CPU. To read all counters of 1,024 shards once took 104 to 147 ms of the client's CPU and 40 to 45 ms of
    the servers'; this takes 9 to 12 ms and 2 to 3 ms."""
    left = dict(wanted)
    with anyio.fail_after(WITHIN_S):
        while left:
            shards = [queue.shards[shard] for shard in left]
            asked = [(shard.slot, pack_command("HGET", shard.group(GROUP), "acked")) for shard in shards]
            replies = await queue.client.pipes.commands(asked)
            left = {
                shard: most
                for (shard, most), acked in zip(left.items(), replies, strict=True)
                if int(acked or 0) < most
            }
            await anyio.sleep(ASK_EVERY_S if left else 0)
