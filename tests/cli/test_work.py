"""`shardq work` as a user runs it: processes of its own, signals, crashes, and every way to name no worker."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

import shardq
from shardq.errors import WorkerNotFound
from shardq.ops.local_cluster import LocalCluster, find_server
from shardq.ops.work import load_worker
from shardq.storage.nodes import free_ports
from tests.cli.support import Command, Start, commands, until

SHARDS = 6
APP = """
import os
import anyio, shardq

journal = os.open("journal", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
worker = shardq.Worker(os.environ["QUEUE"], group="g", shards=6, lease=2)
stranger = shardq.Worker("never-declared", group="g")

def note(*words):
    os.write(journal, " ".join(map(str, (os.getpid(), *words))).encode() + b"\\n")

note("up")

@worker.handler
async def handle(message):
    note("start", message.value)
    await anyio.sleep(float(os.environ.get("HANDLER_S", "0")))
    note("end", message.value)

@stranger.handler
async def ignore(message): ...
"""


@pytest.fixture
def start(tmp_path: Path, queue_name: str) -> Iterator[Start]:
    """Starts `shardq work ARGUMENTS` where app.py is, with the test's queue."""
    (tmp_path / "app.py").write_text(APP)
    with commands(tmp_path) as start:
        yield lambda *arguments, **environment: start("work", *arguments, QUEUE=queue_name, **environment)


@pytest.fixture
def any_cluster(shared_clusters: object) -> LocalCluster:
    """A shared cluster of the server that is found first, for what no server kind changes."""
    assert callable(shared_clusters)
    cluster = shared_clusters(find_server(None))
    assert isinstance(cluster, LocalCluster)
    return cluster


def facts(folder: Path, kind: str) -> list[tuple[int, str]]:
    """What the workers wrote down of this kind: (pid, value)."""
    journal = folder / "journal"
    lines = [line.split() for line in journal.read_text().splitlines()] if journal.exists() else []
    return [(int(words[0]), words[-1]) for words in lines if words[1] == kind]


def children(folder: Path, supervisor: Command) -> list[int]:
    return [pid for pid, _ in facts(folder, "up") if pid != supervisor.process.pid]


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def _send(url: str, queue: str, values: range) -> None:
    async with shardq.connect(url) as client:
        joined = await client.queue(queue, shards=SHARDS)
        async with joined.producer() as producer:
            await producer.send_many((f"k{value % 40}", value) for value in values)


def send(url: str, queue: str, values: range) -> None:
    anyio.run(_send, url, queue, values)


async def _owners(url: str, queue: str) -> Counter[str]:
    async with shardq.connect(url) as client:
        shards = await (await client.queue(queue, shards=SHARDS)).counters(["g"])
        return Counter(shard.groups["g"].owner for shard in shards.values() if "g" in shard.groups)


def owners(url: str, queue: str) -> Counter[str]:
    """How many shards each worker holds; "" is nobody."""
    return anyio.run(_owners, url, queue)


# -- handling ---------------------------------------------------------------------------------------------------------


# What processes and signals do to a worker is the same on every server; tests/runtime has workers on each.
@pytest.mark.server_kinds("redis8")
def test_processes_share_the_shards_and_handle_everything(
    start: Start, cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    supervisor = start("app:worker", "--processes", "2", "--name", "w", "--url", cluster.url)
    until(lambda: owners(cluster.url, queue_name) == {"w-1": 3, "w-2": 3}, "both have their shards")
    send(cluster.url, queue_name, range(300))
    until(lambda: len(facts(tmp_path, "end")) >= 300, "all is handled")
    assert supervisor.stop(signal.SIGINT) == 0, supervisor.stderr
    done = facts(tmp_path, "end")
    assert sorted(int(value) for _, value in done) == list(range(300))
    assert {pid for pid, _ in done} == set(children(tmp_path, supervisor))
    assert len({pid for pid, _ in done}) == 2
    assert owners(cluster.url, queue_name) == {"": SHARDS}
    assert not any(map(exists, children(tmp_path, supervisor)))
    assert "Traceback" not in supervisor.stderr


@pytest.mark.server_kinds("valkey9")
def test_sigterm_finishes_what_runs_and_nothing_is_handled_twice(
    start: Start, cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    send(cluster.url, queue_name, range(400))
    first = start("app:worker", "--url", cluster.url, HANDLER_S="0.02")
    until(lambda: len(facts(tmp_path, "end")) >= 50, "it is in the middle of it")
    assert first.stop() == 0, first.stderr
    handled = facts(tmp_path, "end")
    assert sorted(handled) == sorted(facts(tmp_path, "start"))  # none was cut short
    assert len(handled) < 400  # or nothing was left to hand over
    second = start("app:worker", "--url", cluster.url)
    until(lambda: len(facts(tmp_path, "end")) >= 400, "the rest is handled")
    assert second.stop() == 0
    assert Counter(int(value) for _, value in facts(tmp_path, "start")) == dict.fromkeys(range(400), 1)


def test_a_second_signal_cancels_and_gives_the_leases_back(
    start: Start, any_cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    send(any_cluster.url, queue_name, range(3))
    worker = start("app:worker", "--url", any_cluster.url, HANDLER_S="3600")
    until(lambda: len(facts(tmp_path, "start")) == 3, "all are being handled")
    worker.send(signal.SIGTERM)
    until(lambda: "hands over" in worker.stderr, "it drains")

    def gone() -> bool:
        worker.send(signal.SIGTERM)  # one that comes with the first on its heels counts as the same
        return worker.process.poll() is not None

    until(gone, "it is cancelled")
    assert worker.wait() == 130
    assert facts(tmp_path, "end") == []
    assert owners(any_cluster.url, queue_name) == {"": SHARDS}


# -- supervision ------------------------------------------------------------------------------------------------------


def test_a_killed_process_is_started_again(
    start: Start, any_cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    supervisor = start("app:worker", "--processes", "2", "--url", any_cluster.url)
    until(lambda: len(children(tmp_path, supervisor)) == 2, "both are up")
    victim = children(tmp_path, supervisor)[0]
    os.kill(victim, signal.SIGKILL)
    until(lambda: len(children(tmp_path, supervisor)) == 3, "another one is up")
    assert f"(pid {victim}) ended with signal SIGKILL" in supervisor.stderr
    send(any_cluster.url, queue_name, range(100))
    until(lambda: len({value for _, value in facts(tmp_path, "end")}) == 100, "all is handled")
    assert supervisor.stop() == 0, supervisor.stderr
    assert not any(map(exists, children(tmp_path, supervisor)))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a signal for the death of the parent")
def test_sigkill_of_the_supervisor_leaves_no_process(start: Start, any_cluster: LocalCluster, tmp_path: Path) -> None:
    supervisor = start("app:worker", "--processes", "2", "--url", any_cluster.url)
    until(lambda: len(children(tmp_path, supervisor)) == 2, "both are up")
    supervisor.process.kill()
    supervisor.wait()
    until(lambda: not any(map(exists, children(tmp_path, supervisor))), "its processes are gone")


def test_without_a_cluster_processes_are_tried_again_until_told_to_stop(start: Start) -> None:
    url = f"redis://127.0.0.1:{free_ports('127.0.0.1', 1)[0]}"
    supervisor = start("app:worker", "--processes", "2", "--url", url)
    until(lambda: "process 2" in supervisor.stderr and "started again in 1 s" in supervisor.stderr, "pauses grow")
    assert "started again in 0.5 s" in supervisor.stderr
    assert "error: no cluster node answers" in supervisor.stderr
    assert supervisor.stop() in (0, 1)  # 1 when the signal met a process that was just failing by itself


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["app:stranger"], "error: queue 'never-declared' does not exist"),
        (["app:worker", "--name", "not a name"], "error: worker name 'not a name"),
    ],
    ids=["unknown queue", "bad name"],
)
@pytest.mark.parametrize("processes", ["1", "2"])
def test_what_can_never_run_ends_at_once(
    start: Start, any_cluster: LocalCluster, arguments: list[str], says: str, processes: str
) -> None:
    worker = start(*arguments, "--processes", processes, "--url", any_cluster.url)
    assert worker.wait() == 1
    assert says in worker.stderr
    assert "Traceback" not in worker.stderr
    assert "started again" not in worker.stderr


@pytest.mark.parametrize(
    ("url", "says"),
    [("redis://127.0.0.1:1", "error: no cluster node answers at 127.0.0.1:1"), ("nonsense", "error: the URL is not")],
)
def test_no_cluster_and_no_url_are_one_line_and_status_1(start: Start, url: str, says: str) -> None:
    worker = start("app:worker", "--url", url)
    assert worker.wait() == 1
    assert worker.stderr.startswith(says)
    assert worker.stderr.count("\n") == 1


# -- finding the worker -----------------------------------------------------------------------------------------------

MODULES = {
    "targets_fine": "import shardq\nbare = shardq.Worker('q', group='g')\nnumber = 3\n",
    "targets_needs": "import targets_not_there\n",
    "targets_broken": "def f(:\n",
    "targets_raises": "raise RuntimeError('first line\\nsecond line')\n",
    "targets_exits": "import sys\nsys.exit('I am a script')\n",
}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("targets_fine", "is no MODULE:WORKER"),
        ("targets_fine:", "is no MODULE:WORKER"),
        (":bare", "is no MODULE:WORKER"),
        (".targets_fine:bare", "is no MODULE:WORKER"),
        ("", "is no MODULE:WORKER"),
        ("targets_none:bare", "there is no module 'targets_none'"),
        ("targets_fine.py:bare", r"there is no module 'targets_fine.py'"),
        ("targets_fine:other", "'other' in module 'targets_fine' does not exist: its workers are targets_fine:bare"),
        ("targets_fine:number", "'number' in module 'targets_fine' is int, not a shardq.Worker"),
        ("targets_fine:bare", "the worker targets_fine:bare has no handler"),
        ("targets_needs:bare", "'targets_needs' failed, mend it: ModuleNotFoundError: .*targets_not_there"),
        ("targets_broken:bare", "'targets_broken' failed, mend it: SyntaxError"),
        ("targets_raises:bare", "'targets_raises' failed, mend it: RuntimeError: first line"),
        ("targets_exits:bare", "'targets_exits' failed, mend it: SystemExit: I am a script"),
    ],
)
def test_a_target_that_is_no_worker_says_why(target: str, says: str) -> None:
    with pytest.raises(WorkerNotFound, match=says):
        load_worker(target)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_wrong_target_is_one_line_and_status_1(start: Start, processes: str) -> None:
    worker = start("app:nobody", "--processes", processes)
    assert worker.wait() == 1
    assert worker.stderr.startswith(
        "error: 'nobody' in module 'app' does not exist: its workers are app:stranger, app:w"
    )
    assert worker.stderr.count("\n") == 1
