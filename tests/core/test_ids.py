"""Message ids: text and back, order of entries, and that nonsense is refused with UsageError only."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardq.core.ids import MessageId, entry_key
from shardq.errors import UsageError

U64 = st.integers(0, 2**64 - 1)
ENTRIES = st.builds("{}-{}".format, U64, U64)
IDS = st.builds(MessageId, U64, ENTRIES, U64)


def test_what_an_id_looks_like() -> None:
    assert str(MessageId(3, "1795231414661-0", 7)) == "3/1795231414661-0/7"


@given(IDS)
def test_text_and_back(id_: MessageId) -> None:
    again = MessageId.parse(str(id_))
    assert again == id_
    assert hash(again) == hash(id_)


@given(U64, U64)
def test_entry_key_reads_both_numbers(ms: int, seq: int) -> None:
    assert entry_key(f"{ms}-{seq}") == (ms, seq)


def test_entries_sort_by_number_not_by_text() -> None:
    assert sorted(["10-0", "9-10", "9-9"], key=entry_key) == ["9-9", "9-10", "10-0"]


NONSENSE_IDS = [
    "", "/", "//", "1/2/3", "1/2-3", "1/2-3/4/5", "1/2-3/", "/2-3/4", "1/2-/4", "1/-3/4",
    " 1/2-3/4", "1/2-3/4 ", "1/2-3/4\n", "1 /2-3/4", "+1/2-3/4", "-1/2-3/4", "1/2--3/4", "1/2-3/-4", "1/+2-3/4",
    "01/2-3/4", "1/02-3/4", "1/2-03/4", "1/2-3/04", "00/2-3/4", "1_0/2-3/4", "1e3/2-3/4", "0x1/2-3/4", "1.0/2-3/4",
    "\u0661/2-3/4", "1/\uff12-3/4", "1/2-3/\u00b2", "1\x00/2-3/4", "\ud800",
    f"{2**64}/2-3/4", f"1/{2**64}-3/4", f"1/2-{2**64}/4", f"1/2-3/{2**64}", "1/2-3/" + "9" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("text", NONSENSE_IDS)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="looks like"):
        MessageId.parse(text)


@pytest.mark.parametrize("text", [None, 7, b"1/2-3/4", MessageId(1, "2-3", 4)])
def test_other_types_are_refused(text: object) -> None:
    with pytest.raises(UsageError):
        MessageId.parse(text)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        entry_key(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "entry", ["", "-", "1", "1-", "-1", "1-2-3", "01-2", "1-02", "+1-2", "1 -2", "1-2\n", "*", "$"]
)
def test_nonsense_entries_are_refused(entry: str) -> None:
    with pytest.raises(UsageError):
        entry_key(entry)


@pytest.mark.parametrize("entry", [f"{2**64}-0", f"0-{2**64}"])
def test_entries_beyond_64_bits_are_refused(entry: str) -> None:
    with pytest.raises(UsageError, match="below"):
        entry_key(entry)


@given(st.one_of(st.text(), st.text("0123456789/-+ _")))
@example("0/0-0/0")
def test_whatever_parses_is_what_str_gives(text: str) -> None:
    try:
        id_ = MessageId.parse(text)
    except UsageError:
        return
    assert str(id_) == text
    assert entry_key(id_.entry) is not None


def test_the_message_for_long_nonsense_is_short() -> None:
    with pytest.raises(UsageError) as caught:
        MessageId.parse("x" * 10**6)
    assert len(str(caught.value)) < 300


def test_ids_are_immutable() -> None:
    with pytest.raises(AttributeError):
        MessageId(1, "2-3", 4).shard = 5  # type: ignore[misc]
