"""Which requests are refused, by their headers alone."""

from __future__ import annotations

import pytest

from shardq.errors import UsageError
from shardq.ops.console.guard import SECURITY_HEADERS, Policy, host_name, refusal
from shardq.ops.console.server import TOKEN_VARIABLE, is_loopback, make_policy

TOKEN = "t" * 24
POLICY = Policy(TOKEN, frozenset({"queues.example.org"}))
HOST = "127.0.0.1:9500"
WRITE = {
    "host": HOST,
    "origin": f"http://{HOST}",
    "content-type": "application/json",
    "authorization": f"Bearer {TOKEN}",
    "sec-fetch-site": "same-origin",
}


def status(method: str, headers: dict[str, str], policy: Policy = POLICY, path: str = "/api/dead/purge") -> int | None:
    refused = refusal(policy, method, path, headers)
    return refused.status if refused is not None else None


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:9500",
        "127.0.0.1",
        "[::1]:9500",
        "localhost:9500",
        "LOCALHOST",
        "10.0.0.7:80",
        "queues.example.org:80",
    ],
)
def test_addresses_and_known_names_are_answered(host: str) -> None:
    assert status("GET", {"host": host}) is None


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:9500",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "127.0.0.1@evil",
        "[",
        "1",
    ],
)
def test_other_host_names_are_not(host: str) -> None:
    assert status("GET", {"host": host}, path="/") == 421


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_another_site_makes_a_browser_ask_is_refused(site: str) -> None:
    assert status("GET", {"host": HOST, "sec-fetch-site": site}, path="/api/messages") == 403
    assert status("GET", {"host": HOST, "sec-fetch-site": site}, path="/") is None, "a link to the page may lead here"


def test_a_write_of_the_page_passes() -> None:
    assert status("POST", WRITE) is None
    assert status("POST", WRITE | {"content-type": "application/json; charset=utf-8"}) is None
    assert status("POST", WRITE | {"origin": f"https://{HOST}"}) is None, "TLS may end at a proxy"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param({"origin": "http://evil.example"}, 403, id="another-origin"),
        pytest.param({"origin": "null"}, 403, id="null-origin"),
        pytest.param({"origin": ""}, 403, id="no-origin"),
        pytest.param({"origin": f"http://{HOST}.evil.example"}, 403, id="longer-origin"),
        pytest.param({"content-type": "text/plain"}, 415, id="form-like"),
        pytest.param({"content-type": "application/x-www-form-urlencoded"}, 415, id="form"),
        pytest.param({"authorization": ""}, 401, id="no-token"),
        pytest.param({"authorization": f"Bearer {TOKEN}x"}, 401, id="wrong-token"),
        pytest.param({"authorization": "Bearer null"}, 401, id="page-without-token"),
        pytest.param({"authorization": f"Basic {TOKEN}"}, 401, id="another-scheme"),
        pytest.param({"authorization": "Bearer t\u00e9"}, 401, id="no-ascii"),
        pytest.param({"sec-fetch-site": "cross-site"}, 403, id="cross-site"),
        pytest.param({"host": "evil.example", "origin": "http://evil.example"}, 421, id="rebound"),
    ],
)
def test_any_other_write_does_not(change: dict[str, str], expected: int) -> None:
    assert status("POST", WRITE | change) == expected


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_without_a_token_nothing_is_written(method: str) -> None:
    assert status(method, WRITE, Policy()) == 403


def test_the_page_may_run_nothing_inline() -> None:
    policy = dict(SECURITY_HEADERS)[b"content-security-policy"].decode()
    assert "unsafe" not in policy
    assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy.split("; "))


@pytest.mark.parametrize(
    ("host", "name"), [("A.b:1", "a.b"), ("[::1]:80", "::1"), ("[::1]", "::1"), ("name.", "name"), ("", "")]
)
def test_host_names(host: str, name: str) -> None:
    assert host_name(host) == name


def test_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert make_policy(write=False, names=[]).token is None
    first, second = (make_policy(write=True, names=["Q.example"]) for _ in range(2))
    assert first.token != second.token
    assert len(first.token or "") >= 32
    assert first.names == {"q.example"}
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert make_policy(write=True, names=[]).token == TOKEN
    assert make_policy(write=False, names=[]).token is None


@pytest.mark.parametrize("bad", ["short", "with blanks in it, long enough", "\u00e9" * 20, "a\x7f" * 10])
def test_a_weak_token_is_refused(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, bad)
    with pytest.raises(UsageError, match="at least 16 printable"):
        make_policy(write=True, names=[])


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("example.org", False)],
)
def test_loopback(host: str, own: bool) -> None:
    assert is_loopback(host) is own
