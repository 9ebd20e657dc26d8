"""The example application of this folder: it bills orders. Put your own in its place; nothing of shardq needs it.

What it writes to Redis it writes in `message.atomic()`, so an order is in its customer's list once, whatever happened
to the pod. The line it prints when it takes an order up is for people.
Settings come by environment: QUEUE, GROUP, SHARDS, CONCURRENCY, LEASE_S, DRAIN_S, HANDLER_S.
"""

from __future__ import annotations

import os

import anyio

import shardq

_handler_s = float(os.environ.get("HANDLER_S", "0"))

worker = shardq.Worker(
    os.environ.get("QUEUE", "orders"),
    group=os.environ.get("GROUP", "billing"),
    shards=int(os.environ.get("SHARDS", "12")),
    concurrency=int(os.environ.get("CONCURRENCY", "32")),
    lease=float(os.environ.get("LEASE_S", "5")),
    # Kubernetes' terminationGracePeriodSeconds, compose's stop_grace_period: longer than this and the lease together.
    drain_limit=float(os.environ.get("DRAIN_S", "25")),
)


@worker.handler
async def bill(message: shardq.Message) -> None:
    customer = str(message.key)
    print(f"bills {customer} {message.value['number']}", flush=True)
    await anyio.sleep(_handler_s)  # the work itself
    async with message.atomic() as tx:
        tx.rpush(message.local_key(f"bills:{customer}"), str(message.value["number"]))
