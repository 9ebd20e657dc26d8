"""The guide, run: every snippet and every command of every page, as a reader would, in a folder of the page's own.

Conventions, which docs/guide/README.md tells the reader too:
- a python block is a whole file; its first line, `# NAME.py`, says which. Those of a page lie in one folder, together
  with run.py, and are run by the page's commands: `python run.py NAME` (its `main(client)`), `shardq work NAME:worker`,
  `python NAME.py`, `pytest NAME.py`
- a sh block is what is typed there, line by line; `ID` is the first id in what the command before it printed. Commands
  that run until Ctrl-C go on until the block is through, get a SIGTERM then, and must end with status 0
- a text block behind it is what was printed: each of its lines must come, runs of blanks counting as one; `...` stands
  for anything
Nothing is left out: a block of another kind, a file that no command names and a command that fails are failures here.
"""

from __future__ import annotations

import inspect
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import click
import pytest

import shardq
from shardq.cli.app import cli
from shardq.core.effects import Atomic
from shardq.ops.local_cluster import LocalCluster, find_server

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guide"
PAGES = sorted(GUIDE.glob("*.md"))
BIN = Path(sys.executable).parent
PORT = 7000
DEADLINE_S = 40

UNTIL_STOPPED = ("shardq console ", "shardq work ", "shardq tail ", "shardq archive ", "shardq coordinator ")
ENDS_BY_ITSELF = ("shardq archive cat ",)

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\w+)\.py\n")
_ID = re.compile(r"[\w.-]+/\d+/[0-9a-f]{16}\b|\b\d+/\d+-\d+(?:/\d+)?\b")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Kind and text of every block, in order."""
    return [(found[1], found[2]) for found in _BLOCK.finditer(page.read_text())]


def files(page: Path) -> dict[str, str]:
    """The python blocks by their names."""
    found = {}
    for kind, text in blocks(page):
        if kind == "python":
            name = _FILE.match(text)
            assert name is not None, f"{page.name}: a snippet without its file's name: {text[:60]!r}"
            assert name[1] not in found, f"{page.name}: two files {name[1]}.py"
            found[name[1]] = text
    return found


def lines(text: str) -> list[str]:
    """The commands of a sh block, without what is said about them."""
    stripped = [line.split("  # ")[0].strip() for line in text.splitlines()]
    return [line for line in stripped if line and not line.startswith("#")]


RUN = files(GUIDE / "README.md")["run"]


@pytest.fixture(scope="module")
def cluster_url() -> Iterator[str]:
    """What `shardq up` gives, on ports that are free."""
    with LocalCluster(masters=3, replicas=0, port=None, server=find_server(None)) as cluster:
        yield cluster.url


class Reader:
    """Someone who follows a page in `folder`."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.printed = ""
        self._output = folder / "output.txt"
        self._output.touch()
        self.save("run", RUN)

    def save(self, name: str, text: str) -> None:
        (self.folder / f"{name}.py").write_text(self.ported(text))

    def ported(self, text: str) -> str:
        return text.replace(f"redis://127.0.0.1:{PORT}", self.url)

    @property
    def _environment(self) -> dict[str, str]:
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"SHARDQ_URL": self.url, "PYTHONUNBUFFERED": "1", "PATH": path}

    def type(self, text: str, expected: list[str]) -> None:
        """Types the lines of a sh block and waits until all that it should print is there."""
        start = self._output.stat().st_size
        with ExitStack() as stack:
            for line in lines(text):
                self._type(line, stack)
            self._wait_for(expected, start)

    def _type(self, line: str, stack: ExitStack) -> None:
        if re.search(r"\bID\b", line):
            found = _ID.findall(self.printed)
            assert found, f"{line}: no id in {self.printed!r}"
            line = re.sub(r"\bID\b", found[0], line)
        background = line.startswith(UNTIL_STOPPED) and not line.startswith(ENDS_BY_ITSELF)
        before = self._output.stat().st_size
        with self._output.open("ab") as output:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {line}" if background else line],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        if background:
            stack.callback(self._stop, process, line)
            return
        try:
            status = process.wait(DEADLINE_S)
        finally:
            process.kill()
        self.printed = self._output.read_text()[before:]
        assert status == 0, f"{line}: status {status}\n{self.printed}"

    def _stop(self, process: subprocess.Popen[bytes], line: str) -> None:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(DEADLINE_S) == 0, f"{line}\n{self._output.read_text()}"
        finally:
            process.kill()

    def _wait_for(self, expected: list[str], start: int) -> None:
        started = time.monotonic()
        while missing := [line for line in expected if not self._has(line, start)]:
            output = self._output.read_bytes()[start:].decode()
            assert time.monotonic() - started < DEADLINE_S, f"not printed: {missing}\nbut:\n{output}"
            time.sleep(0.05)

    def _has(self, line: str, start: int) -> bool:
        words = " ".join(line.split())
        pattern = re.compile(".*".join(map(re.escape, words.split("..."))))
        output = self._output.read_bytes()[start:].decode().splitlines()
        return any(pattern.fullmatch(" ".join(each.split())) for each in output)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.stem))
