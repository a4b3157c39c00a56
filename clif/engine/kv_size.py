"""How large the KV cache of a replica is where engine.kv_tokens is `auto`: what is left once all else has its memory.

The order of a start on a GPU: the base; a step of the largest size on a small cache of its own, which shows what a step
needs and lets libraries take their workspaces; then the cache; then captured steps, which are a part of what was left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch

from clif.config import Config, ConfigError, EngineConfig
from clif.distributed.collectives import TpGroup
from clif.engine.base import Base
from clif.engine.capture import why_not_captured, why_training_not_captured
from clif.engine.graphs import decode_sizes
from clif.engine.prompt_graphs import prompt_sizes
from clif.engine.scheduler import Chunk, Sequence
from clif.kernels.kv_types import cache_dtype
from clif.models.loss import head_bytes
from clif.types import CoservingMode, Request, Sampling

log = logging.getLogger(__name__)
RESERVE = 0.05
"""Share of the free memory that nothing may take: gaps of the allocator, workspaces of more streams, rows of training
in the products of a step."""
HOST_SHARE = 0.5
"""Share of a host's free memory for the caches of all its ranks."""
TRAINING_STATE = 6
"""Vectors like the shadow that a round holds besides it and its gradient: moments, a snapshot, and the average."""
MASTER_BYTES = 4


class DeviceMemory(Protocol):
    """The memory of a rank's GPU."""

    def free(self) -> int:
        """Bytes that this rank may still allocate."""
        ...

    def peak(self, work: Callable[[], None]) -> int:
        """Bytes that the work holds at its peak beyond what was allocated before it."""
        ...


