"""Figures for readers: the interval of a share, and sentences that differ in their numbers only, counted."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

Z95 = 1.959964
"""Standard deviations of a normal distribution that hold 95 % of it."""
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def wilson(hits: int, count: int) -> tuple[float, float] | None:
    """95 % interval of a share of which `hits` of `count` draws were seen; None without any.

    Sources: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927). It stays within 0
    and 1 and holds for few draws and for shares near 0 and 1, where mean +- deviation does not.
    """
    if count <= 0:
        return None
    share, spread = hits / count, Z95**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + (spread / 2) ** 2) / (1 + spread)
    # At 0 and 1 they are equal but for rounding.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def count_reasons(sentences: Iterable[str]) -> list[dict[str, Any]]:
    """Sentences that are alike but for their numbers as one, with how many there were; the most frequent first.

    A number that differs is shown as its range.
    """
    alike: dict[str, list[list[str]]] = {}
    for sentence in sentences:
        alike.setdefault(_NUMBER.sub("\0", sentence), []).append(_NUMBER.findall(sentence))
    found = [{"count": len(numbers), "reason": _fill(shape, numbers)} for shape, numbers in alike.items()]
    return sorted(found, key=lambda entry: (-entry["count"], entry["reason"]))


def _fill(shape: str, numbers: list[list[str]]) -> str:
    parts = shape.split("\0")
    ranges = [_range(list(column)) for column in zip(*numbers, strict=True)]
    return "".join(part + number for part, number in zip(parts, [*ranges, ""], strict=True))


def _range(numbers: list[str]) -> str:
    least, most = min(numbers, key=float), max(numbers, key=float)
    return least if float(least) == float(most) else f"{least} to {most}"
