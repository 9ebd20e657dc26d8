"""The URL that a user gives: where the cluster is, who asks, and which certificates hold. Connects to nothing.

    redis://[user:password@]host:port
    rediss://[user:password@]host:port?ssl_ca_certs=ca.pem&ssl_certfile=client.pem&ssl_keyfile=client.key

Never quotes the URL, in no error and in no cause of one: it may hold a password, and a password with a `/` or a `#` in
it may stand in any part of what a parser makes of it.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from shardq.errors import UsageError

DEFAULT_PORT = 6379
HOW = "write it as redis://[user:password@]host:port, rediss:// for TLS, with %XX for what is special in a password"

FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_YES_NO = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse(url: str) -> dict[str, Any]:
    """The URL as redis-py's keyword arguments. Raises UsageError, also for a certificate that can't be loaded."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except (ValueError, AttributeError, TypeError):
        raise _unusable("its host or port is none") from None
    if parts.scheme not in ("redis", "rediss"):
        raise _unusable("it begins with neither redis:// nor rediss://")
    if not host or parts.path not in ("", "/", "/0") or parts.fragment:
        raise _unusable("behind redis:// it names no host, or more than a host and a port")
    found: dict[str, Any] = {"host": unquote(host), "port": port or DEFAULT_PORT}
    for name in ("username", "password"):
        if secret := getattr(parts, name):
            found[name] = unquote(secret)
    return found | _tls(parts)


def _unusable(why: str) -> UsageError:
    return UsageError(f"the URL is not usable ({why}): {HOW}")


def _tls(parts: SplitResult) -> dict[str, Any]:
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.scheme == "redis":
        if query:
            raise _unusable("what stands behind its ? is for TLS, and redis:// has none: write rediss://")
        return {}
    options: dict[str, Any] = {name: query.pop(name) for name in FILES if name in query}
    if "ssl_check_hostname" in query:
        options["ssl_check_hostname"] = _YES_NO.get(query.pop("ssl_check_hostname").lower())
        if options["ssl_check_hostname"] is None:
            raise _unusable("ssl_check_hostname is true or false")
    if query:
        raise _unusable(f"behind its ? may stand {', '.join(FILES)} and ssl_check_hostname, nothing else")
    _check_files(options)
    return {"ssl": True, **options}


def _check_files(options: Mapping[str, Any]) -> None:
    """Loads the files once: said here, it is said at once and by name."""
    certificate, key = options.get("ssl_certfile"), options.get("ssl_keyfile")
    if key is not None and certificate is None:
        raise UsageError("the URL has ssl_keyfile without ssl_certfile: name the client's certificate too")
    context = ssl.create_default_context()
    if (authorities := options.get("ssl_ca_certs")) is not None:
        try:
            context.load_verify_locations(cafile=authorities)
        except (OSError, ValueError) as error:
            what = f"the CA file {authorities} of the URL can't be used ({_reason(error)})"
            raise UsageError(f"{what}: name a PEM file with ssl_ca_certs") from None
    if certificate is not None:
        try:
            # A password for the key is not asked for: at a terminal OpenSSL would, and everything would wait.
            context.load_cert_chain(certificate, key, password=_no_password)
        except (OSError, ValueError) as error:
            what = f"the certificate {certificate} with its key {key or certificate} can't be used ({_reason(error)})"
            raise UsageError(f"{what}: name PEM files, an unencrypted key, as ssl_certfile and ssl_keyfile") from None


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)[:100]
