"""Hot shards and hot keys: from where on a shard is hot, and whether a split would help it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core.hashing import key_hash
from shardq.core.hot import LEAST_BYTES_PER_S, Hot, KeySample, hot_of, hot_shards
from shardq.core.load import Load

SPACE = 1 << 32


@pytest.mark.parametrize(
    ("rates", "hot"),
    [
        ({}, {}),
        ({0: 1e6, 1: 0.0}, {}),
        ({0: 501.0, 1: 100.0, 2: 100.0}, {0: Hot(501.0, 100.0)}),
        ({0: 500.0, 1: 100.0, 2: 100.0}, {}),
        ({0: 99.0, 1: 1.0, 2: 1.0}, {}),
        ({0: 100.0, 1: 0.0, 2: 0.0, 3: 0.0}, {0: Hot(100.0, 0.0)}),
        ({0: 1000.0, 1: 900.0, 2: 10.0, 3: 10.0, 4: 10.0}, {0: Hot(1000.0, 10.0), 1: Hot(900.0, 10.0)}),
    ],
)
def test_hot_is_over_five_times_the_median_and_not_little(rates: dict[int, float], hot: dict[int, Hot]) -> None:
    assert hot_shards(rates) == hot


@given(st.dictionaries(st.integers(0, 50), st.floats(0, 1e6)))
def test_at_most_half_of_the_shards_are_hot(rates: dict[int, float]) -> None:
    assert len(hot_shards(rates)) <= len(rates) / 2


def test_bytes_make_hot_too() -> None:
    few, large = Load(1, 1, 10, 0), Load(1, 1, LEAST_BYTES_PER_S, 0)
    assert hot_of({0: few, 1: large, 2: few}) == {1}
    assert hot_of({0: few, 1: few, 2: few}) == frozenset()
    assert hot_of({}) == frozenset()


def test_one_key_with_most_messages_is_no_case_for_a_split() -> None:
    sample = KeySample.of(["a"] * 51 + [f"k{n}" for n in range(49)], 0, SPACE)
    assert (sample.key, sample.share, sample.one_key) == ("a", 0.51, True)
    assert not KeySample.of(["a"] * 50 + [f"k{n}" for n in range(50)], 0, SPACE).one_key


def test_halves_are_those_of_the_hashes() -> None:
    keys = [f"k{number}" for number in range(400)]
    lower = sum(key_hash(key) < SPACE // 2 for key in keys) / 400
    assert KeySample.of(keys, 0, SPACE).halves == pytest.approx((lower, 1 - lower))
    least = min(map(key_hash, keys))
    assert KeySample.of(keys, 0, 2 * least).halves == pytest.approx((0, 1))


def test_messages_without_a_key_go_anywhere() -> None:
    assert KeySample.of([None] * 10, 0, SPACE) == KeySample(10, None, 0.0, (0.5, 0.5))
    assert not KeySample.of([None] * 9 + ["a"], 0, SPACE).one_key
    assert KeySample.of([], 0, SPACE) == KeySample(0, None, 0.0, (0.5, 0.5))


@given(st.lists(st.sampled_from(["a", "b", b"a", None]), min_size=1), st.randoms())
def test_a_sample_does_not_depend_on_its_order(keys: list[str | bytes | None], chance: object) -> None:
    mixed = list(keys)
    chance.shuffle(mixed)  # type: ignore[attr-defined]  # a random.Random
    sample = KeySample.of(keys, 0, SPACE)
    assert KeySample.of(mixed, 0, SPACE) == sample
    assert sum(sample.halves) == pytest.approx(1)
    assert 0 <= sample.share <= 1
