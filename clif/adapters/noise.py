"""Gradient noise scale: the batch size, in samples, beyond which averaging more samples stops paying.

McCandlish et al., "An Empirical Model of Large-Batch Training" (2018), appendix A: from n micro-batches of b
samples with gradients g_i and mean g,

    |G|^2     = (n |g|^2 - mean |g_i|^2) / (n - 1)
    tr(Sigma) = b n / (n - 1) * (mean |g_i|^2 - |g|^2)        phi = tr(Sigma) / |G|^2

Both estimates are unbiased but noisy, so each is smoothed before the ratio is taken.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class NoiseScale:
    """Running estimate. smoothing: weight of the newest observation."""

    smoothing: float = 0.1
    _signal: float | None = None
    _noise: float | None = None

    def observe(self, micro_norms2: list[float], mean_norm2: float, micro_batch: float) -> None:
        """micro_norms2: |g_i|^2 of each micro-batch; mean_norm2: |g|^2. Fewer than two say nothing."""
        n = len(micro_norms2)
        if n < 2:
            return
        mean_of_norms = sum(micro_norms2) / n
        signal = (n * mean_norm2 - mean_of_norms) / (n - 1)
        noise = micro_batch * n / (n - 1) * (mean_of_norms - mean_norm2)
        self._signal = signal if self._signal is None else self._signal + self.smoothing * (signal - self._signal)
        self._noise = noise if self._noise is None else self._noise + self.smoothing * (noise - self._noise)

    @property
    def samples(self) -> float | None:
        """phi, or None while the estimates do not allow one."""
        if self._signal is None or self._noise is None or self._signal <= 0 or self._noise <= 0:
            return None
        return self._noise / self._signal
