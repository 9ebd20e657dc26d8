"""The whole way of a message, produced, handled, finished: shardq beside task queues and NATS on the same cores.

Each round of a side has fresh servers, one worker process that is ready before the clock starts, and one producer
process; both work at the same time. What a side does exactly is written in benchmarks/peers/NAME.py, and the clock in
benchmarks/peers/protocol.py. A peer that can't run here gets no figure and a note that says why.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import environments, harness
from benchmarks.environments import python_of
from benchmarks.harness import Goal, Options, Result, Say, Side
from benchmarks.runs import Program, one_round
from shardq.errors import StoreUnavailable, UsageError
from shardq.ops.local_cluster import LocalServer
from shardq.ops.processes import die_with_parent
from shardq.storage.nodes import free_ports

Url = AbstractContextManager[str]
HOST, READY_WITHIN_S = "127.0.0.1", 20.0
TASK_QUEUES, ENGINES = 30, 3  # how many times as fast shardq is to be

NOTES = [
    "The goals are judged on shardq's `handler`, one async call for each message; `batch_handler` gets lists.",
    "shardq runs on a cluster of three masters. The peers run on one server without cluster mode, as most don't speak "
    "Redis Cluster: the same binary with the same persistence (appendonly yes, appendfsync everysec).",
    "One producer and one worker process for each system, both on the same CPUs as the servers; the worker is ready "
    "before the clock starts. Values are 100 bytes of text; shardq's messages have keys of 10,000 users, and those of "
    "a key are handled in order; no peer has keys.",
    "Peers keep no results, write no logs, send in bulk where they can, and have the fastest of a few settings here, "
    "tried before the rounds. Those on asyncio run on uvloop; shardq, and ChasquiMQ's handler, on asyncio's own loop.",
    "rq runs SimpleWorker, which spares it a fork for each job. NATS acknowledges a batch with its last message, and "
    "its server leaves syncing its file to its default of two minutes, where the Redis servers sync each second.",
]


@dataclass(frozen=True, slots=True)
class Peer:
    """`messages` at full scale are two to five seconds of work; of `settings` the fastest here is used."""

    name: str
    package: str
    messages: int
    times: int
    settings: tuple[str, ...]
    what: str


PEERS = [
    Peer("streaq", "streaq", 4000, TASK_QUEUES, ("16", "64"), "enqueue_many; concurrency {}; ttl 0"),
    Peer(
        "taskiq_redis",
        "taskiq-redis",
        8000,
        TASK_QUEUES,
        ("20", "100"),
        "RedisStreamBroker; 10 kiq side by side; max_async_tasks {}",
    ),
    Peer("arq", "arq", 4000, TASK_QUEUES, ("20", "100"), "10 enqueue_job side by side; max_jobs {}; keep_result 0"),
    Peer("saq", "saq", 4000, TASK_QUEUES, ("5", "20"), "10 enqueue side by side; concurrency {}; ttl -1"),
    Peer("docket", "pydocket", 3000, TASK_QUEUES, ("20", "50"), "add_many; concurrency {}; execution_ttl 0"),
    Peer("faststream", "faststream", 8000, TASK_QUEUES, ("1", "10"), "streams; publish in pipelines; max_workers {}"),
    Peer("dramatiq", "dramatiq", 6000, TASK_QUEUES, ("8", "16", "32"), "send in 4 threads; a worker of {} threads"),
    Peer("rq", "rq", 600, TASK_QUEUES, ("1", "2"), "enqueue_many; WorkerPool of {} SimpleWorker; result_ttl 0"),
    Peer("celery", "celery", 2000, TASK_QUEUES, ("solo", "threads", "prefork"), "apply_async; pool {}; ignore_result"),
    Peer("chasquimq", "chasquimq", 200_000, ENGINES, ("20", "100"), "Producer.add_bulk; Consumer, concurrency {}"),
    Peer("nats", "nats-py", 100_000, ENGINES, ("fetch", "push"), "publish_async; {} consumer; ack policy all"),
]
SHARDQ, SHARDQ_MESSAGES = "benchmarks.peers.shardq", {"handler": 1_000_000, "batch_handler": 2_000_000}


async def measure(options: Options, say: Say) -> Result:
    sides, notes, versions = _shardq_sides(options), list(NOTES), {}
    for peer in PEERS:
        if reason := why_not(peer, options, say):
            say(f"  no {peer.name}: {reason}")
            notes.append(f"{peer.package} has no figure: {reason}.")
        else:
            versions[peer.package] = environments.version_of(peer.name, peer.package)
            sides.append(await _fastest(peer, options, say))
    if "nats-py" in versions:
        versions["nats-server"] = _nats_version()
    samples = await harness.alternate(sides, options.rounds, say, warm_up=False)  # each round warms itself up
    result = Result("The whole pipeline", "messages/s", samples, {side.name: side.command for side in sides})
    result.notes, result.versions = notes, versions
    result.sizes = _sizes(options)
    result.goals = [goal(result, peer) for peer in PEERS if peer.name in samples]
    _note_uvloop(result)
    return result


def goal(result: Result, peer: Peer) -> Goal:
    ratio = result.median("shardq") / result.median(peer.name)
    return Goal(f"whole pipeline, times {peer.package}", ratio, ">=", peer.times, against=peer.name)


def _sizes(options: Options) -> dict[str, object]:
    counts = {"shardq": SHARDQ_MESSAGES["handler"], "shardq-batch_handler": SHARDQ_MESSAGES["batch_handler"]}
    counts |= {peer.name: peer.messages for peer in PEERS}
    return {"value_bytes": 100, "messages": {name: options.count(count) for name, count in counts.items()}}


def _note_uvloop(result: Result) -> None:
    if "shardq-uvloop" in result.samples:
        times = result.median("shardq-uvloop") / result.median("shardq")
        result.figures["uvloop"] = round(times, 3)
        result.notes.append(f"shardq's worker and producer on uvloop: {times:.2f} times as fast with `handler`.")


# -- the sides -----------------------------------------------------------------------------------------------


def shardq_side(options: Options, name: str, count: int, environment: dict[str, str], what: str) -> Side:
    path = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH")]))
    program = Program(SHARDQ, environment={**environment, "PYTHONPATH": path})
    return Side(name, what, _round_of(program, options.count(count), partial(_cluster_url, options)))


def _shardq_sides(options: Options) -> list[Side]:
    each, lists = SHARDQ_MESSAGES["handler"], SHARDQ_MESSAGES["batch_handler"]
    sides = [
        shardq_side(options, "shardq", each, {}, "send_many; Worker, @worker.handler"),
        shardq_side(options, "shardq-batch_handler", lists, {"LISTS": "1"}, "send_many; Worker, @worker.batch_handler"),
    ]
    try:
        uvloop = {"UVLOOP": "1", "PYTHONPATH": environments.packages_of("shardq")}
    except UsageError:
        return sides  # uvloop can't be installed here, and shardq does without it
    return [*sides, shardq_side(options, "shardq-uvloop", each, uvloop, "send_many; @worker.handler; on uvloop")]


async def _fastest(peer: Peer, options: Options, say: Say) -> Side:
    """The peer with the fastest of its settings, each tried once."""
    rates = {}
    for setting in peer.settings:
        rates[setting] = await _peer_side(peer, setting, options).run()
        say(f"  {peer.name} with {setting}: {rates[setting]:,.0f}")
    return _peer_side(peer, max(rates, key=lambda setting: rates[setting]), options)


def _peer_side(peer: Peer, setting: str, options: Options) -> Side:
    environment = {"PYTHONPATH": "", "SETTING": setting}
    program = Program(f"benchmarks.peers.{peer.name}", python_of(peer.name), environment)
    serve = _nats_url if peer.name == "nats" else partial(_plain_url, options)
    return Side(peer.name, peer.what.format(setting), _round_of(program, options.count(peer.messages), serve))


def _round_of(program: Program, count: int, serve: Callable[[], Url]) -> Callable[[], Awaitable[float]]:
    async def run() -> float:
        with serve() as url:
            return await one_round(program, url, count)

    return run


def why_not(peer: Peer, options: Options, say: Say) -> str:
    """Why this peer can't run here; empty when it can."""
    if peer.name == "nats" and shutil.which("nats-server") is None:
        return "there is no nats-server on PATH"
    if peer.name == "chasquimq" and not knows_idmp(server := harness.server_version(options.server)):
        return f"it needs Redis 8.6 or newer (XADD with IDMP), and this is {server}"
    say(f"  environment of {peer.name}")
    try:
        python_of(peer.name)
    except UsageError as error:
        return str(error)
    return ""


