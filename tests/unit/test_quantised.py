"""Base weights of 8 and 4 bits: what is served and learnt is that of the dense model whose weights they stand for."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family
from helpers import Rig, answer, make_rig, random_state, request, small_config, stack_logits, tp_group_of

from clif.config import ConfigError, config_from_tree
from clif.engine.engine import Engine
from clif.engine.jobs import Job
from clif.kernels import fp8_matrix
from clif.kernels import quantised as quantised_module
from clif.kernels.fp8_matrix import Fp8Matrix
from clif.kernels.quantised import GROUP, Bits, QuantisedMatrix
from clif.models import quantised_weight
from clif.models.estimate import estimate, read_spec
from clif.models.quantised_weight import QuantisedWeight
from clif.models.quantising import FORMATS, assert_stored, quantise
from clif.models.stack import CausalStack
from clif.models.weights.loading import load_model
from clif.training.trainer import ShadowTrainer
from clif.types import TrainSample

KINDS = [kind for kind in FORMATS if kind != "nf4" or find_spec("bitsandbytes")]
"""bitsandbytes is optional, and comes with no other extra."""
WORST = {"int8": 0.015, "int4": 0.11, "fp8": 0.04, "nf4": 0.12}
"""Relative difference of a layer's outputs that these models stay below."""
PROMPTS = [[7, 3, 9], [11, 5, 8, 2, 40, 41, 17], [5], list(range(20, 50)), [9, 9, 9, 1, 2, 3, 4]]


def weight(out: int = 50, in_: int = 70, seed: int = 0) -> torch.Tensor:
    """Numbers of different sizes in each row, and a row of zeros."""
    rng = torch.Generator().manual_seed(seed)
    found = torch.randn(out, in_, generator=rng) * torch.rand(out, 1, generator=rng)
    found[3] = 0
    return found


# --- matrices


@pytest.mark.parametrize("bits", [8, 4])
def test_each_number_is_the_nearest_that_its_scale_allows(bits: Bits):
    dense = weight()
    matrix = QuantisedMatrix.of(dense, bits)
    scales = matrix.scales.float().abs().repeat_interleave(GROUP if bits == 4 else dense.shape[1], 1)[:, :70]
    apart = (matrix.dense(torch.float32) - dense).abs()
    # 8 is beyond the range of 4 bits, whose other end is -8. Scales are rounded to bfloat16, which cuts a little.
    allowed = 0.75 if bits == 8 else 1.05
    assert bool((apart <= allowed * scales + 1e-7).all()) and not matrix.dense(torch.float32)[3].any()
    assert (matrix.out, matrix.in_, matrix.least) == (50, 70, None)


