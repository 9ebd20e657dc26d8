"""The console's page in a headless Chromium, on a real cluster: what a person sees, clicks and types there."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shardq.ops.local_cluster import LocalCluster, find_server
from tests.cli.support import commands, until
from tests.console.browser import Browser, Page, chromium
from tests.console.rig import GROUP, Console, consoles, dead_letters, declare, handle, send

PAYLOAD = '<img src=x onerror="globalThis.broken=1"><script>globalThis.broken=1</script>'
LIVE = "document.querySelector('#live')?.dataset.state === 'live' && document.querySelectorAll('.cell').length"


@pytest.fixture(scope="module")
def cluster_url(shared_clusters: Callable[[Path], LocalCluster]) -> str:
    """A shared cluster of the server that is found first: no server kind changes the page."""
    return shared_clusters(find_server(None)).url


@pytest.fixture(scope="module")
def console(cluster_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    with consoles(tmp_path_factory.mktemp("console"), cluster_url, "--write") as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A new page; nothing it does may end in an error or a warning on its console."""
    opened = browser.page()
    yield opened
    assert opened.said == []
    opened.close()


@pytest.fixture
def queue(cluster_url: str, queue_name: str) -> str:
    declare(cluster_url, queue_name, 12)
    return queue_name


def look_at(page: Page, console: Console, queue: str, **query: str) -> None:
    page.open(console.page(queue=queue, group=GROUP, **query))
    page.until(LIVE)


def tile(title: str) -> str:
    """JavaScript for the text of a total."""
    return f"[...document.querySelectorAll('.tile')].find(t => t.innerText.startsWith('{title}')).innerText"


def test_it_loads_and_follows_the_queue(page: Page, console: Console, queue: str, cluster_url: str) -> None:
    look_at(page, console, queue)
    assert page.js("document.querySelectorAll('.cell').length") == 12
    assert page.js("document.querySelectorAll('#nodes li').length") == 3
    assert page.js("document.title") == f"{queue} - shardq console"
    assert page.js("location.hash") == "", "the token does not stay in the address"
    assert page.js(f"{tile('Backlog')}.includes('\\n0')")
    send(cluster_url, queue, [("user:1", n) for n in range(25)])
    page.until(f"{tile('Backlog')}.includes('25')", "the backlog to rise by itself")
    page.until("[...document.querySelectorAll('.cell b')].some(b => b.textContent === '25')")
    assert page.js("document.querySelectorAll('.cell.v2').length") == 1
    handle(cluster_url, queue, 25)
    page.until(f"{tile('Backlog')}.includes('\\n0')", "the backlog to fall")


def test_a_dead_letter_is_read_and_replayed_by_clicking(
    page: Page, console: Console, queue: str, cluster_url: str
) -> None:
    send(cluster_url, queue, [("user:1", {"n": 1}), ("user:2", {"n": 2})])
    handle(cluster_url, queue, 2, error="the bank did not answer")
    look_at(page, console, queue)
    page.until("document.querySelector('#dead-count').textContent === '2'")
    page.click("#tab-dead")
    page.until("document.querySelectorAll('#dead tr[data-id]').length === 2")
    page.click("#dead tr[data-id] button")
    page.until("document.querySelectorAll('#dead pre').length >= 3", "error, value and traceback")
    assert "ValueError" in page.text("#dead tr.open")
    assert page.js("document.querySelector('#replay').getAttribute('aria-disabled')") == "true"
    key = page.text("#dead tr[data-id] td:nth-child(4)")
    page.click("#dead tr[data-id] input")
    page.click("#replay")
    page.until("document.querySelector('#said').textContent === '1 dead letter replayed.'")
    page.until("document.querySelectorAll('#dead tr[data-id]').length === 1")
    assert handle(cluster_url, queue, 1) == [{"n": int(key[-1])}]
    page.click("#dead tr[data-id] input")
    page.click("#purge")
    page.until("document.querySelector('#ask').open")
    page.press("Escape")
    page.until("!document.querySelector('#ask').open")
    assert dead_letters(cluster_url, queue) == 1, "nothing is purged before it was confirmed"
    page.click("#purge")
    page.click("#ask-yes")
    page.until("document.querySelector('#said').textContent === '1 dead letter purged.'")
    assert dead_letters(cluster_url, queue) == 0


