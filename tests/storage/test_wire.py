"""How shardq reads what comes on a connection of redis-py's, from a server that says whatever the test wants."""

from __future__ import annotations

import asyncio
import gc
import importlib
import ssl
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trustme
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import Connection, SSLConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, ResponseError

from shardq.storage.cluster import Cluster
from shardq.storage.commands import Packed, pack_command
from shardq.storage.wire import Room, Wire
from tests.security.tls import make_files

pytestmark = pytest.mark.anyio

PING = pack_command("PING")
CLOSE = b"<close>"


@asynccontextmanager
async def connected(*parts: bytes, room: int = 1024) -> AsyncIterator[tuple[Connection, Wire]]:
    """To a server that answers the first command with these parts, a moment between them, later ones with +PONG."""

    rest = list(parts)
    answering: list[asyncio.Task[Any] | None] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.append(asyncio.current_task())
        try:
            await speak(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1000):
            said, rest[:] = list(rest) or [b"+PONG\r\n"], []
            for part in said:
                if part == CLOSE:
                    return
                writer.write(part)
                await asyncio.sleep(0.005)

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    # Nothing is asked when it connects.
    connection = Connection(host="127.0.0.1", port=port, protocol=2, driver_info=None)
    await connection.connect()
    try:
        yield connection, Wire.of(connection, Room(room))
    finally:
        await connection.disconnect()
        server.close()
        await server.wait_closed()
        await asyncio.gather(*filter(None, answering), return_exceptions=True)


def until(count: int, heard: list[Any]) -> Callable[[Any], bool]:
    def hear(reply: Any) -> bool:
        heard.append(reply)
        return len(heard) == count

    return hear


async def test_replies_come_whole_however_they_are_cut() -> None:
    heard: list[Any] = []
    async with connected(b"$5\r\nab", b"cde\r\n:7\r", b"\n*2\r\n+x\r\n$-1\r\n") as (_, wire):
        await wire.read(until(3, heard), [PING], 30.0)
    assert heard == [b"abcde", 7, [b"x", None]]


async def test_a_reply_larger_than_the_room() -> None:
    heard: list[Any] = []
    async with connected(b"$100000\r\n" + b"y" * 100_000 + b"\r\n", room=100) as (_, wire):
        await wire.read(until(1, heard), [PING], 30.0)
    assert heard == [b"y" * 100_000]


async def test_an_error_of_redis_is_a_reply() -> None:
    heard: list[Any] = []
    async with connected(b"-ERR no\r\n+OK\r\n") as (_, wire):
        await wire.read(until(2, heard), [PING], 30.0)
    assert isinstance(heard[0], ResponseError)
    assert heard[1] == b"OK"


async def test_the_connection_is_as_it_was_afterwards() -> None:
    heard: list[Any] = []
    async with connected(b"+OK\r\n") as (connection, wire):
        for _ in range(3):
            assert wire.is_clean()
            await wire.read(until(1, []), [PING], 30.0)
            await connection.send_packed_command(PING, check_health=False)
            heard.append(await connection.read_response())
    assert heard == [b"PONG"] * 3


@pytest.mark.parametrize(
    "parts", [(CLOSE,), (b"$5\r\nab", CLOSE), (b"-LOADING x\r\n",), (b"-ERR max number of clients reached\r\n",)]
)
async def test_a_connection_that_ends_or_says_goodbye_is_closed(parts: tuple[bytes, ...]) -> None:
    async with connected(*parts) as (connection, wire):
        with pytest.raises(RedisConnectionError):
            await wire.read(until(1, []), [PING], 30.0)
        assert not connection.is_connected
        assert not wire.late


async def test_what_is_no_reply_closes_the_connection() -> None:
    async with connected(b"HTTP/1.1 400\r\n") as (connection, wire):
        with pytest.raises(InvalidResponse):
            await wire.read(until(1, []), [PING], 30.0)
        assert not connection.is_connected


async def test_an_answer_that_is_late_breaks_the_connection_off() -> None:
    async with connected(b"") as (connection, wire):
        with pytest.raises(RedisConnectionError):
            await wire.read(until(1, []), [PING], 0.02)
        assert wire.late
        assert not connection.is_connected
        await connection.connect()
        heard: list[Any] = []
        await wire.read(until(1, heard), [PING], 30.0)  # a longer limit than the one before
        assert not wire.late


async def test_a_shorter_limit_than_the_one_before_holds() -> None:
    async with connected(b"+OK\r\n") as (_, wire):
        await wire.read(until(1, []), [PING], 3600.0)
        with pytest.raises(RedisConnectionError):
            await asyncio.wait_for(wire.read(lambda _: False, [PING], 0.02), 30.0)
        assert wire.late


async def test_a_reading_without_a_limit_is_not_broken_off_by_the_one_before() -> None:
    async with connected(b"+OK\r\n") as (connection, wire):
        await wire.read(until(1, []), [PING], 0.05)
        reading = asyncio.create_task(wire.read(lambda _: False))
        done, _ = await asyncio.wait([reading], timeout=0.2)
        assert not done
        assert connection.is_connected
        reading.cancel()
        await asyncio.wait([reading])


async def test_who_is_cancelled_leaves_no_late_reply_to_others() -> None:
    async with connected(b"") as (connection, wire):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wire.read(until(1, []), [PING], 30.0), 0.02)
        assert not connection.is_connected


