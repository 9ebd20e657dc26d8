"""TLS with certificates on both sides: everything works, and what does not fit is one clear error, at once."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

import shardq
from shardq.cli.app import run
from shardq.errors import StoreUnavailable, TlsFailed, UsageError
from shardq.ops.exporter import serve_metrics
from shardq.ops.local_cluster import LocalCluster
from tests.runtime.harness import GROUP, drained, running, until
from tests.security.tls import HOST, Files, make_files, speaks_tls, tls_cluster

# Debian's server speaks TLS; the wheels of the two other kinds are built without.
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis7")]

ANOTHER_NAME = "127.1"  # the same address, by a name that no certificate has


@dataclass(frozen=True)
class Lab:
    ports: list[int]
    ours: Files
    theirs: Files  # of an authority that nobody here trusts
    folder: Path

    def url(self, query: str, host: str = HOST) -> str:
        return f"rediss://{host}:{self.ports[0]}?{query}"


@pytest.fixture(scope="module")
def lab(server_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    assert speaks_tls(server_binary)
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    ours = make_files(folder, "ours", authority, HOST)  # an IP: the nodes announce theirs
    theirs = make_files(folder, "theirs", trustme.CA(), HOST)
    with tls_cluster(server_binary, folder, ours) as ports:
        yield Lab(ports, ours, theirs, folder)


async def test_everything_speaks_tls(lab: Lab, queue_name: str) -> None:
    """Declaring, sending (also from a thread), handling, bells, broadcasts, replicas' WAIT, the exporter."""
    url = lab.url(lab.ours.query())
    worker = shardq.Worker(queue_name, group=GROUP)
    seen: list[object] = []

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        seen.append(message.value)

    def send_from_a_thread() -> None:
        with shardq.SyncProducer(url, queue_name) as producer:
            producer.send("from a thread")

    async with shardq.connect(url) as client:
        queue = await client.queue(queue_name, shards=6)
        async with running(client, worker), queue.producer(durability="replica") as producer:
            await producer.send("x", key="k")
            await anyio.to_thread.run_sync(send_from_a_thread)
            await until(lambda: drained(queue), 20, "an empty backlog")
        assert sorted(map(str, seen)) == ["from a thread", "x"]
        async with client.listen("tea", patterns=["news:*"]) as notices:
            await client.broadcast("tea", 1)
            await client.broadcast("news:x", 2)
            got = [await anext(notices) for _ in range(2)]
        assert sorted(notice.value for notice in got if isinstance(notice, shardq.Notice)) == [1, 2]
        await scrape(client, queue_name)
    assert lab_has_no_plain_port(lab)


async def scrape(client: shardq.Client, queue_name: str) -> None:
    told: list[str] = []
    async with anyio.create_task_group() as tasks:

        async def serve() -> None:
            await serve_metrics(client, 0, on_listening=told.append)

        tasks.start_soon(serve)
        await until(lambda: bool(told), 10, "the exporter")
        assert told[0].startswith("http://127.0.0.1:"), "nobody outside this machine is let in unasked"
        text = await anyio.to_thread.run_sync(lambda: urllib.request.urlopen(told[0], timeout=10).read().decode())
        assert f'shardq_queue_up{{queue="{queue_name}"}} 1.0' in text
        tasks.cancel_scope.cancel()


def lab_has_no_plain_port(lab: Lab) -> bool:
    return all("port 0\n" in (lab.folder / str(port) / "server.conf").read_text() for port in lab.ports)


