"""Serving steps by the C++ kernels: the answers of torch's operators, whatever is beside them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Rig, answer, make_rig, request

from clif.config import EngineConfig
from clif.engine.compiled_layers import CompiledLayers
from clif.engine.scheduler import Chunk, Sequence
from clif.kernels.cpu import library
from clif.models import backends
from clif.models.base_weight import PackedQuantisedWeight, PackedWeight
from clif.models.layer_ops import TorchOps

PROMPTS = [[5, 9, 13], [*range(3, 40)], [7], [11, 4, 60, 2, 90]]
SLOTS = [None, 0, 1, 1]
ROUNDED = 0.05
"""Relative difference of logits that is rounding in bfloat16: torch's own differ by as much from those in float32."""


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest) -> None:
    if "without" in request.node.name:
        return
    try:
        library.level()
    except library.Absent as error:
        pytest.skip(f"the C++ kernels cannot run here: {error}")


def rig_of(model: Path | str, dtype: str = "bfloat16", weights: str = "auto", **engine: Any) -> Rig:
    """Versions 1 and 2 lie in slots 0 and 1."""
    path = f"random:{model}" if isinstance(model, Path) else model
    kinds = {"dtype": dtype, "weight_dtype": weights}
    rig = make_rig(path, model=kinds, engine={"max_batch": 8, "max_prefill_tokens": 64, **engine})
    rig.fill(1, seed=1)
    rig.fill(2, seed=2)
    return rig


def logits_of(rig: Rig) -> torch.Tensor:
    """Of a step with all prompts, each by the adapter of its slot."""
    block, chunks, free = rig.engine.config.block_size, [], 0
    for i, (prompt, slot) in enumerate(zip(PROMPTS, SLOTS, strict=True)):
        sequence = Sequence(request(i, prompt), 0.0, [*prompt])
        needed = -(-len(prompt) // block)
        sequence.blocks, sequence.slot, free = [*range(free, free + needed)], slot, free + needed
        chunks.append(Chunk(sequence, 0, len(prompt), True))
    runner = rig.engine.runner
    return runner.compute(runner.fill(chunks))[0].float()


def answers(rig: Rig, prompts: list[list[int]], arrive: dict[int, int] | None = None) -> list[list[int]]:
    events = rig.run([request(i, prompt, max_tokens=12) for i, prompt in enumerate(prompts)], arrive=arrive)
    return [answer(events[i]) for i in range(len(prompts))]


@pytest.mark.parametrize(
    ("dtype", "weights"), [("bfloat16", "auto"), ("float32", "auto"), ("bfloat16", "int8"), ("bfloat16", "int4")]
)
def test_a_step_has_the_logits_of_torchs_operators(tiny_config: Path, dtype: str, weights: str) -> None:
    got, wanted = (logits_of(rig_of(tiny_config, dtype, weights, cpu_kernels=kind)) for kind in ("auto", "off"))
    near = ROUNDED if dtype == "bfloat16" else 1e-5
    for row, expected in zip(got, wanted, strict=True):
        assert (row - expected).norm() < near * expected.norm()
    assert not torch.equal(got, wanted), "the kernels were not used"


def test_answers_in_float32_are_those_of_torchs_operators(stories: str) -> None:
    kernels, torchs = (rig_of(stories, "float32", cpu_kernels=kind) for kind in ("auto", "off"))
    assert answers(kernels, PROMPTS, {2: 3}) == answers(torchs, PROMPTS, {2: 3})


@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
def test_an_answer_does_not_depend_on_the_requests_beside_it(stories: str, weights: str) -> None:
    together = answers(rig_of(stories, weights=weights), PROMPTS, {1: 2, 3: 5})
    alone = rig_of(stories, weights=weights, prefix_reuse=False)
    for prompt, found in zip(PROMPTS, together, strict=True):
        assert answers(alone, [prompt]) == [found]


def test_an_adapter_that_is_promoted_later_answers_as_by_torchs_operators(tiny_config: Path) -> None:
    found = []
    for kind in ("auto", "off"):
        rig = rig_of(tiny_config, cpu_kernels=kind)
        logits_of(rig)
        rig.engine.runner.bank.fill_slot(1, rig.bank.state(rig.bank.shadow.data * 3 + 0.01))
        found.append(logits_of(rig))
    assert (found[0] - found[1]).norm() < ROUNDED * found[1].norm()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_quantised_weight_is_computed_with_in_the_same_call(tiny_config: Path, weights: str) -> None:
    runner = rig_of(tiny_config, weights=weights).engine.runner
    parts = [*runner.stack.linears, runner.stack.head]
    assert all(isinstance(part.base, PackedQuantisedWeight) for part in parts)
    assert CompiledLayers.obstacle(runner.stack, runner.cache) is None


def test_off_is_torchs_operators_and_no_weight_is_packed(tiny_config: Path) -> None:
    stack = rig_of(tiny_config, cpu_kernels="off").engine.runner.stack
    assert not any(isinstance(linear.base, PackedWeight) for linear in stack.linears)
    assert isinstance(backends.choose_ops(stack.device, torch.bfloat16, 64), TorchOps)


@pytest.mark.parametrize("reason", ["they were not built", "no AVX512"])
def test_without_the_kernels_torch_serves_and_the_log_says_why(
    reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def absent() -> int:
        raise library.Absent(reason)

    monkeypatch.setattr(backends, "level", absent)
    with caplog.at_level(logging.INFO, "clif.models.backends"):
        assert backends.choose_cpu_kernels(EngineConfig(), torch.device("cpu"), torch.bfloat16, 64) is None
    assert reason in caplog.text


def test_kernels_that_compute_something_else_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clif.kernels.cpu.host.gated", lambda wide, _: wide.chunk(2, -1)[0].contiguous())
    assert backends.choose_cpu_kernels(EngineConfig(), torch.device("cpu"), torch.float32, 64) is None
