"""The pure heart of shardq: what a key hashes to, where it goes, who should own what, what bytes mean.

Rules of this package, kept by lint contracts and tests:

- No I/O: nothing here opens, sends, waits or logs; no redis, anyio or asyncio is imported.
- No clock and no chance: time and random numbers come in as arguments, never from `time` or `random`.
- Deterministic order: equal input gives equal output on every machine and in every process, whatever the order
  of the input and whatever PYTHONHASHSEED is. Nothing iterates a set where the order could be seen outside.
- Bad input ends in an error from `shardq.errors`, never in a wrong answer.

What is wire format (slots, tags, hashes, routing tables, ids) is guarded by golden values in `tests/core/`.
"""
