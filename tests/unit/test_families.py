"""Every family of models answers as transformers' own model does, and learns as PEFT teaches it."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from families import FAMILIES, WINDOW, Family
from helpers import Rig, answer, finish, make_rig, random_state, request, stack_logits

from clif.adapters import peft_io
from clif.adapters.store import CONFIG_FILE, WEIGHTS_FILE
from clif.config import TrainConfig
from clif.engine.checked_capture import CheckedRecorder
from clif.engine.compiled_layers import CompiledLayers
from clif.engine.scheduler import Chunk, Sequence
from clif.kernels.paged_decode_reference import PagedDecodeReference
from clif.models import spec as specs
from clif.models.dual_linear import SHADOW
from clif.models.spec import spec_of
from clif.models.varlen import varlen_reference
from clif.models.weights.loading import load_model
from clif.training.train_runner import TrainRunner
from clif.training.trainer import ShadowTrainer
from clif.types import TrainSample

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], list(range(40, 130)), [*range(40, 100), *range(7)], list(range(200, 223))]
"""Shorter and longer than windows, chunks and blocks; two begin alike."""
SAMPLES = [
    TrainSample(id=0, ids=tuple(range(5, 25)), target_start=11),
    TrainSample(id=1, ids=tuple(range(90, 160)), target_start=30),
    TrainSample(id=2, ids=(7, 8, 9), target_start=2),
]
different = pytest.mark.parametrize(
    "family", [f for f in FAMILIES if not f.name.startswith("llama-")], ids=lambda family: family.name
)
"""Those that differ in more than their angles."""
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def rig_of(family: Family, folder: Path, **sections: object) -> Rig:
    (folder / "config.json").write_text(json.dumps(family.config))
    return make_rig(f"random:{folder}", **sections)


def own_model(rig: Rig) -> transformers.PreTrainedModel:
    """transformers' own model with the same weights."""
    return load_model(rig.config.model, CPU, seed=3).model


def export(rig: Rig, state: dict[str, torch.Tensor], folder: Path) -> Path:
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(peft_io.config_json(rig.bank, "base"))
    (folder / WEIGHTS_FILE).write_bytes(peft_io.write_weights(state))
    return folder


def generated(model: torch.nn.Module, ids: list[int], count: int) -> list[int]:
    prompt = torch.tensor([ids])
    mask = torch.ones_like(prompt)
    out = model.generate(
        input_ids=prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(ids) :].tolist()


def test_every_family_that_is_known_is_proved_here():
    assert {family.model_type for family in FAMILIES} == set(specs.FAMILIES)


@every_family
def test_answers_are_those_of_transformers_token_for_token(tmp_path, family):
    """Prompts in chunks, and of several requests at once; what a prompt shares with an earlier one is reused."""
    rig = rig_of(family, tmp_path)
    first = rig.run([request(9, PROMPTS[1], max_tokens=2, ignore_eos=True)])
    events = rig.run([request(i, ids, max_tokens=20, ignore_eos=True) for i, ids in enumerate(PROMPTS)])
    assert rig.engine.scheduler.reused_tokens > 0
    model = own_model(rig)
    for i, ids in enumerate(PROMPTS):
        assert answer(events[i]) == generated(model, ids, 20)
    assert answer(first[9]) == answer(events[1])[:2]


@pytest.mark.parametrize("name", ["mistral-window", "gemma2", "gemma3", "gpt_oss"])
def test_answers_are_those_of_transformers_without_the_kernels_for_cpus(tmp_path, name):
    (family,) = (family for family in FAMILIES if family.name == name)
    rig = rig_of(family, tmp_path, engine={"cpu_kernels": "off"})
    events = rig.run([request(i, ids, max_tokens=20, ignore_eos=True) for i, ids in enumerate(PROMPTS)])
    model = own_model(rig)
    for i, ids in enumerate(PROMPTS):
        assert answer(events[i]) == generated(model, ids, 20)


@pytest.mark.slow  # A model of each family: half a minute in total.
@different
def test_two_adapters_answer_at_once_each_as_alone(tmp_path, family):
    rig = rig_of(family, tmp_path)
    ask = [request(i, PROMPTS[2], max_tokens=24, ignore_eos=True) for i in range(4)]
    rig.fill(1, seed=1)
    alone = {1: answer(rig.run(ask[:1])[0])}
    rig.engine.scheduler.add(ask[1], 0.0)
    got = {1: [t for _ in range(4) for event in rig.engine.serve() for t in event.tokens]}
    rig.fill(2, seed=2)
    rig.engine.scheduler.add(ask[2], 0.0)
    got[2] = []
    while rig.engine.serving:
        for event in rig.engine.serve():
            got[event.request_id] += event.tokens
    alone[2] = answer(rig.run(ask[3:])[3])
    assert got == alone and alone[1] != alone[2]


