"""One call of the tuner: tasks in their order, each compiled, timed, checked and written before the next one.

Pure: clock, compiler and layers are given.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future
from concurrent.futures import TimeoutError as NotCompiled
from dataclasses import dataclass, field
from typing import Any

from checkout import use_checkout

use_checkout()

from halving import Heats, Ranking, fastest, rank
from timing import Timing
from tune_plan import Gpu, Task, Tiles, candidates_of, first_of_each, group_of

from clif.kernels.tile_file import GradsEntry, LinearEntry, Spread, Stamp, TileFile
from clif.kernels.tiles import GradTiles, LinearTiles

CRASHED = "a process that compiles has crashed"
AHEAD = 12
"""Tasks whose candidates are compiled in advance."""


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
        for task, candidates, compiled in self._asked(self.in_order(wanted)):
            if self.late():
                self.counts["not measured, time was up"] += 1
                continue
            began = self.clock()
            ready, left_out = self._compiled(candidates, compiled)
            # The second time it is measured without what the compiler does not survive.
            wait = CRASHED in left_out.values() and str(task) not in self.file.unfinished
            self.file.unfinished = [*(name for name in self.file.unfinished if name != str(task)), str(task)]
            self.save()
            outcome, shown = ("not measured", CRASHED) if wait else self._measure(task, ready, left_out)
            self.counts[outcome] += 1
            print(f"{task}: {outcome}, {shown} [{self.clock() - began:.1f} s]", flush=True)

    def in_order(self, wanted: Sequence[Task]) -> list[Task]:
        """What an earlier call began and did not end comes last: it may hang or break the device again."""
        return sorted(wanted, key=lambda task: str(task) in self.file.unfinished)

    def ask_first(self, wanted: Sequence[Task]) -> None:
        """Give the compiler what run() waits for first, while something else is measured."""
        for task in [task for task in self.in_order(wanted) if not self.known(task)][:AHEAD]:
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
            except BrokenExecutor:
                left_out[tiles] = CRASHED
            except RuntimeError as error:
                left_out[tiles] = str(error)
        return ready, left_out

    def _measure(self, task: Task, ready: Sequence[Tiles], left_out: dict[Tiles, str]) -> tuple[str, str]:
        """Heats, check and entry of one task; returns how it ended, and a line about it."""
        rig = self.rig(task)
        ranking: Ranking[Any] = rank([*rig.beside, *ready], group_of, rig.cost, self.late, self.heats)
        ranking.left_out |= left_out
        if ranking.cut_short:
            reported(ranking.left_out)
            self.file.unfinished.remove(str(task))
            self.save()
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
        self.file.unfinished.remove(str(task))
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
