"""The README, run: every command and every snippet in it, as a reader would, in a folder of its own."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

import shardq
from shardq.storage.nodes import free_ports
from tests.runtime.harness import until

HOST = "127.0.0.1"
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent

COMMANDS = {
    "make demo",
    "make test",
    "shardq up",
    "python billing.py",
    "shardq work billing:worker --processes 2",
    "shardq status orders",
    "shardq status orders --json",
    "shardq exporter --port 9400",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> set[str]:
    lines = [line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return {line for line in lines if line}


def test_every_command_in_the_readme_is_run_here() -> None:
    assert commands() == COMMANDS


def test_it_stays_short() -> None:
    assert len(README.splitlines()) <= 200


def test_the_first_screen_shows_what_it_should() -> None:
    first = README.splitlines()[:60]
    text = "\n".join(first)
    assert "make demo" in text
    assert "make test" in text
    assert len([line for line in blocks("python")[0].splitlines() if line]) <= 15
    picture = re.search(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert picture is not None
    assert (ROOT / picture.group(1)).is_file()


class Reader:
    """Someone who follows the README in `folder`, on ports that are free here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, _, _, self.metrics_port = free_ports(HOST, 4)
        (folder / "billing.py").write_text(self.ported(blocks("python")[0]))

    def ported(self, text: str) -> str:
        return text.replace("7000", str(self.port)).replace("9400", str(self.metrics_port))

    def argv(self, command: str) -> list[str]:
        words = shlex.split(self.ported(command))
        words[0] = str(BIN / words[0])
        return [*words, "--port", str(self.port)] if command == "shardq up" else words

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"SHARDQ_URL": f"redis://127.0.0.1:{self.port}", "PYTHONUNBUFFERED": "1"}

    def run(self, command: str) -> str:
        done = subprocess.run(
            self.argv(command),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def running(self, command: str) -> Iterator[Path]:
        """The command goes on in the background; gives the file that its output goes to."""
        output = self.folder / f"output-{len(list(self.folder.iterdir()))}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                self.argv(command), cwd=self.folder, env=self.environment, stdout=file, stderr=subprocess.STDOUT
            )
        try:
            yield output
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, output.read_text()


def wait_for(condition: Any, what: str, deadline_s: float = 40) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < deadline_s, f"waited for {what}"
        time.sleep(0.05)


def test_the_fifteen_lines_and_their_commands(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    with reader.running("shardq up") as up:
        wait_for(lambda: "redis://" in up.read_text(), "the cluster's URL")
        reader.run("python billing.py")
        with reader.running("shardq work billing:worker --processes 2") as work:
            wait_for(lambda: "billed user:42 7" in work.read_text(), "the order to be billed")
            assert "OWNER" in reader.run("shardq status orders")
            assert reader.run("shardq status orders --json").startswith(("{", "["))
            with reader.running("shardq exporter --port 9400"):
                metrics = f"http://127.0.0.1:{reader.metrics_port}/metrics"
                wait_for(lambda: "shardq_messages_acked_total" in _fetch(metrics), "the metrics")
        anyio.run(_snippets, f"redis://127.0.0.1:{reader.port}")


def _fetch(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


async def _snippets(url: str) -> None:
    """The snippets behind the first: sending, and a batch handler that gets what was sent."""
    space: dict[str, Any] = {"shardq": shardq}
    for block in blocks("python")[1:]:
        exec(compile(block, "README.md", "exec"), space)
    async with shardq.connect(url) as client:
        await (await client.queue("orders")).open_group("archive")
        await space["send_some"](client)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(space["archiver"].run, client)
            queue = await client.queue("orders")
            await until(lambda: finished(queue, "archive", 10_002), 40, "the archive to have handled all")
            space["archiver"].stop()


async def finished(queue: shardq.Queue, group: str, count: int) -> bool:
    return sum(shard.groups[group].acked for shard in (await queue.counters()).values()) >= count


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_make_demo_does_what_it_says() -> None:
    done = subprocess.run(["make", "demo"], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "27,004" in done.stdout


def test_make_test_runs_pytest() -> None:
    """This very run is what `make test` starts; here only that it does."""
    shown = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "pytest" in shown.stdout