@dataclass(frozen=True)
class CudaMemory:
    """ranks: how many share the GPU, each of which may have that part of it."""

    device: torch.device
    ranks: int = 1

    def free(self) -> int:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        if self.ranks == 1:
            return free
        return min(free, total // self.ranks - torch.cuda.memory_reserved(self.device))

    def peak(self, work: Callable[[], None]) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


@dataclass(frozen=True)
class KvRoom:
    """Bytes of a rank. free: beside the base; the others: what will take a part of that, the KV cache apart.

    step: temporaries of the largest step. training: activations, state of a round and logits. captured: what captured
    steps and passes hold.
    """

    free: int
    step: int = 0
    training: int = 0
    captured: int = 0

    @property
    def left(self) -> int:
        return int(self.free * (1 - RESERVE)) - self.step - self.training - self.captured


def kv_tokens_for(room: KvRoom, token_bytes: int, block_size: int, most: int) -> tuple[int, str]:
    """The tokens of a KV cache, a multiple of block_size, and the reason. most: more are never filled.

    A spare block is left for rows of padding. 0 if not even a block fits.
    """
    fit = max(0, room.left // token_bytes - block_size) // block_size * block_size
    if fit >= most:
        return most, "requests of full length need no more"
    parts = {"the largest step": room.step, "training": room.training, "what is captured": room.captured}
    needs = "".join(f", {_gib(size)} for {name}" for name, size in parts.items() if size)
    return fit, f"of {_gib(room.free)} free less {RESERVE:.0%}{needs}, {_gib(room.left)} are left"


def resolve_kv_tokens(
    config: Config, base: Base, tp_group: TpGroup, ranks: int = 1, room: KvRoom | None = None
) -> Config:
    """The configuration with the number of tokens in place of `auto`. Collective over the group, which shares a cache.

    ranks: of this host, for its memory. room: by default what is measured here. Raises ConfigError, on all ranks of the
    group, if one request of full length does not fit.
    """
    engine = config.engine
    if engine.kv_tokens != "auto":
        return config
    room = room or _room(config, base, tp_group, ranks)
    tokens, reason = kv_tokens_for(room, token_bytes(base, engine), engine.block_size, config.kv_tokens_bound)
    least = tp_group.least(tokens)
    if least < config.model.max_context:
        raise ConfigError(
            f"engine.kv_tokens auto finds room for {least} tokens, and model.max_context is {config.model.max_context} "
            f"({reason}): lower model.max_context, engine.activation_mib, engine.max_batch or "
            "engine.max_prefill_tokens, or raise layout.tp_size"
        )
    log.info("engine.kv_tokens: %d (%s)", least, reason if least == tokens else "a peer has room for no more")
    return config.model_copy(update={"engine": engine.model_copy(update={"kv_tokens": least})})


def token_bytes(base: Base, engine: EngineConfig) -> int:
    """Bytes of a token in the KV cache of this rank."""
    stack, kv_dtype = base.stack, cache_dtype(engine.kv_dtype, base.loaded.dtype)
    return stack.num_layers * 2 * stack.num_kv_heads * stack.head_dim * kv_dtype.itemsize


def measured_room(config: Config, base: Base, tp_size: int, memory: DeviceMemory) -> KvRoom:
    """Compute a step of the largest size, and count what else will take memory. Collective over the peers."""
    chunks, blocks = largest_step(config.engine, config.model.max_context)
    small = config.engine.model_copy(update={"kv_tokens": blocks * config.engine.block_size})

    def step() -> None:
        runner = base.runner(small)
        runner.forward(runner.fill(chunks)).read()

    def region() -> None:
        # Tokens are drawn outside of graphs, which takes several times as much.
        runner = base.runner(small)
        runner.compute(runner.fill(chunks))

    # Once before: kernels are compiled and libraries take their workspaces, which stay.
    step()
    own_cache = token_bytes(base, small) * (blocks + 1) * config.engine.block_size
    whole, captured = (max(0, memory.peak(work) - own_cache) for work in (step, region))
    return KvRoom(memory.free(), whole, _training(config, base), _captured(config, base, tp_size, captured))


def _training(config: Config, base: Base) -> int:
    """Logits, which held-out losses need as well; activations and the state of a round where there are any."""
    held = head_bytes(base.loaded.device, base.stack.head.shard.size, base.loaded.dtype.itemsize)
    if config.train.enabled:
        held += (config.engine.activation_mib << 20) + TRAINING_STATE * MASTER_BYTES * base.bank.shadow.numel()
    return held


def _captured(config: Config, base: Base, tp_size: int, peak: int) -> int:
    """What captured steps and passes hold of their own: nothing else can use it while they are not running.

    peak: temporaries of the largest step without draws.
    """
    engine, device, held = config.engine, base.loaded.device, 0
    if not why_not_captured(engine, device, tp_size, base.paged is not None):
        # The logits of every size, and the temporaries of the largest one.
        sizes = decode_sizes(engine.max_batch)
        rows = sum(sizes)
        if base.prefill is not None:
            rows += sum(min(size, sizes[-1]) for size in prompt_sizes(engine.max_batch, engine.max_prefill_tokens))
        held += rows * base.stack.head.shard.size * base.loaded.dtype.itemsize + peak
    fuses, varlen = engine.coserving == CoservingMode.FUSED, base.stack.varlen is not None
    if config.train.enabled and not why_training_not_captured(engine, device, tp_size, varlen, fuses):
        # Passes that are not captured keep as much, elsewhere.
        held += (engine.activation_mib << 20) + peak
    return held


def largest_step(engine: EngineConfig, max_context: int) -> tuple[list[Chunk], int]:
    """Chunks of a step with as many rows as there can be, whose tokens are drawn; and how many cache blocks they use.

    Prompts fill the step's budget; the other requests continue an answer, all under the first adapter slot.
    """
    lengths, budget = list[int](), engine.max_prefill_tokens
    while budget > 1 and len(lengths) < engine.max_batch:
        lengths.append(min(budget, max_context))
        budget -= lengths[-1]
    prompts = [(0, length) for length in lengths]
    answers = [(1, 2)] * (engine.max_batch - len(prompts))
    chunks, used = list[Chunk](), 0
    for number, (start, stop) in enumerate([*prompts, *answers]):
        blocks = -(-stop // engine.block_size)
        request = Request(id=number, prompt=(0,) * stop, sampling=Sampling(max_tokens=1, temperature=1.0, top_p=0.9))
        held = list(range(used, used + blocks))
        sequence = Sequence(request, 0.0, [0] * stop, version=0, slot=0, blocks=held, num_computed_tokens=start)
        chunks.append(Chunk(sequence, start, stop, needs_sampling=True))
        used += blocks
    return chunks, used


def _room(config: Config, base: Base, tp_group: TpGroup, ranks: int) -> KvRoom:
    device = base.loaded.device
    if device.type == "cuda":
        return measured_room(config, base, tp_group.size, CudaMemory(device, config.dist.ranks_per_gpu))
    return KvRoom(int(psutil.virtual_memory().available * HOST_SHARE / ranks))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
