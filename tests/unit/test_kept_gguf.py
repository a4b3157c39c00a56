"""A GGUF file whose blocks stay packed: what is served and learnt is what its unpacked weights give."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from helpers import Rig, make_rig, small_config, tp_group_of
from packed_answers import PROMPTS, answers, step
from tiny_gguf import write_gguf

from clif.config import ConfigError
from clif.distributed.layout import LayoutError
from clif.kernels.quantised import QuantisedMatrix
from clif.models.estimate import estimate, read_spec
from clif.models.packed_linear import PackedLinear
from clif.models.shard import Shard
from clif.models.stack import CausalStack
from clif.models.weights.loading import load_model
from clif.models.weights.part import columns_of

CPU, F32 = torch.device("cpu"), torch.float32
FILES: dict[str, dict[str, str]] = {
    "8 bits": {},
    "4 bits": dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), "Q4_1"),
    "several kinds": {"attn_q": "Q4_0", "attn_k": "Q4_0", "attn_v": "Q5_1", "ffn_up": "F16", "ffn_down": "Q5_0"},
}


@pytest.fixture(params=FILES, ids=str)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return write_gguf(tmp_path / "tiny.gguf", kinds=FILES[request.param])


def rig_of(file: str, kind: str, dtype: str = "float32") -> Rig:
    return make_rig(file, model={"weight_dtype": kind, "dtype": dtype, "max_context": 96})


def test_tokens_losses_and_gradients_are_those_of_the_unpacked_file(file: str):
    plain, packed = rig_of(file, "auto"), rig_of(file, "file")
    (loss, gradient), (wanted, of_plain) = step(packed), step(plain)
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert float((gradient - of_plain).norm()) <= 1e-5 * float(of_plain.norm())
    for rig in (plain, packed):
        rig.fill(1, seed=4)
    expected = answers(plain)
    assert answers(packed) == expected
    assert answers(packed, arrive={i: 3 * i for i in range(len(PROMPTS))}) == expected, "in other batches"
    assert packed.loaded.tokenizer.eos_ids == plain.loaded.tokenizer.eos_ids


def test_in_bfloat16_the_weights_are_those_of_the_unpacked_file_bit_for_bit(file: str):
    plain, packed = (
        CausalStack(load_model(small_config(file, model={"dtype": "bfloat16", "weight_dtype": kind}).model, CPU).model)
        for kind in ("auto", "file")
    )
    x = torch.eye(96, dtype=torch.bfloat16)
    for mine, other in zip(packed.linears[:3], plain.linears[:3], strict=True):
        assert torch.equal(mine.base.forward(x), other.base.forward(x))
    assert torch.equal(packed.embed(torch.arange(50)), plain.embed(torch.arange(50)))


def test_nothing_dense_is_held_but_the_embedding_and_what_the_file_has_plain(
    file: str, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, "clif.engine.base"):
        rig = rig_of(file, "file")
    stack = rig.runner.stack
    assert "as the file has them (" in caplog.text and "8 bits by 32 inputs " in caplog.text
    for module in rig.loaded.model.modules():
        if isinstance(module, PackedLinear):
            assert module.weight.numel() == 0
    held = sum(t.nbytes for part in stack.weighed() for t in part.base.tensors)
    assert held < 0.45 * sum(part.base.shape.numel() * 4 for part in stack.weighed())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_is_what_is_held(file: str, dtype: str):
    rig = rig_of(file, "file", dtype)
    stack = rig.runner.stack
    tensors = [*rig.loaded.model.parameters(), *(t for part in stack.weighed() for t in part.base.tensors)]
    held = sum({t.data_ptr(): t.nbytes for t in tensors}.values())
    assert estimate(rig.config, read_spec(file), 1, "cpu").weights == pytest.approx(held, rel=0.05)


def test_ranks_read_their_parts_of_the_blocks(file: str):
    config = small_config(file, model={"weight_dtype": "file", "dtype": "float32"})
    plain = CausalStack(load_model(small_config(file, model={"dtype": "float32"}).model, CPU).model)
    for rank in range(3):
        group = tp_group_of(rank, 3)
        part = CausalStack(load_model(config.model, CPU, 0, group).model, group)
        whole = CausalStack(
            load_model(small_config(file, model={"dtype": "float32"}).model, CPU, 0, group).model, group
        )
        for mine, other in zip(part.weighed(), whole.weighed(), strict=True):
            x = torch.eye(other.base.shape[1])
            assert torch.equal(mine.base.forward(x), other.base.forward(x))
    assert len(plain.linears) == len(part.linears)


def test_ranks_that_would_cut_a_scale_are_told():
    matrix = QuantisedMatrix.of(torch.randn(4, 96), 4)
    assert torch.equal(columns_of(matrix, "w", ("in", Shard(16, 48, 96))).dense(F32), matrix.dense(F32)[:, 16:48])
    with pytest.raises(LayoutError, match=r"cannot share the packed w \(inputs 24 to 48 .* lower layout\.tp_size"):
        columns_of(matrix, "w", ("in", Shard(24, 48, 96)))


def test_a_file_of_plain_weights_has_none_to_keep(stories: str):
    with pytest.raises(ConfigError, match=r"keeps quantised weights, .* are plain: set model\.weight_dtype=auto"):
        load_model(small_config(stories, model={"weight_dtype": "file"}).model, CPU)
