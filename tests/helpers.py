"""What several tests build: an engine around a model, and ways to run it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from clif.adapters.bank import AdapterBank
from clif.adapters.slots import SlotTable
from clif.config import Config, config_from_tree
from clif.distributed.collectives import TpGroup
from clif.engine.draws import Draws, DrawTable
from clif.engine.engine import Engine
from clif.engine.jobs import Slices
from clif.engine.runner import ModelRunner
from clif.engine.scheduler import Chunk, Sequence
from clif.kernels.dual_lora_reference import Segment
from clif.models.causal import CausalSequences
from clif.models.dual_linear import LoraRows
from clif.models.shard import Shard, ShardDim, shard_of, uneven_shard
from clif.models.spec import spec_of
from clif.models.stack import CausalStack
from clif.models.weights.loading import LoadedModel, load_model
from clif.training.train_runner import TrainRunner
from clif.types import Request, Sampling, TokenEvent

SMALL = {"kv_tokens": 1024, "block_size": 4, "max_batch": 8, "max_prefill_tokens": 24, "coserving": "interleaved"}
"""An engine in which everything happens within a few steps."""


@dataclass
class Rig:
    """An engine and its parts."""

    config: Config
    loaded: LoadedModel
    engine: Engine

    @property
    def runner(self) -> ModelRunner:
        return self.engine.runner

    @cached_property
    def train_runner(self) -> TrainRunner:
        return TrainRunner(self.runner)

    @property
    def bank(self) -> AdapterBank:
        return self.runner.bank

    @property
    def slots(self) -> SlotTable:
        return self.engine.scheduler.slots

    def run(
        self, requests: list[Request], arrive: dict[int, int] | None = None, steps: int = 2000
    ) -> dict[int, list[TokenEvent]]:
        """Serve requests to their ends; arrive: request id -> step of its arrival."""
        events: dict[int, list[TokenEvent]] = {r.id: [] for r in requests}
        left = list(requests)
        for step in range(steps):
            for request in [r for r in left if (arrive or {}).get(r.id, 0) <= step]:
                left.remove(request)
                self.engine.scheduler.add(request, self.engine.clock())
            for event in self.engine.serve():
                events[event.request_id].append(event)
            if not left and not self.engine.serving:
                return events
        raise AssertionError(f"requests still running after {steps} steps")

    def fill(self, version: int, seed: int) -> None:
        """Promote a random adapter of non-trivial size."""
        slot = self.slots.free_slot()
        assert slot is not None
        self.bank.fill_slot(slot, random_state(self.bank, seed))
        self.slots.promote(version, slot)


def random_state(bank: AdapterBank, seed: int) -> dict[str, torch.Tensor]:
    """This rank's part of a random adapter, which is the same however many ranks share it."""
    rng = torch.Generator().manual_seed(seed)
    return bank.local({k: torch.randn(shape, generator=rng) * 0.2 for k, shape in bank.shapes().items()})


@torch.no_grad()
def stack_logits(stack: CausalStack, ids: torch.Tensor, slot: int | None = None) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one sequence under an adapter slot."""
    segments = () if slot is None else (Segment(0, len(ids), slot),)
    positions = torch.arange(len(ids), device=ids.device)
    sub_batch = stack.sub_batch(LoraRows(len(ids), segments), positions, CausalSequences([len(ids)], ids.device))
    (hidden,) = stack.layers(0, stack.num_layers, [stack.embed(ids)], [sub_batch])
    return stack.logits(stack.norm(hidden))


def small_config(
    path: str,
    engine: dict | None = None,
    adapter: dict | None = None,
    device: str = "cpu",
    model: dict | None = None,
) -> Config:
    """Of an engine that only serves until a test trains with it."""
    return config_from_tree(
        {
            "model": {"path": path, "dtype": "float32", "max_context": 256, "device": device, **(model or {})},
            "engine": {**SMALL, **(engine or {})},
            "adapter": {"r": 4, "lora_alpha": 8, **(adapter or {})},
            "train": {"enabled": False},
        }
    )


def make_rig(model_path: str, device: str = "cpu", seed: int = 3, **sections: Any) -> Rig:
    """An engine around a model; what it takes besides is of small_config()."""
    config = small_config(model_path, device=device, **sections)
    loaded = load_model(config.model, torch.device(device), seed)
    return Rig(config, loaded, Engine.from_config(config, loaded))


def finish(work: Slices[Any]) -> Any:
    """A job from beginning to end; returns its result."""
    result = None
    while True:
        try:
            piece = work.send(result)
            result = piece.work(piece.units)
        except StopIteration as end:
            return end.value


def request(id: int, prompt: list[int], **sampling: object) -> Request:
    return Request(id=id, prompt=tuple(prompt), sampling=Sampling(**sampling))  # type: ignore[arg-type]


def answer(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.tokens]


def cache_slots(blocks: list[int], block_size: int, start: int, stop: int) -> list[int]:
    """Cache slots of a sequence's tokens [start, stop)."""
    return [blocks[i // block_size] * block_size + i % block_size for i in range(start, stop)]


def chunks_of(requests: list[Request], position: int) -> list[Chunk]:
    """Those of a step in which each request gets its answer's token at this position."""
    stops = [len(r.prompt) + position for r in requests]
    return [Chunk(Sequence(r, 0.0, [*r.prompt]), s - 1, s, True) for r, s in zip(requests, stops, strict=True)]


def draws_of(requests: list[Request], vocab_size: int, position: int = 0, device: str = "cpu") -> Draws | None:
    """The draws of such a step."""
    return DrawTable(len(requests), vocab_size, torch.device(device)).fill(chunks_of(requests, position))


def tp_group_of(rank: int, size: int) -> TpGroup:
    """A rank of several that needs nobody: loading is not collective."""
    tp_group = TpGroup()
    tp_group.rank, tp_group.size = rank, size
    return tp_group


def layer_shards(config: Any, rank: int, size: int) -> dict[str, tuple[ShardDim, Shard]]:
    """Cut side and shard of every linear layer of a decoder layer, by the last part of its name."""
    shards = spec_of(config).layer.shards(rank, size)
    return {name.rpartition(".")[2]: shard for name, shard in shards.items()}


def expected_part(name: str, whole: torch.Tensor, config: Any, rank: int, size: int) -> torch.Tensor:
    """A tensor of a model, or the part of it that this rank is to have."""
    leaf, side = name.split(".")[-2:]
    if leaf == "lm_head" and not config.tie_word_embeddings:
        return shard_of(whole, "out", uneven_shard(config.vocab_size, rank, size))
    if leaf not in (shards := layer_shards(config, rank, size)) or (side == "bias" and shards[leaf][0] == "in"):
        return whole
    return shard_of(whole, *shards[leaf])


def true_product_error(bank: AdapterBank, flats: list[torch.Tensor], weights: list[float]) -> float:
    """|sum_i w_i B_i A_i - Bbar Abar| / |Bbar Abar| of flat shadows, from full products."""
    return relative_error([{n: bank.factors(f)[n] for n in bank.names} for f in flats], weights)


def relative_error(members: list[dict[str, tuple[torch.Tensor, torch.Tensor]]], weights: list[float]) -> float:
    """The same of members' factors A, B by module name."""
    wrong = right = 0.0
    for name in members[0]:
        a, b = ([w * m[name][i] for w, m in zip(weights, members, strict=True)] for i in (0, 1))
        product = sum(b) @ sum(a)
        true = sum(w * m[name][1] @ m[name][0] for w, m in zip(weights, members, strict=True))
        wrong += float((true - product).square().sum())
        right += float(product.square().sum())
    return (wrong / right) ** 0.5