def test_all_that_fit_a_filter(page: Page, console: Console, queue: str, cluster_url: str) -> None:
    send(cluster_url, queue, [("user:1", 1), ("user:2", 2), ("user:3", 3)])
    handle(cluster_url, queue, 3, error="the bank did not answer")
    look_at(page, console, queue, tab="dead")
    page.until("document.querySelectorAll('#dead tr[data-id]').length === 3")
    page.click("#dead-form [name=key]")
    page.type("user:2")
    page.press("Enter")
    page.until("document.querySelectorAll('#dead tr[data-id]').length === 1")
    page.click("#replay-all")
    page.until("document.querySelector('#ask-text').textContent.includes('user:2')")
    page.click("#ask-yes")
    page.until("document.querySelector('#said').textContent === '1 dead letter replayed.'")
    assert handle(cluster_url, queue, 1) == [2]
    assert dead_letters(cluster_url, queue) == 2


def test_read_only_says_so_and_writes_nothing(page: Page, queue: str, cluster_url: str, tmp_path: Path) -> None:
    send(cluster_url, queue, [("user:1", 1)])
    handle(cluster_url, queue, 1, error="the bank did not answer")
    with consoles(tmp_path, cluster_url) as reading:
        look_at(page, reading, queue, tab="dead")
        assert page.text("#mode") == "Read-only"
        page.click("#dead tr[data-id] input")
        assert "--write" in page.text("#dead-note")
        for button in ("replay", "purge", "replay-all", "purge-all"):
            assert page.js(f"document.getElementById('{button}').getAttribute('aria-disabled')") == "true"
            page.click(f"#{button}")
            page.until("document.querySelector('#said').textContent.includes('Read-only')")
        page.open("about:blank")
    assert dead_letters(cluster_url, queue) == 1


def test_a_wrong_token_is_not_taken_and_a_right_one_is(browser: Browser, console: Console, queue: str) -> None:
    page = browser.page()
    page.open(f"{console.url}?queue={queue}&group={GROUP}#token=wrong")
    page.until(LIVE)
    page.until("document.querySelector('#said').textContent.startsWith('Not taken')")
    assert page.text("#mode") == "Enter token"
    page.click("#mode")
    page.until("document.activeElement.id === 'ask-input'")
    page.type(console.token)
    page.press("Enter")
    page.until("document.querySelector('#mode').textContent === 'May write'")
    assert all("401" in line for line in page.said), "the browser's own note of the refused try is all there is"
    page.close()


def test_what_users_send_is_text(page: Page, console: Console, queue: str, cluster_url: str) -> None:
    send(cluster_url, queue, [(PAYLOAD, {PAYLOAD: PAYLOAD}), (PAYLOAD, PAYLOAD)], headers={PAYLOAD: PAYLOAD})
    handle(cluster_url, queue, 2, error=PAYLOAD)
    send(cluster_url, queue, [(PAYLOAD, {PAYLOAD: PAYLOAD})], headers={PAYLOAD: PAYLOAD})
    look_at(page, console, queue, tab="dead")
    page.click("#dead tr[data-id] button")
    page.until("document.querySelectorAll('#dead pre').length >= 4")
    assert PAYLOAD in page.text("#dead tr.open pre")
    assert page.text("#dead tr[data-id] td:nth-child(4)") == PAYLOAD
    page.click("#tab-messages")
    page.click("#peek-form button")
    page.until("document.querySelectorAll('#messages tr[data-id]').length")
    page.click("#messages tr[data-id] button")
    page.until("document.querySelectorAll('#messages pre').length === 2", "value and headers")
    assert json.loads(page.text("#messages pre")) == {PAYLOAD: PAYLOAD}
    page.open(console.page(queue=PAYLOAD, group=PAYLOAD, tab=PAYLOAD, shard=PAYLOAD))
    page.until(LIVE)
    assert page.js("document.querySelectorAll('main img, main script, main b img').length") == 0
    assert page.js("globalThis.broken") is None


