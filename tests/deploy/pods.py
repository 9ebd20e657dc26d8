"""Containers as processes of this machine, treated as Kubernetes treats pods: probes over HTTP, SIGTERM and the grace
period, SIGKILL after it. As root each is process 1 of its own PID namespace with its own host name, as in a pod; else a
plain process. No image and no isolation of files or network.

What is not as in the manifests: the ports (several pods share this machine) and the address they listen on (127.0.0.1);
the pauses between probes are shorter, and minReadySeconds is not waited for, which is harder on the workers.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from shardq.ops.processes import die_with_parent
from shardq.storage.nodes import free_ports
from tests.deploy.manifests import DEPLOY, ROOT, Container, find
from tests.runtime.harness import until

HOST = "127.0.0.1"
READY_WITHIN_S = 60.0
# Process 1 of a namespace, under its pod's name.
_APART = [
    "unshare",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "--uts",
    "sh",
    "-c",
    'hostname "$HOSTNAME" && exec "$0" "$@"',
]


@cache
def can_be_apart() -> bool:
    """Whether this user may make namespaces here: root mostly may, in a container often not."""
    if sys.platform != "linux":
        return False
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts", "hostname", "apart"]
    return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0


def answer(url: str, timeout_s: float) -> tuple[int, str]:
    """Status and text; 0 and the fault where nothing answers in time."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as found:
            return found.status, found.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


class Pod:
    """One container that runs."""

    def __init__(self, container: Container, folder: Path, programs: Path) -> None:
        self.container = container
        self.serving = False  # ready once, and not told to stop
        self.ports = dict(zip(container.ports, free_ports(HOST, len(container.ports) or 1), strict=False))
        self._out, self._errors = folder / f"{container.name}.out", folder / f"{container.name}.err"
        path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
        if shutil.which(container.command[0], path=path) is None:
            find(container.command[0], "Debian's package of this name")
        environment = {**container.environment, "HOSTNAME": container.name, "PATH": path, "PYTHONPATH": str(ROOT)}
        if "METRICS_PORT" in environment and self.ports:
            environment["METRICS_PORT"] = str(self.ports["metrics"])
        command = [self._here(word) for word in container.command]
        with self._out.open("wb") as out, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*(_APART if can_be_apart() else []), *command],
                env=environment,
                cwd=DEPLOY / "app",
                stdout=out,
                stderr=errors,
                preexec_fn=_parent_watch(),
            )

    def _here(self, word: str) -> str:
        for name, port in self.container.ports.items():
            word = word.replace(str(port), str(self.ports[name]))
        return word.replace("0.0.0.0", HOST)

    @property
    def name(self) -> str:
        return self.container.name

    @property
    def lines(self) -> list[str]:
        return self._out.read_text().splitlines()

    @property
    def log(self) -> str:
        return self._errors.read_text()

    @property
    def first_pid(self) -> int | None:
        """The container's process 1 as this machine numbers it; None before it is the program of its command."""
        pid = self.process.pid
        if can_be_apart():
            within = _children(pid)
            if not within:
                return None
            pid = within[0]
        program = Path(self.container.command[0]).name
        try:
            begun = Path(f"/proc/{pid}/comm").read_text().strip() == program
        except OSError:
            return None
        # tini sets itself up in the moment before it starts its child.
        return pid if begun and (program != "tini" or _children(pid)) else None

    async def probe(self, kind: str) -> str:
        """Empty when the probe of the manifest is content, else why not."""
        wanted: dict[str, Any] = self.container.probes[kind]["httpGet"]
        url = f"http://{HOST}:{self.ports[wanted['port']]}{wanted['path']}"
        status, text = await anyio.to_thread.run_sync(answer, url, self.container.probes[kind]["timeoutSeconds"])
        return "" if 200 <= status < 400 else f"{kind} of {self.name}: {status} {text.strip()}"

    async def ready(self) -> None:
        """Waits as the kubelet does: first the start-up probe, then the readiness probe."""
        for kind in [kind for kind in ("startup", "readiness") if kind in self.container.probes]:

            async def content(kind: str = kind) -> bool:
                assert self.process.poll() is None, f"{self.name} ended: {self.log}"
                return not await self.probe(kind)

            await until(content, READY_WITHIN_S, f"the {kind} probe of {self.name}")
        self.serving = True

    async def terminate(self) -> int:
        """SIGTERM to process 1, then the grace period; its exit status. Fails where Kubernetes would send SIGKILL."""
        await until(lambda: self.first_pid is not None, READY_WITHIN_S, f"process 1 of {self.name}")
        pid = self.first_pid
        assert pid is not None
        self.serving = False
        os.kill(pid, signal.SIGTERM)
        with anyio.move_on_after(self.container.grace_s):
            while self.process.poll() is None:  # noqa: ASYNC110 # another process ends
                await anyio.sleep(0.02)
        assert self.process.poll() is not None, f"{self.name} outlived its {self.container.grace_s:g} s: {self.log}"
        return int(self.process.returncode)

    def kill(self) -> None:
        """SIGKILL, as when a node dies: also the way out of a failed test."""
        self.serving = False
        for pid in _children(self.process.pid) if can_be_apart() else []:
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _parent_watch() -> Any:
    parent = os.getpid()
    return lambda: die_with_parent(parent)


@dataclass
class Machine:
    """Starts pods and forgets none."""

    folder: Path
    programs: Path
    pods: list[Pod] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)

    def start(self, container: Container) -> Pod:
        pod = Pod(container, self.folder, self.programs)
        self.pods.append(pod)
        return pod

    def name(self, workload: str) -> str:
        """A pod's name: never the same twice."""
        self.numbers[workload] = self.numbers.get(workload, 0) + 1
        return f"{workload}-{self.numbers[workload]}"

    async def complete(self, container: Container) -> None:
        """Runs a container that has to end by itself, and well."""
        pod = self.start(container)
        await until(lambda: pod.process.poll() is not None, READY_WITHIN_S, f"the end of {pod.name}")
        assert pod.process.returncode == 0, pod.log


@contextmanager
def machine(folder: Path, programs: Path) -> Iterator[Machine]:
    found = Machine(folder, programs)
    try:
        yield found
    finally:
        for pod in found.pods:
            pod.kill()
