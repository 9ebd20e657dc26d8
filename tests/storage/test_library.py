"""The functions library: its build number keeps up with its source, and every node comes to have it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import pytest
from redis.asyncio.cluster import ClusterNode

import shardq
from shardq.errors import FunctionsMissing, StoreRefused
from shardq.ops.local_cluster import LocalCluster
from shardq.storage import calls
from shardq.storage.functions import BUILD, LIBRARY, library_source
from shardq.storage.nodes import node_command
from tests.storage.rig import Rig, rig

HOST = "127.0.0.1"
PASSWORD = "let-me-in"
# SHA-256 of the library's source without its build number, by build.
DIGEST_OF_BUILD = {
    1: "db15a4971e47bdc13457f3d7c73a7e7eafdbbdec5f0a8c200ece6fac9d33da1e",
    2: "0f444019d5dbf6a04e11e112f102677928ee26d2941b62c54001cefeb6bffc2c",
    3: "427d6d87d494227ae32ae3be7a4f348b77b3ec113b512bdd01e242a9ae452c1b",
    4: "b6ceed2b8a58579c9c1a82eb257e438dcfd8b39e6a72f62da62eded1a029cc93",
    5: "899174d4b93e4db051f32c4e2e10c945f97917f0728de48bf2c5805304afcfa4",
}
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in Path(str(files("shardq.storage"))).glob("**/*.lua")}
REGISTRATION = re.compile(r"redis\.register_function[({].*?shardq_1_(\w+)'")


def test_the_build_rises_with_the_source() -> None:
    source = library_source().replace(f"LIBRARY_BUILD = {BUILD}\n", "")
    digest = sha256(source.encode()).hexdigest()
    assert DIGEST_OF_BUILD.get(BUILD) == digest, (
        f"the .lua files changed: raise BUILD in shardq/storage/functions.py above every build that was released "
        f"(nodes that run an older one get the new one then), and write its digest here: {digest}"
    )
    assert max(DIGEST_OF_BUILD) == BUILD


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_every_script_is_part_of_the_library(name: str) -> None:
    assert SCRIPTS[name] in library_source()


@pytest.mark.parametrize("name", [found[1] for text in SCRIPTS.values() for found in REGISTRATION.finditer(text)])
def test_every_function_says_what_it_takes_and_gives(name: str) -> None:
    (script,) = [text for text in SCRIPTS.values() if f"shardq_1_{name}'" in text]
    comments = re.findall(r"(?:^--.*\n)+", script, re.MULTILINE)
    (header, *_) = [part for part in comments if part.startswith(f"-- {name}:") and "reply" in part] or [""]
    for word in ("KEYS", "ARGV", "reply"):
        assert word in header, f"the comment `-- {name}: ...` of its .lua file must name {word}"


# -- on servers of its own ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_cluster(server_binary: Path) -> Iterator[LocalCluster]:
    """Three masters; here libraries come and go."""
    with LocalCluster(masters=3, port=None, server=server_binary) as cluster:
        yield cluster


def on_every_node(cluster: LocalCluster, *command: str) -> list[object]:
    return [node_command(HOST, port, *command) for port in cluster.ports]


def builds(cluster: LocalCluster) -> list[object]:
    return on_every_node(cluster, "FCALL", f"{LIBRARY}_build", "0")


@pytest.fixture
def limited_url(own_cluster: LocalCluster) -> Iterator[str]:
    """A user who may call functions but not load them, nor run scripts of its own; and no library."""
    rights = ["on", f">{PASSWORD}", "~*", "&*", "+@all", "-function", "-eval", "-evalsha", "-script"]
    on_every_node(own_cluster, "ACL", "SETUSER", "limited", *rights)
    on_every_node(own_cluster, "FUNCTION", "FLUSH")
    yield own_cluster.url.replace("redis://", f"redis://limited:{PASSWORD}@")
    on_every_node(own_cluster, "ACL", "DELUSER", "limited")


@pytest.mark.anyio
async def test_connecting_loads_it_everywhere(own_cluster: LocalCluster) -> None:
    on_every_node(own_cluster, "FUNCTION", "FLUSH")
    async with shardq.connect(own_cluster.url):
        assert builds(own_cluster) == [BUILD] * 3


@pytest.mark.anyio
async def test_a_full_server_takes_no_appends_but_drains(own_cluster: LocalCluster) -> None:
    """Flags decide: allow-oom on what workers need, never on append; readers are fit for replicas."""
    async with shardq.connect(own_cluster.url):
        ((_, _, _, _, _, functions),) = node_command(HOST, own_cluster.ports[0], "FUNCTION", "LIST")
    flags = {dict(zip(item[::2], item[1::2], strict=True))["name"]: item[item.index("flags") + 1] for item in functions}
    by_flag: dict[str, set[str]] = {"allow-oom": set(), "no-writes": set(), "": set()}
    for name, own in flags.items():
        by_flag["".join(own)].add(name.removeprefix(f"{LIBRARY}_"))
    assert {"append", "append_each", "promote", "replay", "declare", "open_shard", "open_group"} <= by_flag[""]
    workers = {"step", "acquire", "release", "offer", "ready", "transfer", "beat", "lead", "resign", "plan", "leave"}
    assert workers | {"tidy", "purge", "pause"} <= by_flag["allow-oom"]
    assert {"inspect", "build"} <= by_flag["no-writes"]


async def append_on_every_node(client: shardq.Client, queue: str, sequence: int) -> list[str]:
    statuses = []
    for slot in (0, 8000, 16383):
        made = Rig(client, f"{queue}-{slot}", slot)
        await calls.open_shard(made.pipes, made.shard)
        statuses.append((await made.append("p", sequence, "a")).status)
    return statuses


@pytest.mark.anyio
async def test_a_node_that_lost_it_gets_it_at_the_next_call(own_cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(own_cluster.url) as client:
        for sequence, port in enumerate(own_cluster.ports, start=1):
            node_command(HOST, port, "FUNCTION", "FLUSH")
            assert await append_on_every_node(client, queue_name, sequence) == ["OK"] * 3
    assert builds(own_cluster) == [BUILD] * 3


@pytest.mark.anyio
@pytest.mark.parametrize(("loaded", "then"), [(BUILD - 1, BUILD), (BUILD + 1, BUILD + 1)])
async def test_connecting_replaces_an_older_build_only(own_cluster: LocalCluster, loaded: int, then: int) -> None:
    other = library_source().replace(f"LIBRARY_BUILD = {BUILD}\n", f"LIBRARY_BUILD = {loaded}\n")
    on_every_node(own_cluster, "FUNCTION", "LOAD", "REPLACE", other)
    assert builds(own_cluster) == [loaded] * 3
    async with shardq.connect(own_cluster.url):
        assert builds(own_cluster) == [then] * 3
    on_every_node(own_cluster, "FUNCTION", "FLUSH")


@pytest.mark.anyio
async def test_a_call_that_an_older_build_refused_is_sent_again_though_another_updated_it(
    own_cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(own_cluster.url, queue_name) as made:
        head = "local function append(keys, args)\n"
        assert head in library_source()
        older = library_source().replace(f"LIBRARY_BUILD = {BUILD}\n", f"LIBRARY_BUILD = {BUILD - 1}\n")
        older = older.replace(head, f"{head}  if true then return misuse('as an older one may') end\n")
        on_every_node(own_cluster, "FUNCTION", "LOAD", "REPLACE", older)
        cluster, asked = made.client.cluster, []
        update = cluster.update_functions

        async def after_another(node: ClusterNode) -> bool:
            on_every_node(own_cluster, "FUNCTION", "LOAD", "REPLACE", library_source())
            asked.append(await update(node))
            return asked[-1]

        monkeypatch.setattr(cluster, "update_functions", after_another)
        assert (await made.append("p", 1, "a")).status == "OK"
        assert asked == [False]


@pytest.mark.anyio
async def test_a_call_that_our_own_build_refuses_fails(own_cluster: LocalCluster, queue_name: str) -> None:
    async with rig(own_cluster.url, queue_name) as made:
        with pytest.raises(StoreRefused, match="please report it"):
            await made.call("append", [])


@pytest.mark.anyio
async def test_who_may_not_load_it_is_told_the_command(limited_url: str, own_cluster: LocalCluster) -> None:
    with pytest.raises(FunctionsMissing, match="shardq install"):
        async with shardq.connect(limited_url):
            raise AssertionError("entered without the functions")
    assert on_every_node(own_cluster, "FUNCTION", "LIST") == [[]] * 3


@pytest.mark.anyio
async def test_who_may_not_load_it_can_use_it(limited_url: str, own_cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(own_cluster.url):
        pass
    async with rig(limited_url, queue_name) as made:
        await made.open_group()
        assert (await made.append("p", 1, "a")).status == "OK"
        on_every_node(own_cluster, "FUNCTION", "FLUSH")
        with pytest.raises(FunctionsMissing, match="shardq install"):
            await made.append("p", 2, "b")
