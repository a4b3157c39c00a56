"""Runs serving steps through the model, alone or fused with the rows of a training forward."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from clif.adapters.bank import AdapterBank
from clif.config import EngineConfig
from clif.engine.attention import KVCache, PagedRows
from clif.engine.batch import Batch, BatchBuilder
from clif.engine.capture import Recorder
from clif.engine.changes import changes_of
from clif.engine.compiled_layers import CompiledLayers
from clif.engine.decode_buffers import DecodeBuffers
from clif.engine.graphs import DecodeGraphs, decode_sizes
from clif.engine.jobs import FusedPass
from clif.engine.logprobs import logprobs_of
from clif.engine.prompt_buffers import PromptBuffers
from clif.engine.prompt_graphs import Prefill, PromptGraphs, prompt_sizes
from clif.engine.prompt_logprobs import prompt_logprobs
from clif.engine.sampling import SampledTokens, draw_
from clif.engine.scheduler import Chunk
from clif.kernels.cpu.host import argmax
from clif.kernels.kv_types import cache_dtype
from clif.models.layer import SubBatch
from clif.models.stack import CausalStack

if TYPE_CHECKING:
    from clif.kernels.paged_decode_host import PagedDecode

log = logging.getLogger(__name__)


class ModelRunner:
    """The model of one rank with its adapters and KV cache, for serving.

    paged: the kernel for attention of decode rows, None: torch's products. prefill: that for prompts of captured steps,
    None: those are not captured. graphs, prompt_graphs: captured steps without and with prompts, once there are any.
    cpu_level: of the C++ kernels for CPUs; None: torch's operators. train_recorder: captures the layers of training
    passes; None: none are captured. fuses: steps may have to compute training forwards, whose passes must not be
    captured then.
    """

    def __init__(
        self,
        stack: CausalStack,
        bank: AdapterBank,
        config: EngineConfig,
        device: torch.device,
        dtype: torch.dtype,
        paged: PagedDecode | None = None,
        cpu_level: int | None = None,
        prefill: Prefill | None = None,
    ) -> None:
        self.stack, self.bank, self.config, self.device, self.dtype = stack, bank, config, device, dtype
        # A spare block behind those of the sequences, for rows of padding.
        tokens = config.num_kv_tokens + config.block_size
        kv_dtype = cache_dtype(config.kv_dtype, dtype)
        self.cache = KVCache(stack.num_layers, tokens, stack.num_kv_heads, stack.head_dim, kv_dtype, device)
        self.paged, self.prefill = paged, prefill
        self.graphs: DecodeGraphs | None = None
        self.prompt_graphs: PromptGraphs | None = None
        self.train_recorder: Recorder | None = None
        self.fuses = False
        self._cpu = self._by_reference = cpu_level is not None
        step_tables = self._cpu and kv_dtype == dtype
        self._batches = BatchBuilder(config, stack.vocab_size, device, dtype, stack.varlen, step_tables, stack.windows)
        self._compiled = None if cpu_level is None else _compiled(stack, self.cache, cpu_level)
        # Of the last step, in the order in which its chunks sample: the next one may need them before the host knows.
        self._last_tokens = torch.zeros(config.max_batch, dtype=torch.int64, device=device)
        # Logits and greedy tokens of a batch that is late.
        self._late: tuple[torch.Tensor, torch.Tensor] | None = None

    def capture(self, recorder: Recorder, max_context: int) -> DecodeGraphs:
        """Capture the steps in which all rows continue an answer, of contexts up to this length."""
        # Larger batches are not captured.
        most, limits = decode_sizes(self.config.max_batch)[-1], self._limits(max_context)
        self._keep_in_place()
        self.graphs = DecodeGraphs(self.compute, DecodeBuffers(most, *limits, self.device), recorder)
        return self.graphs

    def capture_prompts(self, recorder: Recorder, max_context: int) -> PromptGraphs | None:
        """Capture steps with prompts, before the others, which then fit into their memory; None: there is no kernel."""
        if self.prefill is None:
            return None
        sequences, sizes = decode_sizes(self.config.max_batch)[-1], self._prompt_sizes()
        stack, limits = self.stack, self._limits(max_context)
        group = stack.num_heads // stack.num_kv_heads
        tile = self.prefill.tile_tokens(group, stack.head_dim, self.dtype.itemsize)
        buffers = PromptBuffers(sizes[-1], sequences, *limits, tile, self.device)
        self._keep_in_place()
        self.prompt_graphs = PromptGraphs(self.compute, buffers, self.prefill, sizes, recorder)
        return self.prompt_graphs

    def _prompt_sizes(self) -> list[int]:
        return prompt_sizes(self.config.max_batch, self.config.max_prefill_tokens)

    def _limits(self, max_context: int) -> tuple[int, int, int, int]:
        """Of buffers: blocks of a context, tokens of a block, the block for padding, and adapter slots."""
        block = self.config.block_size
        spare, max_blocks = self.config.num_kv_tokens // block, -(-max_context // block)
        return max_blocks, block, spare, self.bank.config.serving_slots + 1

    def _keep_in_place(self) -> None:
        """A graph reads the tokens of the step before where they were when it was captured."""
        if self._by_reference:
            self._by_reference = False
            self._last_tokens = torch.zeros(self.config.max_batch, dtype=torch.int64, device=self.device)

    def fill(self, chunks: Sequence[Chunk], fused: bool = False) -> Batch:
        """The batch of one step's chunks; valid until the next one is filled. Does not wait for the device.

        fused: a training forward will be in its products, so that no captured step computes it.
        """
        graphs = None if fused else self._graphs_for(chunks)
        if graphs is None:
            return self._batches.fill(chunks, self.paged is not None)
        return self._batches.with_draws(graphs.fill(chunks))

    def _graphs_for(self, chunks: Sequence[Chunk]) -> DecodeGraphs | PromptGraphs | None:
        for graphs in (self.graphs, self.prompt_graphs):
            if graphs is not None and graphs.can_run(chunks):
                return graphs
        return None

    @torch.no_grad()
    def forward(self, batch: Batch, fused: FusedPass | None = None) -> SampledTokens:
        """Compute one step and choose its tokens, one for each chunk that samples. Collective over the peers.

        Does not wait for the device: ids that the step before chose are taken from there. fused: a training forward
        whose remaining layers are computed in the same products. A batch that is late has no tokens yet: see choose().
        """
        sampled = SampledTokens(self.device)
        if batch.captured is not None:
            batch.captured.replay()
            logits, tokens = batch.captured.result
        else:
            hidden = self._hidden(batch, fused)
            if batch.scoring is not None:
                sampled.prompts = prompt_logprobs(self.stack, hidden, batch.scoring)
            logits, tokens = self._best(batch, hidden)
        if batch.late:
            self._late = logits, tokens
        else:
            self._choose(batch, sampled, logits, tokens)
        return sampled

    @torch.no_grad()
    def choose(self, batch: Batch, sampled: SampledTokens) -> None:
        """Choose the tokens of a late batch, the last one of forward(), once the step before has been settled.
        Collective over the peers.
        """
        assert self._late is not None
        (logits, tokens), self._late = self._late, None
        self._choose(batch, sampled, logits, tokens)

    def _choose(self, batch: Batch, sampled: SampledTokens, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        if batch.draws is not None:
            sampling = [chunk for chunk in batch.chunks if chunk.needs_sampling]
            changes = changes_of(sampling, batch.draws.guided, self.device) if batch.draws.guided else None
            self._keep(draw_(self.stack.head, tokens, logits, batch.draws, changes))
        reported = None
        if batch.reporting is not None:
            reported = logprobs_of(self.stack.head, logits, tokens, batch.reporting)
        # A captured step has rows of padding behind its own.
        sampled.send(tokens if batch.captured is None else tokens[: batch.sampling], reported)

    @torch.no_grad()
    def compute(self, batch: Batch, fused: FusedPass | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and greedy tokens of the rows that sample: everything of a step that can be captured."""
        return self._best(batch, self._hidden(batch, fused))

    def _hidden(self, batch: Batch, fused: FusedPass | None) -> torch.Tensor:
        """[rows, hidden size], of the last layer"""
        hidden = self.stack.embed(batch.ids if batch.sources is None else self._ids(batch.ids, batch.sources))
        if self._compiled is not None and batch.layout.step is not None and fused is None:
            return self._compiled(hidden, batch)
        attention = PagedRows(self.cache, batch.layout, self.paged)
        return self._layers(hidden, self.stack.sub_batch(batch.rows, batch.positions, attention), fused)

    def _best(self, batch: Batch, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.stack.head(self.stack.norm(hidden if batch.ends is None else hidden[batch.ends]))
        # With peers each has columns of its own.
        alone = self._cpu and self.stack.tp_group.size == 1
        tokens = argmax(logits) if alone else self.stack.head.best(logits)
        self._keep(tokens)
        return logits, tokens

    def _keep(self, tokens: torch.Tensor) -> None:
        """For the rows of the next step. A sequence without a token ends; until that is known, they need some id."""
        if self._by_reference:
            # Most steps do not read them: _ids() makes ids of them where one does.
            self._last_tokens = tokens
        else:
            self._last_tokens[: len(tokens)] = tokens.clamp_min(0)

    def _ids(self, ids: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        """ids [rows], with tokens of the last step where sources [rows] says so."""
        last = self._last_tokens.clamp_min(0) if self._by_reference else self._last_tokens
        return torch.where(sources < 0, ids, last[sources.clamp_min(0)])

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


def _compiled(stack: CausalStack, cache: KVCache, cpu_level: int) -> CompiledLayers | None:
    """The layers of serving steps as one call; None: part by part."""
    obstacle = CompiledLayers.obstacle(stack, cache)
    log.info("layers of serving steps: %s", f"part by part, {obstacle}" if obstacle else "one call of the C++ kernels")
    return None if obstacle else CompiledLayers(stack, cache, cpu_level)