async def test_what_the_listener_raises_closes_the_connection() -> None:
    def hear(_: Any) -> bool:
        raise LookupError

    async with connected(b"+OK\r\n") as (connection, wire):
        with pytest.raises(LookupError):
            await wire.read(hear, [PING], 30.0)
        assert not connection.is_connected


async def test_what_came_unasked_makes_a_connection_unclean() -> None:
    async with connected(b"+OK\r\n+unasked\r\n") as (_, wire):
        await wire.read(until(1, []), [PING], 30.0)
        assert not wire.is_clean()


async def test_nothing_of_a_reading_is_kept_once_it_is_over() -> None:
    class Sent:
        def hear(self, _: Any) -> bool:
            return True

    async with connected(b"+OK\r\n") as (connection, wire):
        sent = Sent()
        await wire.read(sent.hear, [PING], 30.0)
        seen = weakref.ref(sent)
        del sent
        gc.collect()
        assert seen() is None
        assert connection.is_connected


async def test_what_comes_behind_the_last_reply_is_handed_to_nobody() -> None:
    heard: list[Any] = []
    async with connected(b"+OK\r\n") as (_, wire):

        def hear(reply: Any) -> bool:
            heard.append(reply)
            asyncio.get_running_loop().call_soon(come, b"+late\r\n")  # before the reading task has its turn
            return True

        def come(data: bytes) -> None:
            wire.get_buffer(-1)[: len(data)] = data
            wire.buffer_updated(len(data))

        await wire.read(hear, [PING], 30.0)
        assert heard == [b"OK"]
        assert not wire.is_clean()


async def test_a_limit_that_passes_as_the_last_reply_comes_breaks_nothing_off() -> None:
    async with connected(b"+OK\r\n") as (_, wire):

        def hear(_: Any) -> bool:
            asyncio.get_running_loop().call_soon(pass_by)
            return True

        def pass_by() -> None:
            wire._alarm._moment_s = 0.0
            wire._alarm._look()

        await wire.read(hear, [PING], 30.0)
        assert not wire.late
        assert wire.is_clean()


async def test_a_connection_that_ended_before_it_was_read_ends_the_reading_at_once() -> None:
    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(close, "127.0.0.1", 0)
    connection = Connection(host="127.0.0.1", port=server.sockets[0].getsockname()[1], protocol=2, driver_info=None)
    await connection.connect()
    stream: Any = connection._reader
    assert await asyncio.wait_for(stream.read(1), 30) == b""
    with pytest.raises(RedisConnectionError):
        await asyncio.wait_for(Wire.of(connection, Room(100)).read(lambda _: True), 30)  # which has no limit itself
    assert not connection.is_connected
    server.close()
    await server.wait_closed()


async def test_who_is_cancelled_while_it_connects_leaves_no_reply_due() -> None:
    asked = asyncio.Event()

    async def be_slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        asked.set()
        await reader.read(1000)
        writer.close()

    server = await asyncio.start_server(be_slow, "127.0.0.1", 0)
    node = ClusterNode("127.0.0.1", server.sockets[0].getsockname()[1], password="secret", protocol=2, driver_info=None)
    cluster = Cluster("redis://127.0.0.1:7000")
    call = asyncio.create_task(cluster.exchange(node, [Packed(PING)]))
    await asyncio.wait_for(asked.wait(), 30)  # AUTH was sent and is not answered
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    connection = node.acquire_connection()
    assert not connection.is_connected
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_other_event_loops_and_tls(loop: str, tls: bool, debug: bool, tmp_path: Path) -> None:
    factory = None if loop == "asyncio" else importlib.import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory, debug=debug) as runner:
        runner.run(_read_it_all(_certificate(tmp_path) if tls else None))


def _certificate(folder: Path) -> tuple[ssl.SSLContext, str]:
    """A server's side, and the file by which it is known."""
    made = make_files(folder, "server", trustme.CA(), "127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, made.key)
    return context, str(made.authority)


async def _read_it_all(tls: tuple[ssl.SSLContext, str] | None) -> None:
    """Replies of every size in turn on one connection, then its end in the middle of one."""
    sizes = [0, 1, 100, 16_384, 70_000, 300_000, 5]
    talks: list[asyncio.Task[Any] | None] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.append(asyncio.current_task())
        for size in sizes:
            await reader.readuntil(PING)
            writer.write(b"*2\r\n$-1\r\n$%d\r\n%b\r\n" % (size, b"y" * size))
        await reader.readuntil(PING)
        writer.write(b"$100\r\nab")
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0, ssl=tls[0] if tls else None)
    port = server.sockets[0].getsockname()[1]
    kind: Any = SSLConnection if tls else Connection
    more = {"ssl_ca_certs": tls[1], "ssl_check_hostname": False} if tls else {}
    connection = kind(host="127.0.0.1", port=port, protocol=2, driver_info=None, **more)
    wire = Wire.of(connection, Room(1024))
    await connection.connect()
    for size in sizes:
        heard: list[Any] = []
        assert wire.is_clean()
        await wire.read(until(1, heard), [PING], 30.0)
        assert heard == [[None, b"y" * size]]
    with pytest.raises(RedisConnectionError):
        await wire.read(until(1, []), [PING], 30.0)
    assert not wire.late
    assert not connection.is_connected
    server.close()
    await server.wait_closed()
    await asyncio.gather(*filter(None, talks), return_exceptions=True)
