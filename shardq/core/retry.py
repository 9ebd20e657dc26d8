"""When a failed message is tried again, and when it is given up. Pure: chance is an argument, nothing is counted
here."""

from __future__ import annotations

import msgspec

from shardq.errors import ShardqError, UsageError

MAX_DELAY_S = 10 * 365 * 86400.0


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """How often and when a worker tries a failing message again.

    attempts    tries in all, the first one included; then the message is a dead letter
    base        seconds before the second try
    factor      each further pause is this many times the one before
    max_delay   seconds: no pause is longer, but for the jitter
    jitter      share of the pause, 0 to 1, by which it is shortened or lengthened at random, so that what failed
                together does not come back together

    The default gives up after six tries in about a minute: 0.5, 1.5, 4.5, 13.5 and 40.5 s apart.
    """

    attempts: int = 6
    base: float = 0.5
    factor: float = 3.0
    max_delay: float = 300.0
    jitter: float = 0.1

    def __post_init__(self) -> None:
        for name, least, most in (
            ("attempts", 1, 1_000_000),
            ("base", 0, MAX_DELAY_S),
            ("factor", 1, 1000),
            ("max_delay", 0, MAX_DELAY_S),
            ("jitter", 0, 1),
        ):
            value = getattr(self, name)
            kinds = (int,) if name == "attempts" else (int, float)
            if type(value) not in kinds or not least <= value <= most:
                what = "a whole number" if name == "attempts" else "a number"
                msg = f"Retry({name}=) must be {what} between {least:g} and {most:g}, not {value!r}"
                raise UsageError(msg)

    def delay_s(self, attempt: int, chance: float) -> float:
        """Seconds from the failure of try number `attempt` (1, 2, ...) to the next; `chance` is from [0, 1)."""
        try:
            pause = min(self.base * float(self.factor) ** (attempt - 1), self.max_delay)
        except OverflowError:  # more than a float holds is more than max_delay
            pause = self.max_delay if self.base else 0.0
        return float(pause * (1 + self.jitter * (2 * chance - 1)))


class RetryLater(ShardqError):
    """Raised by a handler: try this message again in `delay` seconds. It counts as one of its attempts."""

    def __init__(self, delay: float) -> None:
        if type(delay) not in (int, float) or not 0 <= delay <= MAX_DELAY_S:
            msg = f"RetryLater takes 0 to {MAX_DELAY_S:g} seconds, not {delay!r}"
            raise UsageError(msg)
        super().__init__(f"the handler asked to be called again in {delay:g} s")
        self.delay = float(delay)


class Reject(ShardqError):
    """Raised by a handler: this message can't be handled, make it a dead letter at once."""

    def __init__(self, reason: str = "rejected by the handler") -> None:
        super().__init__(reason)
