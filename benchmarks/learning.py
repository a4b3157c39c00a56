"""Does training help on tasks that it was not tuned to? Two replicas of CLIF against PEFT on the same samples.

    python benchmarks/learning.py --data DIR                      # 3 seeds, four data sets: two hours on one idle core
    python benchmarks/learning.py --data DIR --seconds 240        # as far as it gets; the next call continues
    python benchmarks/learning.py --data DIR --parts sweep        # learning rates and ranks
    python benchmarks/learning.py --dry --data DIR --out /tmp     # a trial of all parts with a tiny random model

DIR holds data sets as JSON lines, NAME.jsonl, of instruction, input, output and split; missing ones are left out. Of
each a few hundred rows are drawn by the seed. Three parts: compare has the base, PEFT, and replicas with rows in turn
and by client; forget trains a second task after the first, with and without replay; sweep tries recipes.
"""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import learning_results as r
import torch
import typer
from learning_data import DATA_SETS, Example, Sizes, Task, read_task, shares
from learning_results import Result, Unit
from learning_ways import Bench, Central, Recipe

from clif.data.replay import with_replay
from clif.metrics.provenance import cpu_model, git_commit
from clif.types import TrainSample

REPO = Path(__file__).resolve().parents[1]
WAYS = ("base", "central", "single", "iid", "client")
"""central: PEFT on all samples; single: one replica with all samples, in steps as large as those of all replicas
together, as if they averaged every gradient; iid and client: replicas with rows in turn, and by client."""
REPLICAS = 2
REPLAYS = (0.0, 0.1)
SWEEP = tuple((lr, rank) for rank in (8, 16) for lr in (5e-4, 1e-3, 2e-3, 4e-3))
SWEPT = 2
"""Data sets of the sweep."""


class Study:
    """All that the units of one call share. Models are made when the first unit needs them."""

    def __init__(self, model: str, dtype: str, recipe: Recipe, folder: Path) -> None:
        self._model, self._dtype, self._recipe, self._folder = model, dtype, recipe, folder
        self.tasks: dict[tuple[str, int], Task] = {}
        self.central_recipe = recipe
        self._bench: Bench | None = None
        self._central: Central | None = None

    def run(self, unit: Unit) -> Result:
        """Measure one unit."""
        started = time.monotonic()
        part = {"compare": self._compare, "forget": self._forget, "sweep": self._sweep}[unit.part]
        return replace(part(unit), seconds=time.monotonic() - started)

    def bench(self, recipe: Recipe) -> Bench:
        """The engine for a recipe: another one for another rank."""
        if self._bench is None or self._bench.recipe.rank != recipe.rank:
            self._bench = None
            self._bench = Bench(self._model, self._dtype, recipe)
        self._bench.use(recipe)
        return self._bench

    def _compare(self, unit: Unit) -> Result:
        task, bench = self.tasks[unit.data, unit.seed], self.bench(self._recipe)
        detail = ""
        if unit.way == "base":
            adapter = None
        elif unit.way == "central":
            self._central = self._central or Central(self._model, self._dtype, self.central_recipe)
            folder = self._folder / f"peft-{unit.data}-{unit.seed}"
            epoch = self._central.learn(samples_of(task.train), task.gate, unit.seed, folder)
            adapter, detail = bench.adapter_of(folder), f"epoch {epoch} of {self._recipe.epochs}"
        else:
            adapter, detail = self._learn(unit, task)
        score = bench.score(task.report, adapter)
        return Result(unit, score.loss, score.exact, detail=detail)

    def _learn(self, unit: Unit, task: Task) -> tuple[torch.Tensor, str]:
        recipe, parts = self._recipe, [samples_of(task.train)]
        if unit.way == "single":
            recipe = replace(recipe, micro_batch=REPLICAS * recipe.micro_batch)
        else:
            parts = [samples_of(part) for part in shares(task.train, REPLICAS, unit.way)]
        learnt = self.bench(recipe).federated(parts, task.gate, unit.seed)
        if unit.way == "iid":
            torch.save(learnt.adapter, self._first(unit.data, unit.seed))
        detail = f"{learnt.promoted} of {learnt.rounds} rounds promoted, {learnt.halved} at half of the way"
        return learnt.adapter, detail

    def _first(self, data: str, seed: int) -> Path:
        return self._folder / f"iid-{data}-{seed}.pt"

    def _forget(self, unit: Unit) -> Result:
        """Train the second task from the adapter of the first, judged by the second alone."""
        names, share = unit.data.split(">"), float(unit.way.split()[1])
        first, second = (self.tasks[name, unit.seed] for name in names)
        both = zip(shares(second.train, REPLICAS, "iid"), shares(first.train, REPLICAS, "iid"), strict=True)
        parts = [with_replay(samples_of(new), samples_of(old), share, unit.seed) for new, old in both]
        bench = self.bench(self._recipe)
        learnt = bench.federated(parts, second.gate, unit.seed, torch.load(self._first(names[0], unit.seed)))
        of_first, of_second = (bench.score(task.report, learnt.adapter) for task in (first, second))
        return Result(unit, of_first.loss, of_first.exact, second=of_second.exact)

    def _sweep(self, unit: Unit) -> Result:
        _, lr, _, rank = unit.way.split()
        recipe = replace(self._recipe, lr=float(lr), rank=int(rank), alpha=2.0 * int(rank))
        task, bench = self.tasks[unit.data, unit.seed], self.bench(recipe)
        parts = [samples_of(part) for part in shares(task.train, REPLICAS, "iid")]
        learnt = bench.federated(parts, task.gate, unit.seed)
        score, gate = bench.score(task.report, learnt.adapter), bench.gate(task.gate, learnt.adapter)
        return Result(unit, score.loss, score.exact, gate=gate)