def test_workers_and_their_leases(page: Page, console: Console, queue: str, cluster_url: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import shardq\n"
        f"worker = shardq.Worker({queue!r}, group={GROUP!r}, name='bill-7')\n"
        "@worker.handler\n"
        "async def take(message): pass\n"
    )
    look_at(page, console, queue)
    assert page.js("document.querySelectorAll('.cell.free').length") == 12
    with commands(tmp_path) as start:
        worker = start("work", "app:worker", "--url", cluster_url)
        page.until("document.querySelectorAll('.cell.free').length === 0", "every shard to be held")
        page.click("[data-measure=owner]")
        page.until("[...document.querySelectorAll('.cell b')].every(b => b.textContent === 'bill-7')")
        page.click("#tab-workers")
        page.until("document.querySelector('#workers tbody').innerText.includes('0-11')")
        assert [page.text(f"#workers tbody tr > :nth-child({n})") for n in (1, 2, 3)] == ["bill-7", "leads", "12"]
        page.click("#pause")
        page.until("document.querySelector('#ask').open")
        page.click("#ask-yes")
        page.until("document.querySelector('#pause-note').textContent.startsWith('Paused')")
        page.until("document.querySelector('#workers').innerText.includes('nobody holds: 0-11')")
        page.click("#pause")
        page.until("document.querySelector('#pause-note').textContent === ''", "it to be resumed without a question")
        page.until("document.querySelector('#workers tbody').innerText.includes('0-11')")
        assert worker.stop() == 0
    page.until("document.querySelector('#workers').innerText.includes('nobody holds')")


def test_a_shard_is_found_and_opened_by_keyboard(page: Page, console: Console, queue: str) -> None:
    look_at(page, console, queue)
    page.js("document.querySelector('#tab-shards').focus()")
    for _ in range(9):  # the tab stop of the whole grid is one
        page.press("Tab")
        if page.js("document.activeElement.getAttribute('role')") == "gridcell":
            break
    assert page.js("document.activeElement.dataset.shard") == "0"
    columns = page.js("Number(document.querySelector('#grid').getAttribute('aria-colcount'))")
    for key, shard in (
        ("ArrowRight", 1),
        ("ArrowDown", 1 + columns),
        ("ArrowUp", 1),
        ("End", columns - 1),
        ("Home", 0),
        ("ArrowLeft", 0),
    ):
        page.press(key)
        assert page.js("Number(document.activeElement.dataset.shard)") == shard, key
    assert page.js("document.activeElement.getAttribute('aria-label')").startswith("Shard 0, slot 682 on 127.0.0.1")
    page.press("Enter")
    page.until("document.querySelector('#detail-title').textContent === 'Shard 0'")
    assert page.js("document.activeElement.getAttribute('aria-selected')") == "true"
    assert "shard=0" in page.js("location.search")
    page.js("document.querySelector('#tab-shards').focus()")
    page.press("ArrowRight")
    assert page.js("document.activeElement.id") == "tab-workers"
    assert page.js("document.querySelector('#panel-workers').checkVisibility()")


def test_a_screen_reader_is_told(page: Page, console: Console, queue: str) -> None:
    look_at(page, console, queue)
    there = page.tree()
    for role, name in (
        ("heading", "shardq"),
        ("combobox", "Queue"),
        ("combobox", "Group"),
        ("tab", "Shards"),
        ("tabpanel", "Shards"),
        ("grid", "Shards, coloured by the chosen measure"),
        ("gridcell", "Shard 3"),
        ("image", "Slots and nodes"),
        ("button", "Table"),
    ):
        assert any(each == role and text.startswith(name) for each, text in there), (role, name)
    page.click("#as-table")
    page.until("document.querySelectorAll('#shard-table tbody tr').length === 12")
    for tab in ("shards", "workers", "dead", "messages"):
        page.click(f"#tab-{tab}")
        unnamed = [each for each in page.tree() if each[0] in ("button", "textbox", "combobox", "tab") and not each[1]]
        assert unnamed == [], tab
    assert page.js("document.documentElement.lang") == "en"
    assert page.js("[...document.querySelectorAll('th')].every(th => th.scope)")


