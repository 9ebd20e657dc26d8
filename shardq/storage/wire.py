"""A connection of redis-py's while shardq itself reads what comes on it: replies are parsed, and handed on, in the very
turn of the event loop in which their bytes come. Connects nothing: topology, TLS and AUTH are redis-py's.

redis-py's own way from the socket to a reply leads over a StreamReader and four coroutines, and takes a turn of the
loop more, for each reply.

Invariants:
- The connection gets its own protocol back when the reading ends. A reading that ended otherwise than by its last
  reply leaves the connection closed, so that no later one can meet a late reply.
- What the connection's writer waits for (flow control, its end) is passed on to its own protocol all the while.
- An answer that is late ends the connection. Its timer moves on by itself: it is not made anew for each reading.
- What comes behind the last reply is parsed by nobody: it makes the connection unclean.
- Nothing of a reading is kept once it is over: an idle connection would hold all that was sent on it.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

import hiredis
from redis.asyncio.connection import Connection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse

from shardq.storage.alarm import NEVER, Alarm

_NOT_ENOUGH = object()
_CLOSED = "Connection closed by server."

Heard = Callable[[Any], bool]


class Room:
    """Where bytes lie between the socket and the parser; one will do for all connections of an event loop."""

    __slots__ = ("data", "view")

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.view = memoryview(self.data)


class Wire(asyncio.BufferedProtocol):
    """The reading side of one connection, which has to be connected whenever it is asked for anything."""

    def __init__(self, connection: Connection, room: Room) -> None:
        self._connection, self._room = connection, room
        self._transport: asyncio.Transport | None = None
        self._own: Any = None  # the connection's own protocol
        self._parser: Any = None
        self._has_left: Callable[[], bool] = bool
        self._poll = select.poll()
        self._heard: Heard | None = None
        self._ended: asyncio.Future[None] | None = None
        self._alarm = Alarm(self._is_late)
        self.limit_s = 0.0
        self.late = False
        self._over = False  # the server had closed it before it was met

    @classmethod
    def of(cls, connection: Connection, room: Room) -> Wire:
        """The one of this connection."""
        wire: Wire | None = connection.__dict__.get("shardq_wire")
        if wire is None:
            wire = connection.__dict__["shardq_wire"] = cls(connection, room)
        return wire

    def _meet(self) -> asyncio.Transport:
        """The transport, which is another one after each connect."""
        connection: Any = self._connection
        transport: asyncio.Transport = connection._writer.transport
        if transport is not self._transport:
            self._transport, self._own = transport, transport.get_protocol()
            self._parser = hiredis.Reader(
                protocolError=InvalidResponse, replyError=connection._parser.parse_error, notEnoughData=_NOT_ENOUGH
            )
            self._has_left = connection._parser._reader.has_data  # of hiredis: redis-py makes it anew at each connect
            self._poll = select.poll()
            self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
            self._loop = asyncio.get_running_loop()  # a system call, up to Python 3.11
            self._over = connection._reader.at_eof()  # of which nobody would be told again
        return transport

    def is_clean(self) -> bool:
        """Whether a connection that lay idle may be written to: what is written to one that the server has closed since
        could not be told from what got lost on its way. No reply is due, so there is nothing to be read but the end."""
        connection: Any = self._connection
        transport = self._meet()
        if self._over or transport.is_closing() or connection.should_reconnect() or self._parser.has_data():
            return False
        stream = connection._reader
        # What redis-py's own `can_read` looks at, two coroutines further.
        if stream._buffer or stream.at_eof() or self._has_left():
            return False
        return not self._poll.poll(0)  # the event loop may not have looked since

    async def read(self, heard: Heard, write: Sequence[bytes] = (), within_s: float = NEVER) -> None:
        """Writes, and calls `heard` for each reply until it says that this was the last one. Errors of Redis are
        replies too. Raises what redis-py does when the connection breaks, and what `heard` raises. When it is not over
        in time the connection is broken off, and `late` is true."""
        transport = self._meet()
        self._heard, self.late, self.limit_s = heard, False, within_s
        ended = self._ended = self._loop.create_future()
        self._alarm.set(monotonic() + within_s)
        transport.set_protocol(self)
        try:
            if self._over or transport.is_closing():
                raise RedisConnectionError(_CLOSED)
            if write:
                transport.writelines(write)  # whoever waits for the answer need not wait for the last byte to leave
            await ended
        except BaseException:
            if not ended.cancel() and not ended.cancelled():
                ended.exception()  # seen
            self._ended = self._heard = None
            self._hand_back(transport)
            await self._connection.disconnect(nowait=True)
            raise
        self._ended = self._heard = None
        transport.set_protocol(self._own)

    def _hand_back(self, transport: asyncio.Transport) -> None:
        # Before the connection is closed: asyncio's TLS transports take no other protocol once they were closed twice,
        # by the other side, say, and then here. Where sending did that, nothing more comes.
        with suppress(AttributeError):
            transport.set_protocol(self._own)

    def _is_late(self) -> None:
        if self._ended is not None and not self._ended.done() and self._transport is not None:
            self.late = True
            self._transport.abort()

    def _end(self, error: BaseException | None = None) -> None:
        ended = self._ended
        if ended is None or ended.done():
            return
        self._heard = None
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    # -- what the transport says -----------------------------------------------------------------------------

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._room.view

    def buffer_updated(self, count: int) -> None:
        parser, heard = self._parser, self._heard
        try:
            parser.feed(self._room.data, 0, count)
            while heard is not None:
                reply = parser.gets()
                if reply is _NOT_ENOUGH:
                    return
                # Errors after which redis-py does not use a connection any more.
                first = reply[0] if type(reply) is list and reply else reply
                if isinstance(first, RedisConnectionError):
                    self._end(first)
                    return
                if heard(reply):
                    self._end()
                    return
        except Exception as error:
            self._end(error)

    def eof_received(self) -> Any:
        self._end(RedisConnectionError(_CLOSED))
        return self._own.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        lost = RedisConnectionError("Connection lost.")
        lost.__cause__ = error
        self._end(lost)
        self._own.connection_lost(error)

    def pause_writing(self) -> None:
        self._own.pause_writing()

    def resume_writing(self) -> None:
        self._own.resume_writing()
