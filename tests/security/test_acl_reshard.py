"""Who may not reshard works through one that somebody else does: a producer, and a worker in a process of its own, with
the users that `shardq acl` prints. What is left unfinished waits for one who may, and the worker's log says so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest

import shardq
from shardq.core import reshard as reshards
from shardq.runtime import reshard as resharding
from shardq.storage.acl import Wanted
from tests.runtime.harness import GROUP, ROOT, Traffic, WorkerProcess, check_equation, drained, until, workers
from tests.runtime.judge import judge, read_journal
from tests.security.users import Users, users

# The rights themselves are tested on every kind (test_acl.py, test_acl_rules.py).
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("valkey9")]

QUEUE = "parcels"


def handled_on(folder: Path, shards: set[int]) -> bool:
    """Whether messages of each of these shards were handled."""
    return shards <= {int(fact.id.split("/")[0]) for fact in read_journal(folder) if fact.kind == "end"}


def rights(worker: WorkerProcess) -> int:
    """How often the worker's log names what gives it the right to reshard."""
    return worker.log.read_text().count(f"shardq acl worker --queue {QUEUE} --reshards")


@contextmanager
def coordinator(known: Users, folder: Path) -> Iterator[Callable[[str], bool]]:
    """One that may reshard, of the other group, in a process of its own. Gives whether its log has a text."""
    command = [sys.executable, "-m", "shardq", "coordinator", QUEUE, "--group", "other", "--url", known.url("leader")]
    log = folder / "coordinator.txt"
    with log.open("wb") as written:
        process = subprocess.Popen(command, cwd=ROOT, stderr=written)
    try:
        yield lambda text: text in log.read_text()
    finally:
        process.kill()
        process.wait()


async def leave_sealed(queue: shardq.Queue) -> None:
    """Every shard is to be split; whoever began it is gone when they are sealed."""
    await queue.refresh()
    plan = reshards.split_all(queue.table)
    await resharding.begin(queue.client.pipes, queue.keys, plan)
    work = resharding.Work(queue.client.pipes, queue.keys, plan.to_bytes())
    for step in resharding.STEPS[: resharding.STEPS.index(resharding.seal) + 1]:
        assert await step(work)


def make_users(known: Users) -> None:
    known.add("operator", Wanted("operator", [QUEUE]))
    known.add_printed("producer", "--queue", QUEUE, "--user", "sender")
    known.add_printed("worker", "--queue", QUEUE, "--group", GROUP, "--user", "worker")
    known.add_printed("coordinator", "--queue", QUEUE, "--group", "other", "--reshards", "--user", "leader")
    known.load()


async def test_work_goes_on_without_the_right_to_reshard(server_binary: Path, tmp_path: Path) -> None:
    traffic = Traffic(keys=12)
    with users(server_binary, tmp_path) as known:
        make_users(known)
        async with shardq.connect(known.url("operator")) as operator:
            queue = await operator.queue(QUEUE, shards=1)
            for group in (GROUP, "other"):
                await queue.open_group(group)
            with workers(known.url("worker"), QUEUE, tmp_path) as start:
                worker = start()
                await until(partial(worker.says, "handles"), 30, "the worker to begin")
                async with (
                    shardq.connect(known.url("sender")) as client,
                    (await client.queue(QUEUE)).producer() as producer,
                    anyio.create_task_group() as tasks,
                ):
                    tasks.start_soon(traffic.keep_sending, producer, 0.05)
                    await until(lambda: handled_on(tmp_path, {0}), 30, "messages of the old shard")
                    assert await queue.split(0) == [1, 2]
                    await until(lambda: handled_on(tmp_path, {1, 2}), 30, "messages of the new shards")
                    await until(lambda: rights(worker) == 1, 30, "a word on the old shard that it may not remove")
                    await leave_sealed(queue)
                    await until(lambda: worker.says("a reshard was left unfinished"), 30, "a word on what is left")
                    stuck, reshard = traffic.total, await queue.reshard()
                    assert (rights(worker), reshard is not None and reshard.phase) == (2, "sealing")
                    with coordinator(known, tmp_path) as leader_says:
                        await until(lambda: leader_says("completed a reshard"), 30, "a leader that may complete it")
                        await until(lambda: handled_on(tmp_path, {3, 4, 5, 6}), 30, "messages of the newest shards")
                    assert traffic.total > stuck
                    traffic.stopped = True
                await queue.refresh()
                await until(lambda: drained(queue), 30, "an empty backlog")
                worker_said = worker.log.read_text()
            verdict = judge(traffic.sent, read_journal(tmp_path))
            assert (verdict.lost, verdict.repeated, verdict.disorder, verdict.overlaps) == (set(), set(), [], [])
            await check_equation(queue)
        assert {user for user, _ in known.refused()} == {"worker"}, worker_said
