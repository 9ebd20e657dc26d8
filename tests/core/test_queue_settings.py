"""Settings of a queue: what a user may write, what is stored, and that stored bytes raise nothing but CorruptData."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core.queue_settings import MAX_NUMBER, MAX_RETENTION_S, QueueSettings, parse
from shardq.core.routing import RoutingTable
from shardq.errors import CorruptData, UsageError

COUNTS = st.integers(1, MAX_NUMBER)
AMOUNTS = st.builds("{}{}".format, st.integers(1, 36500), st.sampled_from("dhms")) | st.builds(
    "{}{}".format, st.integers(1, 8000), st.sampled_from(["B", "KB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB"])
)


@st.composite
def changes(draw: st.DrawFn) -> dict[str, Any]:
    """What a user may ask of a new queue."""
    wanted: dict[str, Any] = {}
    for name, values in (
        ("retention", AMOUNTS | st.just("done")),
        ("max_backlog", COUNTS),
        ("compression", st.sampled_from(["zlib", "zstd", None])),
        ("jobs", st.booleans()),
    ):
        if draw(st.booleans()):
            wanted[name] = draw(values)
    if "max_backlog" in wanted:
        wanted["overflow"] = draw(st.sampled_from(["block", "reject", "drop-oldest"]))
    return wanted


@pytest.mark.parametrize(
    ("text", "seconds", "size"),
    [
        ("done", None, None),
        ("7d", 604800, None),
        ("12h", 43200, None),
        ("30m", 1800, None),
        ("45s", 45, None),
        ("36500d", MAX_RETENTION_S, None),
        ("10GB", None, 10**10),
        ("512MB", None, 512 * 10**6),
        ("64MiB", None, 64 * 1024 * 1024),
        ("1B", None, 1),
    ],
)
def test_retention_in_words(text: str, seconds: int | None, size: int | None) -> None:
    settings = QueueSettings().changed({"retention": text})
    assert (settings.retention_s, settings.retention_bytes) == (seconds, size)
    assert settings.retention == text


@given(AMOUNTS)
def test_retention_is_written_as_it_is_read(text: str) -> None:
    settings = QueueSettings().changed({"retention": text})
    assert QueueSettings().changed({"retention": settings.retention}) == settings


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"retention": "forever"}, "'7d'"),
        ({"retention": "7 d"}, "'7d'"),
        ({"retention": "0d"}, "'7d'"),
        ({"retention": "-1d"}, "'7d'"),
        ({"retention": "1.5GB"}, "'10GB'"),
        ({"retention": "10gb"}, "'10GB'"),
        ({"retention": "7d\n"}, "'7d'"),
        ({"retention": "٣d"}, "'7d'"),
        ({"retention": ""}, "'7d'"),
        ({"retention": 3600}, "'7d'"),
        ({"retention": None}, "'done'"),
        ({"retention": "36501d"}, "1 to 3153600000"),
        ({"retention": "9999999999999999TB"}, "1 to 9007199254740991"),
        ({"max_backlog": 0}, "1 or more"),
        ({"max_backlog": -5}, "1 or more"),
        ({"max_backlog": True}, "1 or more"),
        ({"max_backlog": 1e6}, "1 or more"),
        ({"max_backlog": "many"}, "1 or more"),
        ({"max_backlog": 2**53}, "1 or more"),
        ({"overflow": "drop", "max_backlog": 1}, "'block', 'reject', 'drop-oldest'"),
        ({"overflow": None, "max_backlog": 1}, "'block', 'reject', 'drop-oldest'"),
        ({"overflow": "reject"}, "needs max_backlog=N"),
        ({"overflow": "drop-oldest", "max_backlog": None}, "needs max_backlog=N"),
        ({"compression": "gzip"}, "None, 'zlib', 'zstd'"),
        ({"compression": True}, "None, 'zlib', 'zstd'"),
        ({"compression": ["zstd"]}, "None, 'zlib', 'zstd'"),
        ({"jobs": 1}, "True or False"),
        ({"jobs": None}, "True or False"),
        ({"retentoin": "7d"}, "retention, max_backlog, overflow, compression, jobs"),
    ],
    ids=repr,
)
def test_what_is_wrong_says_what_is_right(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        QueueSettings().changed(change)
    assert says in str(caught.value)


def test_a_change_keeps_the_rest_and_must_fit_it() -> None:
    before = QueueSettings().changed({"retention": "7d", "max_backlog": 10, "overflow": "reject"})
    after = before.changed({"retention": "10GB"})
    assert (after.retention_s, after.retention_bytes, after.max_backlog) == (None, 10**10, 10)
    with pytest.raises(UsageError, match="needs max_backlog"):
        before.changed({"max_backlog": None})
    assert before.changed({"max_backlog": None, "overflow": "block"}).max_backlog is None
    assert before.changed({}) == before


@pytest.mark.parametrize("both", [{"retention_s": 1, "retention_bytes": 1}, {"retention_s": 0}, {"max_backlog": 0}])
def test_unsound_settings_can_not_be_made(both: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        QueueSettings(**both)  # type: ignore[arg-type]


# -- asked for and stored ---------------------------------------------------------------------------------------------


def test_a_difference_names_the_setting_and_both_values() -> None:
    stored = QueueSettings().changed({"retention": "7d", "max_backlog": 10})
    assert stored.difference({"retention": "168h", "max_backlog": 10, "jobs": False}) == ""
    assert stored.difference({}) == ""
    assert stored.difference({"retention": "12h"}) == "retention='7d', not '12h'"
    assert stored.difference({"retention": "10GB"}) == "retention='7d', not '10GB'"
    assert stored.difference({"retention": "done"}) == "retention='7d', not 'done'"
    assert stored.difference({"overflow": "reject"}) == "overflow='block', not 'reject'"
    two = stored.difference({"max_backlog": None, "compression": "zlib", "jobs": False})
    assert two == "max_backlog=10, not None and compression=None, not 'zlib'"
    with pytest.raises(UsageError, match="1 or more"):
        stored.difference({"max_backlog": 0})


@given(changes())
def test_new_settings_do_not_differ_from_what_was_asked(change: dict[str, Any]) -> None:
    settings = QueueSettings().changed(change)
    assert settings.difference(change) == ""
    assert settings.difference(settings.shown()) == ""
    assert QueueSettings().changed(settings.shown()) == settings
    assert parse(settings.shown()) == msgspec.structs.asdict(settings)


@given(changes(), st.integers(1, 16384))
def test_shards_share_the_bounds(change: dict[str, Any], shards: int) -> None:
    settings = QueueSettings().changed(change)
    own = settings.for_shard(shards)
    for name, total in (("max_backlog", settings.max_backlog), ("retention_bytes", settings.retention_bytes)):
        share = own.get(name)
        assert (share is None) == (total is None)
        if total is not None:
            assert isinstance(share, int)
            assert share * shards >= total > (share - 1) * shards
    assert own.get("overflow") == (settings.overflow if settings.max_backlog else None)
    assert own.get("retention_ms") == (settings.retention_s * 1000 if settings.retention_s else None)
    assert set(own) <= {"max_backlog", "overflow", "retention_ms", "retention_bytes"}


@given(changes(), st.integers(1, 16384))
def test_ranges_of_an_equal_cut_have_equal_shares(change: dict[str, Any], shards: int) -> None:
    settings = QueueSettings().changed(change)
    for shard in RoutingTable.equal(shards).shards[:: max(1, shards // 7)]:
        assert settings.for_range(shard.low, shard.high) == settings.for_shard(shards)


@given(changes(), st.integers(1, 2**32), st.integers(0, 2**32))
def test_a_range_has_its_share_by_width(change: dict[str, Any], width: int, low: int) -> None:
    settings = QueueSettings().changed(change)
    own = settings.for_range(low, low + width)
    for name, total in (("max_backlog", settings.max_backlog), ("retention_bytes", settings.retention_bytes)):
        if total is not None:
            assert abs(int(own[name]) - total * width / 2**32) <= 1 + total / 2**31
            assert int(own[name]) >= 1
    assert own.keys() == settings.for_shard(3).keys()


# -- the wire format --------------------------------------------------------------------------------------------------

# By the module's docstring and the msgpack specification.
GOLDEN = (
    b"\x01\x86\xabretention_s\xce\x00\x09\x3a\x80\xafretention_bytes\xc0\xabmax_backlog\x0a"
    b"\xa8overflow\xa6reject\xabcompression\xa4zstd\xa4jobs\xc3"
)


def test_golden_bytes() -> None:
    change = {"retention": "7d", "max_backlog": 10, "overflow": "reject", "compression": "zstd", "jobs": True}
    settings = QueueSettings().changed(change)
    assert settings.to_bytes() == GOLDEN
    assert QueueSettings.from_bytes(GOLDEN) == settings


@given(changes())
def test_what_is_stored_is_read(change: dict[str, Any]) -> None:
    settings = QueueSettings().changed(change)
    assert QueueSettings.from_bytes(settings.to_bytes()) == settings


def test_a_queue_from_before_there_were_settings_has_the_defaults() -> None:
    assert QueueSettings.from_bytes(b"") == QueueSettings()
    assert QueueSettings.from_bytes(b"\x01\x80") == QueueSettings()


def test_names_of_a_newer_version_are_ignored_and_kept() -> None:
    newer = b"\x01" + msgspec.msgpack.encode({"max_backlog": 5, "ordering": "none", "tiers": {"cold": [1, 2]}})
    assert QueueSettings.from_bytes(newer) == QueueSettings(max_backlog=5)
    changed = QueueSettings.from_bytes(newer).changed({"max_backlog": 6}).to_bytes(newer)
    assert QueueSettings.from_bytes(changed) == QueueSettings(max_backlog=6)
    kept = msgspec.msgpack.decode(changed[1:])
    assert (kept["ordering"], kept["tiers"]) == ("none", {"cold": [1, 2]})


@pytest.mark.parametrize(
    "content",
    [
        {"retention_s": 1, "retention_bytes": 1},
        {"retention_s": 0},
        {"retention_s": -1},
        {"retention_s": MAX_RETENTION_S + 1},
        {"retention_s": 1.5},
        {"retention_s": "7d"},
        {"max_backlog": 0},
        {"max_backlog": True},
        {"max_backlog": 2**53},
        {"overflow": "reject"},
        {"overflow": "spill", "max_backlog": 1},
        {"overflow": None},
        {"compression": "brotli"},
        {"jobs": None},
        {1: 2},
        [],
        "text",
        None,
    ],
    ids=repr,
)
def test_wrong_content_is_corrupt(content: object) -> None:
    with pytest.raises(CorruptData, match="upgrade"):
        QueueSettings.from_bytes(b"\x01" + msgspec.msgpack.encode(content))


@given(st.binary() | st.binary().map(lambda tail: b"\x01\x81" + tail))
def test_arbitrary_bytes(stored: bytes) -> None:
    try:
        settings = QueueSettings.from_bytes(stored)
    except CorruptData:
        return
    assert settings == QueueSettings().changed(settings.shown())


@given(changes(), st.data())
def test_every_cut_and_every_tail_is_refused(change: dict[str, Any], data: st.DataObject) -> None:
    raw = QueueSettings().changed(change).to_bytes()
    end = data.draw(st.integers(1, len(raw) - 1))
    for broken in (raw[:end], raw + b"\0", b"\2" + raw[1:]):
        with pytest.raises(CorruptData, match="upgrade"):
            QueueSettings.from_bytes(broken)


def test_settings_are_immutable() -> None:
    with pytest.raises(AttributeError):
        QueueSettings().jobs = True  # type: ignore[misc]