def on_a_grid(out: int, in_: int) -> torch.Tensor:
    """Numbers of 4 bits with a scale and a least number for each group, such as those of a GGUF file."""
    rng = torch.Generator().manual_seed(2)
    shape = (out, -(-in_ // GROUP), GROUP)
    whole = torch.randint(0, 16, shape, generator=rng)
    whole[..., 0], whole[..., 1] = 0, 15
    scales = torch.rand(*shape[:2], 1, generator=rng) + 0.5
    return (whole * scales - 9 * scales * torch.rand(*shape[:2], 1, generator=rng)).flatten(1)[:, :in_].contiguous()


def test_weights_that_were_four_bits_with_least_numbers_before_keep_their_values():
    dense = on_a_grid(48, 96)
    matrix = QuantisedMatrix.of(dense, 4)
    assert matrix.least is not None
    assert float((matrix.dense(torch.float32) - dense).norm()) < 0.01 * float(dense.norm())


def test_numbers_of_fp8_are_the_nearest_and_the_largest_of_an_output_has_the_end_of_the_range():
    dense = weight()
    matrix = Fp8Matrix.of(dense)
    found, scales = matrix.dense(torch.float32), matrix.scales
    # Half of the last of three bits, and below 2^-6 half of the smallest number, 2^-9.
    allowed = torch.maximum(dense.abs() / 16, scales * 2**-10)
    assert bool(((found - dense).abs() <= allowed * 1.0001).all()) and not found[3].any()
    assert torch.allclose(found.abs().amax(1), dense.abs().amax(1))
    assert matrix.numbers.dtype == torch.float8_e4m3fn and (matrix.out, matrix.in_) == (50, 70)
    dense[5, 7] = torch.nan
    assert Fp8Matrix.of(dense).dense(torch.float32)[5].isnan().all(), "a NaN is not hidden"
    assert torch.equal(Fp8Matrix.of(dense).dense(torch.float32)[6:], found[6:])


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_and_parts_of_a_matrix_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch, kind: str):
    whole = FORMATS[kind](weight())
    for module in (quantised_module, fp8_matrix):
        monkeypatch.setattr(module, "PIECE", 210)
    again = FORMATS[kind](weight())
    assert torch.equal(again.numbers.view(torch.uint8), whole.numbers.view(torch.uint8)) and torch.equal(
        again.scales, whole.scales
    )
    dense = whole.dense(torch.float32)
    assert torch.equal(whole.dense(torch.float32, slice(10, 31)), dense[10:31])
    for columns in (slice(32, 64), slice(64, 70), slice(0, 70)):
        assert torch.equal(whole.dense(torch.float32, columns=columns), dense[:, columns])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strip", [1, 300, 1 << 19])
def test_products_are_those_of_the_dense_matrix_however_little_is_dense_at_a_time(
    monkeypatch: pytest.MonkeyPatch, kind: str, strip: int
):
    monkeypatch.setitem(quantised_weight.STRIP, "cpu", strip)
    base = QuantisedWeight(FORMATS[kind](weight()), torch.linspace(-1, 1, 50), torch.float32)
    dense, x, grad = base.matrix.dense(torch.float32), torch.randn(6, 70), torch.randn(6, 50)
    assert torch.allclose(base.forward(x), x @ dense.T + torch.linspace(-1, 1, 50), atol=1e-5)
    assert torch.allclose(base.backward(grad), grad @ dense, atol=1e-5, rtol=1e-5)


# --- engines


def rig_of(model: str, kind: str, **sections: Any) -> Rig:
    return make_rig(model, model={"weight_dtype": kind, **sections.pop("model", {})}, **sections)


def dense_twin(rig: Rig) -> Rig:
    """The same engine around a dense model with the weights that those of `rig` stand for."""
    config = rig.config.model_copy(update={"model": rig.config.model.model_copy(update={"weight_dtype": "auto"})})
    loaded = load_model(config.model, torch.device("cpu"), 3)
    twin = Rig(config, loaded, Engine.from_config(config, loaded))
    stack = rig.runner.stack
    pairs = zip([*twin.runner.stack.linears, twin.runner.stack.head], [*stack.linears, stack.head], strict=True)
    for mine, other in pairs:
        base: Any = mine.base
        mine.base = type(base)(other.base.matrix.dense(base.dtype), base.bias)
    return twin


def answers(rig: Rig, **options: Any) -> list[list[int]]:
    requests = [request(i, prompt, max_tokens=9, ignore_eos=True) for i, prompt in enumerate(PROMPTS)]
    events = rig.run(requests, **options)
    return [answer(events[i]) for i in range(len(PROMPTS))]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_dense_model_with_its_weights_whatever_runs_beside_them(tiny_config: Path, kind: str):
    rig = rig_of(f"random:{tiny_config}", kind)
    twin = dense_twin(rig)
    for one in (rig, twin):
        one.fill(1, seed=4)
    expected = answers(twin)
    assert answers(rig) == expected
    assert answers(rig, arrive={i: 3 * i for i in range(len(PROMPTS))}) == expected, "in other batches"


@pytest.mark.parametrize("kind", KINDS)
def test_training_steps_and_promotions_are_those_of_the_dense_model(tiny_config: Path, kind: str):
    samples = [TrainSample(id=i, ids=tuple(range(5 + i, 40 + 2 * i)), target_start=12) for i in range(3)]
    found = []
    rig = rig_of(f"random:{tiny_config}", kind)
    for one in (rig, dense_twin(rig)):
        one.bank.set_shadow(random_state(one.bank, 5))
        config = one.config.train.model_copy(update={"enabled": True, "lr": 0.01})
        trainer, losses = ShadowTrainer(one.train_runner, one.bank, samples, config), []

        def step(trainer: ShadowTrainer = trainer, losses: list[float] = losses) -> Any:
            losses.append((yield from trainer.step(2, 2)).loss)

        one.engine.jobs.append(Job("step", step()))
        one.run([])
        gradient = one.bank.gradient.clone()
        slot = one.slots.free_slot()
        assert slot is not None
        one.runner.bank.fill_slot(slot, one.bank.local(one.bank.whole(one.bank.shadow.data)))
        one.slots.promote(2, slot)
        found.append((losses, gradient, answers(one)))
    (losses, gradient, said), (dense_losses, dense_gradient, dense_said) = found
    assert losses == pytest.approx(dense_losses, rel=1e-5) and said == dense_said
    assert float((gradient - dense_gradient).norm()) <= 1e-5 * float(dense_gradient.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_shadow_that_is_not_finite_reaches_no_answer(tiny_config: Path, kind: str):
    rig = rig_of(f"random:{tiny_config}", kind)
    rig.fill(1, seed=4)
    expected = answers(rig)
    rig.bank.shadow.data.fill_(float("nan"))
    rig.bank.refresh()
    assert answers(rig) == expected


# --- what is said and held


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_what_is_held_and_the_dense_weights_are_gone(
    tiny_config: Path, tmp_path: Path, kind: str, tied: bool
):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(tiny_config.read_text()), "tie_word_embeddings": tied}))
    rig = rig_of(f"random:{file}", kind)
    stack = rig.runner.stack
    held = sum(t.nbytes for part in (*stack.linears, stack.head) for t in part.base.tensors)
    held += sum(p.nbytes for p in rig.loaded.model.parameters())
    assert estimate(rig.config, read_spec(rig.config.model.path), 1, "cpu").weights == held


