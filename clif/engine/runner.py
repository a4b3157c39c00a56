"""Runs batches through the model: serving steps, alone or with training rows beside them, and training in slices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from clif.adapters.bank import AdapterBank
from clif.config import ConfigError, EngineConfig
from clif.engine.attention import KVCache, PagedRows
from clif.engine.batch import Batch, BatchBuilder
from clif.engine.jobs import Slice, SliceKind, Slices
from clif.engine.passes import Pass, measure_activations, pack
from clif.engine.sampling import SampledTokens, choose
from clif.engine.scheduler import Chunk
from clif.models.dual_linear import SHADOW
from clif.models.layer import SubBatch
from clif.models.stack import CausalStack
from clif.types import TrainSample

if TYPE_CHECKING:
    from clif.kernels.paged_decode_host import PagedDecode

HEAD_LEAST = 16
"""Rows of the head's smallest slice: one row would read the whole matrix, too."""


class Pace(Protocol):
    """How many rows a training forward has."""

    def pass_tokens(self) -> int:
        """Rows of the next forward at most; a longer sample goes alone."""
        ...


class AtOnce:
    """As many as the memory allows."""

    def pass_tokens(self) -> int:
        return 1 << 30


class ModelRunner:
    """The model of one rank with its adapters and KV cache.

    pace: set by the engine; paged: the kernel for attention of decode rows, None: torch's products.
    """

    def __init__(
        self,
        stack: CausalStack,
        bank: AdapterBank,
        config: EngineConfig,
        device: torch.device,
        dtype: torch.dtype,
        paged: PagedDecode | None = None,
    ) -> None:
        self.stack, self.bank, self.config, self.device = stack, bank, config, device
        self.cache = KVCache(stack.num_layers, config.kv_tokens, stack.num_kv_heads, stack.head_dim, dtype, device)
        self.activations = measure_activations(stack, device, config.activation_mib << 20)
        self.pace: Pace = AtOnce()
        self.paged = paged
        self._batches = BatchBuilder(config, stack.vocab_size, device, dtype)
        # Of the last step, in the order in which its chunks sample: the next one may need them before the host knows.
        self._last_tokens = torch.zeros(config.max_batch, dtype=torch.int64, device=device)

    def check_samples(self, longest: int) -> None:
        """Raises ConfigError if a training sample of this many tokens cannot be held."""
        if not self.activations.fits([longest]):
            raise ConfigError(
                f"a training sample of {longest} tokens needs more than engine.activation_mib "
                f"{self.config.activation_mib}: raise it or lower data.max_sample_tokens"
            )

    def fill(self, chunks: Sequence[Chunk]) -> Batch:
        """The batch of one step's chunks; valid until the next one is filled. Does not wait for the device."""
        return self._batches.fill(chunks, self.paged is not None)

    @torch.no_grad()
    def forward(self, batch: Batch, fused: Pass | None = None) -> SampledTokens:
        """Compute one step and choose its tokens, one for each chunk that samples. Collective over the peers.

        Does not wait for the device: ids that the step before chose are taken from there. fused: a training forward
        that goes through its remaining layers in the same products.
        """
        ids = batch.ids
        if batch.sources is not None:
            ids = torch.where(batch.sources < 0, ids, self._last_tokens[batch.sources.clamp_min(0)])
        attention = PagedRows(self.cache, batch.layout, self.paged)
        sub_batch = self.stack.sub_batch(batch.rows, batch.positions, attention)
        hidden = self._layers(self.stack.embed(ids), sub_batch, fused)
        logits = self.stack.head(self.stack.norm(hidden[batch.ends]))
        tokens = choose(self.stack.head, logits, batch.params, batch.rngs)
        # A sequence without a token ends; until that is known, its next row needs some id.
        self._last_tokens[: len(tokens)] = tokens.clamp_min(0)
        return SampledTokens(tokens)

    def _layers(self, hidden: torch.Tensor, sub_batch: SubBatch, fused: Pass | None) -> torch.Tensor:
        joined = self.stack.num_layers if fused is None else fused.at
        (hidden,) = self.stack.layers(0, joined, [hidden], [sub_batch])
        while fused is not None and fused.left:
            (hidden,) = fused.layer([hidden], [sub_batch])
        return hidden

    def loss_and_gradients(self, samples: Sequence[TrainSample], divisor: float) -> Slices[float]:
        """Forward and backward of the shadow; adds the gradients of (summed cross-entropy / divisor) to it.

        Returns the summed cross-entropy in nats.
        """
        total, left = 0.0, list(samples)
        while left:
            run = self._next_pass(left, SHADOW, learns=True)
            yield from self._forward(run, SliceKind.FORWARD)
            total += yield from self._head(run, SliceKind.HEAD, divisor)
            while run.cuts:
                yield Slice(SliceKind.BACKWARD, run.batch.tokens, len(run.cuts), run.backward)
        return total

    def loss(self, samples: Sequence[TrainSample], slot: int | None) -> Slices[float]:
        """Summed cross-entropy in nats under an adapter slot (SHADOW, a serving slot, None: the base)."""
        total, left = 0.0, list(samples)
        while left:
            run = self._next_pass(left, slot, learns=False)
            yield from self._forward(run, SliceKind.EVALUATE)
            total += yield from self._head(run, SliceKind.EVALUATE_HEAD, 1.0)
        return total

    def _next_pass(self, left: list[TrainSample], slot: int | None, learns: bool) -> Pass:
        """Takes the samples of the next pass from `left`: at least one, and what the pace and the memory allow."""
        most, taken = self.pace.pass_tokens(), [left.pop(0)]
        lengths = [len(taken[0].ids)]
        while left and sum(lengths) + len(left[0].ids) <= most:
            if learns and not self.activations.fits([*lengths, len(left[0].ids)]):
                break
            taken.append(left.pop(0))
            lengths.append(len(taken[-1].ids))
        if slot == SHADOW:
            # The masters may have changed since: rounding them again is cheap beside a forward.
            self.bank.refresh()
        return Pass(self.stack, pack(taken, self.device), slot, self.device, self.activations if learns else None)

    def _forward(self, run: Pass, kind: SliceKind) -> Slices[None]:
        while run.left:
            yield Slice(kind, run.batch.tokens, run.left, run.forward, rider=run)

    def _head(self, run: Pass, kind: SliceKind, divisor: float) -> Slices[float]:
        total, start, end = 0.0, 0, len(run.batch.targets)
        while start < end:
            work = partial(run.head, start, divisor=divisor)
            loss, start = yield Slice(kind, 1, end - start, work, least=min(HEAD_LEAST, end - start))
            total += loss
        return total
