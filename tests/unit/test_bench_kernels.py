"""The kernels' benchmark and tuner: every way computes what it is timed for, figures follow from times, dry runs."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import bench_kernels
import peft
from bench_kernels import measure
from decode_line import measure_paged
from form_tiles import Machine, dry_tilings, tilings
from kernel_cases import CASES, Case, LayerCase, PagedCase
from kernel_count import counted_kernels
from kernel_goals import (
    AUTO,
    BASE,
    CLIF,
    FORMS,
    FOUR,
    QUESTIONS,
    WITHOUT,
    Answer,
    Measured,
    Ratio,
    answers,
    goals,
    verdict,
)
from kernel_report import report
from layer_line import LayerBench
from linear_line import taken, ways_of, why, wrong_rivals
from rivals import AUGMENTED, PEFT, PEFT_BACKWARD, backward_ways, forward_ways, triton_base
from timing import Timing, contest

from clif.kernels.dual_lora_host import KernelLauncher
from clif.kernels.dual_lora_reference import SHADOW
from clif.kernels.testing.dual_lora_specification import by_torch, random_batch, random_layer
from clif.kernels.tuning import Defaults
from clif.models.triton_ops import TritonOps

REPO = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
FIXED = dry_tilings()


def launchers(*ways: str) -> dict[str, KernelLauncher]:
    return {way: KernelLauncher(CPU, FIXED[way]) for way in ways or FIXED}


def test_every_way_computes_the_function_that_it_is_timed_for() -> None:
    layer = random_layer([16, 16, 16], 64, 8, dtype=torch.float32, adapted=[0, 2])
    batch = random_batch(layer, ((9, 0), (4, 1), (3, SHADOW)))
    expected = by_torch(batch).y
    ways = forward_ways([batch, batch], launchers(*FORMS))
    for name, way in ways.items():
        if name not in (BASE, PEFT):
            y = way(1)
            assert torch.allclose(y[0] if name in FORMS else y, expected, atol=1e-4), name
    # Again: it keeps a buffer.
    assert torch.allclose(ways[AUGMENTED](1), expected, atol=1e-4)
    assert len(ways) == 8 + len(FORMS) and set(FORMS) < set(ways)


def test_a_rival_that_computes_another_function_is_not_timed() -> None:
    batch = random_batch(random_layer([16], 16, 8, dtype=torch.float32), ((4, 0), (2, 1)))
    fine, wrong = by_torch(batch).y, batch.x @ batch.merged.weight.T
    ways = {AUTO: lambda i: (wrong, None), BASE: lambda i: wrong, "fine": lambda i: fine, "wrong": lambda i: wrong}
    (reason,) = wrong_rivals(batch, ways).items()
    assert reason[0] == "wrong" and reason[1].startswith("a wrong result: relative error ")


def test_the_base_product_of_the_kernel_is_that_of_no_adapter() -> None:
    batch = random_batch(random_layer([48], 64, 8, dtype=torch.float32), ((9, None),))
    y, _ = triton_base([batch], launchers(f"{AUTO}, fused")[f"{AUTO}, fused"])(0)
    assert torch.allclose(y, batch.x @ batch.merged.weight.T, atol=1e-4)


def test_peft_s_arithmetic_is_peft_s_and_every_form_has_its_gradients() -> None:
    merged = random_layer([48], 64, 8, dtype=torch.float32)
    batch = random_batch(merged, ((16, SHADOW),))
    inner = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False))
    inner[0].weight.data = merged.weight
    config = peft.LoraConfig(r=8, lora_alpha=4, target_modules=["0"], lora_dropout=0.0)
    model = peft.get_peft_model(inner, config)
    lora = model.base_model.model[0]
    lora.lora_A["default"].weight.data, lora.lora_B["default"].weight.data = merged.a[SHADOW], merged.b[SHADOW]
    assert torch.allclose(forward_ways([batch], {})[PEFT](0), model(batch.x), atol=1e-5)
    x = batch.x.clone().requires_grad_()
    wanted = [x, lora.lora_A["default"].weight, lora.lora_B["default"].weight]
    expected = torch.autograd.grad(model(x), wanted, batch.grad)
    ways = backward_ways([batch], launchers(*FORMS))
    for name in (PEFT_BACKWARD, *FORMS):
        for got, want in zip(ways[name](0), expected, strict=True):
            assert torch.allclose(got, want, atol=1e-3, rtol=1e-4), name


LAYER = LayerCase("layer", "tiny-llama", ((2, 0), (1, 1)), context=20, r=8, layers=1)


@functools.cache
def layer_bench() -> LayerBench:
    """With the parts between the products that a GPU has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clif.engine.base.choose_ops", lambda device, dtype, max_context, *rest: TritonOps(max_context))
        return LayerBench(LAYER, CPU, torch.float32, FIXED)


