"""The sync producer: threads, timeouts, interrupts, forks, spawned processes, the end of the program. Real servers."""

from __future__ import annotations

import concurrent.futures
import gc
import inspect
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest

import shardq
from shardq.core import records
from shardq.core.ids import MessageId
from shardq.ops.local_cluster import LocalCluster, find_server
from shardq.runtime import background, feed
from shardq.runtime.answers import SendOptions
from shardq.runtime.sync import ProducerOptions
from shardq.storage.commands import pack_command
from shardq.storage.nodes import free_ports

ROOT = Path(__file__).parents[2]
SHARDS = 6


@pytest.fixture(scope="session")
def url(shared_clusters: Callable[[Path], LocalCluster]) -> str:
    """One kind of server: what is tested here is on the client's side."""
    return shared_clusters(find_server(None)).url


@contextmanager
def own_cluster() -> Iterator[LocalCluster]:
    with LocalCluster(masters=1, port=None) as cluster:
        try:
            yield cluster
        finally:
            resume(cluster)


def pause(cluster: LocalCluster) -> None:
    for server in cluster.processes:
        os.kill(server.pid, signal.SIGSTOP)


def resume(cluster: LocalCluster) -> None:
    for server in cluster.processes:
        if server.alive:
            os.kill(server.pid, signal.SIGCONT)


class Stored(NamedTuple):
    id: str
    key: Any
    value: Any
    headers: Any


def stored(url: str, name: str) -> list[Stored]:
    """Every stored message, shard by shard in stream order."""

    async def read() -> list[Stored]:
        found = []
        async with shardq.connect(url) as client:
            queue = await client.queue(name)
            for shard, keys in queue.shards.items():
                entries = await client.pipes.command(keys.slot, pack_command("XRANGE", keys.stream, "-", "+"))
                for entry, fields in entries:
                    batch = records.decode(fields[3])
                    for index, (key, value) in enumerate(zip(batch.keys, batch.values, strict=True)):
                        id_ = str(MessageId(shard, entry.decode(), index))
                        found.append(Stored(id_, key, value, batch.headers and batch.headers[index]))
        return found

    return anyio.run(read)


def values(url: str, name: str) -> list[Any]:
    return [message.value for message in stored(url, name)]


def by_key(messages: list[Stored]) -> dict[Any, list[Any]]:
    found = defaultdict(list)
    for message in messages:
        found[message.key].append(message.value)
    return dict(found)


def until(condition: Callable[[], object], what: str, deadline_s: float = 20) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < deadline_s, f"waited {deadline_s} s for {what}"
        time.sleep(0.01)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Runs `work(number)` in so many threads; raises what they raised."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(work, number) for number in range(count)]:
            done.result()


# -- sending ---------------------------------------------------------------------------------------------------


def test_what_was_sent_is_stored_under_the_id_that_was_returned(url: str, queue_name: str) -> None:
    with shardq.SyncProducer(url, queue_name, shards=SHARDS) as producer:
        ids = [
            producer.send({"sku": 7}, key="user:42", headers={"trace": "x"}),
            producer.send("text"),
            producer.send_soon(b"bytes", key=b"k", headers={"raw": b"\0"}).result(),
        ]
        assert producer.send_many((f"k{n}", n) for n in range(5000)) == 5000
        assert producer.send_many([]) == 0
    found = {message.id: message for message in stored(url, queue_name)}
    assert len(found) == 5003
    assert [found[id_][1:] for id_ in ids] == [
        ("user:42", {"sku": 7}, {"trace": "x"}),
        (None, "text", None),
        (b"k", b"bytes", {"raw": b"\0"}),
    ]


def test_threads_share_one_producer_and_each_keeps_its_order(url: str, queue_name: str) -> None:
    sent: dict[str, list[str]] = defaultdict(list)
    with shardq.SyncProducer(url, queue_name, shards=SHARDS) as producer:

        def work(number: int) -> None:
            key = f"key-{number}"
            for value in range(100):
                sent[key].append(producer.send(value, key=key))
            for future in [producer.send_soon(value, key=key) for value in range(100, 300)]:
                sent[key].append(future.result())
            assert producer.send_many((key, value) for value in range(300, 600)) == 300
            sent[key].append(producer.send(600, key=key))

        in_threads(12, work)
    found = stored(url, queue_name)
    assert by_key(found) == {f"key-{number}": list(range(601)) for number in range(12)}
    assert {id_ for ids in sent.values() for id_ in ids} <= {message.id for message in found}


