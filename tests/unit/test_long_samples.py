"""Training samples of thousands of tokens: the same losses and gradients in pieces, within the memory that is set."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import finish, make_rig, random_state

from clif.config import ConfigError, TrainConfig
from clif.models.dual_linear import SHADOW
from clif.training.layer_pieces import PiecedPass
from clif.training.passes import LONG_SAMPLE, PIECE_UNIT, Activations, Packed, Pass, pack
from clif.training.trainer import ShadowTrainer
from clif.types import TrainSample
from tests.counted_bytes import CountedBytes
from tests.families import FAMILIES, Family

SHAPE = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16384, "initializer_range": 0.1,
    "tie_word_embeddings": True,
}  # fmt: skip
LONG = 8192
MIB = 1 << 20
OF_1B = Activations(budget=1024 * MIB, layers=16, entry=4096, layer=72 << 10, square=0, across=40 << 10)
"""A model of 1B in bfloat16."""


def rig_for(tmp_path: Path, activation_mib: int, dtype: str = "float32", context: int = LONG):
    path = tmp_path / "long.json"
    path.write_text(json.dumps(SHAPE))
    model = {"dtype": dtype, "max_context": context}
    engine = {"kv_tokens": context, "activation_mib": activation_mib}
    rig = make_rig(f"random:{path}", model=model, engine=engine)
    rig.bank.set_shadow(random_state(rig.bank, 5))
    return rig


def sample(length: int) -> TrainSample:
    return TrainSample(id=0, ids=tuple((i * 7919 + i * i) % 320 for i in range(length)), target_start=length // 2)


def both_ways(rig, batch: Packed) -> list[tuple[float, torch.Tensor]]:
    """Loss and gradients of a whole pass, and of one in pieces."""
    passes = (
        Pass(rig.runner.stack, batch, SHADOW, rig.train_runner.activations),
        PiecedPass(rig.runner.stack, batch, SHADOW, PIECE_UNIT, learns=True),
    )
    found = []
    for run in passes:
        run.forward(run.left)
        run.head(run.targets.left, batch.tokens)
        run.backward(run.pending)
        found.append((float(run.targets.loss), rig.bank.gradient.clone()))
        rig.bank.gradient.zero_()
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [PIECE_UNIT // 2, 5 * PIECE_UNIT + 3])
def test_a_pass_in_pieces_has_the_loss_and_the_gradients_of_a_whole_one(tmp_path, dtype: str, length: int) -> None:
    (loss, whole), (in_pieces, gradient) = both_ways(rig_for(tmp_path, 64, dtype, 512), pack([sample(length)]))
    near = 1e-5 if dtype == "float32" else 0.03
    assert whole.norm() > 0
    assert abs(in_pieces - loss) <= near * loss
    assert (gradient - whole).norm() <= near * whole.norm()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_family_learns_in_pieces_what_it_learns_as_a_whole(tmp_path, family: Family) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(family.config))
    rig = make_rig(f"random:{path}", model={"max_context": 150})
    rig.bank.set_shadow(random_state(rig.bank, 5))
    batch = pack([TrainSample(id=0, ids=tuple(5 + i * i % 250 for i in range(150)), target_start=40)])
    (loss, whole), (in_pieces, gradient) = both_ways(rig, batch)
    assert whole.norm() > 0
    assert in_pieces == pytest.approx(loss, rel=1e-5)
    assert (gradient - whole).norm() <= 5e-4 * whole.norm(), (
        "Gemma's gradients are ten times as sensitive as the others"
    )


def test_a_pass_in_pieces_that_does_not_learn_has_the_loss_of_a_whole_one(tmp_path) -> None:
    rig, batch = rig_for(tmp_path, 64, context=512), pack([sample(200)])
    for slot in (None, SHADOW):
        losses = []
        for run in (Pass(rig.runner.stack, batch, slot), PiecedPass(rig.runner.stack, batch, slot, 64, learns=False)):
            run.forward(run.left)
            run.head(run.targets.left, 1.0)
            losses.append(float(run.targets.loss))
            assert not run.pending
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


SLOW = pytest.mark.slow(reason="attention of 8,192 tokens, forward twice and backward: half a minute")


@pytest.mark.parametrize(
    ("length", "dtype"), [(3000, "float32"), (LONG, "bfloat16"), pytest.param(LONG, "float32", marks=SLOW)]
)
def test_a_long_sample_trains_within_the_memory_that_is_set(tmp_path, length: int, dtype: str) -> None:
    """Counted are all tensors of an optimizer step that are not there before it."""
    activations = rig_for(tmp_path, 1, dtype).train_runner.activations
    smallest = next(mib for mib in range(1, 200) if replace(activations, budget=mib * MIB).piece(length))
    rig = rig_for(tmp_path, smallest, dtype)
    assert not rig.train_runner.activations.fits([length])
    rig.train_runner.check_samples(length)
    trainer = ShadowTrainer(rig.train_runner, rig.bank, [sample(length)], TrainConfig(warmup_steps=0))
    before = rig.bank.shadow.clone()
    with CountedBytes() as counted:
        result = finish(trainer.step(1, 1))
    assert result.finite and not torch.equal(rig.bank.shadow, before)
    assert counted.most <= smallest * MIB


def test_a_sample_that_needs_more_memory_than_is_set_is_refused_with_what_to_change(tmp_path) -> None:
    rig = rig_for(tmp_path, 1)
    with pytest.raises(
        ConfigError, match=r"a training sample of 8192 tokens needs more than engine\.activation_mib 1: raise"
    ):
        rig.train_runner.check_samples(LONG)


def test_pieces_shrink_with_the_memory_and_with_the_length() -> None:
    def piece(length: int, mib: int = 1024) -> int:
        return replace(OF_1B, budget=mib * MIB).piece(length)

    assert piece(8192) % PIECE_UNIT == 0
    assert 0 < piece(8192) < piece(8192, 2048) and piece(8192) < piece(6000)
    assert piece(8192, 700) == 0, "the inputs of its layers alone fill that"
    assert piece(100) == 100


def test_a_long_sample_needs_the_memory_of_its_backward_too() -> None:
    length = LONG_SAMPLE + 1
    kept = length * OF_1B.entry * OF_1B.layers
    for layers, long in ((1, False), (2, True)):
        assert replace(OF_1B, budget=kept + layers * OF_1B.of_layer([length])).fits([length]) is long
    assert replace(OF_1B, budget=kept + OF_1B.of_layer([length])).fits([LONG_SAMPLE])
