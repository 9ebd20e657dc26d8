"""`python -m tests.fuzz [TARGET] --seconds N`: coverage-guided fuzzing of every decoder, or of one, with atheris.

Each target runs in a process of its own, which is what libFuzzer wants; what breaks one is printed and written to a
file `crash-...` in the folder named by --artifacts. Exit status 1 when any did. Needs atheris (in the extra `dev`
where there is a wheel of it).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

LONGEST_INPUT = 4096


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.run:
        _fuzz(arguments.target, arguments.seconds, Path(arguments.artifacts))
        return 0
    from tests.fuzz.targets import TARGETS

    names = [arguments.target] if arguments.target else list(TARGETS)
    if not set(names) <= TARGETS.keys():
        print(f"there is no target {arguments.target!r}: they are {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    broken = [name for name in names if not _run(name, arguments.seconds, arguments.artifacts)]
    print(f"{len(names)} targets, {len(broken)} broken{': ' if broken else ''}{', '.join(broken)}")
    return 1 if broken else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("target", nargs="?", help="one target (default: all, one after another)")
    parser.add_argument("--seconds", type=int, default=30, help="for each target (default: 30)")
    parser.add_argument("--artifacts", default=".", help="folder for inputs that break a target (default: this one)")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    return parser


def _run(name: str, seconds: int, artifacts: str) -> bool:
    """Whether the target withstood."""
    command = [sys.executable, "-m", "tests.fuzz", name, "--run", "--seconds", str(seconds), "--artifacts", artifacts]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    text = ended.stdout.decode(errors="replace")
    runs = [line.split()[1] for line in text.splitlines() if line.startswith("Done ")]
    print(f"{name}: {runs[0] + ' runs' if runs else 'broken'}", flush=True)
    if ended.returncode:
        print(text[-6000:], flush=True)
    return ended.returncode == 0


def _fuzz(name: str, seconds: int, artifacts: Path) -> None:
    import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]  # optional, and has no types

    with atheris.instrument_imports(include=["shardq"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]

    def once(data: bytes) -> None:
        try:
            target.decode(data)
        except target.errors:
            pass

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(target.seeds):
            Path(corpus, str(number)).write_bytes(seed)
        options = [f"-max_total_time={seconds}", f"-artifact_prefix={artifacts}/", f"-max_len={LONGEST_INPUT}"]
        atheris.Setup([sys.argv[0], *options, "-rss_limit_mb=2048", "-timeout=20", corpus], once)
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