@pytest.mark.parametrize("name", ["mistral-window", "gemma3"])
def test_blocks_below_the_windows_of_all_layers_are_given_back_and_otherwise_kept(tmp_path, name):
    (family,) = (family for family in FAMILIES if family.name == name)
    rig = rig_of(family, tmp_path)
    scheduler = rig.engine.scheduler
    scheduler.add(request(0, PROMPTS[1], max_tokens=40, ignore_eos=True), 0.0)
    used = [0]
    while rig.engine.serving:
        rig.engine.serve()
        used.append(scheduler.pool.used_tokens)
    frees = name == "mistral-window"
    # Beside the window: the chunk of a step, the blocks at either end, and the one before.
    assert (max(used) <= WINDOW + rig.config.engine.max_prefill_tokens + 4 * rig.config.engine.block_size) is frees
    assert frees or max(used) >= len(PROMPTS[1]) + 36


@different
def test_an_adapter_gives_the_answers_that_it_gives_in_peft_and_comes_back_unchanged(tmp_path, family):
    rig = rig_of(family, tmp_path)
    rig.bank.set_shadow(random_state(rig.bank, 8))
    rig.fill(1, seed=8)
    ids = PROMPTS[1]
    events = rig.run([request(0, ids, max_tokens=12, ignore_eos=True)])
    folder = export(rig, rig.bank.shadow_state(), tmp_path / "adapter")
    state = peft_io.read_folder(rig.bank, folder)
    assert all(torch.equal(state[k], v) for k, v in rig.bank.shadow_state().items())
    loaded = peft.PeftModel.from_pretrained(own_model(rig), str(folder))
    assert {n.removeprefix(peft_io.PREFIX) for n, m in loaded.named_modules() if hasattr(m, "lora_A")} == set(
        rig.bank.names
    )
    with torch.no_grad():
        expected = loaded(torch.tensor([ids])).logits[0]
    assert torch.allclose(stack_logits(rig.runner.stack, torch.tensor(ids), SHADOW), expected, atol=1e-4, rtol=1e-4)
    assert answer(events[0]) == generated(loaded, ids, 12)


@different
def test_gradients_equal_those_of_peft(tmp_path, family):
    rig = rig_of(family, tmp_path)
    # Small: beside float32's rounding of large sums nothing would be seen.
    rig.bank.set_shadow({name: 0.3 * factor for name, factor in random_state(rig.bank, 5).items()})
    folder = export(rig, rig.bank.shadow_state(), tmp_path / "adapter")
    model = own_model(rig)
    if model._can_set_experts_implementation():
        # Its grouped products do not compute float64.
        model.set_experts_implementation("eager")
    wrapped = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True).double()
    count, total = sum(s.targets for s in SAMPLES), 0.0
    for sample in SAMPLES:
        ids = torch.tensor([sample.ids])
        labels = ids.clone()
        labels[0, : sample.target_start] = -100
        loss = wrapped(ids, labels=labels).loss * sample.targets / count
        loss.backward()
        total += loss.item()
    wanted = {n.removeprefix(peft_io.PREFIX).replace(".default", ""): p.grad for n, p in wrapped.named_parameters()}
    trainer = ShadowTrainer(rig.train_runner, rig.bank, SAMPLES, TrainConfig(warmup_steps=0, clip_norm=1e9))
    result = finish(trainer.step(len(SAMPLES), 1))
    assert result.loss == pytest.approx(total, rel=1e-5)
    for name, factors in rig.bank.factors(rig.bank.gradient).items():
        for key, gradient in zip("AB", factors, strict=True):
            reference = wanted[f"{name}.lora_{key}.weight"]
            assert (gradient - reference).norm() <= 1e-5 * reference.norm(), name


@every_family
def test_a_config_json_and_what_transformers_makes_of_it_are_one_description(family):
    config = transformers.AutoConfig.for_model(**family.config)
    assert spec_of(family.config) == spec_of(config)
    assert spec_of(json.loads(config.to_json_string(use_diff=False))) == spec_of(config)


def test_windows_of_a_family_are_those_of_its_layers():
    windows = {family.name: {kind.window for kind in spec_of(family.config).kinds} for family in FAMILIES}
    assert windows["mistral"] == windows["llama"] == windows["qwen2"] == {None}
    assert windows["mistral-window"] == {WINDOW}
    assert windows["gemma2"] == windows["gemma3"] == windows["olmo3"] == windows["qwen2-window"] == {WINDOW, None}


