"""The image without a docker: its Dockerfile is linted, its context holds what it copies, and its own pip commands
make an environment in which the commands of the deployment run. No image is built and no base image is looked at.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.manifests import DEPLOY, ROOT, image


def ignored(path: str, patterns: list[str]) -> bool:
    """As docker reads .dockerignore: the last pattern that fits decides; a folder's pattern fits what is below it."""
    out = False
    for pattern in patterns:
        fits = pattern.lstrip("!")
        anywhere = fits.removeprefix("**/")
        below = any(fnmatch.fnmatch(part, anywhere) for part in path.split("/")) if anywhere != fits else False
        if below or fnmatch.fnmatch(path, fits) or path.startswith(f"{fits}/"):
            out = not pattern.startswith("!")
    return out


def context(target: Path) -> None:
    """What docker would send: the checkout's own files less what Dockerfile.dockerignore names."""
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    for path in ROOT.rglob("*"):
        relative = path.relative_to(ROOT).as_posix()
        if path.is_file() and not relative.startswith(".") and not ignored(relative, patterns):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)


def test_hadolint_has_nothing_to_say() -> None:
    found = Path(sys.executable).parent / "hadolint"
    said = subprocess.run([found, DEPLOY / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 0, said.stdout


def test_hadolint_would_see_a_careless_line(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN cd /tmp\n")
    found = Path(sys.executable).parent / "hadolint"
    said = subprocess.run([found, tmp_path / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 1
    assert {"DL3007", "DL3003"} <= set(said.stdout.replace(":", " ").split())


def test_the_image_runs_as_a_numbered_user_under_an_init() -> None:
    assert image().user == "10001:10001"
    assert image().entrypoint == ("tini", "--", "shardq")
    assert any("install" in command and " tini" in command for stage, command in image().runs if stage == "last")


def test_the_context_holds_what_is_copied_and_nothing_private(tmp_path: Path) -> None:
    context(tmp_path)
    for _, arguments in image().copies:
        for source in arguments[:-1]:
            assert (tmp_path / source).exists(), source
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "LICENSE",
        "README.md",
        "deploy",
        "pyproject.toml",
        "requirements-dev.txt",
        "shardq",
    ]
    assert [path.name for path in (tmp_path / "deploy").iterdir()] == ["app"]
    assert not list(tmp_path.rglob("*.pyc"))


def test_what_is_ignored_is_decided_by_the_last_pattern_that_fits() -> None:
    patterns = ["*", "!shardq", "!deploy/app", "**/__pycache__"]
    assert not ignored("shardq/core/ids.py", patterns)
    assert not ignored("deploy/app/orders.py", patterns)
    assert ignored("deploy/compose.yaml", patterns)
    assert ignored("tests/conftest.py", patterns)
    assert ignored("shardq/__pycache__/x.pyc", patterns)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_images_own_commands_make_an_environment_that_works(tmp_path: Path) -> None:
    """The first stage on this machine: its folders become folders here, its Python this one, with pip's cache."""
    source, wheels, target = tmp_path / "src", tmp_path / "wheels", tmp_path / "opt"
    context(source)
    (command,) = [command for stage, command in image().runs if stage == "build"]
    # What is run below is compiled when it is; to compile the rest would take longer than all else.
    command = command.replace("pip install --no-cache-dir", "pip install --no-compile").replace(" --no-cache-dir", "")
    for there, here in (("/wheels", wheels), ("/opt", target)):
        command = command.replace(f" {there}", f" {here}")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    said = subprocess.run(
        ["sh", "-c", command],
        cwd=source,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    shutil.rmtree(source / "shardq")  # what is installed has to be enough
    environment = {"PATH": f"{target}/shardq/bin", "HOME": str(tmp_path)}
    for words in (["--version"], ["work", "--help"], ["coordinator", "--help"], ["exporter", "--help"]):
        ran = subprocess.run(
            [target / "shardq/bin/shardq", *words],
            cwd=source / "deploy/app",
            env=environment,
            capture_output=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
    imported = subprocess.run(
        [target / "shardq/bin/python", "-c", "import customers, orders, shardq; print(shardq.__file__)"],
        cwd=source / "deploy/app",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert imported.returncode == 0, imported.stderr
    assert str(target) in imported.stdout
