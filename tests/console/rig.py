"""What the console's tests share: a console as its users start it, requests to it, queues with something in them."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import anyio

import shardq
from tests.cli.support import Command, commands, until

GROUP = "billing"


@dataclass
class Answer:
    """What came back; `body` is the JSON, or the text where it is none."""

    status: int
    headers: dict[str, str]
    body: Any


@dataclass
class Console:
    """A running `shardq console`."""

    command: Command
    url: str
    token: str = ""
    folder: Path = field(default_factory=Path)

    @property
    def address(self) -> str:
        return urlsplit(self.url).netloc

    def page(self, **query: str) -> str:
        """Where a browser goes, the token behind the #."""
        return f"{self.url}?{urlencode(query)}" + (f"#token={self.token}" if self.token else "")

    def ask(self, path: str, headers: dict[str, str] | None = None, /, **query: str | int) -> Answer:
        return self._request("GET", f"/{path}?{urlencode(query)}" if query else f"/{path}", headers or {}, None)

    def write(self, path: str, body: Any, **headers: str | None) -> Answer:
        """A write as the page makes it; `headers` replace its own, None leaves one out (`content_type=None`)."""
        own: dict[str, str | None] = {
            "origin": self.url.rstrip("/"),
            "content-type": "application/json",
            "authorization": f"Bearer {self.token}",
        }
        own |= {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._request("POST", f"/{path}", {k: v for k, v in own.items() if v is not None}, data)

    def _request(self, method: str, path: str, headers: dict[str, str], body: bytes | None) -> Answer:
        connection = http.client.HTTPConnection(self.address, timeout=30)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        kind = answer.headers.get("content-type", "")
        return Answer(answer.status, dict(answer.headers.items()), json.loads(text) if "json" in kind else text)


@contextmanager
def consoles(folder: Path, url: str, *arguments: str, **environment: str) -> Iterator[Console]:
    """A console of its own; it must end with status 0 when it is told to."""
    with commands(folder) as start:
        command = start("console", "--port", "0", "--url", url, *arguments, **environment)
        until(lambda: command.stdout.endswith("\n") or command.process.poll() is not None, "the console's address")
        page, _, token = command.stdout.strip().partition("#token=")
        assert page.startswith("http://"), command.stderr
        yield Console(command, page, token, folder)
        assert command.stop() == 0, command.stderr


def declare(url: str, queue: str, shards: int, *groups: str) -> None:
    async def main() -> None:
        async with shardq.connect(url) as client:
            made = await client.queue(queue, shards=shards)
            for group in groups or (GROUP,):
                await made.open_group(group)

    anyio.run(main)


def send(url: str, queue: str, messages: Iterable[tuple[str, Any]], headers: dict[str, str] | None = None) -> None:
    async def main() -> None:
        async with shardq.connect(url) as client, (await client.queue(queue)).producer() as producer:
            for key, value in messages:
                await producer.send(value, key=key, headers=headers)

    anyio.run(main)


def handle(url: str, queue: str, total: int, *, error: str = "") -> list[Any]:
    """Takes so many messages as a worker of GROUP; with `error` each fails with this text and is a dead letter."""
    taken: list[Any] = []

    async def main() -> None:
        worker = shardq.Worker(queue, group=GROUP, lease=1, name="bill-1", retry=shardq.Retry(attempts=1))

        @worker.handler
        async def take(message: shardq.Message) -> None:
            taken.append(message.value)
            if len(taken) >= total:
                worker.stop()
            if error:
                raise ValueError(error)

        with anyio.fail_after(30):
            async with shardq.connect(url) as client:
                await worker.run(client)

    anyio.run(main)
    return taken


def dead_letters(url: str, queue: str) -> int:
    """How many GROUP has."""

    async def main() -> int:
        async with shardq.connect(url) as client:
            return len([letter async for letter in (await client.queue(queue)).dead_letters(GROUP)])

    return anyio.run(main)