CONTRAST = """
(() => {
  const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
  const pen = canvas.getContext("2d", {willReadFrequently: true});
  const rgb = (name) => {
    pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  };
  const light = (name) => { const [r, g, b] = rgb(name); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ordered = (a, b) => [light(a), light(b)].sort((p, q) => q - p);
  const ratio = (a, b) => { const [x, y] = ordered(a, b); return (x + 0.05) / (y + 0.05); };
  const text = [["ink", "page"], ["ink", "card"], ["soft", "page"], ["soft", "card"], ["accent", "card"],
    ["bad", "card"], ["bad", "bad-soft"], ["good", "card"], ["warn", "card"], ["on-accent", "accent"],
    ...[0, 1, 2, 3, 4].map((n) => ["on-low", "s" + n]), ...[5, 6, 7].map((n) => ["on-high", "s" + n]),
    ...[0, 1, 2, 3, 4, 5, 6, 7].map((n) => ["on-node", "n" + n])];
  const marks = [["edge", "card"], ...[0, 1, 2, 3, 4, 5, 6, 7].map((n) => ["n" + n, "card"])];
  return [...text.map(([a, b]) => [a, b, ratio(a, b), 4.5]), ...marks.map(([a, b]) => [a, b, ratio(a, b), 3])]
    .filter(([, , found, least]) => found < least);
})()
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_keep_their_contrast(page: Page, console: Console, queue: str, theme: str) -> None:
    page.media(prefers_color_scheme=theme)
    look_at(page, console, queue)
    assert page.js("document.documentElement.dataset.theme") == theme
    assert page.js(CONTRAST) == []
    page.click("#theme")
    page.until(f"document.documentElement.dataset.theme !== '{theme}'")
    page.call("Page.reload")
    page.until(
        f"globalThis.shardqConsole && document.documentElement.dataset.theme !== '{theme}'", "it to be remembered"
    )


def test_it_fits_a_phone(page: Page, console: Console, queue: str) -> None:
    page.size(390, 844)
    look_at(page, console, queue)
    for tab in ("shards", "workers", "dead", "messages"):
        page.click(f"#tab-{tab}")
        assert page.js("document.documentElement.scrollWidth") == 390, tab


def test_a_console_that_goes_and_comes_back(browser: Browser, queue: str, cluster_url: str, tmp_path: Path) -> None:
    page = browser.page()
    with consoles(tmp_path, cluster_url) as first:
        look_at(page, first, queue)
        port = first.address.rpartition(":")[2]
    page.until("document.querySelector('#live')?.dataset.state === 'bad'", "it to say that nothing comes")
    with commands(tmp_path) as start:
        again = start("console", "--port", port, "--url", cluster_url)
        until(lambda: again.stdout.endswith("\n"), "the console to listen")
        page.until(LIVE, "it to be live again")
        page.close()
        assert again.stop() == 0


def test_1024_shards(
    page: Page, console: Console, queue_name: str, cluster_url: str, record_property: Callable[[str, object], None]
) -> None:
    declare(cluster_url, queue_name, 1024)
    look_at(page, console, queue_name)
    assert page.js("document.querySelectorAll('.cell').length") == 1024
    before = page.js("shardqConsole.readings")
    send(cluster_url, queue_name, [(f"user:{n}", n) for n in range(2000)])
    page.until(f"{tile('Backlog')}.includes('2,000')")
    page.until(f"shardqConsole.readings >= {before} + 3")
    assert page.js("document.querySelectorAll('.cell:not(.v0)').length") > 500
    took = [float(each) for each in page.js("shardqConsole.update_ms")]
    record_property("update_ms", {"first": took[0], "median": statistics.median(took[1:]), "most": max(took[1:])})
    print(
        f"1,024 shards: first {took[0]:.1f} ms, then {statistics.median(took[1:]):.1f} ms, at most {max(took[1:]):.1f}"
    )
    page.click("#as-table")
    page.until("document.querySelectorAll('#shard-table tbody tr').length === 1024")
