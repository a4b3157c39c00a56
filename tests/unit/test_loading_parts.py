"""With peers a rank reads or draws its own part of a model only, whatever names it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bodies_tp import hub_cache
from conftest import TINY
from helpers import expected_part, tp_group_of
from huggingface_hub import constants

from clif.config import ConfigError, ModelConfig
from clif.distributed.layout import LayoutError
from clif.models.spec import FAMILIES, llama
from clif.models.weights import loading, random_init
from clif.models.weights import safetensors_shard as sliced
from clif.models.weights.hub import is_hub_name
from clif.models.weights.loading import LoadedModel, load_model

CPU = torch.device("cpu")
SHAPE = {**TINY, "num_key_value_heads": 3, "vocab_size": 301, "attention_bias": True}


def load(path: str, rank: int = 0, size: int = 1) -> LoadedModel:
    return load_model(ModelConfig(path=path, dtype="float32", max_context=64), CPU, 3, tp_group_of(rank, size))


def shape_file(folder: Path, **fields: Any) -> str:
    (folder / "config.json").write_text(json.dumps({**SHAPE, **fields}))
    return f"random:{folder}"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [3, 6])
def test_random_weights_of_a_rank_are_its_part_of_those_of_one_rank(tmp_path, tied, size):
    path = shape_file(tmp_path, tie_word_embeddings=tied)
    whole = load(path)
    assert whole.whole and whole.model.lm_head.weight.shape == (301, 48)
    for rank in (0, size - 1):
        part = load(path, rank, size)
        assert not part.whole
        held = dict(part.model.named_parameters())
        for name, tensor in whole.model.named_parameters():
            assert torch.equal(held[name], expected_part(name, tensor, part.model.config, rank, size)), name
        for (_, buffer), (_, expected) in zip(part.model.named_buffers(), whole.model.named_buffers(), strict=True):
            assert torch.equal(buffer, expected)


def test_no_more_than_one_tensor_of_a_random_model_is_whole_at_a_time(tmp_path, monkeypatch):
    alive: list[weakref.ref[torch.Tensor]] = []
    original, most = random_init._draw, [0]

    def watched(name: str, tensor: torch.Tensor, *rest: Any) -> torch.Tensor:
        if "_proj" in name or "lm_head" in name:
            alive[:] = [ref for ref in alive if ref() is not None]
            alive.append(weakref.ref(tensor))
            most[0] = max(most[0], len(alive))
        return original(name, tensor, *rest)

    path = shape_file(tmp_path, tie_word_embeddings=False)
    whole = sum(p.numel() for p in load(path).model.parameters())
    monkeypatch.setattr(loading, "check_architecture", lambda *_: None)
    monkeypatch.setattr(random_init, "_draw", watched)
    part = load(path, 1, 3).model
    held = sum(p.untyped_storage().nbytes() // 4 for p in part.parameters())
    assert most[0] == 1
    embedding = part.model.embed_tokens.weight.numel()
    norms = sum(p.numel() for n, p in part.named_parameters() if "norm" in n)
    biases = sum(p.numel() for n, p in part.named_parameters() if n.endswith("o_proj.bias"))
    cut = whole - embedding - norms - biases
    assert held - embedding - norms - biases <= cut / 3 + 48, "and nothing more is kept"


def test_random_matrices_are_normal_norms_one_and_biases_zero(tmp_path):
    model = load(shape_file(tmp_path, initializer_range=0.05)).model
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif "norm" in name:
            assert (tensor == 1).all(), name
        else:
            assert abs(tensor.mean()) < 0.005 and tensor.std() == pytest.approx(0.05, rel=0.05), name
    tensors = [p for n, p in model.named_parameters() if n.endswith("mlp.up_proj.weight")]
    assert not any(torch.equal(tensors[0], other) for other in tensors[1:]), "each is drawn for itself"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF_HOME with one model, org/tiny, as the hub lays it out."""
    home = tmp_path_factory.mktemp("home")
    shape = tmp_path_factory.mktemp("shape")
    loaded = load(shape_file(shape, tie_word_embeddings=False))
    folder = hub_cache(home, "org/tiny")
    loaded.model.save_pretrained(folder, max_shard_size="100KB")
    loaded.tokenizer.save(folder)
    return home


