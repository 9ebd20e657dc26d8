"""shardq.Workers: several queues in one process, its handler slots shared out by weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

import shardq
from shardq.ops.local_cluster import LocalCluster
from shardq.ops.work import load_worker
from tests.runtime.harness import GROUP, WorkerProcess, check_equation, drained, until

# Slots are shared in the process; no server has a part in it.
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis8")]


class Served:
    """Queues with their workers, whose handlers note in what order messages are begun and how many run at a time."""

    def __init__(self, client: shardq.Client, queue_name: str) -> None:
        self.client, self._name = client, queue_name
        self.begun: list[str] = []
        self.running = self.most_running = 0
        self.queues: list[shardq.Queue] = []

    async def worker(self, name: str, messages: int, *, lists: bool = False, **options: str) -> shardq.Worker:
        queue = await self.client.queue(f"{self._name}-{name}", shards=4)
        self.queues.append(queue)
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            await producer.send_many((f"k{number}", number) for number in range(messages))
        worker = shardq.Worker(queue.name, group=GROUP, concurrency=1, **options)  # type: ignore[arg-type]  # limits

        async def handle(_: object) -> None:
            self.begun.append(name)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            await anyio.sleep(0.002)
            self.running -= 1

        if lists:
            worker.batch_handler(handle)
        else:
            worker.handler(handle)
        return worker

    async def all_drained(self) -> bool:
        return all([await drained(queue) for queue in self.queues])


@asynccontextmanager
async def serving(client: shardq.Client, workers: shardq.Workers) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(workers.run, client)
        yield
        workers.stop()


def common_part(begun: Sequence[str], size: int) -> Counter[str]:
    """Who began the `size` messages after both queues were first served."""
    first = max(begun.index(name) for name in set(begun))
    return Counter(begun[first : first + size])


async def test_while_both_have_messages_the_slots_are_shared_by_weight(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        served = Served(client, queue_name)
        workers = shardq.Workers(
            {await served.worker("three", 900): 3, await served.worker("one", 900): 1}, concurrency=8
        )
        async with serving(client, workers):
            await until(served.all_drained, 60, "empty backlogs")
        found = common_part(served.begun, 600)
        assert 2 * found["one"] < found["three"] < 4.5 * found["one"], found
        assert served.most_running == 8, "also when only one of them has messages"
        for queue in served.queues:
            await check_equation(queue)


async def test_the_smallest_weight_does_not_starve(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        served = Served(client, queue_name)
        workers = shardq.Workers(
            {await served.worker("most", 1500): 500, await served.worker("least", 3): 1}, concurrency=2
        )
        async with serving(client, workers):
            await until(served.all_drained, 60, "empty backlogs")
        assert served.most_running == 2
        last = [number for number, name in enumerate(served.begun) if name == "least"]
        assert last[1] < 1500, "its second turn came while the other one still had messages"


async def test_lists_and_limits_share_slots_too(cluster: LocalCluster, queue_name: str) -> None:
    """One that waits for its limit holds no slot."""
    async with shardq.connect(cluster.url) as client:
        served = Served(client, queue_name)
        workers = shardq.Workers(
            {
                await served.worker("limited", 8, limit="2/h burst 16"): 1000,
                await served.worker("by-key", 8, key_limit="1/h"): 1000,
                await served.worker("lists", 400, lists=True): 1,
                await served.worker("free", 400): 1,
            },
            concurrency=1,
        )
        async with serving(client, workers):

            async def the_others_done() -> bool:
                return all([await drained(queue) for queue in served.queues[1:]])

            await until(the_others_done, 60, "empty backlogs but for the limited one's")
            await until(lambda: served.begun.count("limited") == 4, 30, "what the limit allows")
        assert served.most_running == 1
        assert served.begun.count("limited") == 4


async def test_shardq_work_runs_them(cluster: LocalCluster, queue_name: str, tmp_path: Path) -> None:
    async with shardq.connect(cluster.url) as client:
        queues = [await client.queue(f"{queue_name}-{name}", shards=2) for name in ("a", "b")]
        for queue in queues:
            await queue.open_group(GROUP)
            async with queue.producer() as producer:
                await producer.send_many((f"k{number}", number) for number in range(20))
        process = WorkerProcess(cluster.url, queue_name, tmp_path, target="tests.runtime.app:workers")
        try:
            for queue in queues:
                await until(lambda queue=queue: drained(queue), 60, "an empty backlog")
            process.process.terminate()
            assert await process.wait() == 0
        finally:
            process.end()


# -- bad input ----------------------------------------------------------------------------------------------


def a_worker(queue: str = "orders", group: str = GROUP, name: str | None = None) -> shardq.Worker:
    return shardq.Worker(queue, group=group, name=name)


@pytest.mark.parametrize("weights", [{}, None, [1], {"orders": 1}, {object(): 1}])
def test_what_is_no_dict_of_workers_is_refused(weights: object) -> None:
    with pytest.raises(shardq.UsageError, match="are a dict such as"):
        shardq.Workers(weights)  # type: ignore[arg-type]  # the mistake under test


@pytest.mark.parametrize("weight", [0, -1, 0.5, "3", 1001])
def test_what_is_no_weight_is_refused(weight: object) -> None:
    with pytest.raises(shardq.UsageError, match="a weight is a whole number"):
        shardq.Workers({a_worker(): weight})  # type: ignore[dict-item]  # the mistake under test


@pytest.mark.parametrize("concurrency", [0, -1, 1.5, "8"])
def test_what_is_no_concurrency_is_refused(concurrency: object) -> None:
    with pytest.raises(shardq.UsageError, match="concurrency must be at least 1"):
        shardq.Workers({a_worker(): 1}, concurrency=concurrency)  # type: ignore[arg-type]  # the mistake under test


def test_two_workers_of_one_queue_and_group_are_refused() -> None:
    with pytest.raises(shardq.UsageError, match="larger weight instead"):
        shardq.Workers({a_worker(): 1, a_worker(): 2})
    shardq.Workers({a_worker(): 1, a_worker(group="h"): 2})


def test_workers_of_different_names_are_refused() -> None:
    with pytest.raises(shardq.UsageError, match="different names"):
        shardq.Workers({a_worker(name="a"): 1, a_worker("mails", name="b"): 1})


def test_workers_without_a_handler_are_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import shardq\nboth = shardq.Workers({shardq.Worker('a', group='g'): 1, shardq.Worker('b', group='g'): 1})"
    (tmp_path / "handlerless_workers.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(shardq.WorkerNotFound, match="one of the workers handlerless_workers:both has no handler"):
        load_worker("handlerless_workers:both")
