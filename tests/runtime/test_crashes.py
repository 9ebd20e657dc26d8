"""Retries, dead letters, effects, dedupe, jobs and delays while workers and producers are killed at random moments:
nothing lost, order per key, effects once. The whole history is in Redis: each message's effect appends its number to a
list of its key. Masters that fail are in test_failovers.py.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

import shardq
from shardq.ops.local_cluster import LocalCluster
from shardq.storage import calls
from shardq.storage.commands import pack_command
from tests.runtime.crowd import (
    APP,
    LEASE_S,
    Crowd,
    dead,
    done,
    history,
    make_traffic,
    numbers,
    send_slowly,
    to_be_dead,
    to_be_done,
)
from tests.runtime.harness import GROUP, ROOT, WorkerProcess, check_equation, drained, owners, running, until, workers

# Workers are what fails here; tests/faults does it to the other kinds.
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis7")]

SHARDS = 6
KEYS = 24
MESSAGES = 600


def make_seed() -> int:
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    return seed


async def check_nothing_is_left(queue: shardq.Queue, group: str = GROUP) -> None:
    await check_equation(queue, group)
    for counters in (await queue.counters([group])).values():
        assert counters.groups[group].waiting == 0
        assert counters.entries == 0, "what every group finished is gone from the stream"


async def test_effects_happen_once_and_in_order_however_often_workers_die(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    """Three groups side by side: a handler whose every message is sent on too, a handler of lists, and a plain function
    that is called in no order."""
    seed = make_seed()
    sent = make_traffic(seed, MESSAGES, KEYS)
    kinds = {GROUP: {"COPIES": f"{queue_name}-copies"}, "lists": {"KIND": "batch"}, "free": {"KIND": "plain"}}
    kinds["free"]["ORDERING"] = "none"
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        copies = await client.queue(f"{queue_name}-copies", shards=SHARDS)
        await copies.open_group("keeps")
        for group in kinds:
            await queue.open_group(group)
        with workers(cluster.url, queue_name, tmp_path, lease=LEASE_S, handler_s=0.03, target=APP) as start:
            starts = [partial(start, GROUP=group, **kind) for group, kind in kinds.items()]
            crowd = Crowd(starts * 2, seed, every_s=(0.2, 0.8))
            async with queue.producer() as producer, anyio.create_task_group() as tasks:
                tasks.start_soon(crowd.thin_out)
                await crowd.deaths(1)
                await send_slowly(producer, sent, pause_s=0.1)
                await crowd.deaths(crowd.kills + 2)  # while retries wait
                crowd.stopped.set()
            for group in kinds:
                await until(lambda group=group: drained(queue, group), 60, f"an empty backlog of {group}")
        for key, values in sent.items():
            expected = to_be_done(values)
            assert await numbers(queue, key) == expected, key
            assert await history(copies, key) == expected, key
            assert await numbers(queue, key, "lists") == expected, key
            assert sorted(await numbers(queue, key, "free")) == expected, key
        for group in kinds:
            assert await dead(queue, group) == to_be_dead(sent), group
            await check_nothing_is_left(queue, group)


async def test_delayed_messages_and_jobs_while_workers_die(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    seed = make_seed()
    chance, sent = random.Random(seed), make_traffic(seed, 300, KEYS)
    due_ms: dict[int, float] = {}
    jobs: dict[int, shardq.Job] = {}
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        with workers(cluster.url, queue_name, tmp_path, lease=LEASE_S, handler_s=0.02, target=APP) as start:
            crowd = Crowd([start] * 3, seed)
            async with queue.producer() as producer, anyio.create_task_group() as tasks:
                tasks.start_soon(crowd.thin_out)
                for key, values in sent.items():
                    for value in values:
                        delay_s = chance.choice((0.0, chance.uniform(0.1, 5)))
                        due_ms[value[0]] = int((time.time() + delay_s) * 1000)
                        jobs[value[0]] = await producer.submit(list(value), key=key, delay=delay_s or None)
                await crowd.deaths(6)
                crowd.stopped.set()
            ended = {number: await job.ended(60) for number, job in jobs.items()}
            await until(lambda: drained(queue), 60, "an empty backlog")
        for key, values in sent.items():
            there = await done(queue, key)
            assert sorted(number for number, _ in there) == to_be_done(values), key
            assert all(ms >= due_ms[number] for number, ms in there), "none before its time"
        assert await dead(queue) == to_be_dead(sent)
        for values in sent.values():
            for number, fails, end in values:
                state = ended[number]
                if end == "ok":
                    assert (state.status, state.result, state.attempts) == ("done", number, fails + 1)
                else:
                    assert (state.status, state.result) == ("dead", None)
        await check_nothing_is_left(queue)


async def test_a_worker_that_is_paused_beyond_its_lease_writes_nothing_when_it_wakes(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    seed = make_seed()
    sent = make_traffic(seed, 600, KEYS)
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        with workers(cluster.url, queue_name, tmp_path, lease=LEASE_S, handler_s=0.05, target=APP) as start:
            asleep, other = start(), start()

            async def share() -> bool:
                return set((await owners(queue)).values()) == {asleep.name, other.name}

            async def taken() -> bool:
                return asleep.name not in (await owners(queue)).values()

            async with queue.producer() as producer, anyio.create_task_group() as tasks:
                tasks.start_soon(send_slowly, producer, sent, 0.15)
                for _ in range(2):
                    await until(share, 20, "both to hold shards")
                    asleep.send(signal.SIGSTOP)
                    await until(taken, 20, "the sleeper's shards to be taken")
                    asleep.send(signal.SIGCONT)
            await until(lambda: drained(queue), 60, "an empty backlog")
        for key, values in sent.items():
            assert await numbers(queue, key) == to_be_done(values), key
        assert await dead(queue) == to_be_dead(sent)
        await check_nothing_is_left(queue)


async def test_a_producer_that_dies_and_starts_again_stores_each_message_once(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    chance = random.Random(make_seed())
    sent = {f"key-{key}": list(range(key, 6000, KEYS)) for key in range(KEYS)}
    file = tmp_path / "sent.json"
    file.write_text(json.dumps(sent))
    command = [sys.executable, "-m", "tests.runtime.sending_app", cluster.url, queue_name, str(file)]
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)

        async def stored() -> int:
            return sum(shard.appended for shard in (await queue.counters()).values())

        for _ in range(4):
            before, more = await stored(), chance.randrange(1, 1200)
            async with await anyio.open_process(command, cwd=ROOT, stderr=None) as process:

                async def some_more(before: int = before, more: int = more) -> bool:
                    return await stored() >= min(before + more, 5900)

                await until(some_more, 30, "some more messages")
                process.kill()
        assert await stored() < 6000, "the last one still has something to send"
        await anyio.run_process(command, cwd=ROOT)
        assert await stored() == 6000
        for key, expected in sent.items():
            assert [value[0] for value in await history(queue, key)] == expected, key


async def test_a_group_that_is_put_back_while_workers_die_handles_everything_after_that_once_more(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    seed = make_seed()
    sent = make_traffic(seed, 600, KEYS)
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS, retention="1h")
        await queue.open_group(GROUP)

        async def something_done() -> bool:
            return sum(shard.groups[GROUP].acked for shard in (await queue.counters([GROUP])).values()) > 0

        with workers(cluster.url, queue_name, tmp_path, lease=LEASE_S, handler_s=0.03, target=APP) as start:
            crowd = Crowd([start] * 3, seed)
            async with queue.producer() as producer, anyio.create_task_group() as tasks:
                tasks.start_soon(crowd.thin_out)
                await crowd.deaths(1)
                tasks.start_soon(send_slowly, producer, sent, 0.1)
                await crowd.deaths(3)
                await until(something_done, 60, "something to be handled")
                await queue.reset_group(GROUP, "earliest", force=True)
                await crowd.deaths(6)
                crowd.stopped.set()
            await until(lambda: drained(queue), 60, "an empty backlog")
        again = 0
        for key, values in sent.items():
            expected, there = to_be_done(values), await numbers(queue, key)
            before = len(there) - len(expected)
            assert there == expected[: max(before, 0)] + expected, key
            again += before
        assert again > 0, "something had been handled before"
        assert set(await dead(queue)) == set(to_be_dead(sent)), "some of them twice"
        await check_equation(queue)


async def test_dead_letters_replayed_while_workers_die_are_handled_once(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    seed, mended = make_seed(), tmp_path / "mended"
    sent = make_traffic(seed, 600, KEYS, rejected=0.3)
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=SHARDS)
        await queue.open_group(GROUP)
        with workers(cluster.url, queue_name, tmp_path, lease=LEASE_S, handler_s=0.02, target=APP) as start:
            crowd = Crowd([partial(start, MENDED=str(mended))] * 3, seed)
            async with queue.producer() as producer, anyio.create_task_group() as tasks:
                tasks.start_soon(crowd.thin_out)
                tasks.start_soon(send_slowly, producer, sent, 0.1)
                letters = queue.dead_letters(GROUP)

                async def some_died() -> bool:
                    return len(await dead(queue)) >= 30

                await until(some_died, 30, "dead letters")
                assert await letters.replay() >= 30, "some die again"
                mended.touch()
                for _ in range(3):
                    await crowd.deaths(crowd.kills + 1)
                    await letters.replay()
                    await letters.replay()  # repeating it is harmless
                crowd.stopped.set()

            async def all_done() -> bool:
                await letters.replay()
                return await drained(queue) and not await dead(queue)

            await until(all_done, 60, "an empty backlog and no dead letter")
        for key, values in sent.items():
            there = await numbers(queue, key)
            assert sorted(there) == [number for number, _, _ in values], key
            never_dead = to_be_done(values)
            assert [number for number in there if number in never_dead] == never_dead, key
        await check_nothing_is_left(queue)


async def test_a_message_that_kills_its_worker_ends_as_a_dead_letter_and_nothing_else_does(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        async with queue.producer() as producer:
            jobs = [
                await producer.submit(
                    [number, 1 if number % 10 == 3 else 0, "kill" if number == 50 else "ok"], key=f"key-{number % 10}"
                )
                for number in range(100)
            ]
        with workers(cluster.url, queue_name, tmp_path, lease=LEASE_S, handler_s=0.005, target=APP) as start:
            running: list[WorkerProcess] = [start()]

            async def finished() -> bool:
                if running[-1].process.poll() is not None:
                    running.append(start())
                return await drained(queue)

            await until(finished, 90, "an empty backlog")
        for key in range(10):
            expected = [number for number in range(100) if number % 10 == key and number != 50]
            assert await numbers(queue, f"key-{key}") == expected
        letters = [letter async for letter in queue.dead_letters(GROUP)]
        assert [letter.value[0] for letter in letters] == [50]
        assert "died" in letters[0].error
        states = [await job.state() for job in jobs]
        assert [number for number, state in enumerate(states) if state.status != "done"] == [50]
        assert states[50].status == "dead"
        assert "died" in states[50].error
        assert len(running) <= 7, "killed about five times, not for ever"


async def test_a_cancelled_worker_commits_nothing_behind_a_commit_that_is_refused(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last commit would acknowledge the record batch whole, with the messages that the refused one stood for."""
    real, under_way = calls.step, anyio.Event()
    others_done = anyio.Event()

    async def step(*args: Any, **more: Any) -> calls.Stepped:
        if args[4].effects and not under_way.is_set():
            under_way.set()
            await anyio.sleep_forever()
        return await real(*args, **more)

    def make_worker() -> shardq.Worker:
        worker = shardq.Worker(queue_name, group=GROUP)

        @worker.handler
        async def handle(message: shardq.Message) -> None:
            if message.value == 2:
                await under_way.wait()
                others_done.set()
            async with message.atomic() as tx:
                tx.rpush(message.local_key("list"), message.value)
                if message.value == 1:
                    tx.incrby(message.local_key("list"), 1)  # refused: a list is no number

        return worker

    monkeypatch.setattr(calls, "step", step)
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            await producer.send_many(("k", number) for number in range(3))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(make_worker().run, client)
            await others_done.wait()
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        async with running(client, make_worker()):
            await until(lambda: drained(queue), 20, "an empty backlog")
        packed = pack_command("LRANGE", queue.local_key("list", "k"), 0, -1)
        assert await client.pipes.command(queue.shards[0].slot, packed) == [b"0", b"2"]
        assert [letter.value async for letter in queue.dead_letters(GROUP)] == [1]
        await check_nothing_is_left(queue)
