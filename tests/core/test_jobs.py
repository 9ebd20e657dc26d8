"""Job ids, the headers that carry them, and the record: round trips, and what is not one is told from what is."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core import jobs
from shardq.core.jobs import JOB_HEADER, KEEP_HEADER, JobState
from shardq.errors import CorruptData, UsageError

ID = "orders/3/9f86d081884c7d65"


@given(
    st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True), st.integers(0, 2**31), st.binary(min_size=4, max_size=32)
)
def test_an_id_says_where_its_record_lies(queue: str, shard: int, chance: bytes) -> None:
    assert jobs.job_place(f"{queue}/{shard}/{chance.hex()}") == (queue, shard)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "orders",
        "orders/3",
        "orders/3/",
        "/3/9f86d081884c7d65",
        "orders/03/9f86d081884c7d65",
        "orders/-3/9f86d081884c7d65",
        "orders/\u0663/9f86d081884c7d65",
        "orders/1\u0663/9f86d081884c7d65",
        "orders/3/9F86D081884C7D65",
        "orders/3/9f86",
        "or ders/3/9f86d081884c7d65",
        ID + "\n",
        ID + "/1",
        "o" * 65 + "/3/9f86d081884c7d65",
        "orders/" + "9" * 5000 + "/9f86d081884c7d65",
        None,
        5,
        b"orders/3/9f86d081884c7d65",
    ],
    ids=lambda text: repr(text)[:30],
)
def test_what_is_no_id(text: Any) -> None:
    with pytest.raises(UsageError, match="is not a job id"):
        jobs.job_place(text)


def test_headers_of_a_job() -> None:
    headers = jobs.job_headers({"trace": b"x"}, ID, 5000)
    assert headers == {"trace": b"x", JOB_HEADER: ID, KEEP_HEADER: "5000"}
    assert jobs.job_of(headers) == (ID, 5000)
    assert jobs.job_of(jobs.job_headers(None, ID, 0)) == (ID, 0)


@pytest.mark.parametrize(
    ("job", "keep"),
    [
        (None, "5"),
        (ID, None),
        (ID.encode(), "5"),
        (ID, b"5"),
        ("x", "5"),
        (ID, ""),
        (ID, "-5"),
        (ID, "5.0"),
        (ID, "x"),
        (ID, "\u00b2"),
    ],
    ids=repr,
)
def test_messages_without_a_job(job: Any, keep: Any) -> None:
    headers = {name: value for name, value in ((JOB_HEADER, job), (KEEP_HEADER, keep)) if value is not None}
    assert jobs.job_of(headers) is None


@pytest.mark.parametrize("keep", ["9" * 13, "9" * 14, "9" * 5000])
def test_a_job_is_not_kept_for_ever(keep: str) -> None:
    """Nor does a number that Python will not read stop whoever handles the message."""
    job = jobs.job_of({JOB_HEADER: ID, KEEP_HEADER: keep})
    assert job is None or job[1] <= 10**13


HEADERS = st.dictionaries(
    st.sampled_from([JOB_HEADER, KEEP_HEADER, "x"]), st.text() | st.binary() | st.sampled_from([ID, "5"])
)


@given(HEADERS)
def test_any_headers(headers: dict[str, str | bytes]) -> None:
    found = jobs.job_of(headers)
    if found is not None:
        assert jobs.job_place(found[0]) == ("orders", 3)
        assert 0 <= found[1] <= 10**13


STATES = st.builds(
    JobState,
    id=st.just(ID),
    status=st.sampled_from([jobs.QUEUED, jobs.RUNNING, jobs.RETRYING, jobs.DONE, jobs.DEAD]),
    queue=st.text(),
    group=st.text(),
    attempts=st.integers(0, 100),
    submitted_ms=st.integers(0, 2**53),
    updated_ms=st.integers(0, 2**53),
    result=st.none() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary() | st.lists(st.booleans()),
    error=st.text(),
)


@given(STATES)
def test_a_record_comes_back(state: JobState) -> None:
    assert jobs.decode_state(jobs.encode_state(state)) == state
    assert state.finished == (state.status in ("done", "dead"))


class Hollow(msgspec.Struct):
    """Encoding it fails like nothing that msgpack knows."""

    field: Any = None


def hollow() -> Hollow:
    one = Hollow()
    del one.field
    return one


def circle() -> list[Any]:
    one: list[Any] = []
    one.append(one)
    return one


@pytest.mark.parametrize(
    "result",
    [object(), 2**64, -(2**63) - 1, 10**6000, "\ud800", hollow(), circle(), {("a",): object()}],
    ids=["object", "2**64", "-2**63-1", "10**6000", "surrogate", "hollow", "circle", "nested"],
)
def test_a_result_that_can_not_be_carried_is_left_out(result: Any) -> None:
    state = jobs.decode_state(jobs.encode_state(JobState(ID, jobs.DONE, result=result)))
    assert (state.status, state.result) == ("done", None)
    assert state.error.startswith("the result can't be carried: ")
    assert len(state.error) <= 2000


@pytest.mark.parametrize("size", [jobs.MAX_RESULT_BYTES, 5 * jobs.MAX_RESULT_BYTES])
def test_a_result_that_is_too_large_is_left_out(size: int) -> None:
    state = jobs.decode_state(jobs.encode_state(JobState(ID, jobs.DONE, result=b"x" * size)))
    assert (state.status, state.result) == ("done", None)
    assert state.error == "the result is larger than 1048576 bytes"


def test_an_error_that_can_not_be_carried_does_not_stop_the_record() -> None:
    state = jobs.decode_state(jobs.encode_state(JobState(ID, jobs.DEAD, error="\ud800")))
    assert state.status == "dead"


@given(st.binary(max_size=60))
def test_any_bytes_are_a_record_or_corrupt(data: bytes) -> None:
    try:
        jobs.decode_state(data)
    except CorruptData:
        pass


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"id": 5, "status": "done"}),
        msgspec.msgpack.encode({"status": "done"}),
        b"\x83\xa2id\xa1x\xa6status\xa4done\xa6result\x81\x80\x01",  # a map that has a map for a key
        b"\x83\xa2id\xa1x\xa6status\xa4done\xa6result" + b"\x91" * 100_000,
        b"\x83\xa2id\xa1x\xa6status\xa4done\xa6result\xc7\x0c\xff" + b"\xff" * 12,  # a timestamp of no year
    ],
    ids=["empty", "no msgpack", "wrong type", "no id", "map for a key", "too deep", "no year"],
)
def test_broken_records(data: bytes) -> None:
    with pytest.raises(CorruptData, match="a job's record does not decode"):
        jobs.decode_state(data)