def test_a_page_does_what_it_says(page: Path, cluster_url: str, tmp_path: Path) -> None:
    reader = Reader(tmp_path, cluster_url)
    for name, text in files(page).items():
        reader.save(name, text)
    found = blocks(page)
    for index, (kind, text) in enumerate(found):
        if kind == "sh":
            following = found[index + 1] if index + 1 < len(found) else ("", "")
            reader.type(text, following[1].splitlines() if following[0] == "text" else [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.stem))
def test_nothing_is_left_out(page: Path) -> None:
    found = blocks(page)
    assert {kind for kind, _ in found} <= {"python", "sh", "text"}
    assert page.read_text().count("```") == 2 * len(found)
    for before, (kind, _) in zip([("", ""), *found], found, strict=False):
        assert kind != "text" or before[0] == "sh", "what is printed stands behind the commands that print it"
    typed = [line for kind, text in found if kind == "sh" for line in lines(text)]
    for name in set(files(page)) - {"run", "conftest"}:
        assert any(re.search(rf"\b{name}\b", line) for line in typed), f"{page.name}: nothing runs {name}.py"


def test_the_index_names_every_page() -> None:
    named = re.findall(r"\]\(([\w-]+\.md)\)", (GUIDE / "README.md").read_text())
    assert sorted(named) == sorted(page.name for page in PAGES if page.name != "README.md")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([\w-]+))?\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}, anchor


CLASSES = {
    "client": shardq.Client,
    "job": shardq.Job,
    "message": shardq.Message,
    "notices": shardq.Notices,
    "producer": shardq.Producer,
    "queue": shardq.Queue,
    "tx": Atomic,
    "worker": shardq.Worker,
}
NAMED = re.compile(rf"(?<![\w.])({'|'.join(CLASSES)})\.(\w+)")  # not within a longer dotted name
INLINE = [
    pytest.param(code, id=f"{page.stem if page.parent == GUIDE else 'front'}-{number}")
    for page in (*PAGES, ROOT / "README.md")
    for number, code in enumerate(re.findall(r"`([^`]+)`", _BLOCK.sub("", page.read_text())))
    if re.match(r"shardq \w", code) or NAMED.search(code)
]


@pytest.mark.parametrize("code", INLINE)
def test_what_the_text_names_exists(code: str) -> None:
    for variable, name in NAMED.findall(code):
        assert hasattr(CLASSES[variable], name) or f"self.{name}" in inspect.getsource(CLASSES[variable]), code
    if not code.startswith("shardq "):
        return
    words = code.replace("\\", "").split()
    command: click.Command = cli
    for word in words[1:]:
        if isinstance(command, click.Group) and word != "QUEUE":
            found = [command.get_command(click.Context(command), each) for each in word.split("|")]
            assert all(found), f"`{code}`: no such command"
            command = found[0] or command
    options = {option for each in command.params for option in each.opts}
    assert {word for word in words if word.startswith("--")} <= options, code
