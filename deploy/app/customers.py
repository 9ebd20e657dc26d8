"""The load of the example: customers who order, RATE times a second all together, until SIGTERM. Handles nothing.

Each customer's orders are numbered from 0, so that order and completeness can be seen. What it says at the end is what
was stored. Settings come by environment: SHARDQ_URL, QUEUE, SHARDS, CUSTOMERS, RATE, METRICS_PORT, and HOSTNAME, which
keeps the customers of several pods apart.
"""

from __future__ import annotations

import os
import signal

import anyio
import prometheus_client

import shardq

URL = os.environ.get("SHARDQ_URL", "redis://127.0.0.1:7000")
CUSTOMERS, RATE = int(os.environ.get("CUSTOMERS", "50")), float(os.environ.get("RATE", "50"))
TICK_S = 0.1


async def order(producer: shardq.Producer, stop: anyio.Event) -> int:
    """Sends until `stop`; how many are stored then."""
    host, sent, started_s = os.environ.get("HOSTNAME", "local"), 0, anyio.current_time()
    while not stop.is_set():
        due = int((anyio.current_time() - started_s) * RATE) - sent
        orders = [(f"{host}-{n % CUSTOMERS}", {"number": n // CUSTOMERS}) for n in range(sent, sent + due)]
        sent += await producer.send_many(orders)
        with anyio.move_on_after(TICK_S):
            await stop.wait()
    return sent


async def main() -> None:
    stop, listening = anyio.Event(), anyio.Event()

    async def obey() -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            listening.set()
            async for _ in signals:
                stop.set()

    meters = shardq.Meters()
    prometheus_client.REGISTRY.register(shardq.MetersCollector(meters))
    prometheus_client.start_http_server(int(os.environ.get("METRICS_PORT", "9402")))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(obey)
        await listening.wait()
        async with shardq.connect(URL, meters=meters) as client:
            name, shards = os.environ.get("QUEUE", "orders"), int(os.environ.get("SHARDS", "12"))
            queue = await client.queue(name, shards=shards)
            async with queue.producer() as producer:
                sent = await order(producer, stop)
        print(f"stored {sent} orders of {CUSTOMERS} customers", flush=True)
        tasks.cancel_scope.cancel()


if __name__ == "__main__":
    anyio.run(main)
