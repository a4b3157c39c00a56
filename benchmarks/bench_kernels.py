"""The kernels on one GPU against cuBLAS, PEFT and the usual four launches: ratios within one run.

    python benchmarks/bench_kernels.py            # needs torch, Triton and this repository; matplotlib for the plot
    python benchmarks/bench_kernels.py --dry      # interpreter on a CPU, tiny shapes: its figures mean nothing

Linear layers with adapters in each form, whole decoder layers, and attention of a decode step. The latter two need
the packages of CLIF, too. Every result is checked first. Run `make tune-gpu` before it: otherwise tiles by rule are
measured.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from checkout import REPO, commit, use_checkout

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
use_checkout()

import torch
import triton
from form_tiles import Machine, captured_tiling, dry_tilings, tilings
from gpu_figures import say
from kernel_cases import CASES, DRY_CASES, AnyCase, Case, LayerCase
from kernel_goals import FORMS, Measured, answers
from kernel_report import draw, report
from linear_line import measure_linear, run_once
from timing import contest, copy_time

from clif.kernels.tuning import Defaults, table_path


def measure(cases: Sequence[AnyCase], machine: Machine, seconds: float) -> Iterator[tuple[str, Measured]]:
    """Cases by name, as far as time allows. A figure is printed as soon as its case is measured."""
    end = time.monotonic() + seconds
    for case in cases:
        start = time.monotonic()
        if start > end:
            print(f"time was up before: {case.name}", flush=True)
            return
        found = _measured(case, machine)
        times = {way: str(timing) for way, timing in found.timings.items()}
        print(f"[{time.monotonic() - start:.1f} s] {case.name}: {times} {found.failed or ''}", flush=True)
        for name, answer in answers({case.name: found}).items():
            say(name, answer.value, answer.note)
        yield case.name, found


def _measured(case: AnyCase, machine: Machine) -> Measured:
    """A case that fails ends no other one."""
    try:
        if isinstance(case, Case):
            return measure_linear(case, machine)
        if isinstance(case, LayerCase):
            from layer_line import measure_layer

            return measure_layer(case, machine)
        from decode_line import measure_paged

        return measure_paged(case, machine)
    except Exception as error:  # noqa: BLE001 - whatever it was, the report says it in the case's place
        traceback.print_exc(file=sys.stdout)
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        return Measured(failed={"the case": reason}, faults=[f"not measured: {reason}"])
    finally:
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()


def limits(device: torch.device) -> str:
    """Copy bandwidth and matrix rate of this GPU, measured now."""
    matrix = torch.randn(8192, 8192, device=device).to(torch.bfloat16)
    found, _ = contest({"product": lambda _: matrix @ matrix}, 1, 20, device)
    copy, product = 1e-3 / copy_time(device, 20).median, 2 * 8192**3 / found["product"].median * 1e6
    return f"copy {copy:.0f} GB/s (read and written), bfloat16 product {product / 1e12:.0f} TFLOP/s"


def clocks() -> str:
    """Current clocks of the GPU."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return f"clocks and driver: {done.stdout.strip() or 'unknown'}"


def machine_here(dry: bool) -> tuple[Machine, str]:
    """The first GPU of this machine or the interpreter, and a line about its tiles."""
    if dry:
        # AUTO is the form fused here. The interpreter takes seconds for a layer in one form.
        forms = {way: form for way, form in FORMS.items() if form in ("three", "separate")}
        return Machine(torch.device("cpu"), dry_tilings(forms), 1), "the same for all shapes"
    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability(device)
    defaults = Defaults(torch.cuda.get_device_properties(device).multi_processor_count, 10 * major + minor)
    file = table_path(torch.cuda.get_device_name(device))
    path = file if file.is_file() else None
    about = f"measured, {file.name}" if path else "by rule, nothing was measured on this type of GPU"
    return Machine(device, tilings(defaults, path), 30, captured=captured_tiling(defaults, path)), about


def compile_case(case: AnyCase) -> None:
    """Run the ways of a case once, for a process that compiles ahead."""
    machine, _ = machine_here("--dry" in sys.argv)
    if isinstance(case, Case):
        run_once(replace(case, compiled=False), machine)
    elif isinstance(case, LayerCase):
        from layer_line import LayerBench

        for way in LayerBench(replace(case, layers=1), machine.device, machine.dtype, machine.tilings).ways().values():
            way(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="interpreter on a CPU, tiny shapes: figures mean nothing")
    parser.add_argument("--seconds", type=float, default=240.0, help="no new case is begun after so long")
    parser.add_argument("--out", type=Path, default=REPO / "benchmarks", help="folder for the dated file")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("no NVIDIA GPU here: use --dry, or a machine that has one")
    machine, tiles = machine_here(args.dry)
    name = "CPU, interpreter: figures mean nothing" if args.dry else torch.cuda.get_device_name(machine.device)
    about = [
        f"command: `{' '.join(['python', 'benchmarks/bench_kernels.py', *sys.argv[1:]])}`",
        f"machine: {name}{'' if args.dry else f'; {limits(machine.device)}; {clocks()}'}",
        f"versions: Python {platform.python_version()}, torch {torch.__version__}, Triton {triton.__version__}",
        f"commit: {commit()}",
        f"tiles: {tiles}",
    ]
    cases = DRY_CASES if args.dry else CASES
    file = args.out / f"kernels{'-dry' if args.dry else ''}-{datetime.date.today().isoformat()}.md"
    findings: dict[str, Measured] = {}
    for case, found in measure(cases, machine, args.seconds):
        findings[case] = found
        # After every case: the machine may be taken away.
        file.write_text(report(findings, cases, about, None))
    file.write_text(report(findings, cases, about, draw(findings, file.with_suffix(".png"))))
    print(file.read_text())
    return any(found.faults for found in findings.values())


if __name__ == "__main__":
    sys.exit(main())