async def test_a_command_takes_the_same_url(lab: Lab, queue_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = lab.url(lab.ours.query())
    command = ["queue", "create", queue_name, "--shards", "2", "--url", url]
    assert await anyio.to_thread.run_sync(run, command) == 0, capsys.readouterr().err


async def fails(url: str, within_s: float = 10) -> BaseException:
    """What connecting raises. Fails the test when it hangs."""
    with anyio.fail_after(within_s), pytest.raises(shardq.ShardqError, match=r"\A[^\n]+\Z") as raised:
        async with shardq.connect(url):
            pass
    return raised.value


async def test_another_authority_is_refused(lab: Lab) -> None:
    error = await fails(lab.url(f"ssl_ca_certs={lab.theirs.authority}"))
    assert isinstance(error, TlsFailed)
    assert "certificate of" in str(error)
    assert "ssl_ca_certs" in str(error)


async def test_without_naming_the_authority_it_is_the_systems(lab: Lab) -> None:
    error = await fails(lab.url(f"ssl_certfile={lab.ours.certificate}&ssl_keyfile={lab.ours.key}"))
    assert isinstance(error, TlsFailed)
    assert "ssl_ca_certs" in str(error)


async def test_no_certificate_of_the_client_is_refused(lab: Lab) -> None:
    error = await fails(lab.url(f"ssl_ca_certs={lab.ours.authority}"))
    assert isinstance(error, TlsFailed)
    assert "client certificate" in str(error)
    assert "ssl_certfile" in str(error)


async def test_a_certificate_of_another_authority_is_refused(lab: Lab) -> None:
    files = Files(lab.ours.authority, lab.theirs.certificate, lab.theirs.key)
    error = await fails(lab.url(files.query()))
    assert isinstance(error, TlsFailed)
    assert "client certificate" in str(error)


async def test_a_host_that_the_certificate_does_not_name_is_refused(lab: Lab) -> None:
    error = await fails(lab.url(lab.ours.query(), host=ANOTHER_NAME))
    assert isinstance(error, TlsFailed)
    assert ANOTHER_NAME in str(error)
    async with shardq.connect(lab.url(lab.ours.query() + "&ssl_check_hostname=false", host=ANOTHER_NAME)):
        pass


async def test_plain_to_tls_is_refused(lab: Lab) -> None:
    error = await fails(f"redis://{HOST}:{lab.ports[0]}")
    assert isinstance(error, StoreUnavailable)
    assert "rediss://" in str(error)


async def test_tls_to_plain_is_refused(lab: Lab, cluster: LocalCluster) -> None:
    error = await fails(f"rediss://{HOST}:{cluster.ports[0]}?{lab.ours.query()}")
    assert isinstance(error, shardq.StoreError)


def test_a_command_says_it_in_one_line(lab: Lab) -> None:
    command = [
        sys.executable,
        "-m",
        "shardq",
        "queue",
        "list",
        "--url",
        lab.url(f"ssl_ca_certs={lab.theirs.authority}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: the certificate of ")


# -- what is wrong before anything is connected to --------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("files"), "ours", trustme.CA(), HOST)


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("ssl_ca_certs=/no/such/file", "the CA file /no/such/file of the URL can't be used"),
        ("ssl_ca_certs={key}", "can't be used"),
        ("ssl_certfile={certificate}&ssl_keyfile=/no/such/key", "/no/such/key can't be used"),
        ("ssl_certfile={authority}&ssl_keyfile={key}", "can't be used"),
        ("ssl_keyfile={key}", "ssl_keyfile without ssl_certfile"),
        ("ssl_check_hostname=perhaps", "ssl_check_hostname is true or false"),
        ("ssl_cert_reqs=none", "nothing else"),
        ("decode_responses=1", "nothing else"),
    ],
)
async def test_files_and_options_are_checked_first(files: Files, query: str, says: str) -> None:
    names = {"key": files.key, "certificate": files.certificate, "authority": files.authority}
    with pytest.raises(UsageError, match=says):
        shardq.connect(f"rediss://127.0.0.1:1?{query.format(**names)}")


async def test_an_encrypted_key_does_not_wait_for_its_password(files: Files, tmp_path: Path) -> None:
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
        )
    )
    with pytest.raises(UsageError, match="the key is encrypted"):
        shardq.connect(f"rediss://127.0.0.1:1?ssl_certfile={files.certificate}&ssl_keyfile={locked}")


async def test_options_of_tls_need_tls() -> None:
    with pytest.raises(UsageError, match="write rediss://"):
        shardq.connect("redis://127.0.0.1:1?ssl_ca_certs=x")
