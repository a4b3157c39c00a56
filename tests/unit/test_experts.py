"""The MLP of a layer with experts against transformers' own: forward, gradient of the input, ranks that share it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from helpers import tp_group_of

from clif.distributed.collectives import TpGroup
from clif.engine.checked_capture import CaptureError, CheckedRecorder
from clif.models.dual_linear import LoraRows
from clif.models.expert_linears import Groups, grouped_fault
from clif.models.expert_spec import ExpertFiles, Experts
from clif.models.experts import Choice, RoutedMlp, routed_mlp
from clif.models.layer import _part_of
from clif.models.layer_ops import TorchGate

HIDDEN, INNER, COUNT, TAKEN = 24, 20, 6, 3
SPEC = Experts(COUNT, TAKEN, INNER, ExpertFiles("gate", "{}.w1", "{}.w3", "{}.w2"))
PAIRED = replace(SPEC, router="mlp.router", activation="mlp.experts._apply_gate", paired=True)
SIZES = {
    "vocab_size": 50, "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 12,
    "num_key_value_heads": 1, "num_experts_per_tok": TAKEN, "num_local_experts": COUNT,
}  # fmt: skip
FAMILIES = {
    "mixtral": {"model_type": "mixtral", "intermediate_size": INNER},
    "qwen3_moe, weights that add up to 1": {
        "model_type": "qwen3_moe", "moe_intermediate_size": INNER, "norm_topk_prob": True
    },
    "qwen3_moe, weights as softmax has them": {
        "model_type": "qwen3_moe", "moe_intermediate_size": INNER, "norm_topk_prob": False
    },
    "gpt_oss": {"model_type": "gpt_oss", "intermediate_size": INNER, "swiglu_limit": 1.5},
}  # fmt: skip


def layer_of(name: str, dtype: torch.dtype = torch.float32):
    """A decoder layer of transformers with random experts."""
    config = transformers.AutoConfig.for_model(**{**SIZES, **FAMILIES[name]})
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    rng = torch.Generator().manual_seed(0)
    layer = model.model.layers[0].requires_grad_(False)
    for parameter in layer.mlp.parameters():
        parameter.data.normal_(0.0, 0.4, generator=rng)
    return layer.to(dtype)


def own(layer, x: torch.Tensor) -> torch.Tensor:
    """What transformers' own module computes."""
    found = layer.mlp(x[None])
    return (found[0] if isinstance(found, tuple) else found)[0]


def mlp_of(layer, tp_group: TpGroup | None = None) -> RoutedMlp:
    spec = PAIRED if hasattr(layer.mlp, "router") else SPEC
    return routed_mlp(spec, partial(_part_of, layer), TorchGate, tp_group or TpGroup())


