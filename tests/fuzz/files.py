"""Archive files out of any bytes: written to a folder of their own, read as an operator would. Keeps nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path

from shardq.ops.archive_files import MARKER, FileReader, owner_of


def archive_lines(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "1-1.5.jsonl.gz")
        path.write_bytes(data)
        with FileReader(path) as reader:
            for offset, end in reader.members():
                reader.lines(offset, end)


def archive_owner(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, MARKER).write_bytes(data)
        owner_of(Path(folder))
