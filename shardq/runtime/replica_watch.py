"""While a client is open: counts the replicas that sends of the default durability wait for anew where that may have
changed, and says when nodes are away or were forgotten. What the count goes by is storage/replicas.py's.
"""

from __future__ import annotations

import logging
import random

import anyio

from shardq.storage.cluster import Cluster
from shardq.storage.replicas import Replicas

COUNT_REPLICAS_EVERY_S = 10.0

_log = logging.getLogger("shardq")


async def watch_replicas(cluster: Cluster) -> None:
    """Until it is cancelled."""
    replicas, before = cluster.replicas, cluster.least_replicas()
    looked, warned = False, _warn_of_away(replicas, warned=False)
    while True:
        await anyio.sleep(random.uniform(0.8, 1.2) * COUNT_REPLICAS_EVERY_S)
        # Once in any case: at connecting nobody may have answered in time, or a link was just being tried anew.
        if looked and not replicas.in_doubt:
            continue
        looked = True
        if await cluster.count_replicas():
            _log.warning(
                "the cluster's nodes were forgotten: every master has %d replicas now, and sends of the default "
                "durability wait for %s",
                replicas.count,
                "one" if replicas.count else "none",
            )
        elif before < 1 <= replicas.count:
            _log.info("every master has a replica now: sends of the default durability wait for one")
        before = replicas.count
        warned = _warn_of_away(replicas, warned=warned)


def _warn_of_away(replicas: Replicas, *, warned: bool) -> bool:
    """Whether nodes are away now; it is said once while there are any."""
    if replicas.away and not warned:
        _log.warning(
            "%d nodes of the cluster are away. They count as replicas, so sends of durability 'replica' may wait "
            "for them: start them, or, gone for good, CLUSTER FORGET on every node (`shardq doctor` names them)",
            replicas.away,
        )
    return replicas.away > 0
