"""The kernels' benchmark and tuner: rivals compute what they should, the walk finds what is cheaper, both run dry."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import peft
from bench_kernels import CASES, FUSED, GOALS, Findings, Goal, verdict
from rivals import BASE, PEFT, PEFT_BACKWARD, backward_ways, forward_ways
from timing import Timing, contest
from tune_gpu import walk

from clif.kernels.dual_lora_host import KernelLauncher
from clif.kernels.dual_lora_reference import SHADOW
from clif.kernels.testing.dual_lora_specification import by_torch, random_batch, random_layer
from clif.kernels.tiles import GradTiles, LinearTiles
from clif.kernels.tuning import Fixed

REPO = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def launcher() -> KernelLauncher:
    return KernelLauncher(CPU, Fixed(LinearTiles(block_m=16, block_n=32, block_k=32, slices=2), GradTiles(32, 16, 2)))


def test_every_rival_computes_the_function_that_it_is_timed_for() -> None:
    layer = random_layer([32, 16, 16], 64, 8, dtype=torch.float32, adapted=[0, 2])
    batch = random_batch(layer, ((9, 0), (4, 1), (3, SHADOW)))
    expected = by_torch(batch).y
    ways = forward_ways([batch, batch], launcher(), compiled=False)
    for name, way in ways.items():
        # Twice: some keep buffers.
        for y in (way(1), way(1)) if name not in (BASE, PEFT) else ():
            assert torch.allclose(y[0] if name == FUSED else y, expected, atol=1e-4), name
    assert len(ways) == 9


def test_peft_s_arithmetic_is_peft_s() -> None:
    merged = random_layer([48], 64, 8, dtype=torch.float32)
    batch = random_batch(merged, ((16, SHADOW),))
    inner = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False))
    inner[0].weight.data = merged.weight
    config = peft.LoraConfig(r=8, lora_alpha=4, target_modules=["0"], lora_dropout=0.0)
    model = peft.get_peft_model(inner, config)
    lora = model.base_model.model[0]
    lora.lora_A["default"].weight.data, lora.lora_B["default"].weight.data = merged.a[SHADOW], merged.b[SHADOW]
    assert torch.allclose(forward_ways([batch], launcher(), False)[PEFT](0), model(batch.x), atol=1e-5)
    x = batch.x.clone().requires_grad_()
    wanted = [x, lora.lora_A["default"].weight, lora.lora_B["default"].weight]
    expected = torch.autograd.grad(model(x), wanted, batch.grad)
    ways = backward_ways([batch], launcher())
    for name in (PEFT_BACKWARD, FUSED):
        for got, want in zip(ways[name](0), expected, strict=True):
            assert torch.allclose(got, want, atol=1e-3, rtol=1e-4), name


def test_a_rival_that_breaks_is_reported_and_stops_nobody() -> None:
    def broken(layer: int) -> None:
        raise RuntimeError("out of luck\nand more")

    found, failed = contest({"good": lambda i: None, "broken": broken}, 2, 3, CPU)
    assert list(found) == ["good"] and failed == {"broken": "RuntimeError: out of luck"}


def test_the_walk_keeps_what_costs_less_and_never_asks_twice() -> None:
    asked: list[LinearTiles] = []

    def cost(tiles: LinearTiles) -> float:
        asked.append(tiles)
        return abs(tiles.block_n - 128) + abs(tiles.slices - 4) + (0 if tiles.warps == 8 else 1)

    moves: dict[str, Any] = {"block_n": (32, 64, 128), "slices": (1, 4, 16), "warps": (4, 8)}
    best = walk(LinearTiles(), moves, cost, lambda: False)
    assert best == replace(LinearTiles(), block_n=128, slices=4, warps=8)
    assert len(asked) == len(set(asked))
    assert walk(LinearTiles(), moves, cost, lambda: True) == LinearTiles()


def test_the_worst_case_counts_and_what_was_not_measured_is_said() -> None:
    goal = Goal("x", ("a", "b"), "ours", "base", 1.1, 1.05)
    findings = Findings({c: {"ours": Timing(0, us, 0), "base": Timing(0, 10, 0)} for c, us in (("a", 10), ("b", 10.8))})
    assert findings.ratio(goal) == pytest.approx(1.08) and verdict(goal, 1.08) == "must"
    least = Goal("x", ("a", "b"), "base", "ours", 1.6, 1.8, at_most=False)
    assert findings.ratio(least) == pytest.approx(1 / 1.08)
    assert [verdict(goal, r) for r in (1.11, 1.1, 1.06, 1.05)] == ["missed", "must", "must", "stretch"]
    assert [verdict(least, r) for r in (1.59, 1.6, 1.79, 1.8)] == ["missed", "must", "must", "stretch"]
    assert verdict(goal, None) == "not measured"
    del findings.timings["b"]
    assert findings.ratio(goal) is None


@functools.cache
def ways_of(backward: bool, slots: tuple[int | None, ...]) -> frozenset[str]:
    """What the benchmark times in a case of this form, found out with one row of each slot."""
    batch = random_batch(random_layer([32], 32, 8, dtype=torch.float32), tuple((1, slot) for slot in slots))
    return frozenset(backward_ways([batch], launcher()) if backward else forward_ways([batch], launcher(), False))


def test_a_whole_run_has_an_answer_to_every_goal() -> None:
    findings = Findings()
    for case in CASES:
        assert case.name not in findings.timings, "a later case of the same name would hide the former"
        ways = ways_of(case.backward, tuple(slot for _, slot in case.lengths))
        findings.timings[case.name] = {way: Timing(0, 10, 0) for way in ways}
    assert {goal.text: findings.ratio(goal) for goal in GOALS} == {goal.text: 1.0 for goal in GOALS}


@pytest.fixture
def not_installed(tmp_path: Path) -> dict[str, str]:
    """An environment as where only torch and Triton are: clif itself is not to be found."""
    hide = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
    (tmp_path / "sitecustomize.py").write_text(hide)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(tmp_path)}
    missing = [sys.executable, "-P", "-c", "import clif"]
    assert subprocess.run(missing, cwd=tmp_path, env=environment, capture_output=True).returncode == 1
    return environment


def run_dry(environment: dict[str, str], *command: str) -> None:
    whole = [sys.executable, *command]
    done = subprocess.run(whole, cwd=REPO, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_the_tuner_runs_dry_from_a_checkout_that_is_not_installed(
    tmp_path: Path, not_installed: dict[str, str]
) -> None:
    table = tmp_path / "table.json"
    run_dry(not_installed, "benchmarks/tune_gpu.py", "--dry", "--seconds", "1", "--out", str(table))
    assert len(json.loads(table.read_text())["linear"]) == 2


@pytest.mark.slow
def test_the_benchmark_runs_dry_from_a_checkout_that_is_not_installed(
    tmp_path: Path, not_installed: dict[str, str]
) -> None:
    run_dry(not_installed, "benchmarks/bench_kernels.py", "--dry", "--out", str(tmp_path))
    (report,) = tmp_path.glob("kernels-dry-*.md")
    text = report.read_text()
    assert "every case is within the specification" in text and "backward 16" in text
    assert list(tmp_path.glob("kernels-dry-*.png"))