BETWEEN = {"add_rms_norm": 2, "rotate_heads": 1, "paged_decode": 1, "swiglu": 1}
PRODUCTS = {
    WITHOUT: {"mm": 4},
    AUTO: {"dual_lora_linear": 4},
    FOUR: {"mm": 4, "zeros": 4, "shrink": 4, "expand": 4},
}


def test_a_whole_layer_is_right_in_each_way_and_differs_in_the_launches_of_its_products_alone() -> None:
    bench, found = layer_bench(), {}
    for name, products in PRODUCTS.items():
        way = bench.ways()[name]
        with counted_kernels() as names:
            found[name] = way(0)
        counts = Counter(names)
        if name != FOUR:
            # Workspaces are filled with zeros, once.
            del counts["zeros"]
        assert counts == BETWEEN | products
    assert bench.faults({name: lambda layer, result=result: result for name, result in found.items()}) == []
    (fault,) = bench.faults({AUTO: lambda layer: found[WITHOUT]})
    assert fault.startswith(f"{AUTO}: relative error ") and "adapters" not in fault
    assert bench.taken() == "qkv fused, out fused, gate_up fused, down fused"


def test_a_layer_has_the_forms_that_can_have_their_adapters_as_data() -> None:
    assert set(layer_bench().ways()) & set(FORMS) == set(FORMS) - {f"{AUTO}, separate"}


def test_a_form_is_measured_with_its_own_candidate_where_the_tiling_takes_another_form() -> None:
    used = tilings(Defaults(132, 90), None)
    shape = (64, 4096, 4096, 16, False)
    found = {way: tiling.linear(*shape) for way, tiling in used.items()}
    assert [found[way].form for way in FORMS] == list(FORMS.values())
    taken = found[AUTO]
    assert taken == found[f"{AUTO}, {taken.form}"]


def test_a_rival_that_breaks_is_reported_and_stops_nobody() -> None:
    def broken(layer: int) -> None:
        raise RuntimeError("out of luck\nand more")

    found, failed = contest({"good": lambda i: None, "broken": broken}, 2, 3, CPU)
    assert list(found) == ["good"] and failed == {"broken": "RuntimeError: out of luck"}


def test_a_figure_is_the_best_way_over_the_best_other_and_says_what_is_taken_unforced() -> None:
    found = Measured({BASE: Timing(0, 10, 0), AUTO: Timing(0, 12.5, 0)}, taken="pair")
    found.timings |= {f"{AUTO}, fused": Timing(0, 12, 0), f"{AUTO}, pair": Timing(0, 12.4, 0)}
    answer = Ratio("case", CLIF, (BASE,)).answer(found)
    assert answer == Answer(1.2, "CLIF, fused 12 us / F.linear alone 10 us; auto takes pair: 1.25")
    against = Ratio("case", (FOUR,), CLIF).answer(replace(found, timings={**found.timings, FOUR: Timing(0, 18, 0)}))
    assert against == Answer(1.5, "four launches 18 us / CLIF, fused 12 us; auto takes pair: 1.44")


def test_a_way_that_failed_is_no_figure() -> None:
    assert Ratio("case", CLIF, (BASE,)).answer(Measured({BASE: Timing(0, 10, 0)})) is None
    assert Ratio("case", (AUTO,), (BASE,)).answer(Measured({AUTO: Timing(0, 10, 0)})) is None


def test_a_dispatch_that_is_the_base_itself_is_not_missed_by_noise() -> None:
    found = Measured({BASE: Timing(0, 10, 0), AUTO: Timing(0, 10.04, 0)})
    bounds = {goal.name: goal for _, _, goal in goals()}
    assert verdict(bounds["bare-64"], QUESTIONS["bare-64"].answer(found)) == "must"


def test_the_verdict_says_which_bound_is_met() -> None:
    bounds = {goal.name: goal for _, _, goal in goals()}
    most, least = bounds["linear-64"], bounds["four-launches"]
    assert [verdict(most, Answer(r)) for r in (1.21, 1.2, 1.11, 1.1)] == ["missed", "must", "must", "stretch"]
    assert [verdict(least, Answer(r)) for r in (1.29, 1.3, 1.59, 1.6)] == ["missed", "must", "must", "stretch"]
    assert verdict(most, None) == "not measured"


