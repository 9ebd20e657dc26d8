"""The checks a connection makes before it is used: cluster mode, version, eviction, functions. Changes nothing but the
functions library, and that only to load or update it.
"""

from __future__ import annotations

import logging

from redis.asyncio.cluster import ClusterNode

from shardq.errors import AuthenticationFailed, FunctionsMissing, StoreTimeout, StoreUnavailable, UnsafeStore
from shardq.storage.cluster import Cluster, Packed, pack_call, pack_command
from shardq.storage.functions import BUILD
from shardq.storage.trouble import Trouble

OLDEST_VERSION = (7, 0)

_log = logging.getLogger("shardq")


def _parse_info(text: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in text.decode(errors="replace").splitlines())
    return {name: value for name, sep, value in lines if sep}


async def _info(cluster: Cluster, node: ClusterNode) -> dict[str, str] | None:
    """INFO of one node; None when the user may not ask. Raises for a node out of reach or a refused login."""
    (reply,) = await cluster.exchange(node, [Packed(pack_command("INFO"))])
    if isinstance(reply, Trouble):
        if reply.action == "fail" and not isinstance(reply.error, AuthenticationFailed):
            return None
        raise reply.error
    return _parse_info(reply) if isinstance(reply, bytes) else None


def check_info(name: str, info: dict[str, str]) -> None:
    """Raises UnsafeStore, naming the setting to change, for a server that can't carry a queue safely."""
    if info.get("cluster_enabled") == "0":
        msg = f"{name} is not in cluster mode: set `cluster-enabled yes` in its configuration, or run `shardq up`"
        raise UnsafeStore(msg)
    version = info.get("redis_version", "")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers and numbers < OLDEST_VERSION:
        msg = f"{name} runs {version}: shardq needs Redis 7.0 or newer, or Valkey; upgrade the server"
        raise UnsafeStore(msg)
    policy = info.get("maxmemory_policy", "noeviction")
    if policy.startswith("allkeys-"):
        msg = f"{name} may evict a queue's messages: set `maxmemory-policy noeviction` (it is {policy})"
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
        msg = f"no cluster node answers at {cluster.startup_addresses()}: is it up, and the address right?"
        raise StoreUnavailable(msg) from last


async def check_primaries(cluster: Cluster) -> None:
    """Checks every master, and puts the functions library where it is missing or of an older build."""
    for node in cluster.primaries():
        try:
            info = await _info(cluster, node)
        except (StoreUnavailable, StoreTimeout) as error:
            _log.warning("%s; going on with the other masters", error)
            continue
        if info is None:
            _log.warning("%s does not allow INFO to this user: its settings were not checked", node.name)
        else:
            check_info(node.name, info)
            cluster.told_replicas(node.name, int(info.get("connected_slaves", "0")))
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
