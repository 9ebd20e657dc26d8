"""How long to wait before the next try: twice as long each time up to a bound, and never in step with others. Pure."""

from __future__ import annotations


def backoff_s(tries: int, first_s: float, last_s: float, chance: float) -> float:
    """Seconds before try number `tries` + 1; `chance` in [0, 1) spreads them over the upper half of the pause.

    The lower half is always waited: a bound on how often one client may try.
    """
    whole = min(first_s * float(2 ** min(max(tries - 1, 0), 30)), last_s)
    return whole * (0.5 + chance / 2)
