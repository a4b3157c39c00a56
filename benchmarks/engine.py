"""Speed of the engine alone, as ratios within one run: serving against transformers, training against PEFT.

    python benchmarks/engine.py --model assets/smollm2-135m-instruct.gguf     # about 5 minutes; idle cores
    python benchmarks/engine.py --dry --out /tmp                              # a trial of all parts, within a minute

Each contender is a process of its own, pinned to the same cores, with the same limit of memory; they take turns within
each repeat. All of them get the same prompts and samples in a repeat and new ones in the next.
"""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import contenders as c
import typer
from turns import Contender, Limits, race, table

from clif.metrics.provenance import cpu_model, git_commit

REPO = Path(__file__).resolve().parents[1]
ANSWER_S = 180.0
"""Seconds for the slowest contender on slow cores, and for loading."""


def first_tokens(ours: list[int], theirs: list[int]) -> str:
    """Share of answers with equal first tokens: in bfloat16 a few differ, if two tokens are almost equally likely."""
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    return f"{same} of {len(ours)} answers begin alike"


def losses(ours: float, theirs: float) -> str:
    return f"loss {theirs:.3f}"


def measure(work: c.Work, repeats: int, limits: Limits) -> tuple[list[str], bool]:
    """Markdown of both comparisons, and whether all contenders finished."""
    serving = [
        Contender("CLIF", c.clif_serving, (work,)),
        Contender("transformers.generate, static batch", c.static_batch, (work,)),
        Contender("transformers generate_batch", c.continuous_batch, (work,)),
    ]
    training = [Contender("CLIF", c.clif_training, (work,)), Contender("PEFT + AdamW", c.peft_training, (work,))]
    race(serving, repeats, limits)
    race(training, repeats, limits)
    asked = f"{work.requests} requests at once, {work.prompt} + {work.answer} tokens each"
    learned = f"{work.steps} steps of {work.samples} x {work.length} tokens, {work.targets} targets each"
    lines = table(f"Greedy serving, {asked}, base model", work.requests * work.answer, serving, first_tokens)
    lines += table(f"LoRA training, {learned}", work.steps * work.samples * work.length, training, losses)
    return lines, not any(one.failed for one in (*serving, *training))


def provenance(repeats: int, limits: Limits, busy: float) -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return [
        f"* command: `python {shlex.join(sys.argv)}`",
        f"* machine: {cpu_model()}, {platform.system()}; each contender's threads are pinned to cores "
        f"{', '.join(map(str, limits.cores))}; load average before {busy:.2f}",
        f"* versions: Python {platform.python_version()}, {versions}; commit {git_commit() or 'unknown'}",
        f"* median of {repeats} repeats in turns after a warm-up, with the least and the most; new prompts and samples "
        f"in each; a process per contender with at most {limits.memory_bytes / (1 << 30):g} GiB",
        "",
    ]


def main(
    model: Annotated[str, typer.Option(help="as model.path in a configuration")] = str(
        REPO / "assets" / "smollm2-135m-instruct.gguf"
    ),
    out: Annotated[Path, typer.Option(help="folder for the dated file")] = REPO / "benchmarks",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="5 or more for figures to be published")] = 5,
    memory_gib: Annotated[float, typer.Option(min=1, help="that each contender may allocate")] = 6.0,
    dry: Annotated[bool, typer.Option(help="2 repeats of a tiny random model: its figures mean nothing")] = False,
) -> None:
    """Compare serving and training speed on a CPU and write a dated file."""
    busy, cores = os.getloadavg()[0], tuple(sorted(os.sched_getaffinity(0)))
    work, stem = c.Work(model, dtype), f"engine-{dtype}"
    if dry:
        # One core: with so small a model more threads only wait for each other, forever beside other programs.
        tiny = f"random:{REPO / 'configs' / 'models' / 'tiny-llama.json'}"
        work, stem, repeats, cores = c.Work(tiny, dtype, 4, 12, 6, 2, 2, 24, 12), f"{stem}-dry", 2, cores[:1]
    limits = Limits(cores, int(memory_gib * (1 << 30)), ANSWER_S)
    today = datetime.date.today().isoformat()
    lines, whole = measure(work, repeats, limits)
    path = out / f"{stem}-{today}.md"
    path.write_text("\n".join([f"# Engine alone, {today}, {dtype}", "", *provenance(repeats, limits, busy), *lines]))
    print(path.read_text())
    raise typer.Exit(0 if whole else 1)


if __name__ == "__main__":
    typer.run(main)
