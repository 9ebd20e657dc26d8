"""`shardq up` as a user runs it: a process of its own, its one line of output, its signals and its exit status."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import anyio
import pytest
import trustme

import shardq
from shardq.cli.app import COMMANDS, run
from shardq.storage.nodes import TlsFiles, free_ports, node_command, node_info
from tests.security.tls import make_files

HOST = "127.0.0.1"
READY_WITHIN_S = 60.0
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_up(server_binary: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts `shardq up` with these arguments; its temporary files go where the test can look at them."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "shardq", "up", "--server-binary", str(server_binary), *arguments]
        environment = {**os.environ, "TMPDIR": str(tmp_path), **variables}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], READY_WITHIN_S)
    assert ready, "no line on stdout in time"
    return process.stdout.readline()


def server_pids(port: int, count: int) -> list[int]:
    return [int(node_info(HOST, port + index, "server")["process_id"]) for index in range(count)]


def all_gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() or _answers(pid) for pid in pids)


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pids: list[int], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not all_gone(pids):
        assert time.monotonic() < deadline, f"still there: {pids}"
        time.sleep(0.02)


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_prints_the_url_and_stops_cleanly(start_up: Start, stop_signal: signal.Signals, tmp_path: Path) -> None:
    port = free_ports(HOST, 3)[0]
    process = start_up("--port", str(port))
    assert first_line(process) == f"redis://127.0.0.1:{port}\n"
    assert node_info(HOST, port, "cluster")["cluster_state"] == "ok"
    pids = server_pids(port, 3)
    # To the whole group, as a terminal does with Ctrl-C: the servers must still be stopped by their parent, in order.
    os.killpg(process.pid, stop_signal)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (0, "")
    assert re.search(r"server v=\d+\.\d+\.\d+ \(.*\), 3 nodes\n", stderr)
    assert "Traceback" not in stderr
    assert all_gone(pids)
    assert list(tmp_path.iterdir()) == []


# What becomes of the processes is up to `shardq up`, whatever server they run; that each kind starts and stops is above
# and in ops/test_local_cluster.py.
only_one_kind = pytest.mark.server_kinds("valkey9")


@only_one_kind
def test_a_signal_while_starting_leaves_nothing(start_up: Start, tmp_path: Path) -> None:
    process = start_up("--port", str(free_ports(HOST, 3)[0]))
    deadline = time.monotonic() + READY_WITHIN_S
    while not (logs := list(tmp_path.glob("shardq-*/*/server.log"))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert logs
    assert list(tmp_path.iterdir()) == []


@only_one_kind
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a signal for the death of the parent")
def test_sigkill_of_the_parent_leaves_no_server(start_up: Start) -> None:
    port = free_ports(HOST, 3)[0]
    process = start_up("--port", str(port))
    first_line(process)
    pids = server_pids(port, 3)
    process.kill()
    process.wait(timeout=10)
    wait_until_gone(pids)


PASSWORD = "p%s w/#rd"


@pytest.mark.server_kinds("redis7")  # those of the wheels are built without TLS
def test_a_password_and_tls(start_up: Start, tmp_path: Path) -> None:
    """The URL holds for clients that put the password in, and no other client gets in."""
    port, files = free_ports(HOST, 2)[0], make_files(tmp_path, "up", trustme.CA(), HOST)
    tls = ["--tls-cert", files.certificate, "--tls-key", files.key, "--tls-ca", files.authority]
    process = start_up(
        "--port", str(port), "--masters", "1", "--replicas", "1", "--password-env", "SECRET", *map(str, tls),
        SECRET=PASSWORD,
    )  # fmt: skip
    url = first_line(process).strip()
    assert url.startswith(f"rediss://{HOST}:{port}?ssl_ca_certs=")
    with_password = url.replace("://", f"://:{quote(PASSWORD, safe='')}@")

    async def send() -> str:
        async with shardq.connect(with_password) as client:
            assert client.confirm(None) is not None, "the replica is linked"
            queue = await client.queue("q", shards=1)
            async with queue.producer() as producer:
                await producer.send("x")
            return str([message.value async for message in queue.history()])

    assert anyio.run(send) == "['x']"
    shown = TlsFiles(files.authority, files.certificate, files.key)
    assert node_command(HOST, port, "PING", password=PASSWORD, tls=shown) == "PONG"
    with pytest.raises(shardq.StoreError, match="refused"):
        node_command(HOST, port, "PING", tls=shown)
    with pytest.raises(shardq.StoreUnavailable):
        node_command(HOST, port, "PING", password=PASSWORD)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (0, "")
    assert "password of $SECRET" in stderr
    assert PASSWORD not in url + stderr


def test_files_and_passwords_that_are_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    (tmp_path / "cert.pem").touch()
    try:
        assert run(["up", "--password-env", "NO_SUCH_VARIABLE"]) == 1
        assert "NO_SUCH_VARIABLE is not set" in capsys.readouterr().err
        assert run(["up", "--tls-cert", str(tmp_path / "cert.pem")]) == 2
        assert "name all three files" in capsys.readouterr().err
        assert run(["up", "--tls-key", "/nowhere/key.pem"]) == 2
        assert "does not exist" in capsys.readouterr().err
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@only_one_kind
def test_a_server_that_dies_is_named(start_up: Start) -> None:
    port = free_ports(HOST, 3)[0]
    process = start_up("--port", str(port))
    first_line(process)
    pids = server_pids(port, 3)
    os.kill(pids[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"error: The server on port {port + 1} (pid {pids[1]}) died while running" in stderr
    assert all_gone(pids)


@only_one_kind
def test_a_port_in_use_is_one_line_and_status_1(start_up: Start) -> None:
    port = free_ports(HOST, 3)[0]
    with socket.create_server((HOST, port + 2)):
        process = start_up("--port", str(port))
        stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (1, "")
    assert re.fullmatch(rf"error: Port {port + 2} .* is in use: .*--port\)\.", stderr.splitlines()[-1])
    assert "Traceback" not in stderr


def test_no_server_is_an_error_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = run(["up", "--server-binary", "/nowhere/redis-server"])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    captured = capsys.readouterr()
    assert (status, captured.out) == (1, "")
    assert re.fullmatch(r"error: --server-binary=/nowhere/redis-server is no .*shardq\[local\]'\.\n", captured.err)


@pytest.mark.parametrize("arguments", [["nosuch"], ["up", "--nosuch"], ["up", "--masters", "0"]], ids=" ".join)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert "Usage: shardq" in capsys.readouterr().err


def test_help_imports_no_command() -> None:
    script = (
        "import sys; from shardq.cli.app import run; status = run(['--help'])\n"
        "loaded = [name for name in sys.modules if name.startswith(('shardq.cli.up', 'shardq.ops', 'redis'))]\n"
        "assert (status, loaded) == (0, []), (status, loaded)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for name, entry in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(entry.help[:20])}", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    assert f"Example: shardq {name}" in capsys.readouterr().out
