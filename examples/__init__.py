"""Whole systems on shardq, each one file and one command: `python -m examples.NAME`. See examples/README.md."""
