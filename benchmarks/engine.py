"""Speed of the engine alone, as ratios within one run: serving and training against others at the same work.

    python benchmarks/engine.py --model assets/smollm2-135m-instruct.gguf     # about 5 minutes; idle cores
    python benchmarks/engine.py --peer vllm=/path/to/venv/bin/python --peer llama=/path/to/llama-server \\
        --only serving --streams 32,8,4,1 --adapters 1
    python benchmarks/engine.py --only serving --adapters 2 --streams 64,48+16     # two versions at once against one
    python benchmarks/engine.py --only serving --instances 2     # two processes of each contender, half the cores each
    python benchmarks/engine.py --dry --out /tmp                              # a trial of all parts, within a minute

Each contender is a process of its own, pinned to the same cores, with the same limit of memory; they take turns within
each repeat. All of them get the same prompts and samples in a turn and new ones in the next. Other engines and trainers
are optional, see rival_engines.py.
"""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import contenders as c
import rival_engines
import typer
from instances import Instances
from peer_files import PeerFiles, make_files
from rival_engines import Rival
from turns import Contender, Limits, OwnContender, race, settings_lines, split_table, table

from clif.errors import InputError
from clif.metrics.provenance import cpu_model, git_commit

REPO = Path(__file__).resolve().parents[1]
ANSWER_S = 180.0
"""Seconds for the slowest contender on slow cores, and for loading."""
PARTS = ("serving", "training")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
"""Of CPUs; the speed of all contenders depends on them."""
Rows = tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """What is compared. loads: rows at once, by adapter version. paths: of peers, by name. files: theirs, if any."""

    work: c.Work
    loads: tuple[Rows, ...]
    paths: dict[str, str]
    files: PeerFiles | None
    transformers: bool = True

    @property
    def several(self) -> bool:
        return any(len(rows) > 1 for rows in self.loads)


def first_tokens(ours: list[int], theirs: list[int]) -> str:
    """Share of answers with equal first tokens: in bfloat16 a few differ, if two tokens are almost equally likely."""
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    return f"{same} of {len(ours)} answers begin alike"


def losses(ours: float, theirs: float) -> str:
    return f"loss {theirs:.3f}"


def copies(run: Run, name: str, make: object) -> Contender:
    """One contender, or its instances. make: of a Work."""
    assert callable(make)
    works = [replace(run.work, instance=i) for i in range(run.work.instances)]
    members: list[Contender] = [make(work) for work in works]
    return members[0] if len(members) == 1 else Instances(name, members)


def own(run: Run, name: str, prepare: object) -> Contender:
    return copies(run, name, lambda work: OwnContender(name, prepare, (work,)))  # type: ignore[arg-type]


def others(run: Run, rivals: dict[str, Rival], make: object) -> tuple[list[Contender], list[str]]:
    """Peers that were found, and why others are left out."""
    found, left_out = [], []
    for name, rival in rivals.items():
        reason = rival_engines.why_not(rival, run.paths.get(name, ""))
        if not reason and len(run.work.adapters) > rival.adapters and make is rival_engines.serving_contender:
            reason = f"it serves {rival.adapters} adapters at once at most"
        if not reason and run.files is None:
            reason = "the model is no GGUF file, from which the files of all peers are made"
        if reason:
            left_out.append(f"* {rival.title} is left out: {reason}")
            continue
        path = run.paths.get(name, "")
        found.append(copies(run, rival.title, lambda work, r=rival, p=path: make(r, p, work, run.files)))  # type: ignore
    return found, left_out


def serve(run: Run, repeats: int, limits: Limits) -> tuple[list[str], bool]:
    """Markdown of the comparison of serving, and whether all contenders finished."""
    found, left_out = others(run, rival_engines.SERVING, rival_engines.serving_contender)
    ours = [own(run, "CLIF", c.clif_serving)]
    if run.transformers and not run.several:
        ours.append(own(run, "transformers.generate, static batch", c.static_batch))
        ours.append(own(run, "transformers generate_batch", c.continuous_batch))
    contenders = [*ours, *found]
    race(contenders, repeats, limits, run.loads)
    work, lines = run.work, []
    model = f"{len(work.adapters)} adapters of r={c.RANK}" if len(work.adapters) > 1 else "base model"
    model = f"one adapter of r={c.RANK} on all linear layers" if len(work.adapters) == 1 else model
    shared = f", shared by {work.instances} instances" if work.instances > 1 else ""
    for rows in run.loads:
        said = f"{' + '.join(map(str, rows))} requests at once{shared}, {work.prompt} + {work.answer} tokens each"
        title = f"Greedy serving, {said}, {model}"
        lines += table(title, sum(rows) * work.answer, contenders, first_tokens, rows)
    for rows in run.loads:
        if len(rows) > 1 and (sum(rows),) in run.loads:
            lines += split_table(sum(rows) * work.answer, contenders, sum(rows), rows)
    return [*lines, *settings_lines(contenders), *left_out, ""], not any(one.failed for one in contenders)


def train(run: Run, repeats: int, limits: Limits) -> tuple[list[str], bool]:
    """Markdown of the comparison of training, and whether all contenders finished."""
    found, left_out = others(run, rival_engines.TRAINING, rival_engines.training_contender)
    contenders = [own(run, "CLIF", c.clif_training), own(run, "PEFT + AdamW", c.peft_training), *found]
    race(contenders, repeats, limits)
    work = run.work
    learned = f"{work.steps} steps of {work.samples} x {work.length} tokens, {work.targets} targets each"
    lines = table(f"LoRA training, {learned}", work.steps * work.samples * work.length, contenders, losses)
    return [*lines, *settings_lines(contenders), *left_out, ""], not any(one.failed for one in contenders)


