"""A small web service that hands slow work to workers and says how far it is: POST /reports, then GET /reports/<id>.

A POST is answered with 202 and the job's id as soon as the job is stored, and with 503 while as much waits as may wait.
The state of a job lies beside its message, so any process of the service can be asked for it. Here a worker is killed,
and then the service itself: every job that was accepted ends.

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
worker = shardq.Worker(os.environ.get("QUEUE", "unset"), group=GROUP, lease=LEASE_S, concurrency=2)


@worker.handler
def report(message: shardq.Message) -> dict[str, Any]:
    time.sleep(0.05)
    return {"customer": message.value["customer"], "total": sum(message.value["amounts"])}


class Service(ThreadingHTTPServer):
    """`portal` carries calls from the threads of requests to the event loop, where the client lives."""

    request_queue_size = 128

    def __init__(self, port: int, portal: BlockingPortal, queue: shardq.Queue, producer: shardq.Producer) -> None:
        super().__init__(("127.0.0.1", port), Request)
        self.portal, self.queue, self.producer = portal, queue, producer


class Request(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        order = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            job = self.server.portal.call(partial(self.server.producer.submit, order, key=order["customer"]))
        except shardq.QueueFull:
            self.answer(503, {"error": "there is too much to do, try again later"})
        else:
            self.answer(202, {"id": job.id})

    def do_GET(self) -> None:
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


class Customers:
    """They ask the service, from plain threads."""

    def __init__(self, port: int) -> None:
        self._reports = f"http://127.0.0.1:{port}/reports"
        self.refusals = 0
        self._left = False

    def __enter__(self) -> Customers:
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True  # a thread that goes on asking would keep a failed example from ending

    def ask(self, path: str = "", data: Any = None) -> tuple[int, Any]:
        body = json.dumps(data).encode() if data is not None else None
        try:
            with urllib.request.urlopen(self._reports + path, body, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)
        except OSError as error:
            return 0, str(error)  # the service is away

    def order(self, number: int) -> str:
        """Asks again until the report is accepted; returns its job's id."""
        while not self._left:
            status, answer = self.ask(data={"customer": f"customer-{number}", "amounts": [number] * 3})
            if status == 202:
                return str(answer["id"])
            self.refusals += status == 503
            time.sleep(0.05)
        raise TimeoutError

    def status(self, job: str) -> str:
        return str(self.ask(f"/{job}")[1]["status"])

    def result(self, job: str) -> Any:
        while not self._left and self.status(job) != "done":
            time.sleep(0.05)
        return self.ask(f"/{job}")[1]["result"]

    async def are_served(self) -> bool:
        return (await anyio.to_thread.run_sync(self.ask, "/none"))[0] == 404


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


async def main(url: str) -> None:
    name, port = unique("reports"), free_port()
    async with shardq.connect(url) as client:
        queue = await client.queue(name, shards=4, max_backlog=MOST_WAITING, overflow="reject")
        await queue.open_group(GROUP)
    service = programs(url, "examples.offload", PART="web", QUEUE=name, PORT=str(port))
    with ThreadPoolExecutor(16) as threads, service as web, Customers(port) as customers:
        await until(customers.are_served, "the service")
        orders = [threads.submit(customers.order, number) for number in range(REPORTS)]

        async def accepted(some: int) -> bool:
            return sum(order.done() for order in orders) >= some

        await until(partial(accepted, MOST_WAITING // 2), "reports to be accepted")
        await anyio.sleep(0.3)
        jobs = [order.result() for order in orders if order.done()]
        print(f"no worker runs yet: {len(jobs)} reports are accepted, {customers.refusals} times the answer was 503")
        web.kill_one()  # full as it is, it can have accepted nothing that it did not answer any more
        web.start()
        await until(customers.are_served, "another service")
        print(f"killed the service; the next one says: {dict(Counter(map(customers.status, jobs)))}")
        with workers(url, "examples.offload:worker", 2, QUEUE=name) as running:
            await until(partial(accepted, REPORTS // 2), "half of the reports to be accepted")
            running.kill_one()
            print("killed a worker")
            await until(partial(accepted, REPORTS), "the rest to be accepted")
            results = list(threads.map(customers.result, [order.result() for order in orders]))
    check(
        0 < len(jobs) <= MOST_WAITING, f"never more than {MOST_WAITING} reports waited, {customers.refusals} times 503"
    )
    wanted = [{"customer": f"customer-{number}", "total": number * 3} for number in range(REPORTS)]
    check(results == wanted, f"all {REPORTS} are done, though a worker and the service died")


if __name__ == "__main__":
    run(serve if os.environ.get("PART") == "web" else main, __doc__)
