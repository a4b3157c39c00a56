"""Every make of model is served exactly or refused with a sentence, whatever the device, dtype, depth and context."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import answer, make_rig, request, stack_logits
from model_folders import SMALL, saved, shaped

from clif.config import ConfigError, ModelConfig
from clif.models.base_weight import Dense
from clif.models.layer import DecoderLayer
from clif.models.layer_ops import Rope, TorchNorm
from clif.models.proof import Expected, ask_ends, check_architecture, compare
from clif.models.spec import FAMILIES, llama
from clif.models.stack import CausalStack
from clif.models.weights import loading
from clif.models.weights.loading import LoadedModel, load_model

CPU = torch.device("cpu")

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
SCALED = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64,
    "llama_4_scaling_beta": 0.1,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
WRONG = {
    "longrope": {"rope_parameters": {**LONG, "original_max_position_embeddings": 64}},
    "ministral3": {"model_type": "ministral3", "rope_parameters": SCALED},
    "stablelm": {"model_type": "stablelm"},
    "partial rotary": {"model_type": "glm4", "partial_rotary_factor": 0.5},
    "cohere2": {"model_type": "cohere2", "sliding_window": 256, "layer_types": ["full_attention"] * 2},
    "bloom": {"model_type": "bloom"},
    "mamba": {"model_type": "mamba"},
    "qwen3_moe without experts in one layer": {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
    "cohere": {"model_type": "cohere"},
    "olmo": {"model_type": "olmo"},
    "nemotron": {"model_type": "nemotron"},
    "chunked": {"model_type": "llama4_text", "attention_chunk_size": 64},
    "deepseek_v3": {"model_type": "deepseek_v3"},
    "gpt_neox": {"model_type": "gpt_neox"},
    "t5": {"model_type": "t5"},
    "bert": {"model_type": "bert"},
}  # fmt: skip
RIGHT = {
    "llama": {},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
        }
    },
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "dynamic, never reached": {"rope_parameters": DYNAMIC},
    "longrope, never long": {"rope_parameters": {**LONG, "original_max_position_embeddings": 256}},
    "ministral3 within its first context": {
        "model_type": "ministral3", "rope_parameters": {**SCALED, "original_max_position_embeddings": 256}
    },
    "window as wide as the context": {"model_type": "mistral", "sliding_window": 256, "max_position_embeddings": 1024},
    "a scale of attention that its layers tell": {"model_type": "granite", "attention_multiplier": 0.2},
    "phi3": {"model_type": "phi3"},
    "phi3 that turns half of each head": {
        "model_type": "phi3",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},
    "qwen2 with biases": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
}  # fmt: skip


def as_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every family be described as Llama."""
    for family in (*FAMILIES, "smollm3", "stablelm"):
        monkeypatch.setitem(FAMILIES, family, llama)


def config_of(fields: dict[str, Any]) -> Any:
    return transformers.AutoConfig.for_model(**{"model_type": "llama", **SMALL, **fields})


@pytest.mark.parametrize("name", WRONG)
def test_a_make_that_computes_something_else_is_refused_before_its_weights_are_drawn(tmp_path, monkeypatch, name):
    monkeypatch.setattr(loading, "draw_model", None)
    with pytest.raises(ConfigError, match=r"Llama-style|not support|no CLIF|for this kind of AutoModel"):
        make_rig(shaped(tmp_path, WRONG[name]))


@pytest.mark.parametrize("name", ["stablelm", "cohere2", "ministral3", "longrope", "olmo"])
def test_a_folder_of_another_make_is_refused_before_its_weights_are_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(loading, "load_whole", None)
    with pytest.raises(ConfigError, match=r"Llama-style|not supported"):
        make_rig(saved(tmp_path, WRONG[name]))


