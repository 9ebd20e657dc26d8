"""The console's API over HTTP, on a real cluster: what it gives, what it writes, what it refuses."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio
import pytest

import shardq
from shardq.cli.app import run
from shardq.ops.console.feed import Difference, Feed, Hub, Reading
from shardq.ops.console.shown import MAX_VALUE_CHARS, Row, cut, printable, text_of
from shardq.ops.local_cluster import LocalCluster, find_server
from tests.cli.support import commands, until
from tests.console.rig import GROUP, Console, consoles, dead_letters, declare, handle, send
from tests.runtime.harness import until as eventually


@pytest.fixture(scope="module")
def cluster_url(shared_clusters: Callable[[Path], LocalCluster]) -> str:
    """A shared cluster of the server that is found first: no server kind changes what a console shows."""
    return shared_clusters(find_server(None)).url


@pytest.fixture(scope="module")
def console(cluster_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    with consoles(tmp_path_factory.mktemp("console"), cluster_url, "--write") as running:
        yield running


def with_letters(url: str, queue: str, count: int = 3) -> None:
    declare(url, queue, 4)
    send(url, queue, [(f"user:{n}", {"n": n}) for n in range(count)], headers={"trace": "x"})
    handle(url, queue, count, error="the bank did not answer")


class Stream:
    """What a page hears: the rows as they stand after each event."""

    def __init__(self, console: Console, queue: str, group: str = GROUP) -> None:
        self._connection = http.client.HTTPConnection(console.address, timeout=30)
        self._connection.request("GET", f"/api/stream?queue={queue}&group={group}")
        self._answer = self._connection.getresponse()
        assert self._answer.headers["content-type"].startswith("text/event-stream")
        self.columns: list[str] = []
        self.rows: dict[int, dict[str, Any]] = {}
        self.about: dict[str, Any] = {}

    def next(self) -> dict[str, Any]:
        line = self._answer.readline()
        assert line.startswith(b"data: "), line
        assert self._answer.readline() == b"\n"
        event: dict[str, Any] = json.loads(line[6:])
        self.columns = event.get("columns", self.columns)
        self.about = event.get("about", self.about)
        for row in event["rows"]:
            named = dict(zip(self.columns, row, strict=True))
            self.rows[named["shard"]] = named
        return event

    def total(self, column: str) -> int:
        return sum(row[column] for row in self.rows.values())

    def close(self) -> None:
        self._answer.close()  # it has the socket
        self._connection.close()


def test_it_says_what_it_is(console: Console) -> None:
    assert console.ask("api/about").body == {"version": version("shardq"), "write": True}


def test_the_page_and_its_parts(console: Console) -> None:
    page = console.ask("")
    assert page.status == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "access-control-allow-origin" not in page.headers
    assets = Path(shardq.__file__).parent / "ops" / "console" / "assets"
    for file in assets.iterdir():
        assert console.ask(f"assets/{file.name}").body == file.read_text(), file.name
    for name in ("nothing.js", "..%2fapp.py", "../app.py", "app.py"):
        assert console.ask(f"assets/{name}").status == 404


def test_no_part_of_the_page_asks_anybody_else() -> None:
    assets = Path(shardq.__file__).parent / "ops" / "console" / "assets"
    for file in assets.iterdir():
        text = file.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "http://" not in text, file.name
        assert "https://" not in text, file.name
        assert "innerHTML" not in text, file.name


def test_the_stream_tells_what_changes(console: Console, cluster_url: str, queue_name: str) -> None:
    declare(cluster_url, queue_name, 8)
    stream = Stream(console, queue_name)
    first = stream.next()
    assert first["columns"] == list(Row._fields)
    assert sorted(stream.rows) == list(range(8))
    assert stream.about["groups"] == [GROUP]
    assert sum(last - first + 1 for first, last, _ in stream.about["slots"]) == 16384
    assert {name for _, _, name in stream.about["slots"]} == {row["node"] for row in stream.rows.values()}
    assert stream.next()["rows"] == [], "nothing happened"
    send(cluster_url, queue_name, [("user:1", n) for n in range(5)])
    while stream.total("backlog") != 5:
        event = stream.next()
        assert len(event["rows"]) <= 1, "one key lies on one shard"
        assert "about" not in event
    assert stream.total("appended") == 5
    handle(cluster_url, queue_name, 5)
    while stream.total("backlog"):
        stream.next()
    assert stream.total("acked") == 5
    stream.close()


def test_the_stream_of_a_queue_that_is_not_there(console: Console) -> None:
    stream = Stream(console, "nowhere", "")
    assert stream.next()["rows"] == []
    assert "nowhere" in stream.about["trouble"]
    stream.close()
    bad = console.ask("api/stream", queue="<b>")
    assert (bad.status, "queue" in bad.body["error"]) == (400, True)


def test_messages(console: Console, cluster_url: str, queue_name: str) -> None:
    declare(cluster_url, queue_name, 4)
    send(cluster_url, queue_name, [("ann", {"n": 2**60}), ("ben", "text"), ("ann", b"\xff")], headers={"trace": "x"})
    found = console.ask("api/messages", None, queue=queue_name, **{"from": "oldest"}).body["messages"]
    by_key = {key: [each["value"] for each in found if each["key"] == key] for key in ("ann", "ben")}
    assert by_key == {"ann": ['{\n  "n": 1152921504606846976\n}', "base64:/w=="], "ben": ["text"]}
    assert found[0]["headers"] == '{\n  "trace": "x"\n}'
    newest = console.ask("api/messages", queue=queue_name, key="ann", n=1).body["messages"]
    assert [each["value"] for each in newest] == ["base64:/w=="]
    (shard,) = {each["shard"] for each in found if each["key"] == "ben"}
    there = console.ask("api/messages", queue=queue_name, shard=shard).body["messages"]
    assert {each["shard"] for each in there} == {shard}


@pytest.mark.parametrize(
    ("path", "query", "status"),
    [
        pytest.param("api/messages", {}, 400, id="no-queue"),
        pytest.param("api/messages", {"queue": "nowhere"}, 404, id="unknown-queue"),
        pytest.param("api/messages", {"queue": "a b"}, 400, id="no-name"),
        pytest.param("api/messages", {"queue": "Q", "n": "many"}, 400, id="no-number"),
        pytest.param("api/messages", {"queue": "Q", "n": "-1"}, 400, id="negative"),
        pytest.param("api/messages", {"queue": "Q", "shard": "99"}, 400, id="no-such-shard"),
        pytest.param("api/dead", {"queue": "Q"}, 400, id="no-group"),
        pytest.param("api/dead", {"queue": "Q", "group": "nobody"}, 404, id="unknown-group"),
        pytest.param("api/dead/one", {"queue": "Q", "group": GROUP, "id": "0/1-0"}, 400, id="no-such-letter"),
        pytest.param("api/dead/one", {"queue": "Q", "group": GROUP, "id": "<b>"}, 400, id="no-id"),
        pytest.param("api/nothing", {}, 404, id="no-such-path"),
    ],
)
def test_bad_questions(
    console: Console, cluster_url: str, queue_name: str, path: str, query: dict[str, str], status: int
) -> None:
    declare(cluster_url, queue_name, 2)
    answer = console.ask(path, None, **{name: queue_name if value == "Q" else value for name, value in query.items()})
    assert answer.status == status
    assert answer.body["error"]


def test_dead_letters_are_found_read_replayed_and_purged(console: Console, cluster_url: str, queue_name: str) -> None:
    with_letters(cluster_url, queue_name)
    where = {"queue": queue_name, "group": GROUP}
    letters = console.ask("api/dead", None, **where).body["letters"]
    assert sorted(each["key"] for each in letters) == ["user:0", "user:1", "user:2"]
    assert console.ask("api/dead", None, error="no such", **where).body["letters"] == []
    assert [each["key"] for each in console.ask("api/dead", None, key="user:1", **where).body["letters"]] == ["user:1"]
    whole = console.ask("api/dead/one", None, id=letters[0]["id"], **where).body
    assert "the bank did not answer" in whole["error"]
    assert "ValueError" in whole["traceback"]
    assert whole["headers"] == '{\n  "trace": "x"\n}'

    assert console.write("api/dead/replay", {**where, "ids": [letters[0]["id"]]}).body == {"count": 1}
    assert console.write("api/dead/replay", {**where, "ids": [letters[0]["id"]]}).body == {"count": 0}, "repeated"
    assert handle(cluster_url, queue_name, 1) == [{"n": int(letters[0]["key"].partition(":")[2])}]
    assert console.write("api/dead/purge", {**where, "all": True, "key": letters[1]["key"]}).body == {"count": 1}
    assert console.write("api/dead/purge", {**where, "all": True}).body == {"count": 1}
    assert dead_letters(cluster_url, queue_name) == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(b"{", 400, id="no-json"),
        pytest.param([], 400, id="no-object"),
        pytest.param({}, 400, id="empty"),
        pytest.param({"queue": "Q", "group": GROUP}, 400, id="which"),
        pytest.param({"queue": "Q", "group": GROUP, "ids": ["0/1-0"], "all": True}, 400, id="both"),
        pytest.param({"queue": "Q", "group": GROUP, "ids": ["0/1-0"], "error": "x"}, 400, id="ids-and-filter"),
        pytest.param({"queue": "Q", "group": GROUP, "ids": "0/1-0"}, 400, id="ids-no-list"),
        pytest.param({"queue": "Q", "group": GROUP, "ids": ["0/1-0"] * 2001}, 400, id="too-many"),
        pytest.param({"queue": "Q", "group": GROUP, "ids": ["<b>"]}, 400, id="no-id"),
        pytest.param({"queue": "Q", "group": "nobody", "all": True}, 404, id="no-group"),
        pytest.param({"queue": "nowhere", "group": GROUP, "all": True}, 404, id="no-queue"),
        pytest.param({"queue": "Q", "group": GROUP, "all": True, "eror": "x"}, 400, id="misspelt-filter"),
        pytest.param(b" " * 300_000, 413, id="too-large"),
    ],
)
def test_bad_writes(console: Console, cluster_url: str, queue_name: str, body: Any, status: int) -> None:
    declare(cluster_url, queue_name, 2)
    if isinstance(body, dict) and body.get("queue") == "Q":
        body = {**body, "queue": queue_name}
    answer = console.write("api/dead/purge", body)
    assert answer.status == status
    assert answer.body["error"]


def test_a_group_is_paused_and_resumed(console: Console, cluster_url: str, queue_name: str) -> None:
    declare(cluster_url, queue_name, 2)
    where = {"queue": queue_name, "group": GROUP}
    for verb, paused in (("pause", True), ("pause", True), ("resume", False)):
        assert console.write(f"api/group/{verb}", where).body == {"paused": paused}
        assert is_paused(cluster_url, queue_name) is paused
    assert console.write("api/group/pause", {**where, "group": "nobody"}).status == 404
    for body in ({}, {**where, "more": 1}, {"queue": queue_name, "group": 3}):
        assert console.write("api/group/pause", body).status == 400
    assert console.ask("api/group/pause", **where).status == 405


def is_paused(url: str, name: str) -> bool:
    async def look() -> bool:
        async with shardq.connect(url) as client:
            (info,) = await (await client.queue(name)).groups()
            return info.paused

    return anyio.run(look)


def test_what_is_not_the_page_writes_nothing(console: Console, cluster_url: str, queue_name: str) -> None:
    with_letters(cluster_url, queue_name, 1)
    body = {"queue": queue_name, "group": GROUP, "all": True}
    for headers, status in (
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": None}, 401),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": None}, 403),
        ({"content_type": "text/plain"}, 415),
        ({"host": "evil.example", "origin": "http://evil.example"}, 421),
        ({"sec_fetch_site": "cross-site"}, 403),
    ):
        assert console.write("api/dead/purge", body, **headers).status == status, headers
    assert console.ask("api/dead/purge", queue=queue_name).status == 405
    assert console.ask("api/queues", {"host": "evil.example"}).status == 421
    assert dead_letters(cluster_url, queue_name) == 1


def test_without_write_it_is_read_only(cluster_url: str, queue_name: str, tmp_path: Path) -> None:
    with_letters(cluster_url, queue_name, 1)
    token = "x" * 20
    with consoles(tmp_path, cluster_url, SHARDQ_CONSOLE_TOKEN=token) as console:
        assert console.token == ""
        assert console.ask("api/about").body["write"] is False
        console.token = token
        refused = console.write("api/dead/purge", {"queue": queue_name, "group": GROUP, "all": True})
        assert (refused.status, "--write" in refused.body["error"]) == (403, True)
    assert dead_letters(cluster_url, queue_name) == 1


def test_a_token_that_was_given_is_not_printed(cluster_url: str, tmp_path: Path) -> None:
    token = "given-by-the-operator"
    with consoles(tmp_path, cluster_url, "--write", SHARDQ_CONSOLE_TOKEN=token) as console:
        assert token not in console.command.stdout + console.command.stderr
        console.token = token
        assert console.write("api/token", {}).status == 200


def test_a_name_of_its_own(cluster_url: str, tmp_path: Path) -> None:
    with consoles(tmp_path, cluster_url, "--allow-host", "queues.example.org") as console:
        assert console.ask("api/about", {"host": "queues.example.org"}).status == 200
        assert console.ask("api/about", {"host": "other.example.org"}).status == 421


def test_a_port_that_is_taken(cluster_url: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, commands(tmp_path) as start:
        console = start("console", "--port", str(taken.getsockname()[1]), "--url", cluster_url)
        assert console.wait() == 1
        assert "choose another port" in console.stderr


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run(["console"]) == 1
    assert "pip install 'shardq[console]'" in capsys.readouterr().err


def test_other_commands_do_not_load_it() -> None:
    code = "import sys, shardq.cli.app as a; a.run(['console', '--help']); sys.exit('starlette' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


# -- one reading for all -----------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_viewers_share_readings_and_nobody_looks_at_none(cluster_url: str, queue_name: str) -> None:
    async with shardq.connect(cluster_url) as client, anyio.create_task_group() as tasks:
        await client.queue(queue_name, shards=2)
        hub = Hub(client, tasks)
        with hub.watching(queue_name) as feed, hub.watching(queue_name) as same, anyio.fail_after(30):
            assert same is feed
            one, two = await feed.after(0), await same.after(0)
            assert one is two
            assert one is not None
            later = await feed.after(one.number + 1)
            assert later is not None
            assert later.number == one.number + 2
            assert hub.last(queue_name) is later
        await eventually(lambda: hub.last(queue_name) is None, 30, "the readings to end")
        assert (feed.closed, feed.viewers) == (True, 0)
        with hub.watching(queue_name) as again:
            assert again is not feed
            with anyio.fail_after(30):
                assert await again.after(0) is not None
            hub.close()
            assert await again.after(1000) is None


@pytest.mark.anyio
async def test_a_slow_viewer_gets_what_it_missed(cluster_url: str, queue_name: str) -> None:
    async with shardq.connect(cluster_url) as client:
        queue = await client.queue(queue_name, shards=4)
        feed = Feed(client, queue_name)
        slow = Difference("")
        first = json.loads(slow.to(await feed._read()))
        assert len(first["rows"]) == 4
        async with queue.producer() as producer:
            for number in range(3):
                await producer.send(number, key=f"user:{number}")
                await feed._read()
        event = json.loads(slow.to(await feed._read()))
        assert sum(row[5] for row in event["rows"]) == 3
        assert json.loads(slow.to(Reading()))["gone"] == [0, 1, 2, 3]


# -- text --------------------------------------------------------------------------------------------------------------


def test_what_does_not_print_is_escaped() -> None:
    assert printable("a\u202eb\x1b[1m\n\tc") == "a\\u202eb\\x1b[1m\n\tc"
    assert text_of(b"\xff") == "base64:/w=="
    assert text_of({"a": float("nan")}) == '{\n  "a": "nan"\n}'


def test_long_values_are_cut() -> None:
    assert cut("x" * MAX_VALUE_CHARS, MAX_VALUE_CHARS) == "x" * MAX_VALUE_CHARS
    assert cut("x" * 12, 10) == "xxxxxxxxxx ... (2 more characters)"


def test_stopping_ends_open_streams(cluster_url: str, queue_name: str, tmp_path: Path) -> None:
    declare(cluster_url, queue_name, 2)
    with consoles(tmp_path, cluster_url) as console:
        streams = [Stream(console, queue_name) for _ in range(3)]
        for stream in streams:
            stream.next()
        console.command.process.terminate()
        until(lambda: console.command.process.poll() == 0, "the console's end")
        for stream in streams:
            stream.close()
