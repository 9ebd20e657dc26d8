"""The hash that decides the shard of a key: MurmurHash3 x86_32 with seed 0, unsigned.

Wire format: every producer in every language must get the same number. Never salts, never caches, never guesses
an encoding: str is UTF-8, bytes are taken as they are, anything else is refused.
"""

from __future__ import annotations

import mmh3

from shardq.errors import InvalidKey


def key_hash(key: str | bytes) -> int:
    """Return the 32-bit hash, 0..2**32-1, of `key`; a str hashes like its UTF-8 bytes.

    Raises InvalidKey when `key` is neither str nor bytes, or is a str that UTF-8 can't carry (lone surrogates).
    """
    # Encoded here and not by mmh3, which (5.3.1) crashes the interpreter when a str can't be encoded.
    if type(key) not in (str, bytes):
        raise InvalidKey(f"a message key must be str or bytes, not {type(key).__name__}; convert it, e.g. str(key)")
    if isinstance(key, str):
        key = _utf8(key)
    elif not isinstance(key, bytes):
        raise InvalidKey(f"a message key must be str or bytes, not {type(key).__name__}; convert it, e.g. str(key)")
    return mmh3.hash(key, 0, False)


def _utf8(key: str) -> bytes:
    try:
        return key.encode()
    except UnicodeEncodeError as error:
        raise InvalidKey(
            f"the message key can't be encoded as UTF-8 (lone surrogate at index {error.start}); "
            "pass its bytes instead, e.g. key.encode('utf-8', 'surrogateescape')"
        ) from error
