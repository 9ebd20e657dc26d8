"""The clocks of a lease: how long an owner may trust it, and when another may take it. Pure; now is an argument.

State model (the store is the authority, scripts/lease.lua; these clocks may only end trust sooner)

    FREE --acquire--> HELD by (epoch, nonce) --transfer--> HELD by the heir      release: back to FREE
                        |
                        +-- another acquires: only with the (epoch, renewals) it saw unchanged for a lease time

Trust window. An owner trusts its lease from the moment it *sent* its last successful renewal (or acquire), for the
lease time less a margin. A slow reply can't lengthen it. Past it no handler starts and running ones are cancelled.

Taking over. A taker starts its own clock when it has *received* the pair, so its lease time always begins after the
owner's last renewal was carried out, which is after it was sent:
    trusted_until < sent + lease <= seen + lease <= taken.
Both spans are measured on monotonic clocks of one process each; no clock is compared with another machine's. The margin
covers clocks that run at different rates (10 % of the lease: far more than any quartz drifts).

What is not promised: a process that is paused between its check and its write acts late; its commit is FENCED then.
"""

from __future__ import annotations

from dataclasses import dataclass

MARGIN = 0.1
RENEW_AFTER = 1 / 3


@dataclass(slots=True)
class Trust:
    """How long the owner of a lease of `lease_s` seconds may go on without a renewal."""

    lease_s: float
    renewed_monotonic_s: float

    def renewed(self, sent_monotonic_s: float) -> None:
        """A renewal sent at this moment succeeded. An older one that is answered late changes nothing."""
        self.renewed_monotonic_s = max(self.renewed_monotonic_s, sent_monotonic_s)

    @property
    def until_monotonic_s(self) -> float:
        return self.renewed_monotonic_s + self.lease_s * (1 - MARGIN)

    def trusted(self, now_monotonic_s: float) -> bool:
        return now_monotonic_s < self.until_monotonic_s

    @property
    def renew_at_monotonic_s(self) -> float:
        return self.renewed_monotonic_s + self.lease_s * RENEW_AFTER


class Watch:
    """Watches something that counts while it lives (a lease, a member, a leader): tells when it has stood still."""

    __slots__ = ("_seen", "_since_monotonic_s")

    def __init__(self) -> None:
        self._seen: tuple[object, ...] | None = None
        self._since_monotonic_s = 0.0

    def see(self, now_monotonic_s: float, *state: object) -> float:
        """Takes a state just received; returns for how many seconds it has been seen unchanged."""
        if state != self._seen:
            self._seen = state
            self._since_monotonic_s = now_monotonic_s
        return now_monotonic_s - self._since_monotonic_s

    def still_for(self, now_monotonic_s: float) -> float:
        """Seconds since the state last seen was first seen; 0 when nothing was seen."""
        return now_monotonic_s - self._since_monotonic_s if self._seen is not None else 0.0
