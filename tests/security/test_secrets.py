"""Passwords, user names and payloads are in no error, cause, traceback, log line, output, metric or list of processes,
whichever way a call fails."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import anyio
import pytest

import shardq
from shardq.cli.app import run
from shardq.ops.exporter import QueueReader
from shardq.ops.queue_metrics import _of_groups, _of_shards
from shardq.storage.acl import Wanted
from shardq.storage.commands import pack_command
from tests.cli.support import commands
from tests.cli.support import until as until_sync
from tests.runtime.harness import GROUP, drained, running, until
from tests.security.users import PASSWORD, Users, users

pytestmark = pytest.mark.anyio

PAYLOAD = "canary-payload"
USER = "canary-user"
WRONG = "canary-wrong-password"
SECRETS = (PASSWORD, PAYLOAD, USER, WRONG)
QUEUE = "orders"


@pytest.fixture(scope="module")
def known(server_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Users]:
    with users(server_binary, tmp_path_factory.mktemp("secrets")) as found:
        found.add(USER, Wanted("operator"), "~*", "+@all")
        found.add(f"{USER}-sends", Wanted("producer", [QUEUE]), "-xadd", "-zadd")
        found.load()
        yield found


def told(error: BaseException) -> str:
    """All that anybody could print of an error: its texts and those of what it came from."""
    parts = [*traceback.format_exception(error), str(error), repr(error), repr(error.args)]
    context = None if error.__suppress_context__ else error.__context__  # what no traceback and no logger follows
    under = (error.__cause__, context, *getattr(error, "exceptions", ()))
    return "\n".join([*parts, *(told(each) for each in under if each is not None)])


# -- ways to fail -----------------------------------------------------------------------------------------------------

Way = Callable[[Users], Awaitable[object]]


def connecting(make_url: Callable[[Users], str]) -> Way:
    async def fail(known: Users) -> None:
        async with shardq.connect(make_url(known)):
            pass

    return fail


def from_a_thread(make_url: Callable[[Users], str]) -> Way:
    def send(url: str) -> None:
        with shardq.SyncProducer(url, QUEUE) as producer:
            producer.send(PAYLOAD)

    async def fail(known: Users) -> None:
        await anyio.to_thread.run_sync(send, make_url(known))

    return fail


def sending(prepare: list[tuple[str, ...]], undo: list[tuple[str, ...]], user: str = USER, **options: object) -> Way:
    """Sends the payload after every node was told something; `STREAM` and `META` stand for the shard's keys."""

    async def fail(known: Users) -> None:
        async with shardq.connect(known.url(USER)) as operator:
            (shard,) = (await operator.queue(QUEUE, shards=1)).shards.values()

        def tell(commands: list[tuple[str, ...]]) -> None:
            names = {"STREAM": shard.stream, "META": shard.meta, "TIMED": shard.timed}
            for port in known.cluster.ports:
                for command in commands:
                    known.ask("admin", *(names.get(part, part) for part in command), port=port)

        await anyio.to_thread.run_sync(tell, prepare)
        try:
            async with shardq.connect(known.url(user)) as client:
                queue = await client.queue(QUEUE)
                async with queue.producer(delivery_timeout=0.5) as producer:
                    await producer.send(PAYLOAD, headers={"h": PAYLOAD}, **options)  # type: ignore[arg-type]  # a table's
        finally:
            await anyio.to_thread.run_sync(tell, undo)

    return fail


def refusing(value: object) -> Way:
    async def fail(known: Users) -> None:
        async with shardq.connect(known.url(USER)) as client:
            queue = await client.queue(QUEUE, shards=1)
            async with queue.producer(max_message_bytes=1000) as producer:
                await producer.send(value)

    return fail


def asking(*command: str) -> Way:
    async def fail(known: Users) -> None:
        async with shardq.connect(known.url(USER)) as client:
            await client.pipes.command(0, pack_command(*command))

    return fail


async def after_closing(known: Users) -> None:
    client = shardq.connect(known.url(USER))
    async with client:
        queue = await client.queue(QUEUE, shards=1)
        async with queue.producer() as producer:
            pass
    await producer.send(PAYLOAD)


class Unpackable:
    def __repr__(self) -> str:
        return PAYLOAD