def samples_of(examples: Sequence[Example]) -> list[TrainSample]:
    return [example.sample for example in examples]


def plan(names: Sequence[str], seeds: int, parts: Sequence[str], ways: Sequence[str] = WAYS) -> list[Unit]:
    """All units, one seed after the other: a call that is cut short has whole comparisons of the first seeds.

    A pair of tasks comes behind the comparison of its first one, from whose adapter it goes on.
    """
    units = []
    for seed in range(seeds):
        if "compare" in parts:
            units += [Unit(seed, "compare", name, way) for name in names for way in ways]
        if "forget" in parts:
            pairs = [f"{first}>{second}" for first, second in pairwise(names)]
            units += [Unit(seed, "forget", pair, f"replay {share:g}") for pair in pairs for share in REPLAYS]
        if "sweep" in parts and seed == 0:
            ways = [f"lr {lr:g} rank {rank}" for lr, rank in SWEEP]
            units += [Unit(seed, "sweep", name, way) for name in names[:SWEPT] for way in ways]
    return units


def document(results: Sequence[Result], given: str, recipe: Recipe, sizes: Sizes, central_batch: int) -> str:
    """The dated file."""
    seeds = len({result.unit.seed for result in results})
    threads = torch.get_num_threads()
    lines = [
        f"# Does training help? {datetime.date.today().isoformat()}", "",
        f"* command: `{given}`",
        f"* machine: {cpu_model()}, {platform.system()}, {threads} thread{'s' * (threads > 1)}; "
        f"torch {torch.__version__}; commit {git_commit() or 'unknown'}",
        f"* {seeds} seed{'s' * (seeds > 1)}: median, least and most; {sizes.train} training rows, "
        f"{sizes.gate} that judge rounds, {sizes.report} that are reported, of {sizes.tokens} tokens at most",
        f"* {recipe}",
        f"* {REPLICAS} replicas take turns in one process, with their own moments and samples; rounds are averaged by "
        "samples, judged and scaled as in a run; central is PEFT on all samples, the best epoch by the judging rows, "
        f"in steps of {central_batch}: {REPLICAS * recipe.micro_batch / central_batch:g} times as many as a replica "
        f"takes; single is one replica with all samples, in steps of {REPLICAS * recipe.micro_batch}, and otherwise as "
        "the replicas",
        f"* measured in {sum(result.seconds for result in results) / 60:.0f} minutes", "", *r.verdicts(results), "",
        "Loss in nats per answer token, and exact match of greedy answers, on rows that nothing else reads:", "",
        *r.compare_table(results, WAYS),
    ]  # fmt: skip
    for part, title, table in (
        ("forget", "A second task after the first (exact match)", r.forget_table),
        ("sweep", "Recipes, 2 IID replicas", r.sweep_table),
    ):
        if any(result.unit.part == part for result in results):
            lines += ["", f"{title}:", "", *table(results)]
    return "\n".join([*lines, ""])


