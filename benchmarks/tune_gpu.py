"""Finds the fastest form and tiles of the dual LoRA layers on this GPU, and writes the table that CLIF reads.

    python benchmarks/tune_gpu.py                 # needs torch, Triton and this repository; at most 150 s
    python benchmarks/tune_gpu.py --again         # measures also what the table has
    python benchmarks/tune_gpu.py --dry           # interpreter, tiny shapes: a trial

For every shape (tune_plan.py) the candidates of all forms (clif/kernels/candidates.py) are compiled beforehand in
parallel (compile_ahead.py), then timed in heats against each other and against torch's products (halving.py). Before
that come the splits of the paged decode kernel (tune_decode.py). What the table has is right: results are checked
against the specification. Every shape is on disk before the next one begins, so that a second call continues where the
first one was ended.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotCompiled
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from checkout import commit, use_checkout

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
use_checkout()

import torch
import triton
import tune_decode
from compile_ahead import CompilePool, Launched, job_of
from halving import Heats, Ranking, fastest, rank
from timing import Timing
from tune_plan import Gpu, Task, Tiles, candidates_of, first_of_each, group_of, tasks
from tune_rig import Rig

from clif.kernels.dual_lora_reference import MergedLinear
from clif.kernels.testing.dual_lora_specification import Batch, random_batch, random_layer
from clif.kernels.tile_file import GradsEntry, LinearEntry, Spread, Stamp, TileFile
from clif.kernels.tiles import GradTiles, LinearTiles
from clif.kernels.tuning import Defaults, table_path

SOURCES = ("dual_lora_*kernel.py", "dual_lora_host.py", "dual_lora_forms.py", "numerics.py", "tiles.py")
"""Files of kernels/ that an entry was measured with: other ones make it old."""
DECODE_SOURCES = ("paged_decode_*.py", "numerics.py")
AHEAD = 12
"""Tasks whose candidates are compiled in advance."""


class Tuner:
    """The device that is measured."""

    def __init__(self, device: torch.device, defaults: Defaults, heats: Heats, weights_bytes: int) -> None:
        self.device, self.defaults, self.heats, self.bytes = device, defaults, heats, weights_bytes

    @classmethod
    def here(cls, dry: bool) -> Tuner:
        """For the first GPU of this machine, or for the interpreter."""
        if dry:
            return cls(torch.device("cpu"), Defaults(4, 80), Heats(1, 1, least=1), 1)
        device = torch.device("cuda")
        major, minor = torch.cuda.get_device_capability(device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        return cls(device, Defaults(processors, 10 * major + minor), Heats(), 256 << 20)

    @property
    def gpu(self) -> Gpu:
        return Gpu(self.defaults.programs, self.defaults.capability)

    def layers(self, sizes: Sequence[int], depth: int, r: int) -> list[MergedLinear]:
        """Layers of one shape, with more weights than the cache holds."""
        count = max(2, min(16, -(-self.bytes // (2 * depth * sum(sizes)))))
        dtype, device = torch.bfloat16, str(self.device)
        return [random_layer(sizes, depth, r, dtype=dtype, device=device, seed=i) for i in range(count)]

    def batches(
        self, sizes: Sequence[int], depth: int, r: int, lengths: Sequence[tuple[int, int | None]]
    ) -> list[Batch]:
        """The same layers with rows."""
        return [random_batch(layer, lengths) for layer in self.layers(sizes, depth, r)]


@dataclass
class Session:
    """One call of the tuner. rig: layers of a task, see tune_rig.Rig; save: writes the table; end_s: on `clock`."""

    file: TileFile
    stamp: Stamp
    gpu: Gpu
    heats: Heats
    rig: Callable[[Task], Any]
    ask: Callable[[Task, Sequence[Tiles]], dict[Tiles, Future[float]]]
    save: Callable[[], None]
    end_s: float
    clock: Callable[[], float] = time.monotonic
    again: bool = False
    dry: bool = False
    counts: Counter[str] = field(default_factory=Counter)

    def late(self) -> bool:
        return self.clock() >= self.end_s

    def run(self, wanted: Sequence[Task]) -> None:
        """Measure tasks in their order, while the candidates of the next ones are compiled."""
        for task, candidates, compiled in self._asked(wanted):
            if self.late():
                self.counts["not measured, time was up"] += 1
                continue
            began = self.clock()
            ready, left_out = self._compiled(candidates, compiled)
            outcome, shown = self._measure(task, ready, left_out)
            self.counts[outcome] += 1
            print(f"{task}: {outcome}, {shown} [{self.clock() - began:.1f} s]", flush=True)

    def ask_first(self, wanted: Sequence[Task]) -> None:
        """Give the compiler what run() waits for first, while something else is measured."""
        for task in [task for task in wanted if not self.known(task)][:AHEAD]:
            self.ask(task, candidates_of(task, self.gpu, self.file))

    def known(self, task: Task) -> bool:
        """Whether the table has it, measured with the same versions on the same type of GPU."""
        entries = self.file.grads if task.what == "grads" else self.file.linear
        entry = entries.get(task.shape())
        return not self.again and entry is not None and entry.stamp.same_versions(self.stamp)

    def _asked(self, wanted: Sequence[Task]) -> Iterator[tuple[Task, tuple[Tiles, ...], dict[Tiles, Future[float]]]]:
        """Tasks that are not known, each after its candidates and those of the next ones were given to the compiler."""
        left, asked = deque(wanted), deque[tuple[Task, tuple[Tiles, ...], dict[Tiles, Future[float]]]]()
        while left or asked:
            while left and len(asked) < AHEAD:
                task = left.popleft()
                if self.known(task):
                    self.counts["known"] += 1
                    continue
                candidates = candidates_of(task, self.gpu, self.file)
                candidates = first_of_each(candidates) if self.dry else candidates
                asked.append((task, candidates, {} if self.late() else self.ask(task, candidates)))
            if asked:
                yield asked.popleft()

    def _compiled(
        self, candidates: Sequence[Tiles], compiled: dict[Tiles, Future[float]]
    ) -> tuple[list[Tiles], dict[Tiles, str]]:
        """The candidates whose kernels are ready, and why others are not."""
        ready, left_out = [], {}
        for tiles in candidates:
            try:
                if tiles in compiled:
                    compiled[tiles].result(max(0.0, self.end_s - self.clock()))
                ready.append(tiles)
            except NotCompiled:
                left_out[tiles] = "time was up before it was compiled"
            except RuntimeError as error:
                left_out[tiles] = str(error)
        return ready, left_out

    def _measure(self, task: Task, ready: Sequence[Tiles], left_out: dict[Tiles, str]) -> tuple[str, str]:
        """Heats, check and entry of one task; returns how it ended, and a line about it."""
        rig = self.rig(task)
        ranking: Ranking[Any] = rank([*rig.beside, *ready], group_of, rig.cost, self.late, self.heats)
        ranking.left_out |= left_out
        if not ranking.complete or any("time was up" in why for why in left_out.values()):
            reported(ranking.left_out)
            return "not measured", "time was up"
        best = {
            name: found
            for name in dict.fromkeys(map(group_of, ready))
            if (found := fastest(ranking.times, [c for c in ready if group_of(c) == name], rig.wrong, ranking.left_out))
        }
        reasons = reported(ranking.left_out)
        if not best:
            return "not measured", "no candidate is left"
        shown = self._enter(task, ranking, best, reasons)
        self.save()
        return "measured", shown

    def _enter(self, task: Task, ranking: Ranking[Any], best: dict[str, Tiles], left_out: dict[str, int]) -> str:
        shape, us = task.shape(), {name: spread(ranking.times[tiles]) for name, tiles in best.items()}
        beside = {c: spread(t) for c, t in ranking.times.items() if isinstance(c, str)}
        if task.what == "grads":
            (tiles,) = best.values()
            assert isinstance(tiles, GradTiles)
            self.file.grads[shape] = GradsEntry(shape, tiles, *us.values(), self.stamp, left_out)
            return ", ".join(f"{name} {found.median:.1f}" for name, found in (us | beside).items())
        of_forms = {name: tiles for name, tiles in best.items() if isinstance(tiles, LinearTiles)}
        chosen = fastest(ranking.times, of_forms.values(), lambda tiles: None, {})
        captured = fastest(
            ranking.times, (t for t in of_forms.values() if t.form != "separate"), lambda tiles: None, {}
        )
        assert chosen is not None
        self.file.linear[shape] = LinearEntry(
            shape, chosen.form, captured.form if captured else None, of_forms, us, beside, self.stamp, left_out
        )
        times = ", ".join(f"{name} {found.median:.1f}" for name, found in (beside | us).items())
        return f"{chosen.form} of {times} us"


def reported(left_out: Mapping[Any, str]) -> dict[str, int]:
    """How many candidates were left out, by form and reason; it is said, too."""
    reasons = Counter(f"{group_of(c)}: {why}" for c, why in left_out.items())
    for why, count in reasons.items():
        print(f"  left out, {count}: {why}", flush=True)
    return dict(reasons)


def spread(timing: Timing) -> Spread:
    return Spread(*(round(us, 3) for us in (timing.p10, timing.median, timing.p90)))


def digest_of_kernels(sources: Sequence[str] = SOURCES) -> str:
    """Of the source that an entry was measured with."""
    folder = Path(table_path("x")).parents[1]
    files = sorted({path for pattern in sources for path in folder.glob(pattern)})
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def summary(file: TileFile) -> list[str]:
    """Markdown: what was measured for every shape, medians in microseconds."""
    ways = ("base", "torch", "fused", "pair", "three", "branches", "separate")
    lines = ["### Tiles: microseconds per layer (median) of the best of each form", ""]
    lines += [f"| shape | {' | '.join(ways)} | chosen | captured | over base |", "|---" * (len(ways) + 4) + "|"]
    for shape, entry in file.linear.items():
        us = {name: found.median for name, found in (entry.beside | entry.us).items()}
        cells = [f"{us[way]:.1f}" if way in us else "" for way in ways]
        ratio = f"{us[entry.chosen] / us['base']:.2f}" if us.get("base") else ""
        name = f"{'backward, ' * shape.backward}{shape.rows} rows {shape.depth}->{shape.out} r={shape.rank}"
        lines.append(f"| {name} | {' | '.join(cells)} | {entry.chosen} | {entry.captured} | {ratio} |")
    lines += ["", "| gradients of the factors | us | tiles |", "|---|---|---|"] if file.grads else []
    for shape, of_factors in file.grads.items():
        name = f"{shape.rows} rows {shape.depth}->{shape.out} r={shape.rank}"
        lines.append(f"| {name} | {of_factors.us.median:.1f} | {of_factors.tiles} |")
    return lines


def load(paths: Sequence[Path], again: bool) -> TileFile:
    """The first of the files that is there. Raises ValueError for one of another format, unless it is not needed."""
    for path in paths:
        if path.is_file():
            try:
                return TileFile.read(path)
            except ValueError:
                if not again:
                    raise
    return TileFile()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="interpreter on a CPU, tiny shapes: figures mean nothing")
    parser.add_argument("--seconds", type=float, default=150.0, help="what is left then is for the next call")
    parser.add_argument("--again", action="store_true", help="measure also what the table has")
    parser.add_argument("--out", type=Path, help="file to write; by default the one that CLIF reads (dry: none)")
    parser.add_argument("--copy", type=Path, help="folder for a copy, which a call without a table continues")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    if not args.dry and not torch.cuda.is_available():
        parser.error("no NVIDIA GPU here: use --dry, or a machine that has one")
    tuner = Tuner.here(args.dry)
    name = "dry" if args.dry else torch.cuda.get_device_name(tuner.device)
    path = args.out or table_path(name)
    paths = [path] if args.out or not args.dry else []
    paths += [args.copy / path.name] if args.copy else []
    try:
        file = load(paths, args.again)
    except ValueError as error:
        parser.error(str(error))
    file.about = {
        "device": name,
        "command": " ".join(["python", "benchmarks/tune_gpu.py", *sys.argv[1:]]),
        "commit": commit(),
    }
    today = datetime.date.today().isoformat()
    stamp = Stamp(today, name, torch.__version__, triton.__version__, digest_of_kernels())

    def save() -> None:
        for target in paths:
            file.write(target)

    def ask(task: Task, candidates: Sequence[Tiles]) -> dict[Tiles, Future[float]]:
        return {tiles: compiler.submit(job_of(task, tiles)) for tiles in candidates}

    def rig(task: Task) -> Rig:
        return Rig(task, tuner.layers(task.sizes, task.depth, task.r), tuner.device)

    launched = triton.knobs.compilation.listener = Launched()
    with CompilePool(None if args.dry else tuner.gpu.capability) as compiler:
        session = Session(file, stamp, tuner.gpu, tuner.heats, rig, ask, save, end, again=args.again, dry=args.dry)
        # First: a few shapes, which take seconds.
        decode = tune_decode.tune_decode(
            file, replace(stamp, kernels=digest_of_kernels(DECODE_SOURCES)), tuner.gpu.capability, tuner.device,
            compiler.submit, session.late, tuner.heats, again=args.again, dry=args.dry,
            asked=partial(session.ask_first, list(tasks(args.dry))),
        )  # fmt: skip
        save()
        session.counts.update(decode)
        session.run(list(tasks(args.dry)))
        compiled, cpu_s = compiler.cpu_seconds()
    print("\n".join(["", *summary(file), "", *tune_decode.summary(file)]))
    print(f"\n{dict(session.counts)}; {len(file.linear) + len(file.grads) + len(file.decode)} entries in {path.name}")
    print(f"compiled ahead: {compiled} candidates, {cpu_s:.0f} CPU seconds", end="; ")
    print(f"kernels: {launched.found} found on disk, {launched.compiled} compiled here")
    done = session.counts.keys() <= {"known", "measured"}
    if not done:
        print("not complete: call it again, and it continues")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
