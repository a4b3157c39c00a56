"""A model is described once; a family that keeps its weights otherwise is another description."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from helpers import make_rig, stack_logits

from clif.distributed.collectives import TpGroup
from clif.distributed.layout import LayoutError
from clif.errors import ConfigError
from clif.models.causal import CausalSequences
from clif.models.dual_linear import LoraRows
from clif.models.expert_spec import Experts
from clif.models.layer import DecoderLayer, check_layer
from clif.models.layer_ops import TorchOps
from clif.models.layer_spec import Features, LayerSpec, LinearGroup, LinearModule
from clif.models.shard import Shard, ShardSpec
from clif.models.spec import FAMILIES, spec_of

SIZES = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def fused(layer: LayerSpec) -> LayerSpec:
    """The same layer with query, key and value in one weight, as Phi keeps them."""
    qkv = LinearModule("self_attn.qkv_proj", layer.linears[0].outputs)
    return replace(layer, linears=(replace(layer.linears[0], modules=(qkv,)), *layer.linears[1:]))


def test_a_config_and_what_transformers_makes_of_it_are_one_description(tiny_config):
    tree = json.loads(tiny_config.read_text())
    rig = make_rig(f"random:{tiny_config}")
    assert spec_of(rig.loaded.model.config) == spec_of(tree) == rig.runner.stack.spec


def test_the_description_names_every_tensor_with_its_shape(tiny_config):
    rig = make_rig(f"random:{tiny_config}")
    spec = rig.runner.stack.spec
    held = {name: tuple(tensor.shape) for name, tensor in rig.loaded.model.named_parameters()}
    assert dict(spec.tensors(spec.tied)) == held


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_of_all_ranks_cover_every_layer_and_few_kv_heads_are_held_by_several(size):
    layer = spec_of(SIZES).layer
    for group in layer.linears:
        for i, module in enumerate(group.modules):
            shards = [group.shards(rank, size)[i] for rank in range(size)]
            total = module.size if group.shard_dim == "out" else group.inputs.size
            assert {n for s in shards for n in range(s.start, s.stop)} == set(range(total))
            assert all(s.total == total for s in shards)
    assert layer.linears[0].local_outputs(0, size) == [32 // size, 16 // min(size, 2), 16 // min(size, 2)]


def test_a_model_that_ranks_cannot_share_is_refused():
    with pytest.raises(LayoutError, match="3 ranks cannot share the model's 4 attention heads"):
        spec_of(SIZES).check_divisible(3)


def test_what_attention_splits_and_what_adapters_belong_to_are_two_facts():
    layer = spec_of(SIZES).layer
    one = fused(layer).linears[0]
    assert [f.size for f in one.outputs] == [f.size for f in layer.linears[0].outputs] == [32, 16, 16]
    assert [m.size for m in one.modules] == [64] and [m.size for m in layer.linears[0].modules] == [32, 16, 16]
    assert one.shards(0, 1) == (Shard(0, 64, 64),)


def test_a_rank_holds_some_of_each_kind_of_outputs_of_one_weight():
    one = fused(spec_of(SIZES).layer).linears[0]
    assert one.shards(0, 2) == (Shard(0, 16, 64, ((32, 40), (48, 56))),)
    assert one.shards(1, 2) == (Shard(16, 32, 64, ((40, 48), (56, 64))),)
    whole = torch.arange(128.0).view(64, 2)
    parts = [ShardSpec(0, one.shards(rank, 2)[0]) for rank in range(2)]
    assert parts[0].of_rank(1, 2) == parts[1] and parts[0].holders(2) == 1
    again = torch.zeros_like(whole)
    for part in parts:
        part.put(again, part.take(whole))
    assert torch.equal(again, whole)
    assert torch.equal(parts[1].take(whole), torch.cat((whole[16:32], whole[40:48], whole[56:64])))
    with pytest.raises(LayoutError, match="outnumber the key/value heads"):
        one.shards(0, 4)


@torch.no_grad()
def test_a_layer_with_one_weight_for_query_key_and_value_computes_the_same_and_has_one_adapter_there(tiny_config):
    rig = make_rig(f"random:{tiny_config}", engine={"cpu_kernels": "off"})
    stack, spec = rig.runner.stack, rig.runner.stack.spec
    module = deepcopy(rig.loaded.model.model.layers[0])
    parts = [module.self_attn.q_proj, module.self_attn.k_proj, module.self_attn.v_proj]
    qkv = torch.nn.Linear(spec.hidden_size, sum(p.out_features for p in parts), bias=False)
    qkv.weight.data = torch.cat([p.weight for p in parts])
    module.self_attn.qkv_proj = qkv
    del module.self_attn.q_proj, module.self_attn.k_proj, module.self_attn.v_proj
    layer = DecoderLayer(module, "model.layers.0", 0, fused(spec.layer), TpGroup(), TorchOps())
    ids = torch.arange(5, 25)
    rows = stack.sub_batch(LoraRows(len(ids)), torch.arange(len(ids)), CausalSequences([len(ids)], ids.device))
    hidden = stack.embed(ids)
    ((residual,), (added,)), (expected,) = layer([hidden], [None], [rows]), stack.layers(0, 1, [hidden], [rows])
    assert torch.equal(expected, residual + added)
    lora = layer.qkv.adapt([0], 4, 2.0, 2)
    (factors,) = lora.by_module(lora.shadow_a, lora.shadow_b).items()
    assert factors[0] == "model.layers.0.self_attn.qkv_proj" and len(factors[1][1]) == qkv.out_features


def test_a_new_family_is_one_function(tiny_config, monkeypatch: pytest.MonkeyPatch):
    """Its spec is what loading, cutting, estimating and running go by."""
    asked = []

    def family(tree):
        asked.append(tree["model_type"])
        return FAMILIES["mistral"](tree)

    expected = stack_logits(make_rig(f"random:{tiny_config}").runner.stack, torch.arange(9))
    monkeypatch.setitem(FAMILIES, "llama", family)
    assert torch.equal(stack_logits(make_rig(f"random:{tiny_config}").runner.stack, torch.arange(9)), expected)
    assert asked and set(asked) == {"llama"}


def test_windows_and_experts_can_be_described_and_a_layer_without_them_is_refused(tiny_config):
    mistral = spec_of({**SIZES, "model_type": "mistral", "sliding_window": 64})
    assert mistral.window == 64 and spec_of(SIZES).window is None
    layer = make_rig(f"random:{tiny_config}").loaded.model.model.layers[0]
    spec = spec_of(json.loads(tiny_config.read_text())).layer
    experts = replace(spec, mlp=Experts(count=4, per_token=2, inner=48))
    with pytest.raises(ConfigError, match="is not a Llama-style layer"):
        check_layer(layer, experts)


def test_kinds_of_rotary_embeddings_are_described():
    assert spec_of(SIZES).layer.attention.rope == "default"
    assert spec_of({**SIZES, "rope_scaling": {"type": "yarn"}}).layer.attention.rope == "yarn"
    assert spec_of({**SIZES, "rope_parameters": {"rope_type": "llama3"}}).layer.attention.rope == "llama3"


def test_a_unit_is_never_cut():
    heads = Features(units=2, unit=8)
    assert [heads.shard(rank, 4) for rank in range(4)] == [Shard(0, 8, 16)] * 2 + [Shard(8, 16, 16)] * 2
    group = LinearGroup("out", (LinearModule("o", (Features(6),)),), heads, "in", "attended")
    assert group.shards(1, 2) == (Shard(8, 16, 16),) and group.local_outputs(1, 2) == [6]