@pytest.fixture
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the fixture above, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def test_of_a_hub_name_a_rank_reads_its_own_slices_only(offline, monkeypatch):
    read: dict[str, int] = {}
    original = sliced._read

    def counted(file: Any, name: str, *rest: Any) -> torch.Tensor:
        tensor = original(file, name, *rest)
        read[name] = tensor.numel()
        return tensor

    monkeypatch.setattr(sliced, "_read", counted)
    for rank in range(3):
        part = load("org/tiny", rank, 3)
        assert not part.whole and part.tokenizer.eos_ids == (256,)
        assert read["lm_head.weight"] == (100 if rank < 2 else 101) * 48
        assert read["model.layers.0.mlp.up_proj.weight"] == 96 * 48 // 3
        assert read["model.embed_tokens.weight"] == 301 * 48, "the embedding is whole"
    whole = load("org/tiny")
    assert whole.whole
    expected = dict(whole.model.named_parameters())
    for name, tensor in part.model.named_parameters():
        assert torch.equal(tensor, expected_part(name, expected[name], part.model.config, 2, 3)), name


def test_the_hubs_own_settings_say_where_a_name_is(cache):
    """In a process of its own: they are read when it starts."""
    code = "import sys\nfrom clif.models.weights.hub import snapshot\nprint(snapshot(sys.argv[1]))"
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(variable, None)
    found = [
        subprocess.run(
            [sys.executable, "-c", code, name], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        for name in ("org/tiny", "org/none")
    ]
    assert found[0].stdout.strip() == str(hub_cache(cache, "org/tiny")), found[0].stderr
    assert "ConfigError: model.path org/none cannot be had from the hub" in found[1].stderr


@pytest.mark.parametrize("name", ["org/none", "not a name", "a/b/c"])
def test_a_name_that_cannot_be_had_is_refused_with_what_to_change(offline, name):
    with pytest.raises(ConfigError, match=f"model.path {name} cannot be had .*: correct it, or name a folder"):
        load(name, 0, 2)


def test_a_snapshot_that_lacks_a_file_is_refused_with_its_name(offline):
    folder = hub_cache(offline, "org/broken")
    source = hub_cache(offline, "org/tiny")
    for file in source.iterdir():
        if not file.name.startswith("model-00002"):
            (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match=r"lacks a part .*model-00002.*: get it again"):
        load("org/broken", 0, 2)


def test_a_snapshot_without_safetensors_is_loaded_whole_as_with_one_rank(offline):
    folder, source = hub_cache(offline, "org/old"), hub_cache(offline, "org/tiny")
    for file in source.iterdir():
        if "safetensors" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    loaded = load("org/old", 0, 2)
    assert loaded.whole and torch.equal(loaded.model.lm_head.weight, model.lm_head.weight)


def test_only_what_is_neither_here_nor_random_is_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "local").mkdir(parents=True)
    assert is_hub_name("org/name") and is_hub_name("name")
    for path in ("org/local", "./org/name", "/org/name", "m.gguf", "org/m.gguf", "random:org/name"):
        assert not is_hub_name(path)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model_type": "granite", "embedding_multiplier": 7.0}, "computes more than"),
        ({"model_type": "granite", "residual_multiplier": 0.5}, "computes more than"),
        ({"model_type": "granite", "logits_scaling": 3.0}, "computes more than"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0]}, "computes more than"),
        ({"model_type": "mistral", "sliding_window": 8}, "computes more than"),
        ({"model_type": "gpt2"}, "is of the family gpt2, which is not supported"),
    ],
)
def test_a_model_that_no_rank_holds_whole_is_refused_if_it_would_be_computed_wrongly(
    tmp_path, monkeypatch, fields, sentence
):
    """Families that are known are described as Llama without windows here: their description may be wrong."""
    for family in ("granite", "smollm3", "mistral"):
        monkeypatch.setitem(FAMILIES, family, lambda tree: llama({**tree, "sliding_window": None}))
    with pytest.raises(ConfigError, match=sentence):
        load(shape_file(tmp_path, **fields), 0, 3)


def test_a_model_of_another_family_is_not_refused_for_being_narrow(tmp_path):
    for family in ("qwen2", "qwen3", "mistral", "smollm3"):
        path = shape_file(tmp_path, model_type=family, sliding_window=None, no_rope_layers=[1, 1, 1, 1])
        assert not load(path, 1, 3).whole


def test_quantised_weights_are_not_cut(tmp_path):
    folder = tmp_path / "quantised"
    folder.mkdir()
    shape = {**SHAPE, "quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="quantised weights"):
        load(str(folder), 0, 2)


def test_a_model_that_peers_cannot_share_is_refused(tmp_path):
    with pytest.raises(LayoutError, match="4 ranks cannot share the model's 6 attention heads"):
        load(shape_file(tmp_path), 0, 4)
