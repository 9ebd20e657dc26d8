"""When a failed message is tried again: pauses in their bounds for any try and any chance; bad settings are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core.retry import MAX_DELAY_S, Reject, Retry, RetryLater
from shardq.errors import ShardqError, UsageError

CHANCE = st.floats(0, 1, exclude_max=True)
RETRIES = st.builds(
    Retry,
    attempts=st.integers(1, 1_000_000),
    base=st.floats(0, MAX_DELAY_S) | st.integers(0, int(MAX_DELAY_S)),
    factor=st.floats(1, 1000) | st.integers(1, 1000),
    max_delay=st.floats(0, MAX_DELAY_S) | st.integers(0, int(MAX_DELAY_S)),
    jitter=st.floats(0, 1) | st.integers(0, 1),
)


@given(RETRIES, st.integers(1, 10) | st.integers(1, 1_000_000), CHANCE)
def test_a_pause_is_never_longer_than_the_longest_but_for_the_jitter(retry: Retry, attempt: int, chance: float) -> None:
    delay = retry.delay_s(attempt, chance)
    assert type(delay) is float
    assert 0 <= delay <= retry.max_delay * (1 + retry.jitter) * (1 + 1e-12)


@given(RETRIES, st.integers(1, 10) | st.integers(1, 999_999))
def test_pauses_never_become_shorter(retry: Retry, attempt: int) -> None:
    assert retry.delay_s(attempt, 0.5) <= retry.delay_s(attempt + 1, 0.5)


@given(RETRIES, st.integers(1, 20), CHANCE)
def test_jitter_stays_in_its_share(retry: Retry, attempt: int, chance: float) -> None:
    middle, delay = retry.delay_s(attempt, 0.5), retry.delay_s(attempt, chance)
    rounding = 1e-12 * middle + 1e-300  # a jitter of a few units in the last place is rounded to more
    assert abs(delay - middle) <= retry.jitter * middle + rounding


@pytest.mark.parametrize("chance", [0.0, 0.25, 0.5, 0.999])
def test_without_jitter_chance_changes_nothing(chance: float) -> None:
    assert Retry(jitter=0).delay_s(3, chance) == 4.5


def test_the_default_is_what_it_says() -> None:
    assert [Retry().delay_s(attempt, 0.5) for attempt in range(1, 6)] == [0.5, 1.5, 4.5, 13.5, 40.5]


@pytest.mark.parametrize(
    ("base", "factor", "attempt", "delay"),
    [
        (0.5, 3, 1_000_000, 300.0),  # far beyond what a float holds
        (0.5, 3.0, 1_000_000, 300.0),
        (MAX_DELAY_S, 1000, 1_000_000, 300.0),
        (0, 1000, 1_000_000, 0.0),
        (2, 1, 1_000_000, 2.0),
        (0.001, 1.01, 1_000, 0.001 * 1.01**999),  # a slow rise goes on beyond any small number of tries
        (0.001, 1.01, 10_000, 300.0),
    ],
)
def test_huge_attempts(base: float, factor: float, attempt: int, delay: float) -> None:
    assert Retry(base=base, factor=factor, jitter=0).delay_s(attempt, 0.5) == pytest.approx(delay)


@pytest.mark.parametrize(
    "setting",
    [
        *({"attempts": value} for value in (0, -1, 1_000_001, 2.5, 3.0, True, "3", None, math.nan)),
        *({"base": value} for value in (-0.001, MAX_DELAY_S + 1, math.nan, math.inf, "1", None, True)),
        *({"factor": value} for value in (0.999, 0, 1001, math.nan, math.inf, "2", None, True)),
        *({"max_delay": value} for value in (-1, MAX_DELAY_S + 1, math.nan, math.inf, "1", None, False)),
        *({"jitter": value} for value in (-0.1, 1.1, math.nan, "0", None, True)),
    ],
    ids=str,
)
def test_bad_settings(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(UsageError, match=rf"Retry\({name}=\) must be"):
        Retry(**setting)


@pytest.mark.parametrize("delay", [0, 0.0, 1, 2.5, MAX_DELAY_S])
def test_retry_later_keeps_its_delay(delay: float) -> None:
    error = RetryLater(delay)
    assert error.delay == delay
    assert type(error.delay) is float
    assert isinstance(error, ShardqError)


@pytest.mark.parametrize(
    "delay", [-1, -0.001, MAX_DELAY_S * 1.01, math.nan, math.inf, "5", None, True, 10**400], ids=repr
)
def test_retry_later_with_what_is_no_delay(delay: Any) -> None:
    with pytest.raises(UsageError, match="RetryLater takes 0 to"):
        RetryLater(delay)


def test_reject_says_why() -> None:
    assert str(Reject("no such user")) == "no such user"
    assert str(Reject())
    assert isinstance(Reject(), ShardqError)
