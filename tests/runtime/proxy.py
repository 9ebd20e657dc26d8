"""A TCP proxy before one node of a cluster, announced in its place: cuts connections so that replies are lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import ByteStream, Listener, SocketAttribute, SocketStream, TaskGroup

from shardq.ops.local_cluster import LocalCluster
from shardq.storage.nodes import node_command
from tests.runtime.harness import until

HOST = "127.0.0.1"


class Proxy:
    """Passes bytes both ways until told otherwise. `drop_replies` counts the replies still to be swallowed: the server
    carries the call out, its answer is thrown away and the connection cut. `mute` lets nothing through at all."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.drop_replies = 0
        self.dropped = 0
        self.mute = False

    async def serve(self, client: SocketStream) -> None:
        async with (
            client,
            await anyio.connect_tcp(HOST, self.target_port) as server,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(self._forward, client, server, tasks)
            await self._backward(server, client)
            tasks.cancel_scope.cancel()

    async def _forward(self, client: ByteStream, server: ByteStream, tasks: TaskGroup) -> None:
        try:
            async for data in client:
                if self.mute:
                    await anyio.sleep_forever()
                await server.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass
        tasks.cancel_scope.cancel()

    async def _backward(self, server: ByteStream, client: ByteStream) -> None:
        try:
            async for data in server:
                if self.drop_replies > 0:
                    self.drop_replies -= 1
                    self.dropped += 1
                    return
                if self.mute:
                    await anyio.sleep_forever()
                await client.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass


@asynccontextmanager
async def proxied(cluster: LocalCluster, node: int) -> AsyncIterator[Proxy]:
    """Every client of the cluster reaches its node number `node` through the proxy."""
    real = cluster.ports[node]
    proxy = Proxy(real)
    async with anyio.create_task_group() as tasks:
        listener = await anyio.create_tcp_listener(local_host=HOST, local_port=0)
        port = listener.extra(SocketAttribute.local_port)
        tasks.start_soon(_listen, listener, proxy)
        node_command(HOST, real, "CONFIG", "SET", "cluster-announce-port", port)

        def announced() -> bool:
            return all(str(port).encode() in _slots(other) for other in cluster.ports)

        await until(announced, 20, "the proxy's port to be known in the cluster")
        try:
            yield proxy
        finally:
            tasks.cancel_scope.cancel()


async def _listen(listener: Listener[SocketStream], proxy: Proxy) -> None:
    async with listener:
        await listener.serve(proxy.serve)


def _slots(port: int) -> bytes:
    reply = node_command(HOST, port, "CLUSTER", "NODES")
    return reply if isinstance(reply, bytes) else str(reply).encode()
