"""What the engine answered before its steps were cut in four, token for token: greedy and drawn, ends, versions.

The greedy answers in recorded_answers.json were written by that engine, those that are drawn by the first one whose
random numbers depend on seed and position alone; RECORD=1 writes them anew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import answer, make_rig, request
from scenarios import DRAWN, PROMPTS, RECORDED, SCENARIOS, outcome, recorded
from torch.utils._python_dispatch import TorchDispatchMode

from clif.engine.scheduler import Chunk
from clif.types import TokenLogprob

MODELS = ("random", "stories")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tiny_config: Path) -> tuple[str, str]:
    """Name and path: one that is always there, and a real one, which ends answers by itself."""
    path = f"random:{tiny_config}" if request.param == "random" else request.getfixturevalue("stories")
    return request.param, path


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", SCENARIOS)
def test_answers_are_those_of_the_engine_before(model: tuple[str, str], name: str, overlap: bool) -> None:
    got = outcome(SCENARIOS[name].run(model[1], overlap=overlap))
    if os.environ.get("RECORD") and not overlap:
        known = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
        known.setdefault(model[0], {})[name] = got
        RECORDED.write_text(json.dumps(known, separators=(",", ":")) + "\n")
    assert got == recorded(model[0], name, overlap)


class Counted:
    """Stands in for a runner by the two names that the engine uses: each answer counts up from its last token."""

    captured, late = None, False

    def fill(self, chunks: list[Chunk], fused: bool) -> Counted:
        self.tokens = [10 + chunk.stop for chunk in chunks if chunk.needs_sampling]
        return self

    def forward(self, batch: Counted, fused: object = None) -> Counted:
        return batch

    def read(self) -> list[int]:
        return self.tokens

    def logprobs(self) -> dict[int, TokenLogprob]:
        return {}


def test_an_engine_needs_of_its_runner_fill_and_forward_and_nothing_else(tiny_config: Path) -> None:
    rig = make_rig(f"random:{tiny_config}")
    rig.engine.runner = Counted()  # type: ignore[assignment]
    events = rig.run([request(i, [1] * (3 + i), max_tokens=4) for i in range(2)])
    assert {i: answer(got) for i, got in events.items()} == {0: [13, 14, 15, 16], 1: [14, 15, 16, 17]}


class NoWait(TorchDispatchMode):
    """Refuses what makes the host wait for a device: a number read from a tensor, or a size that depends on numbers."""

    WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = func.overloadpacket in self.WAITS
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            waits = any(index is not None and index.dtype is torch.bool for index in args[1])
        assert not waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_neither_fill_nor_forward_waits_for_the_device(tiny_config: Path) -> None:
    """Greedy and drawn tokens, prompts and answers, ids that only the device knows, biases and log-probabilities."""
    rig = make_rig(f"random:{tiny_config}", engine={"overlap": True})
    for i, prompt in enumerate(PROMPTS):
        drawn: dict[str, Any] = {**DRAWN, "seed": i, "min_p": 0.01} if i % 2 else {}
        drawn |= {"logprobs": i} if i > 3 else {"logit_bias": ((i, 2.0),)} if i > 1 else {}
        rig.engine.scheduler.add(request(i, prompt, max_tokens=9, ignore_eos=True, **drawn), 0.0)
    under_way = None
    while rig.engine.scheduler.running or rig.engine.scheduler.waiting:
        chunks = rig.engine.scheduler.schedule()
        with NoWait():
            launched = rig.runner.forward(rig.runner.fill(chunks)) if chunks else None
        if under_way is not None:
            rig.engine.scheduler.settle(under_way[0], under_way[1].read(), 0.0)
        under_way = launched and (chunks, launched)