def test_send_soon_takes_the_value_as_it_is_now(url: str, queue_name: str) -> None:
    value, headers = {"n": 0}, {"h": "0"}
    with shardq.SyncProducer(url, queue_name, shards=1) as producer:
        for number in range(200):
            value["n"], headers["h"] = number, str(number)
            producer.send_soon(value, key="k", headers=headers)
        producer.flush()
        found = stored(url, queue_name)
    assert [(message.value["n"], message.headers["h"]) for message in found] == [(n, str(n)) for n in range(200)]


def test_send_soon_waits_while_too_much_is_under_way(queue_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "MOST_OPEN", 20)
    with own_cluster() as own, shardq.SyncProducer(own.url, queue_name, shards=1) as producer:
        producer.send("first")
        pause(own)
        taken: list[int] = []

        def flood() -> None:
            for number in range(100):
                producer.send_soon(number, key="k")
                taken.append(number)

        thread = threading.Thread(target=flood)
        thread.start()
        until(lambda: len(taken) == 20, "as many as may be under way")
        thread.join(0.2)
        assert len(taken) == 20
        resume(own)
        thread.join(20)
        producer.flush()
        assert values(own.url, queue_name) == ["first", *range(100)]


def test_a_full_buffer_keeps_order_and_loses_nothing(url: str, queue_name: str) -> None:
    with shardq.SyncProducer(url, queue_name, shards=2, max_buffered_bytes=2000, max_batch_messages=3) as producer:

        def work(number: int) -> None:
            for value in range(200):
                producer.send_soon([value, "x" * 50], key=f"k{number}")
            producer.send_many((f"k{number}", [value, "x" * 50]) for value in range(200, 300))

        in_threads(4, work)
        producer.flush()
    found = by_key(stored(url, queue_name))
    assert {key: [value[0] for value in of_key] for key, of_key in found.items()} == {
        f"k{number}": list(range(300)) for number in range(4)
    }


def test_delayed_and_deduplicated_messages_keep_their_order(url: str, queue_name: str) -> None:
    with shardq.SyncProducer(url, queue_name, shards=1) as producer:
        first = producer.send("once", key="k", dedupe_id="order-991")
        assert producer.send("twice", key="k", dedupe_id="order-991", delay=None) == first
        for value in range(100):
            if value % 3:
                producer.send_soon(value, key="k")
            else:
                producer.send_soon(value, key="k", dedupe_id=f"id-{value}")
        assert producer.send_soon("later", key="k", delay=60).result().startswith("0/d")
        producer.flush()
        assert values(url, queue_name) == ["once", *range(100)]
        with pytest.raises(shardq.UsageError, match="not both"):
            producer.send(1, delay=1, at=2)
        with pytest.raises(shardq.UsageError, match="dedupe_id"):
            producer.send_soon(1, dedupe_window=1).result()
        unknown: Any = {"colour": "red"}
        for send in (producer.send, producer.send_soon):
            with pytest.raises(TypeError, match="colour"):
                send(1, **unknown)


def test_every_message_of_a_queue_of_jobs_is_a_job(url: str, queue_name: str) -> None:
    async def declare() -> None:
        async with shardq.connect(url) as client:
            await client.queue(queue_name, shards=1, jobs=True)

    anyio.run(declare)
    with shardq.SyncProducer(url, queue_name) as producer:
        producer.send(1)
    assert stored(url, queue_name)[0].headers.keys() >= {"shardq-job"}


# -- iterables -------------------------------------------------------------------------------------------------


