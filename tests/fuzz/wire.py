"""A node that answers any bytes: what redis-py's parser makes of them, through Cluster.exchange. Opens no socket."""

from __future__ import annotations

import asyncio
import re
from typing import Any, cast

import hiredis
from redis._parsers.base import BaseParser
from redis.asyncio.cluster import ClusterNode
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, ResponseError

from shardq.storage.cluster import Cluster, Packed, confirm_fsync, confirm_replicas, pack_command
from shardq.storage.trouble import Trouble


class _Connection:
    """Answers what it was given, then breaks off."""

    is_connected = False

    def __init__(self, answer: bytes) -> None:
        self._reader = hiredis.Reader(protocolError=InvalidResponse, replyError=BaseParser.parse_error)
        self._reader.feed(answer)

    async def connect(self) -> None:
        pass

    async def disconnect(self, **_: Any) -> None:
        pass

    async def send_packed_command(self, *_: Any, **__: Any) -> None:
        pass

    async def read_response(self) -> Any:
        reply = self._reader.gets()
        if reply is False:
            raise RedisConnectionError("it broke off")
        if isinstance(reply, ResponseError):
            raise reply
        return reply


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
