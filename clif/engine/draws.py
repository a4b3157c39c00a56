"""What a step's draws need besides logits: parameters and a random number for each row that is not greedy.

The random number of a draw is a function of the request's seed and of how many tokens were drawn before it, and of
nothing else. So no generator has a state to keep: it is known before the tokens in front of it are, and another replica
continues an answer with the tokens that the first one would have drawn, on any device.

Sources: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), for random numbers by counter.
"""

from __future__ import annotations

import struct
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from clif.engine.scheduler import Chunk
from clif.kernels.staging import Staged
from clif.types import Request, Sampling

INTS, FLOATS = 2, 3
"""Numbers of a row: its index and top_k; temperature, top_p and its random number."""
ONLY_TOP_K, BOTH, ONLY_TOP_P, NEITHER = range(4)
"""Filters of a row, in the order of the rows: those of either filter lie together."""
LIMITS = torch.finfo(torch.float32)


def uniform(request: Request, position: int) -> float:
    """The random number in [0, 1) of an answer's token at this position: a multiple of 2^-53.

    Without a seed, the request's id stands in for it.
    """
    seed = request.id if request.sampling.seed is None else request.sampling.seed
    digest = blake2b(struct.pack("<QQ", seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


@dataclass(frozen=True)
class Draws:
    """The rows of a step whose token is drawn, on the device. Valid until the next fill.

    rows: their indices among all rows that choose a token; temperature, uniform: float64. All are [drawing]. top_k
    int64 and top_p float64 belong to the slices with_top_k and with_top_p of them; largest_k: the maximum of top_k.
    """

    rows: torch.Tensor
    temperature: torch.Tensor
    uniform: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    with_top_k: slice
    with_top_p: slice
    largest_k: int


@dataclass(frozen=True)
class Drawing:
    """The requests of a step that draw, which are mostly those of the step before.

    rows, and the columns of ints [INTS, drawing] and floats [FLOATS - 1, drawing]: in the order of draws.rows.
    """

    rows: Sequence[int]
    ints: Any
    floats: Any
    draws: Draws


class DrawTable:
    """Fills the draws of a step by one copy to the device, if any row draws. capacity: rows, at most."""

    def __init__(self, capacity: int, vocab_size: int, device: torch.device) -> None:
        self._capacity, self._vocab_size = capacity, vocab_size
        self._staged = Staged.zeros((INTS + FLOATS) * capacity, torch.int64, device)
        self._requests: list[Request] = []
        self._drawing: Drawing | None = None

    def fill(self, chunks: Sequence[Chunk]) -> Draws | None:
        """The draws of these chunks, all of which choose a token, in the order of their logits. None: all are greedy.

        After Scheduler.schedule(): tokens in flight count as drawn.
        """
        requests = [chunk.sequence.request for chunk in chunks]
        if requests != self._requests:
            self._requests, self._drawing = requests, self._choose(requests)
        drawing = self._drawing
        if drawing is None:
            return None
        n, words = len(drawing.rows), self._staged.write().view(-1, self._capacity)
        words[:INTS, :n].numpy()[:] = drawing.ints
        floats = words[INTS:, :n].view(torch.float64).numpy()
        floats[:-1] = drawing.floats
        # What lies before a chunk's end is prompt, or was drawn.
        floats[-1] = [uniform(requests[row], chunks[row].stop - len(requests[row].prompt)) for row in drawing.rows]
        self._staged.send()
        return drawing.draws

    def _choose(self, requests: Sequence[Request]) -> Drawing | None:
        numbers = sorted(self._numbers(row, r.sampling) for row, r in enumerate(requests) if r.sampling.temperature)
        if not numbers:
            return None
        uses, *columns = zip(*numbers, strict=True)
        with_top_k, only_k, no_p = bisect(uses, BOTH), bisect(uses, ONLY_TOP_K), uses.count(NEITHER)
        slices = slice(0, with_top_k), slice(only_k, len(uses) - no_p)
        draws = self._draws(len(uses), *slices, max(columns[1][:with_top_k], default=0))
        return Drawing(columns[0], np.array(columns[:INTS]), np.array(columns[INTS:]), draws)

    def _numbers(self, row: int, asked: Sampling) -> tuple[int, int, int, float, float]:
        """Which filters a row uses, and its integers and floats, except for the random number."""
        top_k = min(asked.top_k, self._vocab_size)
        by_k, by_p = 0 < top_k < self._vocab_size, asked.top_p < 1
        use = (BOTH if by_p else ONLY_TOP_K) if by_k else ONLY_TOP_P if by_p else NEITHER
        # In float32 a temperature of 1e-300 would be 0, and one of 1e300 infinite.
        return use, row, top_k, min(max(asked.temperature, LIMITS.tiny), LIMITS.max), asked.top_p

    def _draws(self, n: int, with_top_k: slice, with_top_p: slice, largest_k: int) -> Draws:
        words = self._staged.words.view(-1, self._capacity)
        (rows, top_k), (temperature, top_p, uniforms) = words[:INTS, :n], words[INTS:, :n].view(torch.float64)
        return Draws(
            rows, temperature, uniforms, top_k[with_top_k], top_p[with_top_p], with_top_k, with_top_p, largest_k
        )