def rows_of(n: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(got: torch.Tensor, wanted: torch.Tensor, bound: float = 1e-5) -> bool:
    return bool((got - wanted).norm() <= bound * wanted.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_that_serve_get_what_transformers_computes(name):
    layer, x = layer_of(name), rows_of(37)
    (got,) = mlp_of(layer)([x], [LoraRows(37)])
    assert near(got, own(layer, x))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_of_the_input_goes_through_router_and_experts(name):
    """Against transformers' autograd, behind rows of another kind."""
    layer, served, x = layer_of(name), rows_of(5, seed=2), rows_of(33)
    weight = rows_of(33, seed=3)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    wanted = own(layer, inputs[0])
    others, got = mlp_of(layer)([served, inputs[1]], [LoraRows(5), LoraRows(33, learns=True)])
    for y in (wanted, got):
        (y * weight).sum().backward()
    assert near(got, wanted) and near(inputs[1].grad, inputs[0].grad)
    assert not others.requires_grad and near(others, own(layer, served))


def test_in_float64_the_gradient_is_exact():
    """The router's softmax, which transformers computes in float32, is the caller's here."""
    layer = layer_of("mixtral", torch.float64)
    x, scores = rows_of(21, dtype=torch.float64), rows_of(21, 4, torch.float64)[:, :COUNT]

    def router(hidden: torch.Tensor):
        weights, experts = (hidden[:, :COUNT] + scores).softmax(-1).topk(TAKEN)
        return None, weights / weights.sum(-1, keepdim=True), experts

    mlp, learns = mlp_of(layer), [LoraRows(21, learns=True)]
    mlp.router = router
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    _, weights, experts = router(inputs[0])
    wanted = layer.mlp.experts(inputs[0], experts, weights)
    (got,) = mlp([inputs[1]], learns)
    for y in (wanted, got):
        y.square().sum().backward()
    assert near(got, wanted, 1e-12) and near(inputs[1].grad, inputs[0].grad, 1e-12)


def test_the_gradient_of_a_row_does_not_depend_on_whether_others_share_the_pass():
    layer, x = layer_of("mixtral"), rows_of(12)
    found = []
    for others in ([], [rows_of(9, seed=5)]):
        own = x.clone().requires_grad_()
        kinds = [*(LoraRows(len(one)) for one in others), LoraRows(12, learns=True)]
        mlp_of(layer)([*others, own], kinds)[-1].square().sum().backward()
        found.append(own.grad)
    assert near(*found)


def test_equal_batches_give_equal_numbers():
    layer, x = layer_of("mixtral"), rows_of(40)
    mlp = mlp_of(layer)
    first, second = (mlp([x], [LoraRows(40)])[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", FAMILIES)
def test_grouped_products_compute_the_same_without_a_look_at_the_sizes_of_groups(name):
    """As a captured region has to: under its rules, the second time with other choices."""
    layer, grad = layer_of(name), rows_of(15, seed=6)
    plain, grouped = mlp_of(layer), mlp_of(layer)
    for linears in grouped.linears:
        assert linears.can_group
        linears.grouped = True
    x = torch.empty(15, HIDDEN)

    def region() -> tuple[torch.Tensor, ...]:
        choice = Choice(*grouped.router(x)[1:])
        y, wide = grouped.forward(x, choice)
        return y, *grouped.backward(grad, choice, wide)

    x.copy_(rows_of(15))
    captured = CheckedRecorder().capture(region)
    for seed in (7, 8):
        x.copy_(rows_of(15, seed))
        captured.replay()
        choice = Choice(*plain.router(x)[1:])
        y, wide = plain.forward(x, choice)
        for got, wanted in zip(captured.result, (y, *plain.backward(grad, choice, wide)), strict=True):
            assert near(got, wanted)


def test_products_for_each_expert_are_not_captured():
    """What captures says so, and the steps are launched one by one."""
    mlp, x = mlp_of(layer_of("mixtral")), rows_of(15)
    with pytest.raises(CaptureError, match="tolist"):
        CheckedRecorder().capture(lambda: mlp.forward(x, Choice(*mlp.router(x)[1:])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_are_tried_before_they_are_used(dtype, monkeypatch):
    assert grouped_fault(torch.device("cpu"), dtype) is None
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda x, weights, offs: x @ weights[0])
    assert grouped_fault(torch.device("cpu"), dtype) == "torch's grouped products are wrong here"


def test_pairs_are_grouped_by_expert_in_the_order_of_rows():
    groups = Groups(torch.tensor([[2, 0], [0, 1], [2, 1]]), 4)
    assert groups.spans == [(0, 0, 2), (1, 2, 4), (2, 4, 6)] and groups.ends.tolist() == [2, 4, 6, 6]
    assert groups.rows.tolist() == [0, 1, 1, 2, 0, 2]
    pairs = groups.order[:, None].float()
    assert groups.spread(pairs).flatten().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_the_ranks_add_up_in_both_directions(size, name):
    layer, x, grad = layer_of(name), rows_of(15), rows_of(15, seed=6)
    whole = mlp_of(deepcopy(layer))
    choice = Choice(*whole.router(x)[1:])
    ranks = [mlp_of(deepcopy(layer), tp_group_of(rank, size)) for rank in range(size)]
    for one in ranks:
        one.tp_group.all_reduce_ = lambda tensor: tensor
    assert ranks[1].gate_up.each[0].base.shape == (2 * INNER // size, HIDDEN)
    outputs = [one.forward(x, choice) for one in ranks]
    wanted, wide = whole.forward(x, choice)
    assert near(sum(y for y, _ in outputs), wanted)
    parts = [one.backward(grad, choice, read) for one, (_, read) in zip(ranks, outputs, strict=True)]
    for of_ranks, of_whole in zip(zip(*parts, strict=True), whole.backward(grad, choice, wide), strict=True):
        assert near(sum(of_ranks), of_whole)


def test_files_may_have_every_expert_by_itself():
    pieces = SPEC.pieces()
    assert pieces["mlp.experts.gate_up_proj"][5] == ("5.w1.weight", "5.w3.weight")
    assert pieces["mlp.experts.down_proj"][0] == ("0.w2.weight",) and pieces["mlp.gate.weight"] == (("gate.weight",),)
