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

import torch

from clif.engine.scheduler import Chunk
from clif.kernels.staging import Staged
from clif.types import Request

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


class DrawTable:
    """Fills the draws of a step by one copy to the device, if any row draws. capacity: rows, at most."""

    def __init__(self, capacity: int, vocab_size: int, device: torch.device) -> None:
        self._capacity, self._vocab_size = capacity, vocab_size
        self._staged = Staged.zeros((INTS + FLOATS) * capacity, torch.int64, device)

    def fill(self, chunks: Sequence[Chunk]) -> Draws | None:
        """The draws of these chunks, all of which choose a token, in the order of their logits. None: all are greedy.

        After Scheduler.schedule(): tokens in flight count as drawn.
        """
        drawing = sorted(
            self._numbers(row, chunk.sequence.request, chunk.stop)
            for row, chunk in enumerate(chunks)
            if chunk.sequence.request.sampling.temperature
        )
        if not drawing:
            return None
        uses, *columns = zip(*drawing, strict=True)
        n, words = len(drawing), self._staged.write().view(-1, self._capacity)
        words[:INTS].numpy()[:, :n] = columns[:INTS]
        words[INTS:].view(torch.float64).numpy()[:, :n] = columns[INTS:]
        self._staged.send()
        with_top_k, only_k, no_p = bisect(uses, BOTH), bisect(uses, ONLY_TOP_K), uses.count(NEITHER)
        return self._draws(slice(0, with_top_k), slice(only_k, n - no_p), n, max(columns[1][:with_top_k], default=0))

    def _numbers(self, row: int, request: Request, stop: int) -> tuple[int, int, int, float, float, float]:
        """Which filters it uses, and what the device needs to know. stop: what lies before it is prompt, or drawn."""
        asked = request.sampling
        top_k = min(asked.top_k, self._vocab_size)
        by_k, by_p = 0 < top_k < self._vocab_size, asked.top_p < 1
        use = (BOTH if by_p else ONLY_TOP_K) if by_k else ONLY_TOP_P if by_p else NEITHER
        # In float32 a temperature of 1e-300 would be 0, and one of 1e300 infinite.
        temperature = min(max(asked.temperature, LIMITS.tiny), LIMITS.max)
        return use, row, top_k, temperature, asked.top_p, uniform(request, stop - len(request.prompt))

    def _draws(self, with_top_k: slice, with_top_p: slice, n: int, largest_k: int) -> Draws:
        words = self._staged.words.view(-1, self._capacity)
        (rows, top_k), (temperature, top_p, uniforms) = words[:INTS, :n], words[INTS:, :n].view(torch.float64)
        return Draws(
            rows, temperature, uniforms, top_k[with_top_k], top_p[with_top_p], with_top_k, with_top_p, largest_k
        )
