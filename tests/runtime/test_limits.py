"""Rate limits on real clusters: how many messages are begun in any window, over all workers and whatever befalls them;
and that what waits for a limit holds up nothing else.

What is judged are counts: in a window of t seconds at most rate * (t + SLACK_S) + burst messages. The slack is for a
process that was stopped between its look at the clock and its handler's first line.
"""

from __future__ import annotations

import signal
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import anyio
import pytest

import shardq
from shardq.core.limits import parse_limit
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.commands import pack_command
from tests.runtime.harness import GROUP, Traffic, check_equation, drained, owners, running, until, workers
from tests.runtime.judge import judge, read_journal

# The functions themselves are tested on every kind (tests/storage).
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis7", "valkey9")]

SLACK_S = 0.25


def most_above(begun_s: Sequence[float], limit: str, weights: Sequence[int] = ()) -> float:
    """How far the fullest window lies above what the limit allows; at most 0."""
    rate, burst = parse_limit("limit", limit).per_second, parse_limit("limit", limit).burst
    worst = float("-inf")
    for first in range(len(begun_s)):
        count = 0
        for last in range(first, len(begun_s)):
            count += weights[last] if weights else 1
            worst = max(worst, count - rate * (begun_s[last] - begun_s[first] + SLACK_S) - burst)
    return worst


@pytest.mark.server_kinds("redis7")
async def test_the_limit_holds_over_processes_that_die_and_stand_still(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    """One of two workers is killed and replaced, the other is stopped for longer than its lease, and goes on; more is
    sent all the while than the limit lets through."""
    limit, traffic = "100/s burst 20", Traffic(keys=30)
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=8)
        await queue.open_group(GROUP)
        async with queue.producer() as producer, anyio.create_task_group() as tasks:
            await traffic.send(producer, 120)
            tasks.start_soon(traffic.keep_sending, producer, 0.25)
            with workers(cluster.url, queue_name, tmp_path, lease=1.0) as start:
                first, second = start(LIMIT=limit), start(LIMIT=limit)

                def begun(process: int) -> int:
                    facts = [fact for fact in read_journal(tmp_path) if fact.kind == "start"]
                    return sum(1 for fact in facts if process == int(fact.process))

                await until(lambda: min(begun(one.process.pid) for one in (first, second)) > 20, 60, "both to handle")
                first.send(signal.SIGKILL)
                third = start(LIMIT=limit)
                await until(lambda: begun(third.process.pid) > 10, 60, "the third to handle")
                second.send(signal.SIGSTOP)
                stopped_ns, there = time.monotonic_ns(), begun(third.process.pid)
                await until(lambda: begun(third.process.pid) > there + 20, 60, "the third to go on alone")
                second.send(signal.SIGCONT)
                paused = {str(second.process.pid): (stopped_ns, time.monotonic_ns())}
                traffic.stopped = True
                await until(lambda: drained(queue), 90, "an empty backlog")
        facts = read_journal(tmp_path)
        verdict = judge(traffic.sent, facts, paused)
        assert not verdict.lost
        assert not verdict.disorder
        assert not verdict.overlaps
        assert most_above([fact.at_ns / 1e9 for fact in facts if fact.kind == "start"], limit) <= 0
        await check_equation(queue)


