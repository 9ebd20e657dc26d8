"""A Prometheus of the test's own, and what to ask it. Without one the tests are skipped, but in CI they fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shardq.storage.nodes import free_ports

HOST = "127.0.0.1"
DEADLINE_S = 60.0


def find(program: str) -> str:
    """Where `prometheus` or `promtool` is."""
    found = shutil.which(program)
    if found is None:
        message = f"no {program} here: install Debian's package prometheus"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return found


class Prometheus:
    """A running server."""

    def __init__(self, port: int) -> None:
        self._base = f"http://{HOST}:{port}"

    def get(self, path: str, **query: str) -> Any:
        """The `data` of an API's answer; raises AssertionError with Prometheus' own words for a bad query."""
        url = f"{self._base}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.loads(answer.read())["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from error

    def ask(self, query: str) -> dict[tuple[tuple[str, str], ...], float]:
        """An instant query: value by labels, without the metric's name."""
        found = {}
        for item in self.get("query", query=query)["result"]:
            labels = {name: value for name, value in item["metric"].items() if name != "__name__"}
            found[tuple(sorted(labels.items()))] = float(item["value"][1])
        return found

    def one(self, query: str) -> float | None:
        """The only value, None without one."""
        values = list(self.ask(query).values())
        assert len(values) < 2, (query, values)
        return values[0] if values else None

    def series(self, query: str, seconds: float) -> list[Any]:
        """A range query over the last `seconds`, as a panel asks."""
        now = time.time()
        found = self.get("query_range", query=query, start=str(now - seconds), end=str(now), step="1")["result"]
        assert isinstance(found, list)
        return found

    @property
    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._base}/-/ready", timeout=10):
                return True
        except OSError:
            return False


@contextmanager
def scraping(folder: Path, targets: Sequence[str]) -> Iterator[Prometheus]:
    """A Prometheus that scrapes `targets` (host:port) every second, with the project's alerts."""
    (port,) = free_ports(HOST, 1)
    config = folder / "prometheus.yml"
    rules = Path(__file__).parents[2] / "grafana/alerts.yml"
    jobs = [{"job_name": "shardq", "static_configs": [{"targets": list(targets)}]}]
    every = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config.write_text(json.dumps({"global": every, "rule_files": [str(rules)], "scrape_configs": jobs}))
    command = [find("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={HOST}:{port}"], stdout=log, stderr=log)
    try:
        server, deadline = Prometheus(port), time.monotonic() + DEADLINE_S
        while not server.ready:
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            assert time.monotonic() < deadline, "Prometheus does not answer"
            time.sleep(0.05)
        yield server
    finally:
        process.kill()
        process.wait()
