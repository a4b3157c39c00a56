"""Runs serving steps through the model, alone or fused with the rows of a training forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from clif.adapters.bank import AdapterBank
from clif.config import EngineConfig
from clif.engine.attention import KVCache, PagedRows
from clif.engine.batch import Batch, BatchBuilder
from clif.engine.jobs import FusedPass
from clif.engine.sampling import SampledTokens, choose
from clif.engine.scheduler import Chunk
from clif.models.layer import SubBatch
from clif.models.stack import CausalStack

if TYPE_CHECKING:
    from clif.kernels.paged_decode_host import PagedDecode


class ModelRunner:
    """The model of one rank with its adapters and KV cache, for serving.

    paged: the kernel for attention of decode rows, None: torch's products.
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
        self.paged = paged
        self._batches = BatchBuilder(config, stack.vocab_size, device, dtype, stack.varlen)
        # Of the last step, in the order in which its chunks sample: the next one may need them before the host knows.
        self._last_tokens = torch.zeros(config.max_batch, dtype=torch.int64, device=device)

    def fill(self, chunks: Sequence[Chunk]) -> Batch:
        """The batch of one step's chunks; valid until the next one is filled. Does not wait for the device."""
        return self._batches.fill(chunks, self.paged is not None)

    @torch.no_grad()
    def forward(self, batch: Batch, fused: FusedPass | None = None) -> SampledTokens:
        """Compute one step and choose its tokens, one for each chunk that samples. Collective over the peers.

        Does not wait for the device: ids that the step before chose are taken from there. fused: a training forward
        whose remaining layers are computed in the same products.
        """
        sampled, ids = SampledTokens(self.device), batch.ids
        if batch.sources is not None:
            ids = torch.where(batch.sources < 0, ids, self._last_tokens[batch.sources.clamp_min(0)])
        attention = PagedRows(self.cache, batch.layout, self.paged)
        sub_batch = self.stack.sub_batch(batch.rows, batch.positions, attention)
        hidden = self._layers(self.stack.embed(ids), sub_batch, fused)
        logits = self.stack.head(self.stack.norm(hidden[batch.ends]))
        tokens = choose(self.stack.head, logits, batch.draws)
        # A sequence without a token ends; until that is known, its next row needs some id.
        self._last_tokens[: len(tokens)] = tokens.clamp_min(0)
        sampled.send(tokens)
        return sampled

    def _layers(self, hidden: torch.Tensor, sub_batch: SubBatch, fused: FusedPass | None) -> torch.Tensor:
        """All layers of the serving rows; those that the fused pass has yet to do see its rows as well."""
        alone = self.stack.num_layers if fused is None else fused.at
        (hidden,) = self.stack.layers(0, alone, [hidden], [sub_batch])
        if fused is None:
            return hidden
        for layer in range(alone, self.stack.num_layers):
            entry, keep = fused.enter()
            with torch.set_grad_enabled(keep):
                hidden, out = self.stack.layers(layer, layer + 1, [hidden, entry], [sub_batch, fused.sub_batch])
            fused.leave(entry, out)
        return hidden
