"""Every example, run as its README says: it must end with status 0, having said what it promises."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardq.ops.local_cluster import LocalCluster, find_server

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples"
WITHIN_S = 100

# Of each example: what it must say, beside a `yes` to each of so many promises.
SAYS = {
    "cdc": (2, ["killed the reader", "killed the worker", "the copy equals the original"]),
    "counter": (3, ["killed a worker", "every page's total is exact", "counted [1-9][0-9]* clicks twice"]),
    "email_queue": (5, ["stored: 61 queued", "killed a worker", "dead letter: closed@", "[1-9][0-9]* of 60 are lost"]),
    "event_sourcing": (5, ["4000 events of the past", "killed a worker", "once and in order", "0 of 4000 are left"]),
    "images": (4, ["uploaded the rest of", "killed a worker", "none is half written", "contact sheets show them all"]),
    "notifications": (5, ["cut [1-9][0-9]* connections", "killed a worker", "misses [1-9][0-9]*"]),
    "offload": (2, ["no worker runs yet", "killed the service; .*queued", "killed a worker", "all 120 are done"]),
    "reliable_queue": (2, ["killed a worker after", "all 200 tasks are done", "[1-9][0-9]* are lost"]),
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """What `shardq up` gives, on free ports: one kind of server, and a cluster whose connections may be cut."""
    with LocalCluster(masters=3, replicas=0, port=None, server=find_server(None)) as cluster:
        yield cluster.url


def run(url: str, name: str) -> tuple[int, str]:
    """The exit status and what was printed. What the example started ends with it, however it ends."""
    with subprocess.Popen(
        [sys.executable, "-m", f"examples.{name}"],
        cwd=ROOT,
        env=os.environ | {"SHARDQ_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=WITHIN_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"{name} did not end within {WITHIN_S} s. It said:\n{output}")
    return process.returncode, output


def test_every_example_is_run_and_in_the_readme() -> None:
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "common"}
    assert files == set(SAYS)
    readme = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"^\| \[\w+]\((\w+)\.py\)", readme, re.MULTILINE)) == files


@pytest.mark.parametrize("name", list(SAYS))
def test_example(url: str, name: str) -> None:
    status, output = run(url, name)
    promises, lines = SAYS[name]
    assert status == 0, output
    assert output.count("\n  yes  ") == promises, output
    assert "\n  NO " not in output
    for line in lines:
        assert re.search(line, output), f"it did not say {line!r}, but:\n{output}"
