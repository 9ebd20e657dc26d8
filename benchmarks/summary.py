"""The few lines that the project's README says about speed, from the saved results. Types no figure: where sending was
not measured, in full size, there are no lines."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from statistics import median

from benchmarks.saved import Saved, figure

WIDTH = 120
SIDES = ("shardq", "redis-benchmark", "redis-py")
MORE = "Goals that were missed, and charts: [benchmarks/](benchmarks/README.md)."


def summary(results: Sequence[Saved]) -> str:
    """A paragraph of the first server's results; what to do where there are none."""
    found = [one for one in results if one.case == "produce" and one.scale == 1 and set(SIDES) <= one.sides.keys()]
    text = f"{_of_sending(found[0])} {MORE}" if found else f"Nothing has been measured yet. {MORE}"
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _of_sending(result: Saved) -> str:
    rates = {side: median(result.sides[side]) for side in SIDES}
    c_client, pipeline = (figure(rates["shardq"] / rates[side]) for side in SIDES[1:])
    sizes, cores = result.sizes, result.machine["cpus"]
    return (
        f"One process sends {_large(rates['shardq'])} messages a second, {c_client} times redis-benchmark's XADD 500 "
        "deep (a C client that hashes no key and stores nothing idempotently), "
        f"{pipeline} times redis-py's cluster pipeline: medians on {cores} cores, servers included ({result.server}, "
        f"{sizes['shards']} shards, {sizes['value_bytes']}-byte values, {sizes['keys']:,} keys)."
    )


def _large(value: float) -> str:
    return f"{value / 1e6:.3g} million" if value >= 1e6 else figure(value)
