"""Runs the console's HTTP server until it is cancelled. Decides nothing about requests: guard.py and app.py do.

Starlette and uvicorn are the extra `console`; without them a UsageError says how to get them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import anyio

from shardq.errors import UsageError
from shardq.ops.console.feed import Hub
from shardq.ops.console.guard import App, Policy, host_name
from shardq.runtime.client import Client

if TYPE_CHECKING:
    import uvicorn

TOKEN_VARIABLE = "SHARDQ_CONSOLE_TOKEN"
LEAST_TOKEN_CHARS = 16
STOP_S = 2


def check_installed() -> None:
    """Raises UsageError where the extra is missing."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        msg = f"the console needs {error.name}: pip install 'shardq[console]'"
        raise UsageError(msg) from error


def make_policy(*, write: bool, names: Iterable[str]) -> Policy:
    """What is allowed; with `write` the token is that of SHARDQ_CONSOLE_TOKEN, or a new random one."""
    allowed = frozenset(host_name(name) for name in names)
    if not write:
        return Policy(None, allowed)
    given = os.environ.get(TOKEN_VARIABLE, "")
    if given and (len(given) < LEAST_TOKEN_CHARS or not (given.isascii() and given.isprintable()) or " " in given):
        msg = f"{TOKEN_VARIABLE} must be at least {LEAST_TOKEN_CHARS} printable ASCII characters without blanks"
        raise UsageError(msg)
    return Policy(given or secrets.token_urlsafe(24), allowed)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def serve_console(
    client: Client,
    port: int,
    *,
    policy: Policy,
    host: str = "127.0.0.1",
    on_listening: Callable[[str], None] | None = None,
) -> None:
    """Serves until it is cancelled; port 0 takes a free one. `on_listening` is told the URL, with no token in it.
    Raises UsageError where it can't listen or the extra is missing."""
    check_installed()
    from shardq.ops.console.app import make_app

    with _bound(host, port) as listening:
        async with anyio.create_task_group() as tasks:
            hub = Hub(client, tasks)
            server = _make_server(make_app(hub, policy))
            tasks.start_soon(_run, server, listening)
            try:
                if on_listening is not None:
                    shown = f"[{host}]" if ":" in host else host
                    on_listening(f"http://{shown}:{listening.getsockname()[1]}/")
                await anyio.sleep_forever()
            finally:
                hub.close()
                server.should_exit = True


async def _run(server: uvicorn.Server, listening: socket.socket) -> None:
    with anyio.CancelScope(shield=True):  # it ends by `should_exit`, and then within STOP_S
        await server.serve(sockets=[listening])


def _make_server(app: App) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # signals are the command's business (ops/processes.py)

    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        http="h11",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=STOP_S,
    )
    return Server(config)


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens: connections wait there until the server runs."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"can't listen on {host}:{port} ({error}): choose another port or host") from error
    with listening:
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(128)
        except (OSError, OverflowError) as error:
            raise UsageError(f"can't listen on {host}:{port} ({error}): choose another port or host") from error
        yield listening