def test_an_iterable_runs_in_the_calling_thread_and_its_pairs_do_not_wait_for_each_other(
    url: str, queue_name: str
) -> None:
    threads = set()

    def count_is(count: int) -> bool:
        return len(values(url, queue_name)) == count

    def slow() -> Iterator[tuple[str, int]]:
        for number in range(6):
            threads.add(threading.get_ident())
            yield "k", number
            if number % 2:  # every second one comes at once, while the one before it is being stored
                until(partial(count_is, number + 1), "the pairs so far to be stored")

    with shardq.SyncProducer(url, queue_name, shards=1) as producer:
        producer.send_many([])  # so that the queue is there to be looked at
        assert producer.send_many(slow()) == 6
    assert threads == {threading.get_ident()}


def test_what_an_iterable_gave_before_it_raised_is_sent(url: str, queue_name: str) -> None:
    def broken() -> Iterator[tuple[str, int]]:
        for number in range(12_345):
            yield "k", number
        raise KeyError("the iterable's own")

    with shardq.SyncProducer(url, queue_name, shards=1) as producer:
        with pytest.raises(KeyError, match="the iterable's own"):
            producer.send_many(broken())
        producer.flush()
        assert values(url, queue_name) == list(range(12_345))


def test_large_values_do_not_pile_up(url: str, queue_name: str) -> None:
    made = taken = most = 0
    real = feed.Feed._take

    def take(self: feed.Feed) -> Any:
        nonlocal taken, most
        most = max(most, made - taken)
        taken = self._taken
        return real(self)

    def large() -> Iterator[tuple[str, bytes]]:
        nonlocal made
        for number in range(200):
            made = number
            yield "k", b"x" * 300_000

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed.Feed, "_take", take)
        with shardq.SyncProducer(url, queue_name, shards=1, max_buffered_bytes=1_000_000) as producer:
            assert producer.send_many(large()) == 200
    assert most < 60


# -- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "error", "text"),
    [
        (17, b"x", shardq.InvalidKey, "str"),
        ("k", object(), shardq.InvalidValue, "object"),
        ("\ud800", b"x", shardq.InvalidKey, "bytes"),
        ("k", b"x" * 2_000_000, shardq.MessageTooLarge, "max_message_bytes"),
    ],
    ids=["int key", "object value", "surrogate key", "too large"],
)
def test_bad_messages_are_refused_and_nothing_else_is_lost(
    url: str, queue_name: str, key: Any, value: Any, error: type[Exception], text: str
) -> None:
    with shardq.SyncProducer(url, queue_name, shards=2) as producer:
        with pytest.raises(error, match=text):
            producer.send(value, key=key)
        with pytest.raises(error, match=text):
            producer.send_soon(value, key=key).result()
        for before in (2, 30_000):
            good = [(f"k{n}", n) for n in range(before)]
            with pytest.raises(error, match=text) as caught:
                producer.send_many([*good, (key, value), ("c", b"3")])
            assert caught.value.__notes__ == [f"{before} messages before it were sent"]
        producer.send(b"after", key="a")
        future = producer.send_soon(value, key=key)
        with pytest.raises(shardq.NotStored, match="1 messages are not stored") as lost:
            producer.flush()
        assert isinstance(lost.value.__cause__, error)
        with pytest.raises(error, match=text):
            future.result()
        producer.flush()
        producer.send_soon(value, key=key).exception()  # heard of: close has nothing to tell
    assert len(stored(url, queue_name)) == 30_003


def test_a_bad_headers_argument_is_refused(url: str, queue_name: str) -> None:
    with shardq.SyncProducer(url, queue_name, shards=1) as producer:
        headers: Any = {"n": 1}
        with pytest.raises(shardq.InvalidValue, match="header"):
            producer.send(b"x", headers=headers)
        headers = [1]
        with pytest.raises(shardq.InvalidValue, match="headers"):
            producer.send_soon(b"x", headers=headers).result()


