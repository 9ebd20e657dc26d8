"""One lab for all tests of a file and server kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.lab import Lab, open_lab


@pytest.fixture(scope="module")
def lab(server_binary: Path) -> Iterator[Lab]:
    """Three masters with a replica each."""
    with open_lab(server_binary) as made:
        yield made
