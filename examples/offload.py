"""A small web service that hands slow work to workers and says how far it is: POST /reports, then GET /reports/<id>.

A POST is answered with 202 and the job's id as soon as the job is stored, and with 503 when as much waits as is allowed
to: whoever waits for work must not grow without bound. The state of a job lies beside its message, so any process of the
service can be asked for it. Here a worker is killed, and then the service itself: every job that was accepted ends.

The naive version starts a thread for each request and keeps states in a dictionary: a restart forgets all of it, and a
rush takes all memory. What this version does not give: a client that gets no answer to its POST can't know whether it
was accepted, and makes two reports if it asks again.

    python -m examples.offload
"""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anyio.to_thread
from anyio.from_thread import BlockingPortal

import shardq
from examples.common import GROUP, LEASE_S, check, programs, run, unique, until, workers

REPORTS, MOST_WAITING = 120, 40
worker = shardq.Worker(os.environ.get("QUEUE", "unset"), group=GROUP, lease=LEASE_S, concurrency=4)


@worker.handler
def report(message: shardq.Message) -> dict[str, Any]:
    time.sleep(0.05)
    return {"customer": message.value["customer"], "total": sum(message.value["amounts"])}


class Service(ThreadingHTTPServer):
    """`portal` carries calls from the threads of requests to the event loop, where the client lives."""

    def __init__(self, port: int, portal: BlockingPortal, queue: shardq.Queue, producer: shardq.Producer) -> None:
        super().__init__(("127.0.0.1", port), Request)
        self.portal, self.queue, self.producer = portal, queue, producer


class Request(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:  # noqa: N802 # http.server's name for it
        order = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            job = self.server.portal.call(partial(self.server.producer.submit, order, key=order["customer"]))
        except shardq.QueueFull:
            self.answer(503, {"error": "there is too much to do, try again later"})
        else:
            self.answer(202, {"id": job.id})

    def do_GET(self) -> None:  # noqa: N802
        try:
            state = self.server.portal.call(self.server.queue.job(self.path.removeprefix("/reports/")).state)
        except shardq.UsageError as error:
            self.answer(404, {"error": str(error)})
        else:
            self.answer(200, {"status": state.status, "result": state.result})

    def answer(self, status: int, body: dict[str, Any]) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: Any) -> None:
        pass


async def serve(url: str) -> None:
    """What a process of the service does."""
    async with shardq.connect(url) as client, BlockingPortal() as portal:
        queue = await client.queue(os.environ["QUEUE"])
        async with queue.producer() as producer:
            service = Service(int(os.environ["PORT"]), portal, queue, producer)
            await anyio.to_thread.run_sync(service.serve_forever)


class Customer:
    """Asks the service, from plain threads."""

    def __init__(self, port: int) -> None:
        self._reports = f"http://127.0.0.1:{port}/reports"
        self.refusals = 0

    def ask(self, path: str = "", data: Any = None) -> tuple[int, Any]:
        body = json.dumps(data).encode() if data is not None else None
        try:
            with urllib.request.urlopen(self._reports + path, body, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def order(self, number: int) -> str:
        """Asks again while the service is full; returns the job's id."""
        while True:
            status, answer = self.ask(data={"customer": f"customer-{number}", "amounts": [number] * 3})
            if status == 202:
                return str(answer["id"])
            self.refusals += 1
            time.sleep(0.05)

    def state(self, job: str) -> Any:
        return self.ask(f"/{job}")[1]

    async def is_served(self) -> bool:
        try:
            return (await anyio.to_thread.run_sync(self.ask, "/none"))[0] == 404
        except OSError:
            return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


async def main(url: str) -> None:
    name, port = unique("reports"), free_port()
    customer = Customer(port)
    async with shardq.connect(url) as client:
        queue = await client.queue(name, shards=4, max_backlog=MOST_WAITING, overflow="reject")
        await queue.open_group(GROUP)
    with (
        ThreadPoolExecutor(16) as threads,
        programs(url, "examples.offload", PART="web", QUEUE=name, PORT=str(port)) as web,
    ):
        await until(customer.is_served, "the service")
        orders = [threads.submit(customer.order, number) for number in range(REPORTS)]

        async def accepted(some: int) -> bool:
            return sum(order.done() for order in orders) >= some

        await until(lambda: accepted(MOST_WAITING // 2), "the first reports to be accepted")
        await anyio.sleep(0.3)
        waiting = sum(order.done() for order in orders)
        print(f"no worker runs yet: {waiting} reports are accepted, {customer.refusals} times the answer was 503")
        with workers(url, "examples.offload:worker", 2, QUEUE=name) as running:
            await until(lambda: accepted(REPORTS // 2), "half of the reports to be accepted")
            running.kill_one()
            print("killed a worker")
            await until(lambda: accepted(REPORTS), "the rest to be accepted")
            web.kill_one()
            web.start()
            await until(customer.is_served, "another service")
            jobs = [order.result() for order in orders]
            states = Counter(state["status"] for state in threads.map(customer.state, jobs))
            print(f"killed the service; the next one says: {dict(sorted(states.items()))}")

            async def all_done() -> bool:
                return all(state["status"] == "done" for state in threads.map(customer.state, jobs))

            await until(all_done, "the reports")
        totals = [state["result"]["total"] for state in threads.map(customer.state, jobs)]
    check(0 < waiting <= MOST_WAITING and customer.refusals > 0, f"never more than {MOST_WAITING} reports wait")
    check(totals == [number * 3 for number in range(REPORTS)], f"all {REPORTS} that were accepted are done")


if __name__ == "__main__":
    run(serve if os.environ.get("PART") == "web" else main, __doc__)
