"""Rate limits through splits: what workers may begin stays true over old and new shards together. The workers are
processes of their own (tests/runtime/app.py); judged is what they wrote down."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import groupby
from pathlib import Path

import anyio
import pytest

import shardq
from shardq.ops.local_cluster import LocalCluster
from tests.runtime.harness import GROUP, Traffic, check_equation, drained, owners, until, workers
from tests.runtime.judge import Fact, judge, read_journal
from tests.runtime.test_limits import most_above

# Limits are tested on every kind in tests/storage, and over processes on two of them in test_limits.py.
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis7")]

LIMIT, KEY_LIMIT = "100/s burst 20", "5/s burst 3"


def begun(folder: Path) -> list[Fact]:
    return [fact for fact in read_journal(folder) if fact.kind == "start"]


async def test_limits_hold_over_old_and_new_shards_together(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    """More is sent than either limit lets through, and every shard is split twice meanwhile: on each there is a backlog
    to finish first. The group's own limit binds at first, of the rest that each key's."""
    traffic = Traffic(keys=24)
    async with shardq.connect(cluster.url) as client, shardq.connect(cluster.url) as other:
        queue = await client.queue(queue_name, shards=2)
        watched = await other.queue(queue_name)
        await queue.open_group(GROUP)
        with workers(cluster.url, queue_name, tmp_path) as start:
            crew = [start(LIMIT=LIMIT, KEY_LIMIT=KEY_LIMIT) for _ in range(2)]
            for worker in crew:
                await until(partial(worker.says, "handles"), 30, "a worker to begin")
            async with queue.producer() as producer, anyio.create_task_group() as tasks:
                tasks.start_soon(traffic.keep_sending, producer, 0.15)
                for new in ({2, 3, 4, 5}, {6, 7, 8, 9, 10, 11, 12, 13}):
                    before = len(begun(tmp_path))
                    await until(lambda before=before: len(begun(tmp_path)) > before + 60, 30, "messages in hand")
                    backlogs = [shard.groups[GROUP] for shard in (await watched.counters([GROUP])).values()]
                    assert any(group.delivered > group.acked for group in backlogs), "there is something to finish"
                    assert set(await watched.split_all()) == new

                    async def owned(new: set[int] = new) -> bool:
                        return new <= (await owners(watched)).keys()

                    await until(owned, 60, "owners of the new shards")
                traffic.stopped = True
            await queue.refresh()
            await until(lambda: drained(queue), 60, "an empty backlog")
        facts = read_journal(tmp_path)
        verdict = judge(traffic.sent, facts)
        assert (verdict.lost, verdict.repeated) == (set(), set())
        assert (verdict.disorder, verdict.overlaps) == ([], [])
        shards = {int(fact.id.split("/")[0]) for fact in facts}
        generations = ({0, 1}, {2, 3, 4, 5}, set(range(6, 14)))
        assert all(shards & each for each in generations), "of each generation"
        assert most_above([fact.at_ns / 1e9 for fact in begun(tmp_path)], LIMIT) <= 0
        for _, of_key in groupby(
            sorted(begun(tmp_path), key=lambda fact: (fact.key, fact.at_ns)), lambda fact: fact.key
        ):
            assert most_above([fact.at_ns / 1e9 for fact in of_key], KEY_LIMIT) <= 0
        await check_equation(queue)


async def test_a_key_that_used_its_limit_up_has_none_on_a_new_shard(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    """Two an hour: what was begun on the old shard counts on the new one. Other keys go on there."""
    used, fresh = [f"used-{number}" for number in range(6)], [f"fresh-{number}" for number in range(6)]

    def done() -> Counter[str]:
        return Counter(fact.key for fact in read_journal(tmp_path) if fact.kind == "end")

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        await queue.open_group(GROUP)
        with workers(cluster.url, queue_name, tmp_path) as start:
            start(KEY_LIMIT="2/h burst 8")
            async with queue.producer() as producer:
                await producer.send_many((key, number) for number in range(2) for key in used)
                await until(lambda: done() == dict.fromkeys(used, 2), 30, "what the limit lets through")
                await queue.split_all()
                await producer.send_many((key, 2) for key in used)
                await producer.send_many((key, number) for number in range(2) for key in fresh)
            await until(lambda: done().keys() >= set(fresh) and min(done().values()) == 2, 30, "the other keys")
            assert done() == dict.fromkeys([*used, *fresh], 2)
        shards = {int(fact.id.split("/")[0]) for fact in read_journal(tmp_path) if fact.key in fresh}
        assert shards == {1, 2}