@pytest.mark.parametrize("name", RIGHT)
def test_a_make_that_is_right_at_every_position_of_the_context_is_served(tmp_path, name):
    rig = make_rig(shaped(tmp_path, RIGHT[name]))
    prompts = [[5, 6, 7], list(range(40, 200))]
    events = rig.run([request(i, ids, max_tokens=8, ignore_eos=True) for i, ids in enumerate(prompts)])
    for i, ids in enumerate(prompts):
        out = load_model(rig.config.model, CPU, seed=3).model.generate(
            torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        assert answer(events[i]) == out[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    "fields",
    [
        WRONG["longrope"],
        WRONG["ministral3"],
        {"model_type": "granite", "residual_multiplier": 0.97},
        {"model_type": "granite", "embedding_multiplier": 1.02},
        {"model_type": "granite", "logits_scaling": 1.02},
        {"model_type": "smollm3", "no_rope_layers": [1] * 31 + [0], "num_hidden_layers": 32},
    ],
)
def test_the_proof_by_computing_finds_what_no_field_is_known_to_tell(monkeypatch, fields):
    """Also where it depends on the position, or on the longest sequence of a batch."""
    as_llama(monkeypatch)
    with pytest.raises(ConfigError, match="computes more than"):
        check_architecture(config_of(fields), 256)


def test_the_proof_reaches_the_last_positions_of_the_context():
    far = {**SCALED, "original_max_position_embeddings": 8192, "factor": 4.0}
    config = config_of({"model_type": "ministral3", "max_position_embeddings": 32768, "rope_parameters": far})
    check_architecture(config, 8192)
    with pytest.raises(ConfigError, match="computes more than"):
        check_architecture(config, 8193)


DEEP = {
    "num_hidden_layers": 32, "hidden_size": 64, "intermediate_size": 192, "head_dim": 32, "tie_word_embeddings": False,
}  # fmt: skip


def deep(folder: Path, **fields: Any) -> LoadedModel:
    config = ModelConfig(path=shaped(folder, {**DEEP, **fields}), dtype="bfloat16", max_context=256)
    return load_model(config, CPU, seed=3)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Expected]:
    """A deep model in bfloat16, and what it computes."""
    loaded = deep(tmp_path_factory.mktemp("deep"))
    return loaded, ask_ends(loaded.model, 256)


def test_a_deep_model_in_bfloat16_is_served_however_much_its_rounding_adds_up(rounded):
    loaded, expected = rounded
    stack = CausalStack(loaded.model)
    compare(stack, expected)
    whole = stack_logits(stack, expected.ids[:16]) - expected.logits[:16]
    assert whole.norm() > 0.05 * expected.logits[:16].norm(), "a bound on whole forwards would refuse it"


class NoRope(Rope):
    """Positions that make no difference."""

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("part", ["residual", "norm", "query", "rope"])
def test_one_layer_of_a_deep_model_in_bfloat16_that_computes_something_else_is_found(rounded, part):
    loaded, expected = rounded
    stack = CausalStack(loaded.model)
    layer = stack.decoder_layers[17]
    if part == "residual":
        for linear in (layer.out, layer.mlp.down):
            linear.base = Dense(linear.base.weight * 0.8, linear.base.bias)
    elif part == "norm":
        layer.mlp_norm = TorchNorm(torch.nn.Identity())
    elif part == "query":
        layer.scores = layer.scores._replace(scale=3.0 * layer.scores.scale)
    else:
        layer.attend = lambda x, part: DecoderLayer.attend(
            layer, x, replace(part, ropes=[NoRope(rope.cos, rope.sin) for rope in part.ropes])
        )
    with pytest.raises(ConfigError, match=r"computes more than .*layer 17"):
        compare(stack, expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "granite", "residual_multiplier": 0.9},
        WRONG["longrope"],
        {"model_type": "ministral3", "rope_parameters": SCALED},
        {"model_type": "stablelm"},
        {"model_type": "gemma3_text", "sliding_window": 256, "layer_types": ["full_attention"] * 32},
    ],
)
def test_wrong_makes_are_refused_in_bfloat16_at_any_depth(tmp_path, monkeypatch, fields):
    as_llama(monkeypatch)
    with pytest.raises(ConfigError, match=r"computes more than|not supported|Llama-style"):
        deep(tmp_path, **fields)
