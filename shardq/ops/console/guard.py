"""Which requests are answered at all: every one passes here before it reaches the API. Decides by headers alone, and
reads nothing from Redis.

1. The Host header is an address, localhost, or a name the operator gave: a page of another site that makes its own name
   point here (DNS rebinding) is refused.
2. What another site's page makes a browser ask is refused (Sec-Fetch-Site), and no answer allows another origin.
3. A write is a POST with the token in a header, a JSON body, and this very page as its Origin. A form of another site
   can send none of the three. Without a token given at the start there are no writes.
4. The page may load and run only what comes from here, nothing inline, and may not be framed; Trusted Types make the
   browser refuse a script of ours that would put text in as HTML.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

READ_ONLY = "this console is read-only: start it with `shardq console --write`"
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
SECURITY_HEADERS = [
    (b"content-security-policy", _CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


@dataclass(frozen=True, slots=True)
class Policy:
    """What this console allows: `names` are host names beside addresses and localhost; without a token no writes."""

    token: str | None = None
    names: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Refusal:
    """An HTTP status and what the page says of it."""

    status: int
    why: str


def refusal(policy: Policy, method: str, path: str, headers: Mapping[str, str]) -> Refusal | None:
    """Why a request is not answered, None when it is; the names in `headers` are lower case."""
    host = headers.get("host", "")
    if not _known(host_name(host), policy.names):
        why = "the console does not answer to this host name: open it by its address, or start it with --allow-host"
        return Refusal(421, why)
    site = headers.get("sec-fetch-site", "same-origin")
    if path.startswith("/api/") and site not in ("same-origin", "none"):
        return Refusal(403, "asked by a page of another site")
    return _write_refusal(policy, host, headers) if method not in ("GET", "HEAD") else None


def _write_refusal(policy: Policy, host: str, headers: Mapping[str, str]) -> Refusal | None:
    if policy.token is None:
        return Refusal(403, READ_ONLY)
    if headers.get("origin", "").lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
        return Refusal(403, "a write must come from the console's own page (Origin)")
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return Refusal(415, "a write is JSON: Content-Type: application/json")
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), policy.token.encode()):
        return Refusal(401, "the token is missing or wrong: open the address that `shardq console --write` printed")
    return None


def host_name(host: str) -> str:
    """The name or address of a Host header, without its port, in lower case."""
    if host.startswith("["):
        return host.partition("]")[0][1:].lower()
    return host.partition(":")[0].lower().rstrip(".")


def _known(name: str, names: frozenset[str]) -> bool:
    if name == "localhost" or name.endswith(".localhost") or name in names:
        return True  # RFC 6761: no name server may answer for localhost
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True  # an address is not looked up, so nobody can point it elsewhere


class Guard:
    """The ASGI application in front of the API."""

    def __init__(self, app: App, policy: Policy) -> None:
        self._app, self._policy = app, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *SECURITY_HEADERS]
            await send(message)

        refused = refusal(self._policy, scope["method"], scope["path"], headers)
        if refused is None:
            await self._app(scope, receive, send_guarded)
        else:
            await _answer(refused, send_guarded)


async def _answer(refused: Refusal, send: Send) -> None:
    headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": refused.why}).encode()})