def main(
    data: Annotated[Path, typer.Option(help="folder of data sets, NAME.jsonl")],
    model: Annotated[str, typer.Option(help="as model.path in a configuration")] = str(
        REPO / "assets" / "smollm2-135m-instruct.gguf"
    ),
    out: Annotated[Path, typer.Option(help="folder for the dated file")] = REPO / "benchmarks",
    work: Annotated[Path, typer.Option(help="folder of results so far, and of adapters")] = REPO / "runs" / "learning",
    sets: Annotated[str, typer.Option(help="names of data sets, in order")] = ",".join(DATA_SETS),
    parts: Annotated[str, typer.Option(help="of compare, forget, sweep")] = "compare,forget",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    rows: Annotated[int, typer.Option(min=8, help="training rows of a data set")] = Sizes.train,
    report: Annotated[int, typer.Option(min=8, help="held-out rows that are reported")] = Sizes.report,
    epochs: Annotated[int, typer.Option(min=1)] = Recipe.epochs,
    micro_batch: Annotated[int, typer.Option(min=1, help="samples of a replica's step")] = Recipe.micro_batch,
    local_steps: Annotated[int, typer.Option(min=1, help="a replica's steps in a round")] = Recipe.local_steps,
    ways: Annotated[str, typer.Option(help="of the part compare")] = ",".join(WAYS),
    seconds: Annotated[float, typer.Option(help="begin no unit after so long; a further call continues")] = 1e9,
    central_batch: Annotated[int, typer.Option(min=1, help="samples of a step of PEFT")] = Recipe.micro_batch,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    dry: Annotated[bool, typer.Option(help="a tiny random model: its figures mean nothing")] = False,
) -> None:
    """Train in all ways, and write a dated file."""
    started, sizes = time.monotonic(), Sizes(train=rows, report=report)
    recipe = Recipe(epochs=epochs, micro_batch=micro_batch, local_steps=local_steps)
    torch.set_num_threads(threads)
    if dry:
        model = f"random:{REPO / 'configs' / 'models' / 'tiny-llama.json'}"
        recipe, sizes = replace(recipe, epochs=1, local_steps=2), Sizes(16, 4, 4, 400)
        work = out / "learning-dry"
    study, names = Study(model, dtype, recipe, work), list[str]()
    study.central_recipe = replace(recipe, micro_batch=central_batch)
    tokenizer = study.bench(recipe).loaded.tokenizer
    work.mkdir(parents=True, exist_ok=True)
    for name in sets.split(","):
        found = {(name, seed): read_task(data, name, tokenizer, sizes, seed) for seed in range(seeds)}
        if any(task is None for task in found.values()):
            print(f"{data / name}.jsonl is not there: left out")
            continue
        names.append(name)
        study.tasks |= {key: task for key, task in found.items() if task is not None}
    if not names:
        raise typer.BadParameter(f"there is no data set in {data}: give a folder with NAME.jsonl")
    log = work / "results.jsonl"
    for unit in r.left(plan(names, seeds, parts.split(","), ways.split(",")), r.read(log)):
        if time.monotonic() - started > seconds:
            print("the time is up: call again to continue")
            break
        result = study.run(unit)
        r.append(log, result)
        print(result, flush=True)
    command = f"python {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}".replace(str(data), "DIR")
    path = out / f"learning{'-dry' if dry else ''}-{datetime.date.today().isoformat()}.md"
    path.write_text(document(r.read(log), command, recipe, sizes, central_batch))
    print(path.read_text())


if __name__ == "__main__":
    typer.run(main)
