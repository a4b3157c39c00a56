"""Checkpoints of GPTQ, AWQ and compressed-tensors are served packed, as the plain models that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_rig, small_config, tp_group_of
from packed_answers import PROMPTS, answers, step
from packed_checkpoints import CHECKPOINTS, Checkpoint, write_checkpoint
from safetensors.torch import load_file

from clif.config import ConfigError
from clif.distributed.layout import LayoutError
from clif.models.bytes_tokenizer import byte_tokenizer
from clif.models.checkpoint_scheme import UnreadSchemeError, scheme_of
from clif.models.estimate import estimate, read_spec
from clif.models.layer_spec import ModelSpec
from clif.models.spec import spec_of
from clif.models.stack import CausalStack
from clif.models.weights import loading
from clif.models.weights.files import check_weights
from clif.models.weights.loading import load_model

CPU = torch.device("cpu")
by_name = pytest.mark.parametrize("one", CHECKPOINTS, ids=lambda one: one.name)


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders have none."""
    monkeypatch.setattr(loading.transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(loading, "from_transformers", lambda *_: byte_tokenizer(300))


@by_name
def test_tokens_losses_and_gradients_are_those_of_the_plain_model(one: Checkpoint, tmp_path: Path):
    packed, plain = (make_rig(folder) for folder in write_checkpoint(one, tmp_path))
    (loss, gradient), (wanted, of_plain) = step(packed), step(plain)
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert float((gradient - of_plain).norm()) <= 1e-5 * float(of_plain.norm())
    for rig in (packed, plain):
        rig.fill(1, seed=4)
    expected = answers(plain)
    assert answers(packed) == expected
    assert answers(packed, arrive={i: 3 * i for i in range(len(PROMPTS))}) == expected, "in other batches"


def products(stack: CausalStack) -> list[torch.Tensor]:
    """Each weight transposed, by multiplying with it."""
    return [part.base.forward(torch.eye(part.base.shape[1], dtype=part.base.dtype)) for part in stack.weighed()]


@by_name
def test_weights_are_the_files_rounded_once_and_nothing_else_is_held(one: Checkpoint, tmp_path: Path):
    packed, plain = write_checkpoint(one, tmp_path)
    rig = make_rig(packed)
    other = CausalStack(load_model(small_config(plain).model, CPU).model)
    for mine, theirs in zip(products(rig.runner.stack), products(other), strict=True):
        assert torch.equal(mine, theirs)
    tensors = [*rig.loaded.model.parameters(), *(t for part in rig.runner.stack.weighed() for t in part.base.tensors)]
    held = sum({t.data_ptr(): t.nbytes for t in tensors}.values())
    assert estimate(rig.config, read_spec(packed), 1, "cpu").weights == pytest.approx(held, rel=0.05)


@by_name
def test_in_bfloat16_the_weights_are_those_of_the_file_rounded_once(one: Checkpoint, tmp_path: Path):
    packed, plain = write_checkpoint(one, tmp_path)
    rig = make_rig(packed, model={"dtype": "bfloat16"})
    dense = CausalStack(load_model(small_config(plain, model={"dtype": "bfloat16"}).model, CPU).model)
    for mine, theirs in zip(products(rig.runner.stack), products(dense), strict=True):
        assert torch.equal(mine, theirs)
    assert all(len(tokens) == 9 for tokens in answers(rig))


@pytest.mark.parametrize(
    "one", [one for one in CHECKPOINTS if one.name.startswith("compressed, 4") or one.name == "awq"]
)
def test_the_library_of_the_format_reads_the_same(one: Checkpoint, tmp_path: Path):
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    packed, plain = write_checkpoint(one, tmp_path)
    have, wanted = (load_file(f"{folder}/model.safetensors") for folder in (packed, plain))
    module = "model.layers.1.mlp.gate_proj"
    if one.name == "awq":
        leaves = (have[f"{module}.{leaf}"] for leaf in ("qweight", "scales", "qzeros"))
        numbers, scales, zeros = AutoAWQConverter()._convert_gemm_module(*leaves)
    else:
        shape = torch.Size(have[f"{module}.weight_shape"].tolist())
        numbers, scales = unpack_from_int32(have[f"{module}.weight_packed"], 4, shape), have[f"{module}.weight_scale"]
        zeros = torch.zeros(1, 1)
    each = numbers.shape[1] // scales.shape[1]
    wide = numbers.float() - zeros.float().repeat_interleave(each if zeros.numel() > 1 else 1, 1)
    assert torch.equal(wide * scales.float().repeat_interleave(each, 1), wanted[f"{module}.weight"])


@by_name
def test_ranks_read_their_parts(one: Checkpoint, tmp_path: Path):
    packed, plain = write_checkpoint(one, tmp_path)
    if one.order:
        with pytest.raises(LayoutError, match=r"o_proj\.weight, whose groups are of inputs in another order"):
            load_model(small_config(packed).model, CPU, 0, tp_group_of(0, 2))
        return
    for rank in range(2):
        group = tp_group_of(rank, 2)
        mine, theirs = (
            CausalStack(load_model(small_config(f).model, CPU, 0, group).model, group) for f in (packed, plain)
        )
        for a, b in zip(products(mine), products(theirs), strict=True):
            assert torch.equal(a, b)


def spec_at(folder: str) -> ModelSpec:
    return spec_of(json.loads((Path(folder) / "config.json").read_text()))


@by_name
def test_a_dry_run_takes_the_files(one: Checkpoint, tmp_path: Path):
    packed, _ = write_checkpoint(one, tmp_path)
    tree = json.loads((Path(packed) / "config.json").read_text())
    check_weights(Path(packed), spec_at(packed), False, scheme_of(tree))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "gptq, bits 3"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"},
            "checkpoint_format marlin",
        ),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"x": {"bits": 8}}}, "in some modules"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "awq, version gemv"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "format float-quantized"),
        ({"quant_method": "compressed-tensors"}, "no 'format'"),
        ({"quant_method": "torchao"}, "torchao"),
    ],
)
def test_what_is_not_read_is_named(fields: dict[str, Any], said: str):
    with pytest.raises(UnreadSchemeError, match=said):
        scheme_of({"quantization_config": fields})


def test_packed_weights_are_not_quantised_again(tmp_path: Path):
    packed, plain = write_checkpoint(CHECKPOINTS[0], tmp_path)
    with pytest.raises(ConfigError, match=r"are quantised \(gptq, 4 bits\): set model\.weight_dtype=auto"):
        load_model(small_config(packed, model={"weight_dtype": "int8"}).model, CPU)
    with pytest.raises(ConfigError, match=r"keeps quantised weights, .* are plain: set model\.weight_dtype=auto"):
        load_model(small_config(plain, model={"weight_dtype": "file"}).model, CPU)
    load_model(small_config(packed, model={"weight_dtype": "file"}).model, CPU)
