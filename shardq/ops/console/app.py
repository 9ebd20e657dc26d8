"""The console's API and page, as a Starlette application. Every request has passed guard.py; writes are only those of
`/api/dead/` and `/api/group/`, which do what `shardq dead` and `shardq group` do.

    GET  /api/about                                what this console is: version, whether it writes
    GET  /api/queues                               names of all queues
    GET  /api/stream?queue=&group=                 Server-Sent Events: feed.py's differences, one a second at most
    GET  /api/dead?queue=&group=&error=&key=&shard=   dead letters, without their values
    GET  /api/dead/one?queue=&group=&id=           one of them, whole
    GET  /api/messages?queue=&key=&shard=&n=&from=oldest|newest
    POST /api/dead/replay, /api/dead/purge         {queue, group, ids: [...]} or {queue, group, all: true, error, key}
    POST /api/group/pause, /api/group/resume       {queue, group}
    POST /api/token                                whether the token is right

A bad request is answered with a status and {"error": what to do}; nothing is retried here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import anyio
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from shardq.core.dead import DeadLetter
from shardq.errors import CorruptData, ShardqError, StoreError, UnknownGroup, UnknownQueue, UsageError
from shardq.ops.console.feed import MAX_VIEWERS, Difference, Hub
from shardq.ops.console.guard import App, Guard, Policy, Receive, Scope, Send
from shardq.ops.console.shown import letter_line, letter_whole, message, printable
from shardq.runtime.dead import DeadLetters
from shardq.storage.keys import check_name

MAX_BODY_BYTES, MAX_IDS = 256 * 1024, 2000
LETTERS, MESSAGES, MAX_MESSAGES = 200, 50, 200
SEARCH_S = 10.0  # a filter may have to read every dead letter there is

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


class Write(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a replay or a purge: ids, or all that fit the filters; never both, never neither."""

    queue: str
    group: str
    ids: list[str] = []
    all: bool = False
    error: str = ""
    key: str | None = None


