"""Random damage to bytes, the same for the same seed: what disks, editors, scrapers and hurried people do to files."""

from __future__ import annotations

import random
from collections.abc import Callable

Mutation = Callable[[random.Random, bytearray], None]

# What breaks parsers: halves of characters, other numbers, depth, other encodings, other line ends.
TOKENS = [
    b"\\ud83d", b"\\udc00\\ud800", b"\xed\xa0\x80", b"\xff\xfe", b"\x00", b"\xe2\x80\xa8", b"\r", b"\n\n", b"NaN",
    b"Infinity", b"-Infinity", b"1e999", b"-1", b"9" * 30, b"9" * 400, b"9" * 5000, b"0.5", b"true", b"null", b"{}",
    b"[]", b'"', b"\\", b"[" * 3000, b'{"a":' * 3000, b"[" * 200_000, b"1e-300", b",", b"-0", b'"\\u0000"',
    b"x" * 70_000,
]  # fmt: skip


def _at(rng: random.Random, data: bytearray) -> int:
    return rng.randrange(len(data) + 1)


def flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 1, 4, 20))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def overwrite(rng: random.Random, data: bytearray) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.randrange(256)


def zero(rng: random.Random, data: bytearray) -> None:
    start = _at(rng, data)
    part = len(data[start : start + rng.choice((1, 16, 512))])
    data[start : start + part] = bytes(part)


def cut(rng: random.Random, data: bytearray) -> None:
    del data[_at(rng, data) :]


def lose(rng: random.Random, data: bytearray) -> None:
    start = _at(rng, data)
    del data[start : start + rng.choice((1, 2, 30))]


def repeat(rng: random.Random, data: bytearray) -> None:
    start = _at(rng, data)
    data[start:start] = data[start : start + rng.choice((1, 20, 300))]


def insert(rng: random.Random, data: bytearray) -> None:
    start = _at(rng, data)
    data[start:start] = rng.choice(TOKENS)


def replace_value(rng: random.Random, data: bytearray) -> None:
    """Another value in the place of a JSON value or a cell."""
    ends = [i for i, byte in enumerate(data) if byte in b":,[{}]\n"]
    if len(ends) > 1:
        at = rng.randrange(len(ends) - 1)
        data[ends[at] + 1 : ends[at + 1]] = rng.choice(TOKENS)


BINARY: tuple[Mutation, ...] = (flip, flip, overwrite, zero, cut)
"""Those that keep a file's length, or cut it: what a disk does."""
TEXT: tuple[Mutation, ...] = (flip, overwrite, zero, cut, lose, repeat, insert, replace_value, replace_value)


def damaged(content: bytes, seed: int, mutations: tuple[Mutation, ...] = TEXT) -> bytes:
    """content after one to three mutations."""
    rng, data = random.Random(seed), bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice(mutations)(rng, data)
    return bytes(data)
