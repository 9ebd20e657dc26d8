"""Messages stored on conditions: later, once, as a job. On real servers; their clocks decide what is due."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import pytest

import shardq
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.commands import pack_command
from tests.runtime.harness import GROUP, check_equation, drained, running, until

pytestmark = pytest.mark.anyio


async def delayed(queue: shardq.Queue) -> int:
    return sum(shard.delayed for shard in (await queue.counters()).values())


async def test_delayed_messages_come_when_they_are_due_and_not_before(cluster: LocalCluster, queue_name: str) -> None:
    seen: dict[str, float] = {}
    worker = shardq.Worker(queue_name, group=GROUP)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        seen[message.value] = time.time()

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=3)
        async with queue.producer() as producer, running(client, worker):
            started = time.time()
            await producer.send("1.2", key="k", delay=timedelta(seconds=1.2))
            await producer.send("0.4", key="k", delay=0.4)
            await producer.send("0.8", key="k", at=datetime.now(UTC) + timedelta(seconds=0.8))
            await producer.send("past", key="k", at=started - 100)
            await producer.send("now", key="k", delay=0)
            assert await delayed(queue) == 3
            await until(lambda: len(seen) == 5, 20, "all of them")
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert sorted(seen, key=lambda value: seen[value])[2:] == ["0.4", "0.8", "1.2"]
        for value in ("0.4", "0.8", "1.2"):
            assert seen[value] - started >= float(value) - 0.001
        assert await delayed(queue) == 0
        await check_equation(queue)


async def test_a_sooner_message_is_not_held_up_by_a_later_one_and_many_due_at_once_all_come(
    cluster: LocalCluster, queue_name: str
) -> None:
    seen: list[int] = []
    worker = shardq.Worker(queue_name, group=GROUP)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        seen.append(message.value)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        async with queue.producer() as producer, running(client, worker):
            await producer.send(-1, key="k", delay=3600)
            at = time.time() + 1

            async def send(number: int) -> None:
                await producer.send(number, key=f"k{number % 9}", at=at)

            async with anyio.create_task_group() as tasks:
                for number in range(1000):
                    tasks.start_soon(send, number)
            await until(lambda: len(seen) == 1000, 20, "all that are due")
        assert sorted(seen) == list(range(1000))
        assert await delayed(queue) == 1


async def test_a_delayed_message_can_be_taken_back(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        async with queue.producer() as producer:
            message_id = await producer.send("x", key="k", delay=3600)
            assert await queue.delete_message(message_id) is True
            assert await delayed(queue) == 0
            with pytest.raises(shardq.UsageError, match="any more"):
                await queue.delete_message(message_id)


async def test_a_dedupe_id_is_stored_once_within_its_window(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=3)
        async with queue.producer() as one, queue.producer() as other:
            first = await one.send("x", key="k", dedupe_id="order-1")
            assert await one.send("y", key="k", dedupe_id="order-1") == first
            assert await other.send("z", key="k", dedupe_id="order-1") == first
            assert await one.send("x", key="k", dedupe_id="order-2") != first
            keyless = {await one.send("x", dedupe_id="order-3") for _ in range(5)}
            assert len(keyless) == 1, "without a key the id decides the shard"
            ids: set[str] = set()

            async def send(producer: shardq.Producer) -> None:
                ids.add(await producer.send("x", key="many", dedupe_id="at once", dedupe_window=timedelta(minutes=1)))

            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(send, one)
                    tasks.start_soon(send, other)
            assert len(ids) == 1
            short = await one.send("x", key="k", dedupe_id="short", dedupe_window=0.05)

            async def again() -> bool:
                return await one.send("x", key="k", dedupe_id="short", dedupe_window=0.05) != short

            await until(again, 10, "the window to end")
            late = await one.send("x", key="k", dedupe_id="late", delay=3600)
            assert await one.send("x", key="k", dedupe_id="late", delay=3600) == late
            assert await delayed(queue) == 1


async def test_what_is_no_condition_is_refused_and_nothing_sent(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            bad: list[dict[str, Any]] = [
                {"delay": -1},
                {"delay": float("nan")},
                {"delay": "1"},
                {"delay": 1, "at": time.time()},
                {"at": datetime(2030, 1, 1)},  # naive on purpose
                {"at": float("inf")},
                {"dedupe_id": ""},
                {"dedupe_id": "x" * 257},
                {"dedupe_id": 7},
                {"dedupe_id": "\ud800"},
                {"dedupe_window": 10},
                {"dedupe_id": "x", "dedupe_window": -1},
            ]
            for wrong in bad:
                with pytest.raises(shardq.UsageError):
                    await producer.send("x", key="k", **wrong)
            with pytest.raises(shardq.MessageTooLarge):
                await producer.send(b"x" * 2_000_000, delay=1)
            with pytest.raises(shardq.InvalidValue):
                await producer.send(object(), delay=1)
        assert (await queue.counters())[0].appended == 0
        assert await delayed(queue) == 0


async def test_a_job_tells_its_state_and_its_result(cluster: LocalCluster, queue_name: str) -> None:
    go = anyio.Event()
    worker = shardq.Worker(queue_name, group=GROUP, retry=shardq.Retry(attempts=2, base=0.3))

    @worker.handler
    async def handle(message: shardq.Message) -> object:
        if message.value == "waits":
            await go.wait()
        if message.value == "fails" or (message.value == "flaky" and message.attempt == 1):
            raise ValueError("no")
        return object() if message.value == "strange" else {"was": message.value}

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=3)
        async with queue.producer() as producer:
            job = await producer.submit("waits", key="a")
            assert (await job.state()).status == "queued"
            with pytest.raises(shardq.JobTimeout):
                await job.wait(0.1)
            flaky, fails = await producer.submit("flaky", key="b"), await producer.submit("fails", key="c")
            strange = await producer.submit("strange", key="d", headers={"mine": "x"})
            async with running(client, worker):

                async def is_running() -> bool:
                    return (await job.state()).status == "running"

                await until(is_running, 10, "it to run")

                async def retrying() -> bool:
                    return (await fails.state()).status == "retrying"

                await until(retrying, 10, "it to have failed once")
                assert "ValueError" in (await fails.state()).error
                go.set()
                assert await job.wait(10) == {"was": "waits"}
                assert await flaky.wait(10) == {"was": "flaky"}
                assert (await flaky.state()).attempts == 2
                with pytest.raises(shardq.JobFailed, match="ValueError"):
                    await fails.wait(10)
                assert await strange.wait(10) is None
                assert "can't be carried" in (await strange.state()).error
        again = queue.job(job.id)
        assert (await again.state()).result == {"was": "waits"}
        with pytest.raises(shardq.UnknownJob):
            await queue.job(f"{queue_name}/0/{'0' * 16}").state()
        with pytest.raises(shardq.UsageError):
            queue.job("nonsense")
        with pytest.raises(shardq.UsageError, match="not of queue"):
            queue.job("other/0/0123456789abcdef")


async def test_the_job_of_a_replayed_dead_letter_goes_on(cluster: LocalCluster, queue_name: str) -> None:
    """From the replay on it waits for its next try, also for those who ask before a worker has begun it."""
    mended = False
    worker = shardq.Worker(queue_name, group=GROUP, retry=shardq.Retry(attempts=1))

    @worker.handler
    async def handle(message: shardq.Message) -> str:
        if not mended:
            raise ValueError("no")
        return f"done {message.value}"

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        letters = queue.dead_letters(GROUP)
        async with queue.producer() as producer:
            jobs = [await producer.submit(number, key="k") for number in range(2)]
            await producer.send("no job", key="k")
        async with running(client, worker):
            for job in jobs:
                assert (await job.ended(10)).status == "dead"
            await until(lambda: drained(queue), 10, "an empty backlog")
        assert await letters.replay() == 3
        for job in jobs:
            state = await job.state()
            assert (state.status, state.queue, state.group, state.attempts) == ("retrying", queue_name, GROUP, 1)
            assert "ValueError" in state.error
            with pytest.raises(shardq.JobTimeout):
                await job.wait(0.05)
        mended = True
        async with running(client, worker):
            assert [await job.wait(10) for job in jobs] == ["done 0", "done 1"]
        assert await letters.replay() == 0
        assert [(await job.state()).status for job in jobs] == ["done", "done"], "nothing was handed back"


async def test_a_queue_of_jobs_tracks_every_send_and_records_go_when_their_time_is_over(
    cluster: LocalCluster, queue_name: str
) -> None:
    jobs: list[str] = []
    worker = shardq.Worker(queue_name, group=GROUP)

    @worker.handler
    async def handle(message: shardq.Message) -> str:
        assert message.headers is not None
        jobs.append(str(message.headers["shardq-job"]))
        return "done"

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1, jobs=True)
        async with queue.producer() as producer, running(client, worker):
            await producer.send("x", key="k")
            await until(lambda: len(jobs) == 1, 10, "it to be handled")
            assert await queue.job(jobs[0]).wait(10) == "done"
            short = await producer.submit("y", key="k", keep=0.05)
            await until(lambda: drained(queue), 10, "an empty backlog")
            keys = queue.shards[0]

            async def gone() -> bool:
                tidy = ("FCALL", "shardq_1_tidy", 4, keys.stream, keys.meta, keys.expiring, keys.timed)
                await client.pipes.command(keys.slot, pack_command(*tidy))
                record = pack_command("HEXISTS", keys.timed, f"j:{short.id}")
                return bool(await client.pipes.command(keys.slot, record) == 0)

            await until(gone, 10, "its record to go")
