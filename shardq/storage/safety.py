"""The checks a connection makes before it is used: cluster mode, version, eviction, functions. Changes nothing but the
functions library, and that only to load or update it.
"""

from __future__ import annotations

import logging

import anyio
from redis.asyncio.cluster import ClusterNode

from shardq.core.servers import parse_info, refusals
from shardq.errors import (
    AuthenticationFailed,
    FunctionsMissing,
    ShardqError,
    StoreTimeout,
    StoreUnavailable,
    UnsafeStore,
)
from shardq.storage.cluster import Cluster
from shardq.storage.commands import Packed, pack_call, pack_command
from shardq.storage.functions import BUILD
from shardq.storage.tls import refused_client
from shardq.storage.trouble import Trouble

_log = logging.getLogger("shardq")


async def _info(cluster: Cluster, node: ClusterNode) -> dict[str, str] | None:
    """INFO of one node; None when the user may not ask. Raises for a node out of reach or a refused login."""
    (reply,) = await cluster.exchange(node, [Packed(pack_command("INFO"))])
    if isinstance(reply, Trouble):
        if reply.action == "fail" and not isinstance(reply.error, AuthenticationFailed):
            return None
        raise reply.error
    return parse_info(reply.decode(errors="replace")) if isinstance(reply, bytes) else None


def check_info(name: str, info: dict[str, str]) -> None:
    """Raises UnsafeStore, naming the setting to change, for a server that can't carry a queue safely."""
    refusal = next(refusals(name, info), None)
    if refusal is not None:
        msg = f"{name} {refusal.what}: {refusal.do}"
        raise UnsafeStore(msg)


async def check_startup(cluster: Cluster) -> None:
    """Says what is wrong before the topology is read, for then redis-py's own error would hide it."""
    reached = False
    last: Exception | None = None
    for node in cluster.startup_nodes():
        try:
            info = await _info(cluster, node)
        except (StoreUnavailable, StoreTimeout) as error:
            last = error
            continue
        reached = True
        if info is not None:
            check_info(node.name, info)
        break
    if not reached:
        for node in cluster.startup_nodes():
            if (refused := await refused_client(node)) is not None:
                raise refused
        msg = f"no cluster node answers at {cluster.startup_addresses()}: is it up, the address right, and is it TLS (rediss://)?"
        raise StoreUnavailable(msg) from last


async def check_primaries(cluster: Cluster) -> None:
    """Checks every master, all at once, and puts the functions library where it is missing or of an older build."""
    failed: list[ShardqError] = []

    async def check(node: ClusterNode) -> None:
        try:
            await _check_primary(cluster, node)
        except ShardqError as error:
            failed.append(error)

    async with anyio.create_task_group() as tasks:
        for node in cluster.primaries():
            tasks.start_soon(check, node)
    if failed:
        raise failed[0]
    await cluster.count_away()


async def _check_primary(cluster: Cluster, node: ClusterNode) -> None:
    try:
        info = await _info(cluster, node)
    except (StoreUnavailable, StoreTimeout) as error:
        _log.warning("%s; going on with the other masters", error)
        return
    if info is None:
        _log.warning(
            "%s does not allow INFO to this user: its settings were not checked, nor can late confirmations of "
            "replicas be (`shardq acl ROLE` grants it)",
            node.name,
        )
    else:
        check_info(node.name, info)
        cluster.told_replicas(node.name, int(info.get("connected_slaves", "0")))
        cluster.histories.told(node.name, info)
    await ensure_functions(cluster, node)


async def ensure_functions(cluster: Cluster, node: ClusterNode) -> None:
    """Loads the library on one master unless it has this build or a newer one."""
    (reply,) = await cluster.exchange(node, [Packed(pack_call("build", (), ()))])
    if isinstance(reply, int) and reply >= BUILD:
        return
    if isinstance(reply, Trouble) and reply.action != "load":
        _log.warning("%s; its functions were not checked", reply.error)
        return
    refused = await cluster.load_functions(node, replace=isinstance(reply, int))
    if refused is not None and refused.action == "fail":
        msg = f"{node.name} lacks shardq's functions and this user may not load them: run `shardq install --url ...`"
        raise FunctionsMissing(msg) from refused.error
    if refused is not None:
        raise refused.error
