"""`python -m shardq`: the same as the `shardq` command. Never imported by anything else."""

from __future__ import annotations

from shardq.cli import main

if __name__ == "__main__":
    main()
