"""An adapter that leaves CLIF is a PEFT adapter with identical logits; one that comes in is checked."""

from __future__ import annotations

import json

import peft
import pytest
import safetensors.torch
import torch
from helpers import make_rig, random_state, stack_logits

from clif.adapters import peft_io
from clif.adapters.peft_io import AdapterError
from clif.adapters.store import CONFIG_FILE, WEIGHTS_FILE
from clif.errors import ConfigError
from clif.models.dual_linear import SHADOW
from clif.models.weights.loading import load_model

IDS = torch.tensor([5, 9, 33, 2, 60, 61, 7])


def export(rig, folder):
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(peft_io.config_json(rig.bank, "base"))
    (folder / WEIGHTS_FILE).write_bytes(peft_io.write_weights(rig.bank.shadow_state()))
    return folder


def our_logits(rig):
    return stack_logits(rig.runner.stack, IDS, SHADOW)


def check_round_trip(rig, folder):
    rig.bank.set_shadow(random_state(rig.bank, 14))
    export(rig, folder)
    base = load_model(rig.config.model, torch.device("cpu"), seed=3).model
    loaded = peft.PeftModel.from_pretrained(base, str(folder))
    wrapped = {n.removeprefix(peft_io.PREFIX) for n, m in loaded.named_modules() if hasattr(m, "lora_A")}
    assert wrapped == set(rig.bank.names), "peft fills what is too much with zeros, in silence"
    with torch.no_grad():
        expected = loaded(IDS.unsqueeze(0)).logits[0]
    assert torch.allclose(our_logits(rig), expected, atol=1e-5, rtol=1e-5)
    state = peft_io.read_folder(rig.bank, folder)
    assert all(torch.equal(state[k], v) for k, v in rig.bank.shadow_state().items())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], r".*layers\.[02]\..*_proj"])
def test_exported_adapter_has_identical_logits_in_peft(tiny_config, tmp_path, targets):
    check_round_trip(make_rig(f"random:{tiny_config}", adapter={"target_modules": targets}), tmp_path / "a")


def test_exported_adapter_of_a_real_model_has_identical_logits_in_peft(stories, tmp_path):
    check_round_trip(make_rig(stories), tmp_path / "a")


@pytest.fixture
def rig(tiny_config):
    return make_rig(f"random:{tiny_config}")


def broken(rig, change):
    tensors = {peft_io.PREFIX + k: v.clone() for k, v in rig.bank.shadow_state().items()}
    change(tensors)
    return safetensors.torch.save(tensors)


def first(tensors):
    return next(iter(tensors))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop(first(t)), "1 keys missing"),
        (lambda t: t.update(other=torch.zeros(1)), "1 unknown"),
        (lambda t: t.update({first(t): torch.zeros(2, 2)}), "has shape"),
        (lambda t: t[first(t)].fill_(float("nan")), "not finite"),
        (lambda t: t[first(t)].view(-1)[-1:].fill_(float("-inf")), "not finite"),
        (lambda t: t.update({first(t): t[first(t)].double().fill_(1e300)}), "not finite in float32"),
        (lambda t: t.update({first(t): t[first(t)].to(torch.int8)}), "is int8, not floating point"),
        (lambda t: t.update({first(t): t[first(t)].bool()}), "is bool, not floating point"),
        (lambda t: t.update({first(t): t[first(t)].to(torch.complex64)}), "is complex64, not floating point"),
        (lambda t: t.update({first(t).removeprefix(peft_io.PREFIX): t[first(t)].clone()}), "twice, with and without"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(rig, change, sentence):
    """Promise 3: nothing that is not finite gets in; and PEFT's own loader would let missing keys pass."""
    with pytest.raises(AdapterError, match=sentence):
        peft_io.read_weights(rig.bank, broken(rig, change))


def test_values_that_the_type_that_serves_cannot_hold_are_refused(tiny_config):
    rig = make_rig(f"random:{tiny_config}", model={"dtype": "bfloat16"})
    fits, too_large = (broken(rig, lambda t, v=value: t[first(t)].fill_(v)) for value in (3.38e38, 3.4e38))
    peft_io.read_weights(rig.bank, fits)
    with pytest.raises(AdapterError, match="not finite in bfloat16"):
        peft_io.read_weights(rig.bank, too_large)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_any_floating_point_type_comes_in_as_float32(rig, kind):
    state = peft_io.read_weights(rig.bank, broken(rig, lambda t: t.update({k: v.to(kind) for k, v in t.items()})))
    assert {v.dtype for v in state.values()} == {torch.float32}


def test_a_tensor_that_torch_cannot_name_is_refused(rig):
    header = b'{"x":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}'
    with pytest.raises(AdapterError, match=r"cannot be read .*: export it in float32"):
        peft_io.read_weights(rig.bank, len(header).to_bytes(8, "little") + header + b"0")


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        ("[a-z", r"'\[a-z' is not a regular expression \(unterminated character set"),
        ("nonsense", "'nonsense' matches no linear layer of the model: there are .*q_proj"),
        (["q_proj", "gate_prj", "nonsense"], "'gate_prj', 'nonsense' matches no linear layer"),
        ([], "an empty list matches no linear layer"),
    ],
)
def test_target_modules_that_mean_nothing_are_refused(tiny_config, targets, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make_rig(f"random:{tiny_config}", adapter={"target_modules": targets})


def test_what_is_no_adapter_is_refused(rig, tmp_path):
    with pytest.raises(AdapterError, match="not a safetensors file"):
        peft_io.read_weights(rig.bank, b"nonsense")
    with pytest.raises(AdapterError, match="not a PEFT adapter folder"):
        peft_io.read_folder(rig.bank, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("r", 99, "r=99"),
        ("lora_alpha", 3, "lora_alpha=3"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("rank_pattern", {"q_proj": 2}, "rank_pattern"),
        ("alpha_pattern", {"q_proj": 2}, "alpha_pattern"),
        ("use_rslora", True, "use_rslora"),
        ("use_dora", True, "use_dora"),
        ("peft_type", "LOHA", "does not describe a LoRA adapter"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(rig, tmp_path, key, value, sentence):
    folder = export(rig, tmp_path / "a")
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, key: value}))
    with pytest.raises(AdapterError, match=sentence):
        peft_io.read_folder(rig.bank, folder)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("{", "is damaged"), ("[]", "does not describe a LoRA adapter"), ("\xff", "is damaged: 'utf-8'")],
)
def test_a_damaged_adapter_config_is_refused(rig, tmp_path, text, sentence):
    folder = export(rig, tmp_path / "a")
    (folder / CONFIG_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(AdapterError, match=rf"adapter_config\.json {sentence}"):
        peft_io.read_folder(rig.bank, folder)


def test_a_folder_without_weights_or_a_file_is_refused(rig, tmp_path):
    folder = export(rig, tmp_path / "a")
    (folder / WEIGHTS_FILE).unlink()
    for path in (folder, folder / CONFIG_FILE):
        with pytest.raises(AdapterError, match="not a PEFT adapter folder"):
            peft_io.read_folder(rig.bank, path)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_the_written_configuration_is_the_one_that_peft_makes(tiny_config, tmp_path, targets):
    rig = make_rig(f"random:{tiny_config}", adapter={"target_modules": targets})
    export(rig, tmp_path / "ours")
    made = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=peft_io._target_names(rig.bank),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path="base",
    )
    made.save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = (peft.LoraConfig.from_pretrained(str(tmp_path / name)).to_dict() for name in ("ours", "theirs"))
    assert ours == theirs