@pytest.mark.slow  # A model of each family: half a minute in total.
@different
def test_answers_in_bfloat16_are_as_good_whatever_kernels_compute_them(tmp_path, family):
    """The kernels for CPUs take over what they compute, and leave the rest: no token is far from the best one."""
    rig = rig_of(family, tmp_path, model={"dtype": "bfloat16"})
    events = rig.run([request(i, ids, max_tokens=12, ignore_eos=True) for i, ids in enumerate(PROMPTS)])
    model = own_model(rig).float()
    for i, ids in enumerate(PROMPTS):
        got = answer(events[i])
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *got]])).logits[0, len(ids) - 1 : -1]
        behind = logits.amax(-1) - logits.gather(1, torch.tensor(got)[:, None])[:, 0]
        # A router that rounds takes another expert now and then.
        assert (behind <= 0.25 * logits.std(-1)).float().mean() > 0.9, behind


NO_EXPERTS = [
    family for family in FAMILIES if not family.name.startswith(("llama-", "mixtral", "qwen3_moe", "gpt_oss"))
]
ROUNDED = ("olmo2", "olmo3")
"""Families of which a part by itself is torch's."""


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_one_call_of_all_layers_leaves_experts_to_others(tmp_path, name):
    (family,) = (family for family in FAMILIES if family.name == name)
    rig = rig_of(family, tmp_path, model={"dtype": "bfloat16"})
    if rig.runner._cpu is False:
        pytest.skip("the C++ kernels are not built here, or this CPU has not what they need")
    assert CompiledLayers.obstacle(rig.runner.stack, rig.runner.cache) == "a layer has experts"
    assert rig.runner._compiled is None


@pytest.mark.parametrize("family", NO_EXPERTS, ids=lambda family: family.name)
def test_the_one_call_of_all_layers_gives_the_bits_of_its_parts(tmp_path, family):
    rig = rig_of(family, tmp_path, model={"dtype": "bfloat16"}, engine={"max_prefill_tokens": 128, "block_size": 16})
    if rig.runner._cpu is False:
        pytest.skip("the C++ kernels are not built here, or this CPU has not what they need")
    rig.fill(1, seed=1)
    steps = []
    for compiled in (rig.runner._compiled, None):
        assert compiled is not None or steps
        rig.runner._compiled = compiled
        chunks = ([chunk_of(i, start) for i in range(len(PROMPTS))] for start in (0, 40, 75))
        steps.append([rig.runner.compute(rig.runner.fill(step))[0] for step in chunks])
    for got, wanted in zip(*steps, strict=True):
        near = 0.02 * wanted.float().norm() if family.name in ROUNDED else 0.0
        assert (got.float() - wanted.float()).norm() <= near


def chunk_of(prompt: int, start: int) -> Chunk:
    """40 tokens of a prompt, or its last one; the last two prompts have an adapter."""
    ids = PROMPTS[prompt]
    sequence = Sequence(request(prompt, ids), 0.0, [*ids])
    sequence.blocks, sequence.slot = [*range(16 * prompt, 16 * prompt + 16)], None if prompt < 2 else 0
    return Chunk(sequence, min(start, len(ids) - 1), min(start + 40, len(ids)), True)


@pytest.mark.slow  # Checks of captures look at every operation.
@pytest.mark.parametrize("name", ["smollm3", "granite", "olmo2"])
def test_captured_steps_and_passes_compute_what_plain_ones_do(tmp_path, name):
    """Of families whose attention is plain, so that a GPU captures them."""
    (family,) = (family for family in FAMILIES if family.name == name)
    plain, rig = (rig_of(family, tmp_path) for _ in range(2))
    asked = [request(i, ids, max_tokens=12, ignore_eos=True) for i, ids in enumerate(PROMPTS[:3])]
    expected, recorder = plain.run(asked), CheckedRecorder()
    rig.runner.paged = PagedDecodeReference()
    rig.runner.capture(recorder, 256)
    assert {i: answer(e) for i, e in rig.run(asked).items()} == {i: answer(e) for i, e in expected.items()}
    assert sum(region.replays for region in recorder.regions) > 0
    gradients = []
    for one, captures in ((plain, False), (rig, True)):
        one.runner.stack.varlen = varlen_reference
        one.runner.train_recorder = CheckedRecorder() if captures else None
        one.bank.set_shadow(random_state(one.bank, 5))
        runner = TrainRunner(one.runner, (128,))
        one.bank.gradient.zero_()
        finish(runner.loss_and_gradients(SAMPLES, 100))
        gradients.append(one.bank.gradient.clone())
        launches = sum(region.replays for region in one.runner.train_recorder.regions) if captures else 0
        assert (launches > 0) is captures
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()
