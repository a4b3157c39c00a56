"""Weights of experts from files, which have every matrix by itself or all of them stacked; whole, or a rank's part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import make_rig, small_config, tp_group_of
from model_folders import saved, shaped
from safetensors.torch import load_file, save_file

from clif.config import ConfigError, ModelConfig
from clif.engine.compiled_layers import CompiledLayers
from clif.models.base_weight import PackedWeight
from clif.models.estimate import estimate
from clif.models.experts import Choice
from clif.models.layer_spec import ModelSpec
from clif.models.shard import shard_of
from clif.models.spec import spec_of
from clif.models.weights.files import check_weights
from clif.models.weights.loading import load_model

CPU = torch.device("cpu")
EXPERTS = {"num_experts_per_tok": 2, "num_key_value_heads": 2}
KINDS = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, **EXPERTS},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 24, **EXPERTS},
}  # fmt: skip
ONE = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w2.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.3.down_proj.weight",
}


GPT_OSS = {"model_type": "gpt_oss", "num_local_experts": 4, "sliding_window": 32, **EXPERTS}


def model_of(path: str, rank: int = 0, size: int = 1):
    config = ModelConfig(path=path, dtype="float32", max_context=64)
    return load_model(config, CPU, tp_group=tp_group_of(rank, size)).model


def stacked(folder: Path, model) -> None:
    """The same folder with the tensors as the model has them."""
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def folder_spec(folder: Path) -> ModelSpec:
    return spec_of(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("form", ["one by one", "stacked"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_reads_its_columns_of_every_expert(tmp_path, kind, form):
    path = saved(tmp_path, KINDS[kind])
    assert ONE[kind] in load_file(tmp_path / "model.safetensors"), "as the makers' files have them"
    whole = model_of(path)
    if form == "stacked":
        stacked(tmp_path, whole)
    spec, held = folder_spec(tmp_path), dict(whole.named_parameters())
    check_weights(tmp_path, spec, spec.tied)
    for rank in range(2):
        parts = dict(model_of(path, rank, 2).named_parameters())
        for name, shard in spec.layer.mlp.shards(rank, 2).items():
            full = f"model.layers.1.{name}"
            assert torch.equal(parts[full], shard_of(held[full], *shard)) and parts[full].shape != held[full].shape
        router = "model.layers.0.mlp.gate.weight"
        assert torch.equal(parts[router], held[router])


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_without_one_expert_is_refused_before_it_is_read(tmp_path, kind):
    saved(tmp_path, KINDS[kind])
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[ONE[kind]]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"lacks the tensors {ONE[kind]}"):
        check_weights(tmp_path, folder_spec(tmp_path), None)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_is_one_model_however_many_ranks_share_it_and_its_memory_is_estimated(tmp_path, kind, size):
    path = shaped(tmp_path, KINDS[kind])
    spec = folder_spec(tmp_path)
    held = dict(model_of(path).named_parameters())
    parts = dict(model_of(path, size - 1, size).named_parameters())
    for name, shard in spec.layer.mlp.shards(size - 1, size).items():
        assert torch.equal(parts[f"model.layers.0.{name}"], shard_of(held[f"model.layers.0.{name}"], *shard))
    bytes_held = sum(parameter.nbytes for parameter in parts.values())
    weights = estimate(small_config(path), spec, size, "cpu").weights
    # The model has its tied head once; norms of heads are not counted.
    assert abs(weights - bytes_held) < 0.01 * bytes_held


@pytest.mark.parametrize("fields", [KINDS["mixtral"], GPT_OSS], ids=["mixtral", "gpt_oss"])
def test_packed_for_the_kernels_experts_compute_the_same_as_near_as_bfloat16_is(tmp_path, fields):
    """In serving and in training; a whole layer in one call of the kernels is refused."""
    wide = {**fields, "hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
    path = shaped(tmp_path, wide)
    plain, rig = (make_rig(path, model={"dtype": "bfloat16"}, engine={"cpu_kernels": kind}) for kind in ("off", "auto"))
    stack = rig.runner.stack
    if isinstance(stack.linears[0].base, PackedWeight):
        obstacle = CompiledLayers.obstacle(stack, rig.runner.cache)
        assert obstacle in ("a layer has experts", "a layer has scores that are capped or have sinks")
    # The same experts for both: rounding may choose others.
    x, grad = (torch.randn(35, 64, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (1, 2))
    choice = Choice(*stack.routed[0].router(x)[1:])
    found = []
    for one in (plain, rig):
        mlp = one.runner.stack.routed[0]
        y, wide = mlp.forward(x, choice)
        found.append((y, *mlp.backward(grad, choice, wide)))
    for wanted, got in zip(*found, strict=True):
        assert (got - wanted).float().norm() <= 0.01 * wanted.float().norm()


def test_a_rank_reads_its_columns_of_experts_that_lie_in_pairs_and_their_biases(tmp_path):
    path = saved(tmp_path, GPT_OSS)
    spec, held = folder_spec(tmp_path), dict(model_of(path).named_parameters())
    check_weights(tmp_path, spec, spec.tied)
    for rank in range(2):
        parts = dict(model_of(path, rank, 2).named_parameters())
        for name, shard in spec.layer.mlp.shards(rank, 2).items():
            full = f"model.layers.1.{name}"
            assert torch.equal(parts[full], shard_of(held[full], *shard)) and parts[full].shape != held[full].shape


@pytest.mark.parametrize(("kind", "worst"), [("int8", 0.02), ("int4", 0.2)])
def test_experts_are_quantised_with_the_rest_and_held_once(tmp_path, kind, worst):
    path = shaped(tmp_path, KINDS["mixtral"])
    plain, rig = make_rig(path), make_rig(path, model={"weight_dtype": kind})
    stack, mlp = rig.runner.stack, rig.runner.stack.routed[0]
    parts = [one for routed in stack.routed for linears in routed.linears for one in linears.each]
    held = sum(t.nbytes for part in (*stack.linears, stack.head, *parts) for t in part.base.tensors)
    held += sum(parameter.nbytes for parameter in rig.loaded.model.parameters())
    assert estimate(rig.config, folder_spec(tmp_path), 1, "cpu").weights == held
    assert not any(linears.can_group for linears in mlp.linears)
    x, grad = (torch.randn(35, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    dense = plain.runner.stack.routed[0]
    choice = Choice(*dense.router(x)[1:])
    found = []
    for one in (dense, mlp):
        y, wide = one.forward(x, choice)
        found.append((y, *one.backward(grad, choice, wide)))
    for wanted, got in zip(*found, strict=True):
        assert 0 < (got - wanted).norm() <= worst * wanted.norm()