def test_an_8b_base_takes_what_the_documentation_says():
    tree = {"path": "random:configs/models/llama-8b.json", "dtype": "bfloat16", "max_context": 64}
    config = config_from_tree({"model": tree, "train": {"enabled": False}})
    spec, size = read_spec(config.model.path), {}
    for kind in ("auto", *KINDS):
        model = config.model.model_copy(update={"weight_dtype": kind})
        size[kind] = estimate(config.model_copy(update={"model": model}), spec, 1, "cuda").weights / 1e9
    said = {"auto": 16.1, "int8": 8.6, "int4": 5.3, "fp8": 8.6, "nf4": 5.3}
    assert {kind: round(gb, 1) for kind, gb in size.items()} == {kind: said[kind] for kind in size}


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_says_how_far_the_outputs_of_a_layer_are_off(
    stories: str, kind: str, caplog: pytest.LogCaptureFixture
):
    config = small_config(stories)
    stack = CausalStack(load_model(config.model, torch.device("cpu")).model)
    done = quantise(stack, kind)
    assert 0.001 < done.worst < WORST[kind] and done.where.startswith(("model.layers.", "lm_head"))
    assert done.bytes < done.dense / 3
    with caplog.at_level(logging.INFO, "clif.engine.base"):
        rig_of(stories, kind)
    assert f"{kind}, " in caplog.text and f"differ by {done.worst:.2%} at most ({done.where})" in caplog.text


def test_a_gpu_that_has_no_numbers_of_eight_bits_says_what_to_change(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    sentence = r"weight_dtype fp8 needs compute capability 8\.9, this GPU has 8\.0: set model\.weight_dtype=int8"
    with pytest.raises(ConfigError, match=sentence):
        assert_stored("fp8", torch.device("cuda"))
    assert_stored("int8", torch.device("cuda"))
    assert_stored("fp8", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert_stored("fp8", torch.device("cuda"))


def test_a_library_that_is_missing_gives_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("clif.models.nf4_matrix.find_spec", lambda name: None)
    sentence = r"nf4 needs bitsandbytes: python -m pip install .*, or set model\.weight_dtype=int4"
    with pytest.raises(ConfigError, match=sentence):
        assert_stored("nf4", torch.device("cpu"))


def test_kernels_of_adapters_may_be_asked_for_beside_weights_that_are_not_dense(stories: str):
    config = small_config(stories, engine={"lora_kernel": "triton"}, model={"weight_dtype": "int4"})
    assert config.engine.lora_kernel == "triton"


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_quantise_their_own_parts(tiny_config: Path, kind: str):
    config = small_config(f"random:{tiny_config}")
    whole = CausalStack(load_model(config.model, torch.device("cpu"), 3).model)
    quantise(whole, kind)
    for rank in range(2):
        group = tp_group_of(rank, 2)
        part = CausalStack(load_model(config.model, torch.device("cpu"), 3, group).model, group)
        quantise(part, kind)
        for mine, all_ in zip(part.linears, whole.linears, strict=True):
            base: Any = mine.base
            assert base.shape.numel() <= all_.base.shape.numel() and type(base.matrix) is type(
                FORMATS[kind](torch.ones(1, 32))
            )
        mine, all_ = part.linears[-1].base, whole.linears[-1].base
        columns = slice(rank * mine.shape[1], (rank + 1) * mine.shape[1])
        apart = mine.matrix.dense(torch.float32) - all_.matrix.dense(torch.float32)[:, columns]
        assert float(apart.norm()) < WORST[kind] * float(all_.matrix.dense(torch.float32).norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [one for one in FAMILIES if "-" not in one.name], ids=lambda one: one.name)
def test_each_family_computes_with_the_weights_that_the_whole_numbers_stand_for(
    family: Family, kind: str, tmp_path: Path
):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(family.config))
    config = small_config(f"random:{file}")
    stacks = [CausalStack(load_model(config.model, torch.device("cpu"), 3).model) for _ in range(2)]
    quantise(stacks[0], kind)
    for mine, other in zip(*(stack.weighed() for stack in stacks), strict=True):
        base: Any = other.base
        weight: Any = mine.base
        other.base = type(base)(weight.matrix.dense(torch.float32), base.bias)
    ids = torch.arange(5, 45)
    found, expected = (stack_logits(stack, ids) for stack in stacks)
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
    held = sum(t.nbytes for part in stacks[0].weighed() for t in part.base.tensors[:2])
    held += sum(p.nbytes for p in stacks[0].model.parameters())
    whole = config.model_copy(update={"model": config.model.model_copy(update={"weight_dtype": kind})})
    assert estimate(whole, read_spec(config.model.path), 1, "cpu").weights == pytest.approx(held, rel=0.05)
