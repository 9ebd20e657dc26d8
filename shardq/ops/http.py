"""The small HTTP server of a process that others watch: /metrics for Prometheus, /livez and /readyz for probes. Answers
GET only, shows no message and changes nothing.

It runs in threads of its own, so a scrape is answered while the event loop works; what it needs of the loop it asks
through the portal. A loop that stands still makes the process not alive, which is what the probe asks.
"""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from socketserver import ThreadingMixIn
from threading import Thread
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import anyio
import anyio.to_thread
from anyio.from_thread import BlockingPortal
from prometheus_client import CollectorRegistry, make_wsgi_app

from shardq.errors import UsageError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

ANSWER_S = 9.0  # below Prometheus' own limit of 10 s
PULSE_S, STILL_S = 1.0, 9.0  # how often the loop shows that it runs, and how late that may be

Ready = Callable[[], Awaitable[str]]  # why the process is not ready; empty when it is


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    timeout = 10  # a client that connects and says nothing

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is no news."""


async def _always() -> str:
    return ""


class _App:
    """The WSGI application."""

    def __init__(self, registry: CollectorRegistry, ready: Ready) -> None:
        self._metrics = make_wsgi_app(registry, disable_compression=True)
        self.portal: BlockingPortal | None = None
        self.pulse_monotonic_s = time.monotonic()
        self._probes: dict[str, Callable[[], str]] = {"/livez": self._alive, "/readyz": self._ready}
        self._ask = ready

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _answer(start_response, "405 Method Not Allowed", "only GET is answered here")
        if path == "/metrics":
            answer: Iterable[bytes] = self._metrics(environ, start_response)
            return answer
        if path in self._probes:
            fault = self._probes[path]()
            return _answer(start_response, "503 Service Unavailable" if fault else "200 OK", fault or "ok")
        return _answer(start_response, "404 Not Found", "there is /metrics, /livez and /readyz")

    def _alive(self) -> str:
        """Asks the loop nothing: one that stands still would never answer."""
        still_s = time.monotonic() - self.pulse_monotonic_s
        return f"the event loop stands still for {still_s:.0f} s" if still_s > PULSE_S + STILL_S else ""

    def _ready(self) -> str:
        if self.portal is None:
            return "the process is starting"
        try:
            return self._alive() or self.portal.start_task_soon(self._ask).result(ANSWER_S)
        except TimeoutError:
            return f"the event loop did not answer in {ANSWER_S:g} s"
        except RuntimeError:
            return "the process is stopping"


def _answer(start_response: StartResponse, status: str, text: str) -> list[bytes]:
    body = f"{text}\n".encode()
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
    start_response(status, headers)
    return [body]


async def _keep_pulsing(app: _App) -> None:
    while True:
        app.pulse_monotonic_s = time.monotonic()
        await anyio.sleep(PULSE_S)


@asynccontextmanager
async def serving(
    registry: CollectorRegistry, port: int, *, host: str = "127.0.0.1", ready: Ready = _always
) -> AsyncIterator[tuple[str, BlockingPortal]]:
    """Serves while it is entered; gives the URL of /metrics. Port 0 takes a free one. Raises UsageError where it can't
    listen."""
    app = _App(registry, ready)
    try:
        server = make_server(host, port, app, _Server6 if ":" in host else _Server, handler_class=_Quiet)
    except (OSError, OverflowError) as error:
        raise UsageError(f"can't listen on {host}:{port} ({error}): choose another port or host") from error
    async with anyio.create_task_group() as tasks, BlockingPortal() as app.portal:
        tasks.start_soon(_keep_pulsing, app)
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            shown = f"[{host}]" if ":" in host else host
            yield f"http://{shown}:{server.server_port}/metrics", app.portal
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(server.shutdown)
                await anyio.to_thread.run_sync(thread.join)
                server.server_close()
                tasks.cancel_scope.cancel()