@pytest.mark.server_kinds("valkey9")
async def test_a_key_limit_holds_over_processes_and_other_keys_go_on(
    cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    """Shards are handed over on the way: the second worker joins, the first one leaves."""
    limit, hot, cold = "5/s", [f"hot-{number}" for number in range(4)], [f"cold-{number}" for number in range(60)]
    sent: dict[str, list[str]] = defaultdict(list)
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=4)
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            for number in range(13):
                for key in hot:
                    sent[key].append(await producer.send(number, key=key))
            for key in cold:
                sent[key].append(await producer.send(0, key=key))
        with workers(cluster.url, queue_name, tmp_path) as start:
            first = start(KEY_LIMIT=limit)
            await until(lambda: len(read_journal(tmp_path)) > 20, 60, "the first to handle")
            second = start(KEY_LIMIT=limit)
            await until(lambda: second.says("handles"), 60, "the second to join")

            async def shared() -> bool:
                return set((await owners(queue)).values()) == {first.name, second.name}

            await until(shared, 60, "shards with both")
            first.send(signal.SIGTERM)
            assert await first.wait() == 0
            await until(lambda: drained(queue), 60, "an empty backlog")
        facts = read_journal(tmp_path)
        verdict = judge(sent, facts)
        assert not verdict.lost
        assert not verdict.repeated
        assert not verdict.disorder
        assert not verdict.overlaps
        starts = [fact for fact in facts if fact.kind == "start"]
        for _, of_key in groupby(sorted(starts, key=lambda fact: (fact.key, fact.at_ns)), key=lambda fact: fact.key):
            assert most_above([fact.at_ns / 1e9 for fact in of_key], limit) <= 0
        last_of = {fact.key: fact.at_ns for fact in starts}
        assert max(last_of[key] for key in cold) < min(last_of[key] for key in hot)
        await check_equation(queue)


async def test_a_key_with_a_long_backlog_does_not_fill_the_buffer(cluster: LocalCluster, queue_name: str) -> None:
    """What can't be in hand is put back, in order, and no attempt is counted for it."""
    seen: list[tuple[str, int, int]] = []

    async def handle(message: shardq.Message) -> None:
        seen.append((str(message.key), message.value, message.attempt))

    limited = shardq.Worker(queue_name, group=GROUP, key_limit="8/s", buffer=40)
    limited.handler(handle)
    free = shardq.Worker(queue_name, group=GROUP)
    free.handler(handle)
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            for number in range(200):
                await producer.send(number, key="hot")
            await producer.send(0, key="cold")
        async with running(client, limited):
            await until(lambda: ("cold", 0, 1) in seen, 60, "the other key's message")
            hot_before = len(seen)
            await until(lambda: len(seen) > hot_before + 5, 60, "the hot key to go on")
        assert hot_before < 100, "without it 160 of the hot key's come first"
        async with running(client, free):
            await until(lambda: drained(queue), 60, "an empty backlog")
        assert [value for key, value, _ in seen if key == "hot"] == list(range(200))
        assert {attempt for _, _, attempt in seen} == {1}
        counters = (await queue.counters([GROUP]))[0].groups[GROUP]
        assert counters.retried == 0
        await check_equation(queue)


@pytest.mark.parametrize("option", ["limit", "key_limit"])
async def test_what_waits_goes_to_the_next_owner_untouched(cluster: LocalCluster, queue_name: str, option: str) -> None:
    """Its delivery is not counted either, and the worker that stops does not wait for a limit."""
    limited = shardq.Worker(queue_name, group=GROUP, **{option: "1/h burst 8"})  # type: ignore[arg-type]  # one of two
    seen: list[tuple[int, int]] = []

    async def handle(message: shardq.Message) -> None:
        seen.append((message.value, message.attempt))

    limited.handler(handle)
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            for number in range(6):
                await producer.send(number, key="k")
        with anyio.fail_after(30):
            async with running(client, limited):
                await until(lambda: len(seen) == 2, 20, "what the limit allows")

                async def committed() -> bool:
                    return (await queue.counters([GROUP]))[0].groups[GROUP].acked == 2

                await until(committed, 20, "their commit")
        keys = queue.shards[0]
        pending = await client.pipes.command(keys.slot, pack_command("XPENDING", keys.stream, GROUP, "-", "+", 10))
        assert [times for *_, times in pending] == [0] * 4
        free = shardq.Worker(queue_name, group=GROUP)
        free.handler(handle)
        async with running(client, free):
            await until(lambda: drained(queue), 30, "an empty backlog")
        assert seen == [(number, 1) for number in range(6)]
        await check_equation(queue)