def test_a_case_says_which_form_is_taken_and_why_where_a_rule_takes_it() -> None:
    case, defaults = CASES[0], Defaults(132, 90)
    assert isinstance(case, Case)
    machine = Machine(CPU, {AUTO: defaults}, 1, captured=replace(defaults, captured=True))
    form, reason = defaults.form(64, 16, False)
    assert taken(case, machine) == form and why(case, machine) == [f"{AUTO} takes {form} by rule: {reason}"]
    bare = next(case for case in CASES if case.name == "64 bare")
    assert taken(bare, machine) == "F.linear" and why(bare, machine) == []


@functools.cache
def names_of(backward: bool, slots: tuple[int | None, ...]) -> frozenset[str]:
    """What the benchmark times in a case of this form, found out with one row of each slot."""
    case = Case("", (32,), 32, 8, tuple((1, slot) for slot in slots), backward)
    batch = random_batch(random_layer(case.sizes, 32, 8, dtype=torch.float32), case.lengths)
    return frozenset(ways_of(case, Machine(CPU, FIXED, 1), [batch], launchers()))


@functools.cache
def names_of_paged() -> frozenset[str]:
    return frozenset(measure_paged(PagedCase("", 2, 3, 2, 1, 16), Machine(CPU, {}, 1)).timings)


def test_a_whole_run_has_an_answer_to_every_goal() -> None:
    findings: dict[str, Measured] = {}
    for case in CASES:
        assert case.name not in findings, "a later case of the same name would hide the former"
        if isinstance(case, Case):
            ways = names_of(case.backward, tuple(slot for _, slot in case.lengths))
        elif isinstance(case, LayerCase):
            ways = frozenset(layer_bench().ways())
        else:
            ways = names_of_paged()
        counts = dict.fromkeys(FORMS, 3) if isinstance(case, Case) and case.counted else {}
        findings[case.name] = Measured({way: Timing(0, 10, 0) for way in ways}, taken="fused", launches=counts)
    found = answers(findings)
    assert set(found) == set(QUESTIONS) == {goal.name for _, _, goal in goals()}
    assert {name for name, answer in found.items() if answer.value != 1} == {"launches-fused", "launches-three"}


def test_figures_are_said_case_by_case_and_what_is_left_out_or_fails_is_in_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = CASES[:3]

    def measured(case: Case, machine: Machine) -> Measured:
        if case is second:
            raise RuntimeError("out of memory\nand more")
        return Measured({BASE: Timing(0, 10, 0), f"{AUTO}, fused": Timing(0, 12, 0)})

    clock = iter([0.0, *[1.0] * 4, 61.0])
    monkeypatch.setattr(bench_kernels, "measure_linear", measured)
    monkeypatch.setattr(bench_kernels, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    findings = dict(measure([first, second, third], Machine(CPU, {}, 1), seconds=60))
    out = capsys.readouterr().out
    assert "FIGURE linear-64 1.2 CLIF, fused 12 us / F.linear alone 10 us; auto was not measured" in out
    text = report(findings, [first, second, third], ["about"], None)
    assert "* 64+2048, r=16: the case failed: RuntimeError: out of memory" in text
    assert f"* not measured, time was up: {third.name}" in text
    assert "| <= 1.2 | <= 1.1 | 1.2 | must |" in text


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
    run_dry(not_installed, "benchmarks/tune_gpu.py", "--dry", "--out", str(table))
    found = json.loads(table.read_text())
    assert all(set(entry["us"]) >= {"fused", "three", "separate"} for entry in found["linear"])
    assert len(found["linear"]) == 2 and len(found["grads"]) == 1


@pytest.mark.slow
def test_the_benchmark_runs_dry_from_a_checkout_that_is_not_installed(
    tmp_path: Path, not_installed: dict[str, str]
) -> None:
    run_dry(not_installed, "benchmarks/bench_kernels.py", "--dry", "--out", str(tmp_path))
    (report,) = tmp_path.glob("kernels-dry-*.md")
    text = report.read_text()
    assert "every case is within its specification" in text and "backward 16" in text and "| layer |" in text
    assert list(tmp_path.glob("kernels-dry-*.png"))