def knows_idmp(server: str) -> bool:
    kind, version = server.split()
    return kind == "Redis" and tuple(int(part) for part in version.split(".")[:2]) >= (8, 6)


# -- their servers -------------------------------------------------------------------------------------------


@contextmanager
def _cluster_url(options: Options) -> Iterator[str]:
    with harness.cluster(options) as cluster:
        yield cluster.url


@contextmanager
def _plain_url(options: Options) -> Iterator[str]:
    """One server without cluster mode, otherwise with the settings that a cluster's have."""
    (port,) = free_ports(HOST, 1)
    with tempfile.TemporaryDirectory(prefix="shardq-pipeline-") as folder:
        settings = {**harness.SERVER_SETTINGS, "cluster-enabled": "no"}
        server = LocalServer(Path(options.server), port, Path(folder), "", settings)
        try:
            server.launch()
            server.wait_until_answering(time.monotonic() + READY_WITHIN_S)
            yield f"redis://{HOST}:{port}"
        finally:
            server.kill()


@contextmanager
def _nats_url() -> Iterator[str]:
    (port,) = free_ports(HOST, 1)
    with tempfile.TemporaryDirectory(prefix="shardq-pipeline-") as folder:
        command = ["nats-server", "--jetstream", "--store_dir", folder, "--addr", HOST, "--port", str(port)]
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=partial(die_with_parent, os.getpid()))
        try:
            _wait_for(port)
            yield f"nats://{HOST}:{port}"
        finally:
            server.kill()
            server.wait()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        try:
            socket.create_connection((HOST, port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise StoreUnavailable(f"nats-server does not listen on port {port}: start it by hand and read what it says")


def _nats_version() -> str:
    said = subprocess.run(["nats-server", "--version"], capture_output=True, text=True, check=True).stdout
    return said.split()[-1].removeprefix("v")