async def test_a_paused_group_gives_its_shards_back_with_all_that_waits(cluster: LocalCluster, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group=GROUP, limit="1/h burst 8", key_limit="1/h")
    seen: list[int] = []

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        seen.append(message.value)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            await producer.send_many((f"k{number}", number) for number in range(10))
        async with running(client, worker):
            await until(lambda: len(seen) == 2, 30, "what the limit allows")
            await queue.pause_group(GROUP)

            async def free() -> bool:
                return not await owners(queue)

            await until(free, 30, "no lease to be held")
        assert len(seen) == 2
        await check_equation(queue)


async def test_retries_count_and_keep_their_order(cluster: LocalCluster, queue_name: str) -> None:
    retry = shardq.Retry(base=0.01, factor=1.1)
    worker = shardq.Worker(queue_name, group=GROUP, limit="40/s", key_limit="20/s", retry=retry)
    seen: dict[str, list[int]] = defaultdict(list)
    begun: list[float] = []

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        begun.append(time.monotonic())
        if message.attempt < 4:
            raise ValueError("not yet")
        seen[str(message.key)].append(message.value)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            await producer.send_many((f"k{number % 5}", number) for number in range(15))
        async with running(client, worker):
            await until(lambda: sum(map(len, seen.values())) == 15, 60, "all to be handled")
        assert seen == {f"k{key}": list(range(key, 15, 5)) for key in range(5)}
        assert len(begun) == 60
        assert most_above(begun, "40/s") <= 0
        await check_equation(queue)


async def test_a_list_takes_as_much_of_the_limit_as_it_has_messages(cluster: LocalCluster, queue_name: str) -> None:
    worker = shardq.Worker(queue_name, group=GROUP, limit="100/s burst 20")
    lists: list[list[int]] = []
    begun: list[float] = []

    @worker.batch_handler
    async def handle(messages: Sequence[shardq.Message]) -> None:
        begun.append(time.monotonic())
        lists.append([message.value for message in messages])
        await anyio.sleep(0.03)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            await producer.send_many(("k", number) for number in range(120))
        async with running(client, worker):
            await until(lambda: sum(map(len, lists)) == 120, 60, "all to be handled")
        assert [value for values in lists for value in values] == list(range(120))
        assert most_above(begun, "100/s burst 20", [len(values) for values in lists]) <= 0
        await check_equation(queue)


async def test_of_different_limits_the_strictest_holds_for_all(cluster: LocalCluster, queue_name: str) -> None:
    begun: list[tuple[float, str]] = []

    def worker(name: str, limit: str) -> shardq.Worker:
        made = shardq.Worker(queue_name, group=GROUP, name=name, limit=limit)

        @made.handler
        async def handle(message: shardq.Message) -> None:
            begun.append((time.monotonic(), name))

        return made

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=8)
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            await producer.send_many((f"k{number}", number) for number in range(60))
        async with running(client, worker("strict", "40/s")):
            await until(lambda: len(begun) > 2, 30, "the strict one to begin")
            async with running(client, worker("loose", "10000/s")):
                await until(lambda: drained(queue), 60, "an empty backlog")
        assert {name for _, name in begun} == {"strict", "loose"}
        assert most_above([at for at, _ in begun], "40/s") <= 0


def test_lists_have_no_limit_by_key() -> None:
    worker = shardq.Worker("q", group=GROUP, key_limit="5/s")

    async def handle(messages: Sequence[shardq.Message]) -> None: ...

    with pytest.raises(shardq.UsageError, match=r"key_limit is for @worker\.handler"):
        worker.batch_handler(handle)


@pytest.mark.parametrize("option", ["limit", "key_limit"])
def test_a_wrong_form_is_refused_when_the_worker_is_made(option: str) -> None:
    with pytest.raises(shardq.UsageError, match=f'^{option} is "N/s"'):
        shardq.Worker("q", group=GROUP, **{option: "100 per second"})  # type: ignore[arg-type]  # one of two