class Chosen(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a pause or its end."""

    queue: str
    group: str


Body = TypeVar("Body", Write, Chosen)


class Api:
    """The routes' handlers."""

    def __init__(self, hub: Hub, policy: Policy) -> None:
        self._hub, self._policy = hub, policy
        assets = Path(__file__).parent / "assets"
        self._assets = {file.name: file.read_bytes() for file in assets.iterdir() if file.suffix in _TYPES}

    def routes(self) -> list[Route]:
        return [
            Route("/", self.page),
            Route("/assets/{name}", self.asset),
            Route("/api/about", self.about),
            Route("/api/queues", self.queues),
            Route("/api/stream", self.stream),
            Route("/api/dead", self.dead),
            Route("/api/dead/one", self.dead_one),
            Route("/api/messages", self.messages),
            Route("/api/dead/replay", self.replay, methods=["POST"]),
            Route("/api/dead/purge", self.purge, methods=["POST"]),
            Route("/api/group/pause", self.pause, methods=["POST"]),
            Route("/api/group/resume", self.resume, methods=["POST"]),
            Route("/api/token", self.token, methods=["POST"]),
        ]

    # -- the page --------------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        return self._file("index.html")

    async def asset(self, request: Request) -> Response:
        return self._file(request.path_params["name"])

    def _file(self, name: str) -> Response:
        if name not in self._assets:
            raise HTTPException(404, f"there is no {name}")
        kind = _TYPES[Path(name).suffix]
        return Response(self._assets[name], media_type=kind, headers={"cache-control": "no-cache"})

    # -- reading ---------------------------------------------------------------------------------------------

    async def about(self, request: Request) -> Response:
        return answer({"version": version("shardq"), "write": self._policy.token is not None})

    async def queues(self, request: Request) -> Response:
        return answer({"queues": await self._hub.client.queue_names()})

    async def stream(self, request: Request) -> Response:
        queue, group = check_name("queue", _asked(request, "queue")), request.query_params.get("group", "")
        if self._hub.viewers >= MAX_VIEWERS:
            raise HTTPException(503, f"{MAX_VIEWERS} pages are open already: close some")
        return Events(self._hub, queue, group)

    async def dead(self, request: Request) -> Response:
        query = request.query_params
        queue, group = _asked(request, "queue"), _asked(request, "group")
        letters = await self._letters(queue, group, _number(request, "shard", None))
        found: list[dict[str, Any]] = []
        whole = False
        if letters is not None:
            with anyio.move_on_after(SEARCH_S):
                async for letter in _first(letters, query.get("key") or None, query.get("error", "")):
                    found.append(letter_line(letter))  # noqa: PERF401 - what was found before a time-out is kept
                whole = len(found) <= LETTERS
        else:
            whole = True
        found = sorted(found[:LETTERS], key=lambda line: -int(line["failed_at_ms"]))
        return answer({"letters": found, "more": not whole})

    async def _letters(self, queue: str, group: str, shard: int | None) -> DeadLetters | None:
        """The dead letters of the shards that have any, by what was read last: a page that is open asks often, and
        most of a thousand shards have none. None: no shard has any."""
        joined = await self._hub.client.queue(queue)
        reading = self._hub.last(queue)
        wanted = set(joined.shards) if shard is None else {shard} & joined.shards.keys()
        if reading is not None and group in reading.groups:
            rows = reading.rows(group)
            wanted = {number for number in wanted if number not in rows or rows[number].dead or not rows[number].up}
        if not wanted:
            return None
        shards = {number: joined.shards[number] for number in sorted(wanted)}
        return DeadLetters(self._hub.client.pipes, shards, group)

    async def dead_one(self, request: Request) -> Response:
        queue = await self._hub.client.queue(_asked(request, "queue"))
        letter = await queue.dead_letters(_asked(request, "group")).get(_asked(request, "id"))
        return answer(letter_whole(letter))

    async def messages(self, request: Request) -> Response:
        query = request.query_params
        count = max(1, min(_number(request, "n", MESSAGES) or MESSAGES, MAX_MESSAGES))
        shard = _number(request, "shard", None)
        key = query.get("key") or None
        queue = await self._hub.client.queue(_asked(request, "queue"))
        shards = None if shard is None or key is not None else [shard]
        found = await queue.peek(count, reverse=query.get("from") != "oldest", shards=shards, key=key)
        return answer({"messages": list(map(message, found))})

    # -- writing ---------------------------------------------------------------------------------------------

    async def token(self, request: Request) -> Response:
        return answer({"write": True})

    async def replay(self, request: Request) -> Response:
        letters, chosen = await self._write(request)
        return answer({"count": await letters.replay(**chosen)})

    async def purge(self, request: Request) -> Response:
        letters, chosen = await self._write(request)
        return answer({"count": await letters.purge(**chosen)})

    async def pause(self, request: Request) -> Response:
        body = await _decoded(request, Chosen)
        await (await self._hub.client.queue(body.queue)).pause_group(body.group)
        return answer({"paused": True})

    async def resume(self, request: Request) -> Response:
        body = await _decoded(request, Chosen)
        await (await self._hub.client.queue(body.queue)).resume_group(body.group)
        return answer({"paused": False})

    async def _write(self, request: Request) -> tuple[DeadLetters, dict[str, Any]]:
        body = await _decoded(request, Write)
        if body.all == bool(body.ids) or (body.ids and (body.error or body.key)):
            raise HTTPException(400, "say which: ids, or all with filters")
        if len(body.ids) > MAX_IDS:
            raise HTTPException(400, f"at most {MAX_IDS} ids at once")
        queue = await self._hub.client.queue(body.queue)
        chosen = {"ids": body.ids} if body.ids else {"key": body.key, "error": body.error}
        return queue.dead_letters(body.group), chosen


class Events(Response):
    """A stream of readings to one page; ends when the page or the server goes."""

    def __init__(self, hub: Hub, queue: str, group: str) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._hub, self._queue, self._group = hub, queue, group

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_when_gone, receive, tasks.cancel_scope)
            await self._tell(send)
            tasks.cancel_scope.cancel()

    async def _tell(self, send: Send) -> None:
        difference, number = Difference(self._group), 0
        with self._hub.watching(self._queue) as feed:
            while not self._hub.closed and (reading := await feed.after(number)) is not None:
                number = reading.number
                event = b"data: " + difference.to(reading) + b"\n\n"
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _cancel_when_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _first(letters: DeadLetters, key: str | None, error: str) -> AsyncIterator[DeadLetter]:
    """Those that fit, one more than the page shows: it tells whether there are more."""
    left = LETTERS + 1
    async with aclosing(letters.find(key=key, error=error)) as found:  # type: ignore[type-var]  # it is a generator
        async for letter in found:
            yield letter
            left -= 1
            if not left:
                return


async def _decoded(request: Request, kind: type[Body]) -> Body:
    try:
        return msgspec.json.decode(await _body(request), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HTTPException(400, f"the body is not as it should be: {error}") from error


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    return body


def _asked(request: Request, name: str) -> str:
    value = request.query_params.get(name)
    if not value:
        raise HTTPException(400, f"`{name}` is missing")
    return value


def _number(request: Request, name: str, default: int | None) -> int | None:
    text = request.query_params.get(name, "")
    if text and not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise HTTPException(400, f"`{name}` is a number, not {printable(text[:40])!r}")
    return int(text) if text else default


def answer(data: object, status: int = 200) -> Response:
    body = msgspec.json.encode(data)
    return Response(body, status, media_type="application/json", headers={"cache-control": "no-store"})


# -- errors ------------------------------------------------------------------------------------------------------------


def _status(error: ShardqError) -> int:
    match error:
        case UnknownQueue() | UnknownGroup():
            return 404
        case UsageError():
            return 400
        case CorruptData():
            return 409
        case StoreError():
            return 503
    return 500


async def _shardq_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ShardqError)
    return answer({"error": printable(str(error))}, _status(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return answer({"error": error.detail}, error.status_code)


def make_app(hub: Hub, policy: Policy) -> App:
    """The whole application, guarded."""
    handlers = {ShardqError: _shardq_error, HTTPException: _http_error}
    return Guard(Starlette(routes=Api(hub, policy).routes(), exception_handlers=handlers), policy)
