"""What deploy/ holds, read as Kubernetes, compose and docker would read it: rendered overlays, the image's entry point
and environment, what a container of a pod or a service runs. Starts nothing.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = sorted(path.parent.name for path in (DEPLOY / "kubernetes/overlays").glob("*/kustomization.yaml"))

Manifest = dict[str, Any]


def find(program: str, package: str) -> str:
    """Where a program is. Without it the tests are skipped, but in CI they fail."""
    found = shutil.which(program)
    if found is None:
        message = f"no {program} here: install {package}"
        # No package registry has kubectl: it is the machine that brings it.
        if os.environ.get("CI") == "true" and program != "kubectl":
            pytest.fail(message)
        pytest.skip(message)
    return found


@cache
def rendered(overlay: str) -> tuple[Manifest, ...]:
    """What `kubectl apply --kustomize` would send for this overlay."""
    command = [find("kubectl", "kubectl 1.27 or newer"), "kustomize", str(DEPLOY / "kubernetes/overlays" / overlay)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    return tuple(yaml.safe_load_all(said.stdout))


def of_kind(manifests: Iterable[Manifest], kind: str) -> dict[str, Manifest]:
    """By name."""
    return {each["metadata"]["name"]: each for each in manifests if each["kind"] == kind}


def pod_templates(manifests: Iterable[Manifest]) -> dict[str, Manifest]:
    """Every pod template by its owner's name."""
    kinds = ("Deployment", "StatefulSet", "Job")
    return {each["metadata"]["name"]: each["spec"]["template"] for each in manifests if each["kind"] in kinds}


def containers(template: Manifest) -> list[Manifest]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


# -- the image --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """The Dockerfile's last stage, and the shell commands of every stage in order."""

    entrypoint: tuple[str, ...]
    environment: dict[str, str]
    user: str
    runs: tuple[tuple[str, str], ...]  # (stage, command)
    copies: tuple[tuple[str, tuple[str, ...]], ...]  # (stage, arguments), from the build context only


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments) of a Dockerfile, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    parts = (line.strip().partition(" ") for line in joined.splitlines())
    return [(name.upper(), rest.strip()) for name, _, rest in parts]


@cache
def image() -> Image:
    stage, entrypoint, user = "", ["?"], "root"
    environment: dict[str, str] = {}
    runs: list[tuple[str, str]] = []
    copies: list[tuple[str, tuple[str, ...]]] = []
    for name, rest in instructions((DEPLOY / "Dockerfile").read_text()):
        match name:
            case "FROM":
                words = rest.split()
                stage = words[words.index("AS") + 1] if "AS" in words else "last"
                environment, user = {}, "root"
            case "RUN":
                runs.append((stage, rest))
            case "COPY" if not rest.startswith("--from"):
                copies.append((stage, tuple(rest.split())))
            case "ENV":
                environment.update(word.partition("=")[::2] for word in shlex.split(rest))
            case "USER":
                user = rest
            case "ENTRYPOINT":
                entrypoint = json.loads(rest)
    return Image(tuple(entrypoint), environment, user, tuple(runs), tuple(copies))


# -- what a container runs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Container:
    """One container, ready to be started as a process: its ports are those of the manifest."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    grace_s: float
    ports: dict[str, int] = field(default_factory=dict)
    probes: dict[str, Manifest] = field(default_factory=dict)  # "startup", "liveness", "readiness"


def _expanded(text: str, environment: dict[str, str]) -> str:
    """`$(NAME)` as Kubernetes replaces it: a name it does not know stays as it is."""
    return re.sub(r"\$\((\w+)\)", lambda found: environment.get(found[1], found[0]), text)


def _environment(
    container: Manifest, manifests: Iterable[Manifest], secrets: dict[str, dict[str, str]]
) -> dict[str, str]:
    maps = of_kind(manifests, "ConfigMap")
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= maps[source["configMapRef"]["name"]]["data"]
    for item in container.get("env", []):
        if "value" in item:
            found[item["name"]] = item["value"]
        else:
            wanted = item["valueFrom"]["secretKeyRef"]
            found[item["name"]] = secrets[re.sub(r"-[a-z0-9]{10}$", "", wanted["name"])][wanted["key"]]
    return found


def pod_containers(
    overlay: str, workload: str, secrets: dict[str, dict[str, str]], *, host: str = ""
) -> list[Container]:
    """What the kubelet starts for a pod of the workload, init containers first. `secrets` by name, then key."""
    manifests = rendered(overlay)
    template = pod_templates(manifests)[workload]
    found = []
    for each in containers(template):
        own = _environment(each, manifests, secrets)
        said = [*each.get("command", image().entrypoint), *each.get("args", [])]
        found.append(
            Container(
                name=host or workload,
                command=tuple(_expanded(word, own) for word in said),
                environment=image().environment | own,
                grace_s=float(template["spec"].get("terminationGracePeriodSeconds", 30)),
                ports={port["name"]: port["containerPort"] for port in each.get("ports", [])},
                probes={
                    kind: each[f"{kind}Probe"]
                    for kind in ("startup", "liveness", "readiness")
                    if f"{kind}Probe" in each
                },
            )
        )
    return found


@cache
def compose() -> Manifest:
    """compose.yaml with its merge keys resolved, as docker compose reads it."""
    found: Manifest = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return found


@cache
def scraped_port(name: str) -> int | None:
    """Where the Prometheus of compose.yaml asks a service for metrics."""
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    found = [sd["port"] for job in config["scrape_configs"] for sd in job["dns_sd_configs"] if name in sd["names"]]
    return found[0] if found else None


def service(name: str, *, host: str = "") -> Container:
    """What docker compose starts for a service of the image."""
    found = compose()["services"][name]
    grace = str(found.get("stop_grace_period", "10s"))
    assert re.fullmatch(r"\d+s", grace), grace
    return Container(
        name=host or name,
        command=(*found.get("entrypoint", image().entrypoint), *found["command"]),
        environment=image().environment | found["environment"],
        grace_s=float(grace[:-1]),
        ports={"metrics": port} if (port := scraped_port(name)) else {},
    )
