"""What a soak calls flat: judged from lines of memory, no run needed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.faults.soak import MAY_GROW_BYTES, MIB, Growth, Samples, growth, growths, table

SIZES = st.floats(min_value=MIB, max_value=1000 * MIB)


@given(SIZES, st.integers(min_value=100, max_value=400))
def test_what_stays_is_flat_whatever_it_did_while_it_started(size: float, seconds: int) -> None:
    line = [(float(at), size * at / 60 if at < 60 else size) for at in range(seconds)]
    found = growth("w", line)
    assert found is not None
    assert (found.first, found.last, found.flat) == (size, size, True)


@given(SIZES)
def test_a_leak_is_found(size: float) -> None:
    leak = 0.002 * size + MAY_GROW_BYTES / 100  # a second
    found = growth("w", [(float(at), size + leak * at) for at in range(600)])
    assert found is not None
    assert not found.flat


def test_a_process_that_did_not_live_long_says_nothing() -> None:
    assert growth("w", [(float(at), 50.0 * MIB) for at in range(60)]) is None
    assert growths(Samples()) == []


def test_the_table_says_which() -> None:
    rows = table([Growth("worker-1", 40 * MIB, 41 * MIB), Growth("worker-2", 40 * MIB, 60 * MIB)])
    assert rows[-2:] == ["| worker-1 | 40.0 | 41.0 | flat |", "| worker-2 | 40.0 | 60.0 | GROWS |"]