FRESH: list[tuple[str, ...]] = [("DEL", "STREAM", "META", "TIMED")]
WAYS: dict[str, Way] = {
    "wrong password": connecting(lambda known: known.url(USER).replace(PASSWORD, WRONG)),
    "wrong user": connecting(lambda known: known.url(f"{USER}-nobody")),
    "wrong password, thread": from_a_thread(lambda known: known.url(USER).replace(PASSWORD, WRONG)),
    "nobody listens": connecting(lambda known: f"redis://{USER}:{PASSWORD}@127.0.0.1:1"),
    "no such host": connecting(lambda known: f"redis://{USER}:{PASSWORD}@no.such.host.invalid:1"),
    "a slash in the password": connecting(lambda known: f"redis://{USER}:{PASSWORD}/x@127.0.0.1:1"),
    "a hash in the password": connecting(lambda known: f"redis://{USER}:{PASSWORD}#x@127.0.0.1:1"),
    "a question mark in the password": connecting(lambda known: f"redis://{USER}:{PASSWORD}?x=1@127.0.0.1:1"),
    "brackets in the password": connecting(lambda known: f"redis://{USER}:[{PASSWORD}@127.0.0.1:1"),
    "the password for a port": connecting(lambda known: f"redis://127.0.0.1:{PASSWORD}"),
    "the password for a scheme": connecting(lambda known: f"{PASSWORD}://127.0.0.1:1"),
    "the password alone": connecting(lambda known: PASSWORD),
    "an unknown option": connecting(lambda known: f"rediss://{USER}:{PASSWORD}@127.0.0.1:1?password={WRONG}"),
    "TLS to a plain port": connecting(lambda known: known.url(USER).replace("redis:", "rediss:")),
    "WRONGTYPE": sending([*FRESH, ("SET", "STREAM", PAYLOAD), ("HSET", "META", "state", "open")], FRESH),
    "meta of another type": sending([*FRESH, ("SET", "META", PAYLOAD)], FRESH),
    "a number that is none": sending([*FRESH, ("HSET", "META", "state", "open", "appended", PAYLOAD)], FRESH),
    "NOPERM": sending([], [], f"{USER}-sends"),
    "NOPERM, delayed": sending([], [], f"{USER}-sends", delay=1000),
    "OOM": sending([("CONFIG", "SET", "maxmemory", "1")], [("CONFIG", "SET", "maxmemory", "0")]),
    "unknown command": asking("NOSUCH", PAYLOAD, PASSWORD),
    "syntax": asking("WAIT", PAYLOAD, PAYLOAD),
    "no number": asking("CLUSTER", "KEYSLOT", PAYLOAD, PAYLOAD),
    "unknown subcommand": asking("CLUSTER", PAYLOAD),
    "too large": refusing(PAYLOAD * 1000),
    "not a value": refusing({"x": Unpackable()}),
    "surrogates": refusing(PAYLOAD + "\udcff"),
    "surrogates within": refusing({"x": [PAYLOAD + "\udcff"]}),
    "closed": after_closing,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
async def test_a_failure_tells_no_secret(
    known: Users, way: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(shardq.ShardqError) as raised:
        await WAYS[way](known)
    printed = capfd.readouterr()
    everything = "\n".join([told(raised.value), caplog.text, printed.out, printed.err])
    assert [secret for secret in SECRETS if secret in everything] == [], everything


# -- handling ---------------------------------------------------------------------------------------------------------


async def test_a_worker_in_trouble_tells_no_payload(known: Users, caplog: pytest.LogCaptureFixture) -> None:
    """A handler that raises, an effect that is refused, a message that can't be read; and what is measured of it."""
    worker = shardq.Worker("told", group=GROUP, retry=shardq.Retry(attempts=2, base=0.02))

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        if message.key == "raises":
            raise ValueError("no")
        async with message.atomic() as tx:
            tx.set(message.local_key("x"), PAYLOAD)
            tx.incrby(message.local_key("x"), 1)

    with caplog.at_level(logging.DEBUG):
        async with shardq.connect(known.url(USER)) as client:
            queue = await client.queue("told", shards=1)
            (shard,) = queue.shards.values()
            async with running(client, worker), queue.producer() as producer:
                await producer.send(PAYLOAD, key="raises", headers={"h": PAYLOAD})
                await producer.send(PAYLOAD, key="effect")
                raw = pack_command(
                    "XADD", shard.stream, "*", "at", "2", "batch", b"\x01\x00\x00\x01" + PAYLOAD.encode()
                )
                await client.pipes.command(shard.slot, raw)
                await until(lambda: dead(queue, 3), 20, "three dead letters")
                await until(lambda: drained(queue), 20, "an empty backlog")
            snapshot = await QueueReader(client, 1.0).snapshot()
            shown = repr((client, client.cluster, queue, producer, worker, snapshot))
    metrics = repr([*_of_shards(snapshot.queues.values()), *_of_groups(snapshot.queues.values())])
    assert "told" in metrics
    assert "dead letter" in caplog.text
    everything = caplog.text + shown + metrics
    assert [secret for secret in SECRETS if secret in everything] == [], everything


async def dead(queue: shardq.Queue, count: int) -> bool:
    return len([letter async for letter in queue.dead_letters(GROUP)]) == count


# -- commands ---------------------------------------------------------------------------------------------------------

# What servers of each kind say in their errors is above; what is below does not come from servers.
only_one_kind = pytest.mark.server_kinds("valkey9")


@only_one_kind
def test_commands_print_no_secret(known: Users, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDQ_URL", known.url(USER))
        for command in (
            ["queue", "create", "shown", "--shards", "1", "--json"], ["queue", "show", "shown", "--json"],
            ["queue", "list", "--json"], ["status", "--json"], ["install", "--json"], ["install", "--help"],
            ["group", "list", "shown", "--json"], ["status", "absent"], ["acl", "exporter", "--json"],
        ):  # fmt: skip
            run(command)
        patch.setenv("SHARDQ_URL", known.url(USER).replace(PASSWORD, WRONG))
        assert run(["status"]) == 1
        for line in (f'{{"a": "{PAYLOAD}"', f"{PAYLOAD}", f'{{"k": ["{PAYLOAD}"]}}'):
            done = subprocess.run(
                [sys.executable, "-m", "shardq", "produce", "shown", "--key", "k"],
                input=f"{line}\n", capture_output=True, text=True, timeout=60, check=False,
                env={**os.environ, "SHARDQ_URL": known.url(USER)},
            )  # fmt: skip
            assert done.returncode == 1, done
            assert not [secret for secret in SECRETS if secret in done.stdout + done.stderr], done
    printed = capfd.readouterr()
    assert "shown" in printed.out
    assert not [secret for secret in SECRETS if secret in printed.out + printed.err], printed


@only_one_kind
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_url_is_no_argument_of_a_child(known: Users, tmp_path: Path) -> None:
    module = "import shardq\nworker = shardq.Worker('children', group='g', shards=1)\n\n"
    (tmp_path / "child.py").write_text(module + "@worker.handler\nasync def handle(message):\n    pass\n")
    with commands(tmp_path) as start:
        parent = start("work", "child:worker", "--processes", "2", SHARDQ_URL=known.url(USER))
        until_sync(lambda: len(children(parent.process.pid)) == 2, "two children")
        until_sync(lambda: all("child:worker" in line for line in arguments(parent.process.pid)), "their arguments")
        seen = arguments(parent.process.pid)
        parent.stop()
        output = parent.stdout + parent.stderr
    assert len(seen) == 3
    assert not [secret for secret in SECRETS if secret in "".join([*seen, output])]


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for each in found for child in each.read_text().split()]


def arguments(pid: int) -> list[str]:
    return [Path(f"/proc/{each}/cmdline").read_bytes().decode() for each in (pid, *children(pid))]


@only_one_kind
def test_the_exporter_listens_to_this_machine_only(known: Users, tmp_path: Path) -> None:
    with commands(tmp_path) as start:
        exporter = start("exporter", "--port", "0", SHARDQ_URL=known.url(USER))
        until_sync(lambda: "\n" in exporter.stdout, "the exporter's address")
        host, port = exporter.stdout.removeprefix("http://").partition("/")[0].split(":")
        assert host == "127.0.0.1"
        for other in {str(found[4][0]) for found in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}:
            if not other.startswith("127.0.0.1"):
                with pytest.raises(OSError, match="refused"):
                    socket.create_connection((other, int(port)), timeout=5).close()
        assert exporter.stop() == 0
        said = exporter.stdout + exporter.stderr
    assert not [secret for secret in SECRETS if secret in said]
