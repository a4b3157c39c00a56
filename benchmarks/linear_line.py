"""One linear layer with adapters, forward or backward: the forms of CLIF, what CLIF takes, and the rivals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from form_tiles import Machine
from kernel_cases import Case
from kernel_goals import AUTO, BASE, FORMS, TRITON_BASE, Measured, Spread
from rivals import PEFT, backward_ways, forward_ways, triton_base
from timing import Way, contest

from clif.kernels.dual_lora_forms import DualLoraLinear
from clif.kernels.dual_lora_host import KernelLauncher, Tiling
from clif.kernels.dual_lora_reference import SHADOW
from clif.kernels.testing.dual_lora_specification import (
    Batch,
    by_torch,
    computed,
    random_batch,
    random_layer,
    violations,
)
from clif.kernels.tuning import Defaults

LAYERS_BYTES = 256 << 20
"""Weights of all layers: more than a cache holds."""
NEAR = 0.02
"""Relative error of a rival that is rounding, in bfloat16."""


def measure_linear(case: Case, machine: Machine) -> Measured:
    """All ways of the case. CLIF's are checked against the specification first."""
    batches = case_batches(case, machine, _layers(case, machine))
    launchers = _launchers(case, machine)
    ways = ways_of(case, machine, batches, launchers)
    faults = [fault for name, launcher in launchers.items() for fault in _faults(name, batches[0], launcher)]
    wrong = {} if case.backward else wrong_rivals(batches[0], ways)
    ways = {name: way for name, way in ways.items() if name not in wrong}
    timings, failed = contest(ways, len(batches), machine.repeats, machine.device)
    measured = Measured(timings, failed | wrong, faults, why(case, machine), taken(case, machine))
    if machine.device.type == "cuda":
        for name in (AUTO, *(FORMS if case.counted else ())):
            if name in timings:
                names = launches(ways[name])
                measured.launches[name] = len(names)
                measured.notes.append(f"{name}: {len(names)} launches ({', '.join(sorted(set(names)))})")
        if AUTO in timings:
            measured.notes.append(rates(case, batches[0], timings[AUTO]))
    return measured


def run_once(case: Case, machine: Machine) -> None:
    """Each way of the case on one layer: what compiles meanwhile is then there for measure_linear()."""
    batches = case_batches(case, machine, 1)
    for way in ways_of(case, machine, batches, _launchers(case, machine)).values():
        way(0)


def case_batches(case: Case, machine: Machine, count: int) -> list[Batch]:
    """Layers of the case, each with weights of its own."""
    shape: dict[str, Any] = {"dtype": machine.dtype, "device": str(machine.device)}
    layers = [random_layer(case.sizes, case.depth, case.r, seed=i, **shape) for i in range(count)]
    return [random_batch(layer, case.lengths) for layer in layers]


def _layers(case: Case, machine: Machine) -> int:
    if machine.device.type != "cuda":
        return 1
    return max(2, min(16, -(-LAYERS_BYTES // (2 * case.depth * sum(case.sizes)))))


def _launchers(case: Case, machine: Machine) -> dict[str, KernelLauncher]:
    """By way of CLIF. Rows of which none has an adapter are computed by one dispatch for all forms."""
    forced = any(slot is not None for _, slot in case.lengths)
    ways = {name: tiling for name, tiling in machine.tilings.items() if forced and name != AUTO}
    if AUTO in machine.tilings:
        ways = {AUTO: _auto(case, machine), **ways}
    return {name: KernelLauncher(machine.device, tiling) for name, tiling in ways.items()}


def _auto(case: Case, machine: Machine) -> Tiling:
    """Rows that only serve are those of a captured step."""
    serves = all(slot != SHADOW for _, slot in case.lengths)
    return machine.captured if serves and machine.captured is not None else machine.tilings[AUTO]


def ways_of(
    case: Case, machine: Machine, batches: Sequence[Batch], launchers: Mapping[str, KernelLauncher]
) -> dict[str, Way]:
    if case.backward:
        return backward_ways(batches, launchers)
    ways = forward_ways(batches, launchers, case.compiled)
    fused = f"{AUTO}, fused"
    if not batches[0].segments and fused in machine.tilings:
        ways[TRITON_BASE] = triton_base(batches, KernelLauncher(machine.device, machine.tilings[fused]))
    return ways


def _faults(name: str, batch: Batch, launcher: KernelLauncher) -> Iterator[str]:
    try:
        found = violations(batch, computed(batch, DualLoraLinear(batch.merged, launcher)))
    except Exception as error:  # noqa: BLE001 - whatever it was, it is a fault of this way alone
        found = [f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"]
    return (f"{name}: {fault}" for fault in found)


def wrong_rivals(batch: Batch, ways: Mapping[str, Way]) -> dict[str, str]:
    """Rivals that compute another function here: their times would mean nothing."""
    exact, wrong = by_torch(batch, torch.float64).y, {}
    for name, way in ways.items():
        # PEFT's own layer has one adapter for all rows.
        if name.startswith(AUTO) or name in (BASE, TRITON_BASE, PEFT):
            continue
        try:
            error = float((way(0).double() - exact).norm() / exact.norm())
        except Exception:  # noqa: BLE001 - contest() says why
            continue
        if not error < NEAR:
            wrong[name] = f"a wrong result: relative error {error:.2g}"
    return wrong


def taken(case: Case, machine: Machine) -> str:
    """The form that AUTO is."""
    rows, sizes, auto = sum(count for count, _ in case.lengths), (case.depth, sum(case.sizes)), _auto(case, machine)
    if all(slot is None for _, slot in case.lengths):
        return "F.linear"
    depth, out = sizes[::-1] if case.backward else sizes
    return auto.linear(rows, depth, out, case.r, case.backward).form


def why(case: Case, machine: Machine) -> list[str]:
    """Why AUTO is this form, where a rule says so."""
    auto, rows = _auto(case, machine), sum(count for count, _ in case.lengths)
    if not isinstance(auto, Defaults) or all(slot is None for _, slot in case.lengths):
        return []
    form, reason = auto.form(rows, case.r, case.backward)
    return [f"{AUTO} takes {form} by rule: {reason}"]


def launches(way: Callable[[int], Any]) -> list[str]:
    """The kernels of one call."""
    from torch.profiler import ProfilerActivity, profile

    way(0)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        way(0)
        torch.cuda.synchronize()
    return [e.name for e in record.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def rates(case: Case, batch: Batch, timing: Spread) -> str:
    """The least bytes to move and the operations of the base product, per second."""
    p, rows = batch.merged, len(batch.x)
    out, depth = p.weight.shape
    used = {s.slot for s in batch.segments}
    factors = sum(p.a[s].nbytes + p.b[s].nbytes for s in used)
    moved = p.weight.nbytes + factors + (2 if case.backward else 1) * rows * (out + depth) * 2
    seconds = timing.median * 1e-6
    return f"{AUTO}: {moved / seconds / 1e9:.0f} GB/s, {2 * rows * out * depth / seconds / 1e12:.0f} TFLOP/s"
