"""A folder from outside becomes an adapter of the run that computes what it did, or is refused with a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from helpers import Rig, make_rig, random_state, stack_logits

from clif.adapters import peft_io
from clif.adapters.peft_files import PREFIX, config_flaw, describe, weights_flaw
from clif.adapters.peft_fit import fit_files
from clif.adapters.store import CONFIG_FILE, WEIGHTS_FILE
from clif.errors import InputError
from clif.models.dual_linear import SHADOW
from clif.models.weights.loading import load_model

IDS = torch.tensor([5, 9, 33, 2, 60, 61, 7])
SMALL = {"r": 3, "lora_alpha": 15}


def rig_of(tiny_config: str, **adapter: Any) -> Rig:
    rig = make_rig(f"random:{tiny_config}", adapter=adapter)
    rig.bank.set_shadow(random_state(rig.bank, 14))
    return rig


def export(rig: Rig, folder: Path, change: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> Path:
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(peft_io.config_json(rig.bank, "base"))
    state = {PREFIX + name: change(tensor.clone()).contiguous() for name, tensor in rig.bank.shadow_state().items()}
    (folder / WEIGHTS_FILE).write_bytes(safetensors.torch.save(state))
    return folder


def fit(run: Rig, folder: Path, dtype: str = "float32", seed: int = 1) -> tuple[str, bytes]:
    config = run.bank.config
    return fit_files(folder, config.r, config.lora_alpha, describe(run.bank.shapes()), dtype, "base", seed)


def save(folder: Path, files: tuple[str, bytes]) -> Path:
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(files[0])
    (folder / WEIGHTS_FILE).write_bytes(files[1])
    return folder


def peft_logits(rig: Rig, folder: Path) -> torch.Tensor:
    base = load_model(rig.config.model, torch.device("cpu"), seed=3).model
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(base, str(folder))(IDS.unsqueeze(0)).logits[0]


@pytest.fixture
def run(tiny_config: str) -> Rig:
    return make_rig(f"random:{tiny_config}", adapter={"r": 4, "lora_alpha": 8})


def test_a_smaller_rank_of_another_scale_computes_what_it_did_in_clif_in_peft_and_in_transformers(
    run: Rig, tiny_config: str, tmp_path: Path
) -> None:
    small = rig_of(tiny_config, **SMALL)
    given = export(small, tmp_path / "given")
    expected = stack_logits(small.runner.stack, IDS, SHADOW)
    files = fit(run, given)
    assert not config_flaw(files[0], 4, 8) and not weights_flaw(files[1], describe(run.bank.shapes()))
    run.bank.set_shadow(peft_io.read_weights(run.bank, files[1]))
    fitted = save(tmp_path / "fitted", files)
    model = load_model(run.config.model, torch.device("cpu"), seed=3).model
    model.load_adapter(str(fitted))  # type: ignore[operator]
    with torch.no_grad():
        in_transformers = model(IDS.unsqueeze(0)).logits[0]
    for found in (stack_logits(run.runner.stack, IDS, SHADOW), peft_logits(run, fitted), in_transformers):
        assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_the_rank_that_is_added_can_be_trained(run: Rig, tiny_config: str, tmp_path: Path) -> None:
    """Rows of A that are added are drawn, the same ones for one version: no gradient would ever reach zeros."""
    given = export(rig_of(tiny_config, **SMALL), tmp_path / "given")
    first, again, other = (fit(run, given, seed=seed)[1] for seed in (1, 1, 2))
    assert first == again != other
    state = peft_io.read_weights(run.bank, first)
    added = [t[3:] if "lora_A" in name else t[:, 3:] for name, t in state.items()]
    assert all((t != 0).all() if "lora_A" in name else (t == 0).all() for name, t in zip(state, added, strict=True))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_floating_point_of_any_kind_is_read_as_torch_reads_it(run: Rig, tiny_config: str, tmp_path: Path, kind) -> None:
    given = rig_of(tiny_config, r=4, lora_alpha=8)
    state = safetensors.torch.load(fit(run, export(given, tmp_path / "given", lambda t: t.to(kind)))[1])
    for name, tensor in given.bank.shadow_state().items():
        assert torch.equal(state[PREFIX + name], tensor.to(kind).float())


def test_an_adapter_of_the_run_stays_as_it_is(run: Rig, tiny_config: str, tmp_path: Path) -> None:
    given = rig_of(tiny_config, r=4, lora_alpha=8)
    state = safetensors.torch.load(fit(run, export(given, tmp_path / "given"))[1])
    assert all(torch.equal(state[PREFIX + name], t) for name, t in given.bank.shadow_state().items())


def rewrite(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: rewrite(f, r=5), "given has r=5, more than adapter.r 4: export one of at most r=4"),
        (lambda f: rewrite(f, r=2), "has shape"),
        (lambda f: rewrite(f, r=True), "given has r=True: correct it"),
        (lambda f: rewrite(f, lora_alpha=0), "given has lora_alpha=0: correct it"),
        (lambda f: rewrite(f, use_dora=True), "given uses use_dora, which cannot be served"),
        (lambda f: rewrite(f, peft_type="IA3"), "given does not describe a LoRA adapter"),
        (lambda f: (f / CONFIG_FILE).write_text("{"), "adapter_config.json of given is damaged"),
        (lambda f: (f / CONFIG_FILE).write_text("[" * 100_000), "adapter_config.json of given is damaged"),
        (
            lambda f: (f / WEIGHTS_FILE).write_bytes(b"x"),
            "adapter_model.safetensors of given is not a safetensors file",
        ),
        (lambda f: (f / WEIGHTS_FILE).unlink(), r"given is not a PEFT adapter folder: .*adapter_model.safetensors"),
        (lambda f: [(f / WEIGHTS_FILE).unlink(), (f / WEIGHTS_FILE).mkdir()], "not a plain file"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(
    run: Rig, tiny_config: str, tmp_path: Path, change: Callable[[Path], Any], sentence: str
) -> None:
    folder = export(rig_of(tiny_config, r=4, lora_alpha=8), tmp_path / "given")
    change(folder)
    with pytest.raises(InputError, match=sentence):
        fit(run, folder)


@pytest.mark.parametrize(
    ("change", "dtype", "sentence"),
    [
        (lambda t: t * float("nan"), "float32", "holds values that are not finite"),
        (lambda t: t + 1e5, "float16", "holds values that are not finite"),
        (lambda t: t.double() + 1e300, "float32", "holds values that are not finite"),
        (lambda t: t.to(torch.int32), "float32", "is I32, not floating point"),
    ],
)
def test_values_that_cannot_be_served_are_refused(
    run: Rig,
    tiny_config: str,
    tmp_path: Path,
    change: Callable[[torch.Tensor], torch.Tensor],
    dtype: str,
    sentence: str,
) -> None:
    folder = export(rig_of(tiny_config, r=4, lora_alpha=8), tmp_path / "given", change)
    with pytest.raises(InputError, match=sentence):
        fit(run, folder, dtype)


def test_an_adapter_of_other_modules_is_refused_by_their_names(run: Rig, tiny_config: str, tmp_path: Path) -> None:
    folder = export(rig_of(tiny_config, r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]), tmp_path / "given")
    with pytest.raises(InputError, match=r"adapts other modules .* it has q_proj, up_proj, see adapter.target_modules"):
        fit(run, folder)
