"""What a step's draws need besides logits: parameters and a random number for each row that is not greedy.

The random number of a draw is a function of the request's seed and of how many tokens were drawn before it, and of
nothing else. So no generator has a state to keep: it is known before the tokens in front of it are, and another replica
continues an answer with the tokens that the first one would have drawn, on any device.

Sources: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), for random numbers by counter.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch

from clif.engine.scheduler import Chunk
from clif.kernels.staging import Staged
from clif.types import Request, Sampling

INTS, FLOATS = 2, 3
"""Numbers of a row: its index and top_k; temperature, top_p and its random number."""
ORDER = {(True, False): 0, (True, True): 1, (False, True): 2, (False, False): 3}
"""Where the rows of a request that uses (top_k, top_p) lie, so that those of either filter lie together."""
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
        drawing = [(row, chunk) for row, chunk in enumerate(chunks) if chunk.sequence.request.sampling.temperature]
        if not drawing:
            return None
        drawing.sort(key=lambda draw: ORDER[self._filters(draw[1].sequence.request.sampling)])
        asked = [chunk.sequence.request.sampling for _, chunk in drawing]
        self._write(drawing, asked)
        self._staged.send()
        used = [self._filters(params) for params in asked]
        return self._draws(used, max((p.top_k for p, (k, _) in zip(asked, used, strict=True) if k), default=0))

    def _filters(self, params: Sampling) -> tuple[bool, bool]:
        """Whether top_k and top_p leave tokens out."""
        return 0 < params.top_k < self._vocab_size, params.top_p < 1

    def _write(self, drawing: Sequence[tuple[int, Chunk]], asked: Sequence[Sampling]) -> None:
        host, n = self._staged.write().view(-1, self._capacity), len(drawing)
        ints, floats = host[:INTS].numpy(), host[INTS:].view(torch.float64).numpy()
        ints[0, :n] = [row for row, _ in drawing]
        ints[1, :n] = [min(params.top_k, self._vocab_size) for params in asked]
        # In float32 a temperature of 1e-300 would be 0, and one of 1e300 infinite.
        floats[0, :n] = [min(max(params.temperature, LIMITS.tiny), LIMITS.max) for params in asked]
        floats[1, :n] = [params.top_p for params in asked]
        # What lies before a chunk's end, the prompt excepted, was drawn before.
        floats[2, :n] = [uniform(c.sequence.request, c.stop - len(c.sequence.request.prompt)) for _, c in drawing]

    def _draws(self, used: Sequence[tuple[bool, bool]], largest_k: int) -> Draws:
        words, n = self._staged.words.view(-1, self._capacity), len(used)
        (rows, top_k), (temperature, top_p, uniforms) = words[:INTS, :n], words[INTS:, :n].view(torch.float64)
        only_k, no_p = used.count((True, False)), used.count((False, False))
        with_top_k, with_top_p = slice(0, sum(k for k, _ in used)), slice(only_k, n - no_p)
        return Draws(
            rows, temperature, uniforms, top_k[with_top_k], top_p[with_top_p], with_top_k, with_top_p, largest_k
        )
