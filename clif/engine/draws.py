"""What a step's choices need besides logits: parameters and a random number for each row that is not simply greedy.

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
from math import ceil
from typing import Any

import numpy as np
import torch

from clif.engine.logprobs import Reporting
from clif.engine.scheduler import Chunk
from clif.kernels.staging import Staged
from clif.types import Request, Sampling

ONE = 2.0**42
"""The weight of the likeliest token of a row. Those of 2^20 tokens can be added up in an int64."""
INTS, FLOATS = 3, 3
"""Numbers of a row: its index, top_k and the least weight by min_p; temperature, top_p and its random number."""
ONLY_TOP_K, BOTH, ONLY_TOP_P, NEITHER, GREEDY = range(5)
"""Filters of a row, in the order of the rows: those of either filter lie together, and greedy ones at the end."""
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
    """The rows of a step whose token is drawn, or is the likeliest after changes, on the device. Valid until the next
    fill.

    rows: their indices among all rows that choose a token, the greedy ones last. temperature and uniform, float64, and
    least_weight, int64, are [drawn rows]. top_k int64 and top_p float64 belong to the slices with_top_k and with_top_p
    of them; largest_k: the maximum of top_k; with_min_p: whether a least weight is above 0. guided: positions in rows
    whose logits are changed, each with its index; on the host.
    """

    rows: torch.Tensor
    temperature: torch.Tensor
    uniform: torch.Tensor
    least_weight: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    with_top_k: slice
    with_top_p: slice
    largest_k: int
    with_min_p: bool
    guided: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Drawing:
    """The requests of a step that draw or are guided, which are mostly those of the step before.

    rows, and the columns of ints [INTS, rows] and floats [FLOATS - 1, rows]: in the order of draws.rows. drawn: how
    many of them are drawn.
    """

    rows: Sequence[int]
    ints: Any
    floats: Any
    drawn: int
    draws: Draws


class DrawTable:
    """Fills the draws of a step by one copy to the device, if any row draws or is guided. capacity: rows, at most.

    reporting: the rows of the last fill that report log-probabilities.
    """

    def __init__(self, capacity: int, vocab_size: int, device: torch.device) -> None:
        self._capacity, self._vocab_size, self._device = capacity, vocab_size, device
        self._staged = Staged.zeros((INTS + FLOATS) * capacity, torch.int64, device)
        self._requests: list[Request] = []
        self._drawing: Drawing | None = None
        self.reporting: Reporting | None = None

    def fill(self, chunks: Sequence[Chunk]) -> Draws | None:
        """The draws of these chunks, all of which choose a token, in the order of their logits. None: all are greedy.

        After Scheduler.schedule(): tokens in flight count as drawn.
        """
        requests = [chunk.sequence.request for chunk in chunks]
        if requests != self._requests:
            self._requests, self._drawing = requests, self._choose(requests)
            self.reporting = Reporting.of(requests, self._device)
        drawing = self._drawing
        if drawing is None:
            return None
        n, words = len(drawing.rows), self._staged.write().view(-1, self._capacity)
        words[:INTS, :n].numpy()[:] = drawing.ints
        floats = words[INTS:, :n].view(torch.float64).numpy()
        floats[:-1] = drawing.floats
        # What lies before a chunk's end is prompt, or was drawn.
        drawn = drawing.rows[: drawing.drawn]
        floats[-1, : len(drawn)] = [uniform(requests[r], chunks[r].stop - len(requests[r].prompt)) for r in drawn]
        self._staged.send()
        return drawing.draws

    def _choose(self, requests: Sequence[Request]) -> Drawing | None:
        asked = [(row, r.sampling) for row, r in enumerate(requests) if r.sampling.temperature or r.sampling.guided]
        if not asked:
            return None
        uses, *columns = zip(*sorted(self._numbers(row, sampling) for row, sampling in asked), strict=True)
        ints, floats = np.array(columns[:INTS]), np.array(columns[INTS:])
        guided = tuple((at, row) for at, row in enumerate(columns[0]) if requests[row].sampling.guided)
        return Drawing(columns[0], ints, floats, bisect(uses, NEITHER), self._draws(uses, ints, guided))

    def _numbers(self, row: int, asked: Sampling) -> tuple[int, int, int, int, float, float]:
        """Which filters a row uses, and its integers and floats, except for the random number."""
        top_k = min(asked.top_k, self._vocab_size)
        by_k, by_p = 0 < top_k < self._vocab_size, asked.top_p < 1
        use = (BOTH if by_p else ONLY_TOP_K) if by_k else ONLY_TOP_P if by_p else NEITHER
        use = use if asked.temperature else GREEDY
        # In float32 a temperature of 1e-300 would be 0, and one of 1e300 infinite.
        temperature = min(max(asked.temperature, LIMITS.tiny), LIMITS.max)
        return use, row, top_k, ceil(asked.min_p * ONE), temperature, asked.top_p

    def _draws(self, uses: Sequence[int], ints: Any, guided: Sequence[tuple[int, int]]) -> Draws:
        """Views of the numbers on the device; uses: the filters of each row, sorted."""
        words = self._staged.words.view(-1, self._capacity)
        n, drawn, with_top_k = len(uses), bisect(uses, NEITHER), slice(0, bisect(uses, BOTH))
        with_top_p = slice(bisect(uses, ONLY_TOP_K), bisect(uses, ONLY_TOP_P))
        rows, (top_k, least_weight) = words[0, :n], words[1:INTS, :drawn]
        temperature, top_p, uniforms = words[INTS:, :drawn].view(torch.float64)
        return Draws(
            rows,
            temperature,
            uniforms,
            least_weight,
            top_k[with_top_k],
            top_p[with_top_p],
            with_top_k,
            with_top_p,
            int(ints[1, with_top_k].max(initial=0)),
            bool(ints[2, :drawn].any()),
            guided,
        )
