"""Gradient noise scale: the batch size, in samples, beyond which averaging more samples stops paying.

From n disjoint groups of b_i samples, of which each has the mean gradient g_i at the same parameters, and with
s = g_1 + .. + g_n,

    |G|^2     = (|s|^2 - sum |g_i|^2) / (n (n - 1))        the mean of all g_i . g_j
    tr(Sigma) = mean of b_i (|g_i|^2 - |G|^2)              phi = tr(Sigma) / |G|^2

Both are unbiased, for |g_i|^2 is |G|^2 + tr(Sigma) / b_i on average; but noisy, so each is smoothed before the ratio is
taken. For Adam the gradients are those that it sees: divided by the root of its second moment.

Groups come from what a step computes anyway, where that is possible:

* several micro-batches per step (train.accumulation): each is a group, and every step is observed.
* one micro-batch of several samples: its two halves. Every HALVED-th step computes them one after the other instead of
  together, and reads the gradient between them; their sum is the step's gradient as before. The cost is the fixed part
  of one more pass, once in HALVED steps. Measured on one core with 4 samples
  of 60 tokens and 10 layers of SmolLM2's shape: the passes of such a step take 1.15 times as long in bfloat16 and 1.01
  times in float32, so 4 % and 0.3 % of all passes.
* one sample: it and that of the step after, once in HALVED steps. Their parameters differ by one step, along which the
  gradient turns: |G|^2 comes out low and phi high, the more so the longer the step. Otherwise a coordinator
  that has gone down to one sample would never learn that the noise has grown since.

Members are not compared with each other: after several local steps their parameters differ, and the difference of their
averages is no longer that of gradients at one point.

Sources: McCandlish et al., "An Empirical Model of Large-Batch Training" (2018), appendix A.1, there for b_i = B_small
and the whole batch B_big.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clif.adapters.bank import AdapterBank

STRIDE = 8
"""The noise scale, a ratio of two sums over coordinates, is estimated on every eighth: a step must stay short."""
AFTER_STEPS = 5
"""Steps after which Adam's second moment has settled."""
FLOOR = 0.01
"""Share of the mean moment that is added to each: coordinates that hardly move must not drown all others."""
HALVED = 4


@dataclass
class NoiseScale:
    """Running estimate. smoothing: weight of the newest step; the first observations are averaged."""

    smoothing: float = 0.1
    seen: int = 0
    _signal: float = 0.0
    _noise: float = 0.0

    def observe(self, norms2: Sequence[float], sum_norm2: float, sizes: Sequence[int], steps: int = 1) -> None:
        """norms2: |g_i|^2 of each group; sum_norm2: |s|^2; sizes: b_i; steps: those since the last observation.

        Ignores fewer than two groups, which say nothing, and values that are not finite: the average would keep them.
        """
        n = len(norms2)
        if n < 2 or not math.isfinite(sum_norm2 + sum(norms2)):
            return
        signal = (sum_norm2 - sum(norms2)) / (n * (n - 1))
        noise = sum(size * (norm2 - signal) for size, norm2 in zip(sizes, norms2, strict=True)) / n
        self.seen += 1
        weight = max(1 - (1 - self.smoothing) ** steps, 1 / self.seen)
        self._signal += weight * (signal - self._signal)
        self._noise += weight * (noise - self._noise)

    @property
    def noise_scale(self) -> float | None:
        """phi in samples, or None while the estimates do not allow one."""
        if self._signal <= 0 or self._noise <= 0:
            return None
        return self._noise / self._signal


@dataclass(frozen=True)
class Comparison:
    """Groups of a step's samples. norms2 [groups + 1]: |g_i|^2 of each, then |s|^2, on the device until they are read.

    sizes: b_i; steps: those since the last comparison.
    """

    norms2: torch.Tensor
    sizes: list[int]
    steps: int


class NoiseWatch:
    """Observes the noise scale of a bank's gradient, on coordinates that no other peer shares."""

    def __init__(self, bank: AdapterBank) -> None:
        self.scale = NoiseScale()
        self._bank, self._watched = bank, bank.own(STRIDE)
        self._single: tuple[torch.Tensor, torch.Tensor] | None = None
        self._halved = False

    def group_size(self, samples: int, micro_batch: int, steps: int) -> int:
        """Samples to compute at a time, so that a step of `samples` has groups. steps: those before it."""
        self._halved = steps % HALVED == 0 and steps >= AFTER_STEPS and 1 < samples <= micro_batch
        return -(-samples // 2) if self._halved else micro_batch

    def gradient(self) -> torch.Tensor:
        """A copy of the watched coordinates of the gradient as it is now."""
        return self._bank.gradient[self._watched].clone()

    def compare(
        self, groups: list[torch.Tensor], sizes: list[int], moment: torch.Tensor | None, settled: float, steps: int
    ) -> Comparison | None:
        """groups: mean gradients of disjoint groups of a step's samples; steps: done before it. None: nothing to see.

        moment [n]: Adam's second one of the steps before: one that holds the gradient itself would bias the ratio.
        settled: its share of what it will be, 1 - beta2^step, by which Adam divides it.
        """
        if moment is None or steps < AFTER_STEPS:
            return None
        if len(groups) > 1:
            scale = self._scale(moment, settled)
            return _compare([group * scale for group in groups], sizes, HALVED if self._halved else 1)
        if sizes == [1] and self._single is not None:
            (first, scale), self._single = self._single, None
            return _compare([first, groups[0] * scale], [1, 1], HALVED)
        if sizes == [1] and steps % HALVED == 0:
            scale = self._scale(moment, settled)
            self._single = groups[0] * scale, scale
        return None

    def observe(self, seen: Comparison, norms2: Sequence[float]) -> None:
        """norms2: those of `seen`, read from the device."""
        self.scale.observe(norms2[:-1], norms2[-1], seen.sizes, seen.steps)

    def forget(self) -> None:
        """Something else than a step has changed the shadow: the next step does not continue the last."""
        self._single = None

    def _scale(self, moment: torch.Tensor, settled: float) -> torch.Tensor:
        """A gradient's factor. Without `settled`, gradients of the first steps would dominate the averages."""
        watched = moment[self._watched] / settled
        return (watched + FLOOR * watched.mean()).rsqrt_()


def _compare(seen: list[torch.Tensor], sizes: list[int], steps: int) -> Comparison:
    total = torch.stack(seen).sum(0)
    return Comparison(torch.stack([g.dot(g) for g in (*seen, total)]), sizes, steps)
