"""What a failed TLS handshake means, in words: who refused which certificate, and what to change. Sends no command."""

from __future__ import annotations

import ssl

import anyio
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import SSLConnection

from shardq.errors import TlsFailed

# The connection just ended, as when a server goes down: that is no matter of certificates, and passes.
_BROKEN = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_LISTEN_S = 1.0
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "UNKNOWN_PROTOCOL")


def tls_failure(error: BaseException, node: str) -> TlsFailed | None:
    """The error to raise when `error`, or what it came from, is a refused handshake with `node`; else None."""
    found = _ssl_error(error)
    if found is None or isinstance(found, _BROKEN):
        return None
    if isinstance(found, ssl.SSLCertVerificationError):
        said = found.verify_message.rstrip(".")
        how = "name the CA with ?ssl_ca_certs=FILE in the URL, and the host as the certificate has it"
        return TlsFailed(f"the certificate of {node} is not accepted ({said}): {how}")
    reason = found.reason or "handshake failed"
    if any(text in reason for text in _NO_TLS):
        return TlsFailed(f"{node} does not speak TLS on this port ({reason}): write redis://, or name its TLS port")
    if "ALERT" in reason:
        how = "name one it accepts with ?ssl_certfile=FILE&ssl_keyfile=FILE in the URL"
        return TlsFailed(f"{node} wants another client certificate ({reason}): {how}")
    return TlsFailed(f"TLS with {node} failed ({reason}): check the certificates on both sides")


async def refused_client(node: ClusterNode) -> TlsFailed | None:
    """Shakes hands with a node that broke a first connection, and listens. With TLS 1.3 a server says what it holds
    against the client's certificate when the client has begun to write, and what is written then may cut it short."""
    connection = node.acquire_connection()
    try:
        if not isinstance(connection, SSLConnection):
            return None
        context = connection.ssl_context.get()
        with anyio.move_on_after(_LISTEN_S):
            async with await anyio.connect_tcp(
                node.host,
                int(node.port),
                ssl_context=context,
                tls_hostname=node.host,
                tls_standard_compatible=False,  # else leaving shakes hands once more, and that error hides the first
            ) as stream:
                await stream.receive()
    except (OSError, anyio.BrokenResourceError, anyio.EndOfStream) as error:
        return tls_failure(error, node.name)
    finally:
        node.release(connection)
    return None


def _ssl_error(error: BaseException) -> ssl.SSLError | None:
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        if isinstance(at, ssl.SSLError):
            return at
        seen.add(id(at))
        at = at.__cause__ or at.__context__
    return None
