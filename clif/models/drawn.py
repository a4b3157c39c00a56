"""Models with random weights, drawn tensor by tensor: whoever wants a part of one draws no other."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch

from clif.collectives import Peers
from clif.models.causal import CausalSequences
from clif.models.parts import Slice, build
from clif.models.shard import part_of
from clif.models.stack import CausalStack, check_stack


def draw_model(config: Any, dtype: torch.dtype, device: torch.device, seed: int, peers: Peers) -> Any:
    """A model of a transformers configuration; with peers, this rank's part of the one that a single rank draws.

    Each tensor has a generator of its own, and at no time is more than one of them whole beside what is kept.
    With peers raises ConfigError for a model that we would compute wrongly, LayoutError for one they cannot share.
    """
    if peers.size > 1:
        check_make(config)
    std: float = getattr(config, "initializer_range", 0.02)

    def source(name: str, shape: torch.Size, part: Slice) -> torch.Tensor:
        # Where it will live: billions of numbers take minutes on a CPU.
        whole = _draw(name, torch.empty(shape, dtype=dtype, device=device), std, seed)
        # A copy, so that the whole is freed.
        return whole if part is None else part_of(whole, *part).clone()

    return build(config, source, dtype, device, peers)


def _draw(name: str, tensor: torch.Tensor, std: float, seed: int) -> torch.Tensor:
    """As transformers begins: matrices normal, biases zero, norms one."""
    if name.endswith(".bias"):
        return tensor.zero_()
    if tensor.dim() == 1:
        return tensor.fill_(1.0)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    # The CPU's generator takes no more than 32 bits of a seed.
    rng = torch.Generator(tensor.device).manual_seed(int.from_bytes(digest[:4], "little"))
    return tensor.normal_(0.0, std, generator=rng)


def check_make(config: Any) -> None:
    """Compare our forward with the model's own in a narrow model of the same make: for one that nobody holds whole.

    Raises ConfigError for a model that computes more than the stack does.
    """
    narrow = copy.deepcopy(config)
    # Rotary embeddings may depend on the size of a head.
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    narrow.update({"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 2 * head_dim})
    # Weights so large that every layer counts.
    narrow.update({"intermediate_size": 64, "vocab_size": 64, "initializer_range": 0.2})
    narrow.update({"bos_token_id": None, "eos_token_id": None, "pad_token_id": None})
    cpu, ids = torch.device("cpu"), torch.arange(32)
    with torch.no_grad():
        model = draw_model(narrow, torch.float32, cpu, 0, Peers()).eval()
        expected = model(ids.unsqueeze(0), use_cache=False).logits[0]
        check_stack(CausalStack(model), CausalSequences([len(ids)], cpu), ids, expected)
