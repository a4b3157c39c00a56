"""Finds the best tiles of the dual LoRA kernels on this GPU, and writes the table that CLIF reads.

    python benchmarks/tune_gpu.py                 # needs torch, Triton and this repository
    python benchmarks/tune_gpu.py --dry           # interpreter, tiny shapes: a trial

For every shape: a walk from the reasoned default, one setting at a time, keeping each faster one; then the best against
torch's own products. If those win, the table says "separate", and CLIF uses them.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from checkout import commit, use_checkout

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
use_checkout()

import torch
import triton
from timing import contest
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from clif.kernels.dual_lora_host import FusedLinear, KernelLauncher
from clif.kernels.dual_lora_reference import SHADOW
from clif.kernels.testing.dual_lora_specification import Batch, computed, random_batch, random_layer, violations
from clif.kernels.tiles import GradTiles, LinearTiles
from clif.kernels.tuning import Defaults, Fixed, LaunchShape, save_table, table_path

T = TypeVar("T", LinearTiles, GradTiles)
MOVES: dict[str, Sequence[Any]] = {
    "block_n": (16, 32, 64, 128, 256),
    "block_k": (32, 64, 128),
    "block_m": (16, 64, 128),
    "split": (1, 2, 4, 8),
    "slices": (1, 2, 4, 8, 16, 32),
    "shrinkers": (16, 32, 64, 128),
    "stages": (2, 3, 4, 5),
    "warps": (4, 8),
    "programs": (1, 2),
    "form": ("fused", "pair"),
    "tma": (True, False),
    "group_m": (1, 4, 8),
}
GRAD_MOVES: dict[str, Sequence[Any]] = {
    "block_c": (32, 64, 128),
    "slices": (1, 2, 4, 8, 16),
    "block_r": (32, 64, 128),
    "warps": (4, 8),
    "stages": (2, 3, 4),
}
MODELS = {
    # Widths of the merged layers: query+key+value, output, gate+up, down.
    "8b": (((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336)),
    "1b": (((2048, 512, 512), 2048), ((2048,), 2048), ((8192, 8192), 2048), ((2048,), 8192)),
}
GOALS = (((4096,), 4096), ((2048,), 2048), ((1024,), 4096), ((4096, 1024, 1024), 4096))
"""Layers of the goals table: the first to be tuned."""


def walk(start: T, moves: Mapping[str, Sequence[Any]], cost: Callable[[T], float], late: Callable[[], bool]) -> T:
    """Change one setting at a time and keep cheaper ones, until a whole round changes nothing or the time is over."""
    best, lowest, known = start, cost(start), {start}
    while not late():
        before = best
        for name, values in moves.items():
            for value in values:
                candidate = replace(best, **{name: value})
                if candidate in known or late():
                    continue
                known.add(candidate)
                if (found := cost(candidate)) < lowest:
                    best, lowest = candidate, found
        if best == before:
            return best
    return best


class Tuner:
    """Times tiles of one layer shape on one device."""

    def __init__(self, device: torch.device, defaults: Defaults, repeats: int, weights_bytes: int) -> None:
        self.device, self.defaults, self.repeats, self.bytes = device, defaults, repeats, weights_bytes

    @classmethod
    def here(cls, dry: bool) -> Tuner:
        """For the first GPU of this machine, or for the interpreter."""
        if dry:
            return cls(torch.device("cpu"), Defaults(4, 80), 1, 1)
        device = torch.device("cuda")
        major, minor = torch.cuda.get_device_capability(device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        return cls(device, Defaults(processors, 10 * major + minor), 5, 256 << 20)

    def batches(
        self, sizes: Sequence[int], depth: int, r: int, lengths: Sequence[tuple[int, int | None]]
    ) -> list[Batch]:
        """Layers of one shape, with more weights than the cache holds."""
        dtype = torch.bfloat16
        count = max(2, min(16, -(-self.bytes // (2 * depth * sum(sizes)))))
        return [
            random_batch(random_layer(sizes, depth, r, dtype=dtype, device=str(self.device), seed=i), lengths)
            for i in range(count)
        ]

    def linear(
        self, batches: Sequence[Batch], backward: bool, late: Callable[[], bool]
    ) -> tuple[LinearTiles, LinearTiles, dict[str, float]]:
        """The choice (the form "separate" where torch's products win), the best of the kernel's own, microseconds."""
        p = batches[0].merged
        out, depth = p.weight.shape[::-1] if backward else p.weight.shape
        rows = len(batches[0].x)
        start = self.defaults.linear(rows, depth, out, p.r, backward)

        def cost(tiles: LinearTiles) -> float:
            return self._time(self._way(batches, tiles, backward), len(batches))

        best = walk(start, self._allowed(), cost, late)
        ways = {
            "kernel": self._way(batches, best, backward),
            "separate": self._way(batches, LinearTiles(form="separate"), backward),
        }
        found, failed = contest(ways, len(batches), 3 * self.repeats, self.device)
        us = {name: timing.median for name, timing in found.items()}
        if failed:
            print(f"  failed: {failed}", flush=True)
        launcher = KernelLauncher(self.device, Fixed(best, self._grads_of(batches)))
        wrong = violations(batches[0], computed(batches[0], FusedLinear(p, launcher)))
        if wrong:
            # Wrong results never enter the table, whatever their speed.
            print(f"  WRONG RESULTS with {best}: {wrong}", flush=True)
        good = not wrong and us.get("kernel", float("inf")) <= us["separate"]
        return (best if good else LinearTiles(form="separate")), best, us

    def _grads_of(self, batches: Sequence[Batch]) -> GradTiles:
        p = batches[0].merged
        return self.defaults.grads(len(batches[0].x), p.weight.shape[1], p.weight.shape[0], p.r)

    def grads(self, batches: Sequence[Batch], late: Callable[[], bool]) -> tuple[GradTiles, dict[str, float]]:
        """The best tiles of the factors' gradients, microseconds."""
        p = batches[0].merged
        hidden = [torch.randn(len(b.x), p.a.shape[1], device=self.device).to(p.weight.dtype) for b in batches]

        def cost(tiles: GradTiles) -> float:
            launcher = KernelLauncher(self.device, Fixed(LinearTiles(), tiles))
            layers = [FusedLinear(b.merged, launcher) for b in batches]
            return self._time(
                lambda i: layers[i].factor_gradients(batches[i].grad, batches[i].x, hidden[i], hidden[i]), len(batches)
            )

        best = walk(self._grads_of(batches), GRAD_MOVES, cost, late)
        return best, {"kernel": cost(best)}

    def _way(self, batches: Sequence[Batch], tiles: LinearTiles, backward: bool) -> Callable[[int], Any]:
        launcher = KernelLauncher(self.device, Fixed(tiles, GradTiles()))
        layers = [FusedLinear(b.merged, launcher) for b in batches]
        if backward:
            return lambda i: layers[i].through(batches[i].grad, True)
        return lambda i: layers[i].forward(batches[i].x, batches[i].segments)

    def _time(self, way: Callable[[int], Any], layers: int) -> float:
        try:
            way(0)
        except (OutOfResources, CompilationError, PTXASError):
            # The tile is too large for this GPU: the walk has reached a limit.
            return float("inf")
        found, failed = contest({"way": way}, layers, self.repeats, self.device)
        return found["way"].median if not failed else float("inf")

    def _allowed(self) -> dict[str, Sequence[Any]]:
        """The settings that this GPU supports."""
        if self.defaults.capability >= 90:
            return MOVES
        return MOVES | {"form": ("fused",), "tma": (False,)}


def shapes(dry: bool) -> Iterator[tuple[tuple[int, ...], int, int, tuple[tuple[int, int | None], ...]]]:
    """(outputs of the members, depth, rank, rows of each slot), the most important first."""
    if dry:
        yield (32, 16), 32, 8, ((5, 0), (4, SHADOW))
        return
    layers = list(dict.fromkeys([*GOALS, *MODELS["8b"], *MODELS["1b"]]))
    for r in (16, 64):
        for lengths in (
            ((48, 0), (16, 1)),
            ((64, 0), (1984, SHADOW)),
            ((64, 0), (2048, SHADOW)),
            ((12, 0), (4, 1)),
            ((192, 0), (64, 1)),
        ):
            for sizes, depth in layers:
                yield sizes, depth, r, lengths


def tune(
    tuner: Tuner, dry: bool, seconds: float
) -> tuple[dict[LaunchShape, Any], dict[LaunchShape, Any], dict[LaunchShape, LinearTiles]]:
    """Choices for linear launches, for gradients, and the kernel's best for the linear ones, as far as time allows."""
    linear: dict[LaunchShape, Any] = {}
    grads: dict[LaunchShape, Any] = {}
    kernel: dict[LaunchShape, LinearTiles] = {}
    end = time.monotonic() + seconds
    for sizes, depth, r, lengths in shapes(dry):
        if time.monotonic() > end:
            print(f"time is up: {sizes} x {depth}, r={r}, and what comes after it was not measured", flush=True)
            break
        began = time.monotonic()

        def late(began: float = began) -> bool:
            return time.monotonic() > min(end, began + seconds / 12)

        batches = tuner.batches(sizes, depth, r, lengths)
        rows, out = len(batches[0].x), sum(sizes)
        forward = LaunchShape(rows, depth, out, r, False)
        choice, kernel[forward], us = tuner.linear(batches, False, late)
        linear[forward] = choice, us
        print(f"{rows} rows {depth}->{out} r={r}: {choice.form} {us}", flush=True)
        learns = len(batches[0].grad)
        back = LaunchShape(learns, out, depth, r, True)
        if learns and back not in linear:
            learning = [random_batch(b.merged, ((learns, SHADOW),)) for b in batches]
            choice, kernel[back], us = tuner.linear(learning, True, late)
            linear[back] = choice, us
            print(f"{learns} rows {out}->{depth} r={r} backward: {choice.form} {us}", flush=True)
            of_factors = LaunchShape(learns, depth, out, r, True)
            grads[of_factors] = tuner.grads(learning, late)
    return linear, grads, kernel


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="interpreter on a CPU, tiny shapes: figures mean nothing")
    parser.add_argument(
        "--seconds", type=float, default=200.0, help="time for the walks; what is left out stays unmeasured"
    )
    parser.add_argument("--out", type=Path, help="file to write; by default the one that CLIF reads")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("no NVIDIA GPU here: use --dry, or a machine that has one")
    tuner = Tuner.here(args.dry)
    name = "dry" if args.dry else torch.cuda.get_device_name(tuner.device)
    linear, grads, kernel = tune(tuner, args.dry, args.seconds)
    about = {
        "device": name,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/tune_gpu.py", *sys.argv[1:]]),
        "versions": f"torch {torch.__version__}, Triton {triton.__version__}",
        "commit": commit(),
    }
    path = args.out or table_path(name)
    save_table(path, about, linear, grads, kernel)
    print(f"{len(linear) + len(grads)} entries in {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
