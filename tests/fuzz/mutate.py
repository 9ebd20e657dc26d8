"""Hypothesis strategies of bytes that are nearly right: valid encodings with bits flipped, cut off, spliced, with
lengths made huge, nested deep."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

# Lengths and numbers that decoders get wrong; nests deeper than any stack; what is neither a number nor UTF-8.
PIECES = [
    b"\xdd\xff\xff\xff\xff",
    b"\xdc\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xcf" + b"\xff" * 8,
    b"\xd3\x80" + bytes(7),
    b"\xcb\x7f\xf8" + bytes(6),
    b"\xcb\xff\xf0" + bytes(6),
    b"\xc7\x0c\xff" + b"\xff" * 12,
    b"\xd7\xff" + b"\xff" * 8,
    b"\xd6\xff" + bytes(4),
    b"\xd4\x05\x00",
    b"\xc1",
    b"\x82\xa1a\x01\xa1a\x02",
    b"\x81\x80\xc0",
    b"\x81\x91\xc0\xc0",
    b"\xa3\xed\xa0\x80",
    b"\x91" * 2000,
    b"\x81\xa1a" * 990,
    b"[" * 3000,
    b'{"a":' * 990,
    b"9" * 5000,
    b"-1",
    b"nan",
    b"1e400",
    b"\xd9\xa3",
    b"\xff\xfe",
    b"\\ud800",
    b"\0",
    b"\xc0",
    b"",
]


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    data = bytearray(draw(st.sampled_from(list(seeds))))
    for _ in range(draw(st.integers(1, 4))):
        _mutate(draw, data, seeds)
    return bytes(data)


def _mutate(draw: st.DrawFn, data: bytearray, seeds: Sequence[bytes]) -> None:
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    match draw(st.integers(0, 5)):
        case 0 if data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        case 1 if data:
            data[at] = draw(st.integers(0, 255))
        case 2:
            del data[at:]
        case 3:
            del data[at : at + draw(st.integers(1, 8))]
        case 4:
            other = draw(st.sampled_from(list(seeds)))
            data[at:at] = other[draw(st.integers(0, len(other))) :][:40]
        case _:
            data[at : at + draw(st.integers(0, 8))] = draw(st.sampled_from(PIECES))
