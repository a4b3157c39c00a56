"""Models that cannot be had, or that we would compute wrongly, are refused with a sentence."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from helpers import answer, make_rig, request, stack_logits

from clif.config import ConfigError, ModelConfig
from clif.errors import InputError
from clif.models.backends import prepacked_linear
from clif.models.weights.loading import choose_dtype, load_model

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/nowhere/m.gguf", "does not exist: correct it"),
        ("assets/none.gguf", "does not exist: run `clif fetch`"),
        ("./nowhere", "is not a folder: correct it"),
        ("random:/nowhere/config.json", "name a config.json or a folder with one"),
    ],
)
def test_missing_models_are_named(path, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_model(ModelConfig(path=path, dtype="float32"), CPU)


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "nonsense"}', "[]"])
def test_a_config_of_random_weights_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json is not|Unrecognized model identifier"):
        load_model(ModelConfig(path=f"random:{tmp_path}", dtype="float32"), CPU)


def test_a_gguf_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\x00" * 64)
    with pytest.raises(InputError, match=r"m\.gguf is not a whole GGUF file"):
        load_model(ModelConfig(path=str(tmp_path / "m.gguf"), dtype="float32"), CPU)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path} has no config.json: name a folder with one"):
        load_model(ModelConfig(path=str(tmp_path), dtype="float32"), CPU)


def test_a_context_beyond_the_models_own_is_refused(tiny_config):
    with pytest.raises(ConfigError, match="max_context 4096 exceeds the model's own 256"):
        load_model(ModelConfig(path=f"random:{tiny_config}", dtype="float32", max_context=4096), CPU)


def test_random_weights_are_the_same_on_every_rank_and_others_with_another_seed(tiny_config):
    config = ModelConfig(path=f"random:{tiny_config}", dtype="float32", max_context=64)
    first, second, other = (load_model(config, CPU, seed=seed).model.state_dict() for seed in (4, 4, 5))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_dtype_auto_is_decided_by_measurement_and_says_so():
    dtype, reason = choose_dtype("auto", CPU)
    assert dtype in (torch.float32, torch.bfloat16) and "GFLOP/s" in reason
    with pytest.raises(ConfigError, match="float16 is for GPUs"):
        choose_dtype("float16", CPU)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 300},
            "family gpt2, which is not",
        ),
        ({"model_type": "cohere"}, "family cohere, which is not supported: choose one of .*llama"),
        ({"model_type": "ministral3", "attention_bias": True, "partial_rotary_factor": 0.5}, "partial rotary"),
    ],
)
def test_models_that_would_be_computed_wrongly_are_refused(tmp_path, fields, sentence):
    shape = SMALL
    if fields["model_type"] == "gpt2":
        shape = {"n_positions": 256}
    (tmp_path / "config.json").write_text(json.dumps({**shape, **fields}))
    with pytest.raises(ConfigError, match=sentence):
        make_rig(f"random:{tmp_path}")


def test_other_llama_style_families_are_served_exactly(tmp_path):
    """Names are not special-cased: here one with query and key norms."""
    shape = {**SMALL, "model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    rig = make_rig(f"random:{tmp_path}")
    events = rig.run([request(0, [5, 6, 7], max_tokens=10, ignore_eos=True)])
    plain = load_model(rig.config.model, CPU, seed=3).model
    out = plain.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert answer(events[0]) == out[0, 3:].tolist()


def test_a_model_that_scales_its_embeddings_is_exact_or_refused(tmp_path):
    """Gemma scales in its embedding module in some releases of transformers, and between modules in others."""
    shape = {**SMALL, "model_type": "gemma", "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    try:
        rig = make_rig(f"random:{tmp_path}")
    except ConfigError as refused:
        assert "computes more than" in str(refused)
        return
    ids = torch.arange(20)
    with torch.no_grad():
        expected = load_model(rig.config.model, CPU, seed=3).model(ids.unsqueeze(0)).logits[0]
        got = stack_logits(rig.runner.stack, ids)
    assert torch.allclose(got, expected, atol=1e-5, rtol=1e-5)


def test_a_model_without_matching_layers_is_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"matches no linear layer of the model: there are .*q_proj"):
        make_rig(f"random:{tiny_config}", adapter={"target_modules": ["wq"]})


def test_weights_laid_out_for_serving_compute_the_same():
    weight = torch.randn(40, 24).bfloat16()
    packed = prepacked_linear(weight, None)
    assert prepacked_linear(weight.float(), None) is None, "float32 keeps its exact path"
    if packed is None:
        pytest.skip("oneDNN has no bfloat16 for this CPU")
    x = torch.randn(5, 24).bfloat16()
    assert torch.allclose(packed(x), torch.nn.functional.linear(x, weight), atol=0.1, rtol=0.02)


def test_a_cpu_for_which_onednn_has_no_bfloat16_computes_it_all_the_same(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert prepacked_linear(torch.randn(40, 24).bfloat16(), None) is None


def test_transformers_is_one_that_we_know():
    assert int(transformers.__version__.split(".")[0]) == 5
