"""Every family on a GPU: answers, gradients and quantised bases are those of the same weights elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, Family
from helpers import Rig, answer, finish, make_rig, random_state, request

from clif.models.weights.loading import load_model
from clif.training.passes import LONG_SAMPLE
from clif.types import TrainSample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
PROMPTS = [[5, 6, 7], list(range(40, 130)), [*range(40, 100), *range(7)], list(range(200, 223))]
"""Shorter and longer than windows, chunks and blocks; two begin alike."""
SAMPLES = [
    TrainSample(id=0, ids=tuple(range(5, 25)), target_start=11),
    TrainSample(id=1, ids=tuple(range(90, 160)), target_start=30),
    TrainSample(id=2, ids=(7, 8, 9), target_start=2),
]
QUANTISED = ("llama", "qwen3_moe", "gpt_oss", "mixtral")
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.fixture
def drawn(tmp_path: Path, family: Family) -> str:
    """A folder of weights that were drawn on a CPU."""
    (tmp_path / "config.json").write_text(json.dumps(family.config))
    loaded = make_rig(f"random:{tmp_path}").loaded
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save(tmp_path / "model")
    return str(tmp_path / "model")


def rig_of(folder: str, **model: object) -> Rig:
    return make_rig(folder, device="cuda", model=model)


def own_model(rig: Rig) -> transformers.PreTrainedModel:
    """transformers' own model with the same weights, on the GPU in float32."""
    model = load_model(rig.config.model, torch.device("cpu")).model.float().cuda()
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        # Some releases leave the soft cap out of their fused attention.
        model.set_attn_implementation("eager")
    return model


def behind_the_best(model: torch.nn.Module, ids: list[int], got: list[int]) -> torch.Tensor:
    """How far each token of an answer is behind the best one, in deviations of the logits."""
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *got]], device="cuda")).logits[0, len(ids) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(got, device="cuda")[:, None])[:, 0]
    return (logits.amax(-1) - chosen) / logits.std(-1)


def answers(rig: Rig) -> dict[int, list[int]]:
    asked = [request(i, ids, max_tokens=12, ignore_eos=True) for i, ids in enumerate(PROMPTS)]
    return {i: answer(events) for i, events in rig.run(asked).items()}


def gradient(rig: Rig) -> torch.Tensor:
    rig.bank.set_shadow({name: 0.3 * factor for name, factor in random_state(rig.bank, 5).items()})
    rig.bank.gradient.zero_()
    finish(rig.train_runner.loss_and_gradients(SAMPLES, 100))
    return rig.bank.gradient.float().cpu()


@every_family
def test_answers_and_gradients_in_float32_are_those_of_a_cpu(family: Family, drawn: str) -> None:
    gpu, cpu = rig_of(drawn), make_rig(drawn)
    model = own_model(gpu)
    for i, got in answers(gpu).items():
        assert (behind_the_best(model, PROMPTS[i], got) <= 1e-4).all()
    expected, found = gradient(cpu), gradient(gpu)
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@every_family
def test_answers_in_bfloat16_are_near_the_best_and_samples_are_learnt(family: Family, drawn: str) -> None:
    gpu, cpu = rig_of(drawn, dtype="bfloat16"), make_rig(drawn)
    model = own_model(gpu)
    for i, got in answers(gpu).items():
        assert (behind_the_best(model, PROMPTS[i], got) <= 0.25).float().mean() > 0.9
    expected, found = gradient(cpu), gradient(gpu)
    # A router that rounds takes another expert now and then.
    assert torch.nn.functional.cosine_similarity(found, expected, 0) > (0.8 if "moe" in family.model_type else 0.97)


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in QUANTISED], ids=lambda family: family.name)
def test_quantised_weights_answer_and_learn_as_on_a_cpu(family: Family, drawn: str, weights: str) -> None:
    gpu, cpu = rig_of(drawn, weight_dtype=weights), make_rig(drawn, model={"weight_dtype": weights})
    found, expected = answers(gpu), answers(cpu)
    same = sum(found[i] == expected[i] for i in found)
    assert same >= len(found) - 1, (found, expected)
    ours, theirs = gradient(gpu), gradient(cpu)
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name == "llama"], ids=lambda family: family.name)
def test_long_samples_in_pieces_have_the_gradients_of_a_cpu(family: Family, tmp_path: Path) -> None:
    length = 2 * LONG_SAMPLE
    fields = {**family.config, "max_position_embeddings": length}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    sections = {"model": {"max_context": length}, "engine": {"kv_tokens": length, "activation_mib": 64}}
    drawn = make_rig(f"random:{tmp_path}", **sections)
    drawn.loaded.model.save_pretrained(tmp_path / "model")
    drawn.loaded.tokenizer.save(tmp_path / "model")
    ids = tuple((i * 7919 + i * i) % 300 for i in range(length))
    found = []
    for device in ("cpu", "cuda"):
        rig = make_rig(str(tmp_path / "model"), device=device, **sections)
        rig.bank.set_shadow(random_state(rig.bank, 5))
        rig.bank.gradient.zero_()
        sample = TrainSample(id=0, ids=ids, target_start=length // 2)
        finish(rig.train_runner.loss_and_gradients([sample], sample.targets))
        found.append(rig.bank.gradient.float().cpu())
    assert (found[0] - found[1]).norm() <= 1e-3 * found[0].norm()
