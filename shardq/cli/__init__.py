"""The `shardq` command: `main()` is its entry point. Imports nothing until called: start-up stays quick."""

from __future__ import annotations


def main() -> None:
    """Run the command line and end the process with its exit status."""
    from shardq.cli.app import run

    raise SystemExit(run())