def test_settings_and_uses_that_are_wrong_have_their_errors(url: str, queue_name: str) -> None:
    with pytest.raises(shardq.UsageError, match="valid"):
        shardq.SyncProducer(url, "no spaces")
    with pytest.raises(shardq.UsageError, match="valid"):
        shardq.SyncProducer(url, queue_name, prefix="")
    unknown: Any = {"durable": True}
    with pytest.raises(TypeError, match="durable"):
        shardq.SyncProducer(url, queue_name, **unknown)
    with shardq.SyncProducer(url, queue_name) as producer, pytest.raises(shardq.UnknownQueue, match="shards=N"):
        producer.send(b"x")
    with shardq.SyncProducer(url, queue_name, shards=2) as producer:
        for timeout in (0, -1, float("nan")):
            for call in (producer.flush, producer.close, partial(producer.send, b"x")):
                with pytest.raises(shardq.UsageError, match="timeout must be above 0"):
                    call(timeout=timeout)
        producer.send(b"x", timeout=20)
    with shardq.SyncProducer(url, queue_name, shards=3) as producer:
        with pytest.raises(shardq.QueueMismatch, match="has 2 shards"):
            producer.send_many([("k", b"x")])
        with pytest.raises(shardq.QueueMismatch, match="has 2 shards"):
            producer.send_soon(b"x").result()
    with shardq.SyncProducer(url, queue_name, delivery_timeout=4000) as producer:
        with pytest.raises(shardq.UsageError, match="at most 1800"):
            producer.send(b"x")
    with shardq.SyncProducer(url, queue_name, max_buffered_bytes=-1) as producer:
        with pytest.raises(shardq.UsageError, match="above 0"):
            producer.send_soon(b"x").result()
    with shardq.SyncProducer("http://nowhere", queue_name) as producer:
        with pytest.raises(shardq.UsageError, match="redis://"):
            producer.send(b"x")
    producer = shardq.SyncProducer(url, queue_name)
    producer.close()
    producer.close()
    producer.flush()
    for use in (producer.send, producer.send_soon, lambda value: producer.send_many([("k", value)])):
        with pytest.raises(shardq.ClosedError, match="closed"):
            use(b"x")


def test_the_options_are_those_of_the_async_producer() -> None:
    assert set(inspect.signature(shardq.Queue.producer).parameters) - {"self"} == set(ProducerOptions.__annotations__)
    send = set(inspect.signature(shardq.Producer.send).parameters) - {"self", "value", "key", "headers"}
    assert send == set(SendOptions.__annotations__)


def test_in_an_event_loop_it_refuses_to_block(url: str, queue_name: str) -> None:
    with shardq.SyncProducer(url, queue_name, shards=1) as producer:

        async def main() -> None:
            for use in (producer.send, producer.send_soon, lambda value: producer.send_many([("k", value)])):
                with pytest.raises(shardq.UsageError, match="async with queue"):
                    use(b"x")
            for end in (producer.flush, producer.close):
                with pytest.raises(shardq.UsageError, match="async with queue"):
                    end()
            await anyio.to_thread.run_sync(producer.send, b"from a thread")

        anyio.run(main)
        assert values(url, queue_name) == [b"from a thread"]


def test_it_connects_at_its_first_use_and_tries_again_after_a_failure(queue_name: str) -> None:
    (port,) = free_ports("127.0.0.1", 1)
    threads = threading.active_count()
    producer = shardq.SyncProducer(f"redis://127.0.0.1:{port}", queue_name, shards=1)
    assert threading.active_count() == threads
    soon = producer.send_soon(b"x")
    with pytest.raises(shardq.StoreUnavailable, match=str(port)):
        producer.send(b"x")
    with pytest.raises(shardq.StoreUnavailable):
        producer.send_many(("k", b"x" * 1000) for _ in range(100_000))
    with pytest.raises(shardq.NotStored, match="1 messages are not stored"):
        producer.flush()
    assert isinstance(soon.exception(), shardq.StoreUnavailable)
    with LocalCluster(masters=1, port=port) as own:
        producer.send(b"now")
        producer.close()
        assert values(own.url, queue_name) == [b"now"]
    assert threading.active_count() == threads


# -- time and interrupts ---------------------------------------------------------------------------------------


