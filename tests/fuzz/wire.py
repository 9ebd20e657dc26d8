"""A node that answers any bytes: what the parser makes of them, through Cluster.exchange. Opens no socket."""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace
from typing import Any, cast

from redis._parsers.base import BaseParser
from redis.asyncio.cluster import ClusterNode

from shardq.storage.cluster import Cluster
from shardq.storage.commands import Packed, confirm_fsync, confirm_replicas, pack_command
from shardq.storage.trouble import Trouble


class _Transport:
    """Stands for the socket: answers what is written with what it was given, then breaks off."""

    def __init__(self, answer: bytes) -> None:
        self.protocol: Any = asyncio.Protocol()
        self._answer = answer

    def writelines(self, _: object) -> None:
        count = len(self._answer)
        self.protocol.get_buffer(-1)[:count] = self._answer
        self.protocol.buffer_updated(count)
        self.protocol.eof_received()

    def get_protocol(self) -> Any:
        return self.protocol

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_extra_info(self, _: str) -> Any:
        return SimpleNamespace(fileno=lambda: 0)

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        pass


class _Connection:
    is_connected = False

    def __init__(self, answer: bytes) -> None:
        self._writer = SimpleNamespace(transport=_Transport(answer))
        self._parser = SimpleNamespace(parse_error=BaseParser.parse_error)

    async def connect(self) -> None:
        pass

    async def disconnect(self, **_: Any) -> None:
        pass


class _Node:
    name = "127.0.0.1:7000"

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def acquire_connection(self) -> _Connection:
        return _Connection(self._answer)

    def release(self, _: object) -> None:
        pass


_CLUSTER = Cluster("redis://127.0.0.1:7000")
_CALL = pack_command("PING")
_CALLS = (
    [Packed(_CALL), Packed(_CALL, True)],
    [Packed(_CALL, False, confirm_replicas(1))],
    [Packed(_CALL, False, confirm_fsync(1))],
)
_RUNNER = asyncio.Runner()

WIRE_SEEDS = [
    b"+OK\r\n+OK\r\n:1\r\n",
    b"-MOVED 5 127.0.0.1:7001\r\n-ASK 5 127.0.0.1:7001\r\n-ASK 5 :7001\r\n",
    b"-CLUSTERDOWN x\r\n-TRYAGAIN x\r\n-OOM x\r\n-NOPERM x\r\n-READONLY x\r\n-ERR Function not found\r\n",
    b"*2\r\n$1\r\na\r\n*-1\r\n*2\r\n:1\r\n:1\r\n$-1\r\n",
]


# hiredis makes room for an array when it has read its length.
_LONG_ARRAY = re.compile(rb"[*%~>]\s*\+?0*\d{6}")


def converse(data: bytes) -> None:
    """Every call has a reply or a Trouble whose error is ours."""
    if _LONG_ARRAY.search(data):
        return
    for calls in _CALLS:
        node = cast("ClusterNode", _Node(data))
        replies = _RUNNER.run(_CLUSTER.exchange(node, calls))
        assert len(replies) == len(calls)
        assert all(not isinstance(reply, BaseException) for reply in replies)
        for reply in replies:
            if isinstance(reply, Trouble):
                str(reply.error)
