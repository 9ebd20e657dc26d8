"""The virtual environments of the peers: one each, as their dependencies exclude one another, made when first wanted.

Each has what benchmarks/peers/NAME.txt pins and lives in benchmarks/.venvs/NAME, which git ignores. The environment
that shardq itself runs in is never touched.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from shardq.errors import UsageError

HERE = Path(__file__).parent
PEERS, ENVIRONMENTS = HERE / "peers", HERE / ".venvs"
PYTHON = sys.executable
_INSTALL_WITHIN_S = 600


def python_of(name: str) -> str:
    """The Python of the peer's environment, which is made, or made again where its pins changed.

    Raises UsageError when pip can't install it.
    """
    folder, pins = ENVIRONMENTS / name, (PEERS / f"{name}.txt").read_text(encoding="utf-8")
    made_of = folder / "made-of.txt"
    python = folder / "bin" / "python"
    if not made_of.exists() or made_of.read_text(encoding="utf-8") != pins:
        _run(name, PYTHON, "-m", "venv", "--clear", str(folder))
        _run(name, str(python), "-m", "pip", "install", "--quiet", "-r", str(PEERS / f"{name}.txt"))
        made_of.write_text(pins, encoding="utf-8")
    return str(python)


def packages_of(name: str) -> str:
    """The folder of what is installed in the peer's environment, for PYTHONPATH."""
    python_of(name)
    return str(next((ENVIRONMENTS / name / "lib").glob("python*")) / "site-packages")


def version_of(name: str, package: str) -> str:
    """As pinned in the peer's file."""
    for line in (PEERS / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        pinned, _, version = line.partition("==")
        if pinned == package:
            return version
    raise UsageError(f"{name}.txt does not pin {package}: add it there.")


def _run(name: str, *command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_WITHIN_S, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split())[-300:]
        raise UsageError(f"pip can't install benchmarks/peers/{name}.txt: {said}")