def provenance(repeats: int, limits: Limits, busy: float) -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return [
        f"* command: `python {shlex.join(sys.argv)}`",
        f"* machine: {cpu_model()} ({cpu_flags()}), {platform.system()}; each contender's threads are pinned to cores "
        f"{', '.join(map(str, limits.cores))}; load average before {busy:.2f}",
        f"* versions: Python {platform.python_version()}, {versions}; commit {git_commit() or 'unknown'}",
        f"* median of {repeats} repeats in turns after a warm-up, with the least and the most; new prompts and samples "
        f"in each; a process per contender with at most {limits.memory_bytes / (1 << 30):g} GiB",
        "",
    ]


def cpu_flags() -> str:
    """Those of FLAGS that this CPU has."""
    path = Path("/proc/cpuinfo")
    found = set(path.read_text().split()) if path.is_file() else set()
    return " ".join(flag for flag in FLAGS if flag in found) or "flags unknown"


def parse_streams(text: str) -> tuple[Rows, ...]:
    """ "32,48+16": 32 requests at once, and 48 of one version beside 16 of another. Raises InputError."""
    try:
        loads = tuple(tuple(int(count) for count in one.split("+")) for one in text.split(","))
    except ValueError as error:
        raise InputError(f"--streams {text}: give whole numbers, as in 32,8,1 or 64,48+16") from error
    if min(count for rows in loads for count in rows) < 1:
        raise InputError(f"--streams {text}: give whole numbers above 0")
    return loads


def plan(work: c.Work, streams: str, adapters: int, instances: int, peers_given: Sequence[str], folder: Path) -> Run:
    """What is to be compared, with the files that peers and adapters need."""
    loads, paths = parse_streams(streams), rival_engines.parse(peers_given)
    if max(map(len, loads)) > max(adapters, 1):
        raise InputError(f"--streams {streams} with --adapters {adapters}: give an adapter for each number of a sum")
    files = None
    if work.model.endswith(".gguf") and (paths or adapters):
        files = make_files(Path(work.model), folder, adapters)
        # All read the same weights; a folder loads faster.
        work = replace(work, model=files.model, adapters=files.adapters)
    if adapters and files is None:
        raise InputError("--adapters needs --model FILE.gguf: random adapters are made for it")
    most = max(sum(rows) for rows in loads)
    return Run(replace(work, requests=most, instances=instances), loads, paths, files)


def main(
    model: Annotated[str, typer.Option(help="as model.path in a configuration")] = str(
        REPO / "assets" / "smollm2-135m-instruct.gguf"
    ),
    out: Annotated[Path, typer.Option(help="folder for the dated file")] = REPO / "benchmarks",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="5 or more for figures to be published")] = 5,
    memory_gib: Annotated[float, typer.Option(min=1, help="that each contender may allocate")] = 6.0,
    dry: Annotated[bool, typer.Option(help="2 repeats of a tiny random model: its figures mean nothing")] = False,
    only: Annotated[str, typer.Option(help="serving or training; both by default")] = "",
    streams: Annotated[str, typer.Option(help="requests at once; A+B: of two adapter versions")] = "32",
    adapters: Annotated[int, typer.Option(min=0, max=2, help="versions that answer; 0: the base model")] = 0,
    instances: Annotated[int, typer.Option(min=1, help="processes per contender, which share cores and requests")] = 1,
    peer: Annotated[list[str] | None, typer.Option(help="NAME=PATH of an engine or trainer elsewhere")] = None,
    files: Annotated[Path, typer.Option(help="folder of converted weights")] = REPO / "runs" / "peer-files",
    transformers: Annotated[bool, typer.Option(help="with generate and generate_batch")] = True,
) -> None:
    """Compare serving and training speed on a CPU and write a dated file."""
    busy, cores = os.getloadavg()[0], tuple(sorted(os.sched_getaffinity(0)))
    work, stem = c.Work(model, dtype), f"engine-{dtype}"
    if dry:
        # One core: with so small a model more threads only wait for each other, forever beside other programs.
        tiny = f"random:{REPO / 'configs' / 'models' / 'tiny-llama.json'}"
        work, stem, repeats, cores = c.Work(tiny, dtype, 4, 12, 6, 2, 2, 24, 12), f"{stem}-dry", 2, cores[:1]
        streams = "4"
    try:
        run = replace(plan(work, streams, adapters, instances, peer or (), files), transformers=transformers)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    limits = Limits(cores, int(memory_gib * (1 << 30)), ANSWER_S)
    today = datetime.date.today().isoformat()
    lines, whole = [], True
    for part, compare in zip(PARTS, (serve, train), strict=True):
        if only in ("", part):
            found, finished = compare(run, repeats, limits)
            lines, whole = [*lines, *found], whole and finished
    path = out / f"{stem}{suffix(run, only)}-{today}.md"
    path.write_text("\n".join([f"# Engine alone, {today}, {dtype}", "", *provenance(repeats, limits, busy), *lines]))
    print(path.read_text())
    raise typer.Exit(0 if whole else 1)


def suffix(run: Run, only: str) -> str:
    """Of the file's name: what is not the default."""
    words = [only] if only else []
    words += [f"{len(run.work.adapters)}-adapters"] if run.work.adapters else []
    words += [f"{run.work.instances}-instances"] if run.work.instances > 1 else []
    return "".join(f"-{word}" for word in words)


if __name__ == "__main__":
    typer.run(main)
