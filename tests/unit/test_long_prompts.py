"""Prompts of thousands of tokens, in chunks: token for token what transformers generates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import answer, make_rig, request

SHAPE = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40960, "rope_theta": 1e6,
    "initializer_range": 0.1, "tie_word_embeddings": True,
}  # fmt: skip
SLOW = pytest.mark.slow(reason="attention of 32,768 tokens, by CLIF and by transformers: half a minute")


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(5, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def generated(model, prompt: list[int], count: int) -> list[int]:
    """By transformers, whose eager attention would hold a matrix of length x length."""
    model.set_attn_implementation("sdpa")
    given = torch.tensor([prompt])
    got = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return got[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("length", [4096, pytest.param(32768, marks=SLOW)])
def test_a_long_prompt_is_answered_as_transformers_does(tmp_path: Path, length: int, kernels: str) -> None:
    """A second one that begins alike reuses what is cached, and is computed from there on."""
    path = tmp_path / "long.json"
    path.write_text(json.dumps(SHAPE))
    context = length + 64
    engine = {
        "kv_tokens": 2 * context, "block_size": 16, "max_batch": 2, "max_prefill_tokens": 512, "cpu_kernels": kernels
    }  # fmt: skip
    rig = make_rig(f"random:{path}", model={"max_context": context}, engine=engine)
    prompts = [ids(length, 0), ids(length, 0)[:-40] + ids(40, 1)]
    for i, prompt in enumerate(prompts):
        events = rig.run([request(i, prompt, max_tokens=8, ignore_eos=True)])
        assert answer(events[i]) == generated(rig.loaded.model, prompt, 8)