def test_a_timeout_tells_whether_the_message_may_be_stored(queue_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "MOST_OPEN", 5)
    with own_cluster() as own, shardq.SyncProducer(own.url, queue_name, shards=1, max_buffered_bytes=100) as producer:
        producer.send("first")
        pause(own)
        with pytest.raises(shardq.StoreTimeout, match="may be stored still") as begun:
            producer.send("x" * 200, key="begun", timeout=0.2)
        assert begun.value.outcome_unknown
        with pytest.raises(shardq.StoreTimeout, match="was not sent") as waiting:
            producer.send("no room", timeout=0.2)
        assert not waiting.value.outcome_unknown
        with pytest.raises(shardq.StoreTimeout, match="not all messages"):
            producer.flush(timeout=0.2)
        withdrawn = producer.send_soon("no room either")
        assert withdrawn.cancel()
        resume(own)
        producer.send("last", timeout=20)
        producer.flush()
        assert values(own.url, queue_name) == ["first", "x" * 200, "last"]


@contextmanager
def interrupt(when: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C for the main thread when `when` holds and it has come to its wait: a signal that comes between its last
    look for signals and the wait itself would be heard only after the wait."""

    def press() -> None:
        until(when, "the moment to interrupt")
        main, pause_s = threading.main_thread().ident, 0.3
        assert main is not None
        while not heard.wait(pause_s):  # on a busy machine it may come too soon all the same: press again
            signal.pthread_kill(main, signal.SIGINT)
            pause_s = 5.0

    heard = threading.Event()
    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        heard.set()
        thread.join()


def test_an_interrupt_leaves_the_producer_whole(queue_name: str) -> None:
    def endless() -> Iterator[tuple[str, bytes]]:
        while True:
            count[0] += 1
            yield "many", b"x" * 1000

    count = [0]
    with own_cluster() as own, shardq.SyncProducer(own.url, queue_name, shards=1) as producer:
        producer.send("first", key="k")
        pause(own)
        started = time.monotonic()
        with interrupt(lambda: time.monotonic() - started > 0.2):
            producer.send("interrupted", key="k")
        # The thread runs ahead of the loop by 4 MiB at most, and the loop may wait after the first few already.
        with interrupt(lambda: count[0] > 3000):
            producer.send_many(endless())
        with interrupt(lambda: time.monotonic() - started > 1):
            producer.flush()
        resume(own)
        producer.send("last", key="k")
        producer.flush()
        found = by_key(stored(own.url, queue_name))
    assert found["k"] == ["first", "interrupted", "last"]
    assert count[0] - 1 <= len(found["many"]) <= count[0]


def test_close_ends_what_is_under_way(url: str, queue_name: str) -> None:
    producer = shardq.SyncProducer(url, queue_name, shards=SHARDS)
    ends: list[str] = []
    taken: list[int] = []
    count = [0]

    def endless() -> Iterator[tuple[str, int]]:
        while True:
            count[0] += 1
            yield "many", count[0]

    def many(_: int) -> None:
        with pytest.raises(shardq.ClosedError) as caught:
            producer.send_many(endless())
        taken.append(int(str(caught.value).split(": ")[1].split()[0]))

    def keep(send: Callable[[int], object]) -> None:
        try:
            while True:
                send(0)
        except shardq.ClosedError as error:
            ends.append(str(error))

    def one(_: int) -> None:
        keep(producer.send)

    def soon(_: int) -> None:
        keep(producer.send_soon)

    def close(_: int) -> None:
        until(lambda: count[0] > 10_000, "traffic")
        producer.close()

    in_threads(5, lambda number: (many, one, soon, soon, close)[number](number))
    assert len(ends) == 3
    assert by_key(stored(url, queue_name))["many"] == list(range(1, taken[0] + 1))


def test_flush_and_close_say_what_is_not_stored(queue_name: str) -> None:
    with own_cluster() as own:
        producer = shardq.SyncProducer(own.url, queue_name, shards=1, delivery_timeout=1.0)
        producer.send("first")
        for server in own.processes:
            server.kill()
        heard, *_ = [producer.send_soon(number) for number in range(10)]
        with pytest.raises(shardq.StoreError):
            heard.result()
        with pytest.raises(shardq.NotStored, match="9 messages") as caught:
            producer.flush()
        assert caught.value.failed == 9
        with pytest.raises(shardq.StoreError):
            producer.send("not stored")
        with pytest.raises(shardq.NotStored) as bulk:
            producer.send_many((None, number) for number in range(50_000))
        assert 0 < bulk.value.failed <= 50_000
        producer.send_soon("lost")
        with pytest.raises(shardq.NotStored, match="1 messages"):
            producer.close()
        with pytest.raises(shardq.ClosedError):
            producer.send("closed")
        producer.close()


def test_an_error_in_the_block_is_not_hidden_and_the_block_is_left_in_bounded_time(
    queue_name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shardq.runtime.sync.EXIT_WITHIN_S", 0.3)
    with own_cluster() as own:

        def program() -> None:
            with shardq.SyncProducer(own.url, queue_name, shards=1) as producer:
                producer.send("first")
                pause(own)
                producer.send_soon("under way")
                raise KeyError("the block's own")

        with pytest.raises(KeyError, match="the block's own"):
            program()
        assert "not known to be stored" in caplog.text
        resume(own)
        until(lambda: values(own.url, queue_name) == ["first", "under way"], "the rest to be stored")
        until(lambda: not _threads(queue_name), "its thread to end")


def _threads(queue: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == f"shardq-{queue}"]


def test_a_forgotten_producer_ends_its_thread_when_all_is_stored(url: str, queue_name: str) -> None:
    producer = shardq.SyncProducer(url, queue_name, shards=1)
    producer.send("first")
    for number in range(100):
        producer.send_soon(number)
    assert _threads(queue_name)
    del producer
    gc.collect()
    until(lambda: not _threads(queue_name), "its thread to end")
    assert values(url, queue_name) == ["first", *range(100)]


# -- processes -------------------------------------------------------------------------------------------------


def run(script: str, *arguments: str) -> str:
    """Runs a script as a program of its own and returns its stderr, without what asyncio says of slow machines."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return "\n".join(line for line in done.stderr.splitlines() if "WARNING:asyncio:Executing" not in line)


START = """
import gc, logging, multiprocessing, os, signal, sys, threading
import shardq
from shardq.runtime import process, sync
logging.basicConfig()
url, queue = sys.argv[1:3]

def wait(pid):
    status = os.waitpid(pid, 0)[1]
    assert status == 0, f"a child ended with status {status}"
"""


def test_a_forked_child_sends_on_its_own_and_leaves_the_parent_alone(url: str, queue_name: str) -> None:
    script = """
producer = shardq.SyncProducer(url, queue, shards=6)
for number in range(50):
    producer.send(number, key="parent")
under_way = producer.send_soon(50, key="parent")
child = os.fork()
if not child:
    try:
        under_way.result(5)
    except shardq.ClosedError:
        pass
    else:
        os._exit(3)
    producer.flush()
    for number in range(50):
        # Collected in the loop of the child, a connection of the parent would be closed there.
        producer.send_soon(number, key="child").add_done_callback(lambda _: gc.collect())
    grandchild = os.fork()
    if not grandchild:
        producer.send("here", key="grandchild")
        sys.exit()
    wait(grandchild)
    producer.send(50, key="child")
    producer.close()
    sys.exit()
wait(child)
under_way.result(5)
for number in range(51, 100):
    producer.send(number, key="parent", timeout=20)
producer.close()
"""
    run(START + script, url, queue_name)
    assert by_key(stored(url, queue_name)) == {
        "parent": list(range(100)),
        "child": list(range(51)),
        "grandchild": ["here"],
    }


def test_forks_while_threads_are_sending(url: str, queue_name: str) -> None:
    script = """
producer = shardq.SyncProducer(url, queue, shards=6)
done = False
def work(key):
    number = 0
    while not done:
        producer.send(number, key=key)
        producer.send_soon(number + 1, key=key)
        number += 2
threads = [threading.Thread(target=work, args=(f"thread-{n}",)) for n in range(4)]
for thread in threads:
    thread.start()
children = []
for n in range(8):
    child = os.fork()
    if not child:
        for number in range(20):
            producer.send(number, key=f"child-{n}")
        producer.send_many((f"child-{n}", number) for number in range(20, 40))
        gc.collect()
        sys.exit()
    children.append(child)
for child in children:
    wait(child)
done = True
for thread in threads:
    thread.join()
producer.close()
"""
    run(START + script, url, queue_name)
    found = by_key(stored(url, queue_name))
    for n in range(8):
        assert found[f"child-{n}"] == list(range(40))
    for n in range(4):
        assert found[f"thread-{n}"] == list(range(len(found[f"thread-{n}"])))


def test_its_thread_imports_nothing(url: str, queue_name: str) -> None:
    """A process that forks while a thread is importing has a child that waits for ever for that import."""
    script = """
import shardq.runtime.sync
before = set(sys.modules)
with shardq.SyncProducer(url, queue, shards=6) as producer:
    producer.send(1)
    producer.send_many([("k", 2)])
assert set(sys.modules) == before, set(sys.modules) - before
"""
    run(START + script, url, queue_name)


def test_what_was_under_way_at_a_fork_is_stored_once_by_the_parent(queue_name: str) -> None:
    script = """
server = int(sys.argv[3])
producer = shardq.SyncProducer(url, queue, shards=1)
producer.send("first")
os.kill(server, signal.SIGSTOP)
for number in range(50):
    producer.send_soon(number)
child = os.fork()
if not child:
    producer.close()
    sys.exit()
wait(child)
os.kill(server, signal.SIGCONT)
"""
    with own_cluster() as own:
        run(START + script, own.url, queue_name, str(own.processes[0].pid))
        assert values(own.url, queue_name) == ["first", *range(50)]


def test_multiprocessing_forked_and_spawned(url: str, queue_name: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        START
        + """
producer = shardq.SyncProducer(url, queue, shards=6)

def work(given, key):
    given.send("given", key=key)
    producer.send("its own", key=key)

if __name__ == "__main__":
    producer.send("parent", key="parent")
    for method in ("fork", "spawn", "forkserver"):
        process = multiprocessing.get_context(method).Process(target=work, args=(producer, method))
        process.start()
        process.join()
        assert process.exitcode == 0, (method, process.exitcode)
        producer.send(method, key="parent")
"""
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py", url, queue_name],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert by_key(stored(url, queue_name)) == {
        "parent": ["parent", "fork", "spawn", "forkserver"],
        **{method: ["given", "its own"] for method in ("fork", "spawn", "forkserver")},
    }


def test_pickled_it_is_made_anew(url: str, queue_name: str) -> None:
    with shardq.SyncProducer(url, queue_name, shards=2, prefix="other", max_batch_messages=7) as producer:
        id_ = producer.send(1)
        with pickle.loads(pickle.dumps(producer)) as again:
            assert again.send(2) != id_
            assert repr(again) == f"<shardq.SyncProducer of {queue_name!r}>"


def test_a_program_that_ends_stores_what_is_under_way(url: str, queue_name: str) -> None:
    script = """
producer = shardq.SyncProducer(url, queue, shards=6)
for number in range(3000):
    producer.send_soon(number, key="k")
"""
    assert run(START + script, url, queue_name) == ""
    assert values(url, queue_name) == list(range(3000))


def test_a_program_that_ends_without_its_store_says_so_and_does_not_hang(queue_name: str) -> None:
    script = """
process.EXIT_WITHIN_S = 0.5
producer = shardq.SyncProducer(url, queue, shards=1)
refused = shardq.SyncProducer(url, queue, shards=2)
producer.send("first")
refused.send_soon("the queue has one shard")
while not refused._background.over:
    pass
os.kill(int(sys.argv[3]), signal.SIGSTOP)
for number in range(20):
    producer.send_soon(number)
"""
    with own_cluster() as own:
        said = run(START + script, own.url, queue_name, str(own.processes[0].pid))
    assert "20 messages not known to be stored" in said
    assert "1 messages are not stored" in said
    assert "has 1 shards, not 2" in said
