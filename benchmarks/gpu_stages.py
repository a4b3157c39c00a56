"""Measurements for a GPU that is available for minutes, the most important first (make gpu).

    python benchmarks/gpu_stages.py                        # all stages, at most 8 minutes
    python benchmarks/gpu_stages.py --seconds 180          # the stages that fit, in the same order
    python benchmarks/gpu_stages.py --only decode,training # these
    python benchmarks/gpu_stages.py --at-once              # all at the same time: what fails; times mean nothing
    python benchmarks/gpu_stages.py --dry                  # on a CPU with tiny shapes: figures mean nothing

Every stage is a process with a time limit. Its result is on disk before the next one begins, so that nothing is lost
when the machine is taken away. A second call skips stages that have passed. The last table of the result has the
figures that were asked for, beside their goals (gpu_figures.py). The machine needs torch, Triton and
transformers, and no network: CLIF is imported from the checkout, and missing packages are taken from wheels (--wheels).
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import gpu_figures
from checkout import REPO, commit, link_checkout

PYTHON = sys.executable
LEAST_S = 10.0
"""Seconds that must be left for a stage to begin: importing torch takes most of them."""
ON_A_CPU = ("model.path=random:configs/models/tiny-llama.json", "model.device=cpu", "model.dtype=float32")


@dataclass(frozen=True)
class Stage:
    """One measurement. limit_s: its time limit; dry: the command without a GPU (empty: the same with --dry)."""

    name: str
    asks: str
    limit_s: float
    command: tuple[str, ...]
    dry: tuple[str, ...] = ()


def script(name: str, *arguments: str) -> tuple[str, ...]:
    return (PYTHON, f"benchmarks/{name}.py", *arguments)


def sized(name: str, shape: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A script for one shape, and its dry run."""
    return script(name, shape), script(name, shape, "--dry")


def ranks(count: int, *overrides: str) -> tuple[str, ...]:
    """A whole run of `count` ranks."""
    torchrun = (PYTHON, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
    return (*torchrun, "launch/run.py", "--config", "configs/gpu_trial.yaml", *overrides)


def tests(*files: str, processes: int = 1) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tests that need a GPU, and, as the dry run, their collection."""
    pytest = (
        PYTHON,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "said_at_once",
        "-m",
        "gpu",
        "--tb=short",
    )
    paths = tuple(f"tests/gpu/{file}.py" for file in files)
    # By its long name, which tests/conftest.py knows where pytest-xdist is missing.
    parallel = ("--numprocesses", str(processes)) if processes > 1 else ()
    return (*pytest, *parallel, *paths), (*pytest, "--collect-only", *paths)


STAGES = (
    Stage("faults", "what no GPU has run before", 60, script("gpu_faults")),
    Stage("decode", "the engine's decode step, captured and eager, 1B", 50, *sized("gpu_decode", "llama-1b")),
    Stage("training", "training alone against PEFT, captured and eager, 1B", 40, *sized("gpu_training", "llama-1b")),
    Stage("coserving", "both together, in every way and at three loads, 1B", 90, *sized("gpu_coserving", "llama-1b")),
    Stage("prompts", "captured steps with prompts: are they right, and how long they take", 75, script("gpu_prompts")),
    Stage("decode-8b", "the engine's decode step, 8B", 75, *sized("gpu_decode", "llama-8b")),
    Stage("quantised", "steps and products with weights of 8 and 4 bits, 1B", 130, *sized("gpu_quantised", "llama-1b")),
    Stage("run", "a whole run with load on one rank", 60, ranks(1), ranks(1, *ON_A_CPU)),
    Stage(
        "two-ranks",
        "a federated round of two ranks that share the GPU",
        75,
        ranks(2, "dist.ranks_per_gpu=2"),
        ranks(2, *ON_A_CPU),
    ),
    Stage("regressions", "what failed on the first GPU", 60, script("gpu_regressions")),
    Stage(
        "engine-tests",
        "engine, gradients and NCCL on the GPU",
        60,
        *tests("test_gpu_graphs", "test_gpu_training", "test_gpu_streams", "test_gpu_varlen", "test_gpu"),
    ),
    Stage("tensor-parallel", "replicas of several ranks on one GPU", 120, *tests("test_gpu_tensor_parallel")),
    # They mostly compile: one process for every two cores.
    Stage(
        "kernel-tests",
        "the kernels against their specification",
        90,
        *tests(
            "test_gpu_elementwise", "test_gpu_dual_lora", "test_gpu_paged_decode", "test_gpu_paged_prefill", processes=8
        ),
    ),
    Stage(
        "families",
        "every family, and weights of 8 and 4 bits",
        120,
        *tests("test_gpu_families", "test_gpu_quantised", processes=8),
    ),
    # The table is also among the results: a lent machine keeps nothing else.
    Stage(
        "tuner",
        "the fastest form and tiles of every dual LoRA layer",
        180,
        script("tune_gpu", "--seconds", "150", "--copy", "{folder}"),
        script("tune_gpu", "--dry", "--out", "{folder}/tiles-dry.json"),
    ),
    Stage(
        "kernels",
        "the kernels against their rivals",
        120,
        script("bench_kernels", "--seconds", "90", "--out", "{folder}"),
    ),
)


@dataclass
class Session:
    """The stages of one call. folder: where results go, one file each; end_s: monotonic seconds."""

    folder: Path
    environment: dict[str, str]
    end_s: float
    dry: bool
    about: str
    _writing: Lock = field(default_factory=Lock)

    def result(self, number: int, stage: Stage) -> Path:
        return self.folder / f"{number:02d}-{stage.name}.md"

    def passed(self, number: int, stage: Stage) -> bool:
        file = self.result(number, stage)
        return file.is_file() and "\n* outcome: passed" in file.read_text()

    def take(self, number: int, stage: Stage, again: bool) -> bool:
        """Run a stage, unless it has passed before or no time is left; returns whether it has passed."""
        if not again and self.passed(number, stage):
            print(f"[passed before] {stage.name}", flush=True)
            return True
        if self.end_s - time.monotonic() < min(LEAST_S, stage.limit_s):
            print(f"[no time left] {stage.name}", flush=True)
            return False
        return self.run(number, stage)

    def run(self, number: int, stage: Stage) -> bool:
        """Run a stage and write its result, also of a failure; returns whether it passed."""
        # A dry run has no minutes of a GPU to lose, and a slower machine.
        allowed = stage.limit_s * (3 if self.dry else 1)
        limit, start = min(allowed, self.end_s - time.monotonic()), time.monotonic()
        command = self._command(stage)
        log = self.folder / "logs" / f"{number:02d}-{stage.name}.log"
        outcome = "interrupted"
        try:
            outcome = _run(command, log, limit, self.environment)
        finally:
            took = time.monotonic() - start
            self._write(number, stage, command, outcome, took, log)
        print(f"[{took:5.1f} s] {stage.name}: {outcome}", flush=True)
        return outcome == "passed"

    def _command(self, stage: Stage) -> list[str]:
        command = stage.command if not self.dry else stage.dry or (*stage.command, "--dry")
        return [word.replace("{folder}", str(self.folder)) for word in command]

    def _write(self, number: int, stage: Stage, command: Sequence[str], outcome: str, took: float, log: Path) -> None:
        shown = " ".join(["python", *command[1:]]).replace(str(self.folder), "OUT")
        lines = [f"## {stage.name}: {stage.asks}", "", f"* command: `{shown}`"]
        lines += [f"* outcome: {outcome}, {took:.1f} s of {stage.limit_s:g}", "", *_output_of(log), ""]
        with self._writing:
            _replace(self.result(number, stage), "\n".join(lines))
            parts = [file.read_text() for file in sorted(self.folder.glob("[0-9][0-9]-*.md"))]
            _replace(self.folder / "gpu.md", "\n".join([self.about, *parts, *self._figures()]))

    def _figures(self) -> list[str]:
        """The final table, from the logs of all stages that have run in this folder."""
        logs = sorted((self.folder / "logs").glob("[0-9][0-9]-*.log"))
        found = gpu_figures.read(line for log in logs for line in log.read_text(errors="replace").splitlines())
        return gpu_figures.table(found, self.dry)


def _run(command: Sequence[str], log: Path, limit_s: float, environment: dict[str, str]) -> str:
    """Run a command; returns how it ended. None of its processes is left behind."""
    with log.open("wb") as out:
        # A session of its own: ranks and compilers of a stage that hangs end with it.
        process = subprocess.Popen(
            command, cwd=REPO, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"ended after {limit_s:.0f} s"
        finally:
            _end(process)
    return "passed" if code == 0 else f"failed with code {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _output_of(log: Path, lines: int = 60) -> list[str]:
    """The output of a stage: its tables if there are any, otherwise the end of its log."""
    text = log.read_text(errors="replace").splitlines()
    begins = next((i for i, line in enumerate(text) if line.startswith(("### ", "# "))), None)
    return text[begins:] if begins is not None else ["```", *text[-lines:], "```"]


def _replace(file: Path, text: str) -> None:
    part = file.with_suffix(".part")
    part.write_text(text)
    part.replace(file)


def environment(folder: Path, wheels: Path | None) -> dict[str, str]:
    """Environment in which CLIF is importable from this checkout without an installation. Raises OSError."""
    site = folder / "site"
    link_checkout(site)
    if wheels is not None:
        packages = sorted(map(str, wheels.glob("*.whl")))
        pip = [PYTHON, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
        subprocess.run([*pip, "--target", str(site), *packages], check=True)
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "CI": "true"}


@contextmanager
def compiling_ahead(folder: Path, env: dict[str, str]) -> Iterator[None]:
    """Compile the kernels of later stages meanwhile: otherwise these would mostly wait for the compiler."""
    with (folder / "logs" / "ahead.log").open("wb") as out:
        # With a lower priority than the stages, which measure.
        command = ["nice", "-n", "10", *script("gpu_ahead")]
        process = subprocess.Popen(
            command, cwd=REPO, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        try:
            yield
        finally:
            _end(process)


IMPORTS = (
    "gpu_bench",
    "bench_kernels",
    "helpers",
    "bodies_tp",
    "clif.rank.worker",
    "clif.control.__main__",
    "clif.launch.run",
)
"""Imports of the stages, checked first: a missing package would fail every stage only after its start."""
ASK = """
import importlib, sys
sys.path += [{benchmarks!r}, {tests!r}]
missing = set()
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing.add(error.name)
if missing:
    sys.exit("this machine lacks " + ", ".join(sorted(missing)))
import gpu_bench
print(gpu_bench.provenance())
"""


def provenance(env: dict[str, str], dry: bool) -> str:
    """Heading of the results: date, machine, versions. Raises ValueError if a package of the stages is missing."""
    folders = {"benchmarks": str(REPO / "benchmarks"), "tests": str(REPO / "tests")}
    command = [PYTHON, "-c", ASK.format(names=IMPORTS, **folders), *(["--dry"] if dry else [])]
    machine = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True)
    if machine.returncode:
        why = (machine.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"{why}: put wheels of what is missing into a folder and name it (--wheels, make gpu WHEELS=)")
    today = datetime.date.today().isoformat()
    return f"# One GPU, {today}\n\n* machine: {machine.stdout.strip()}\n* commit: {commit()}\n"


def chosen(only: str, stages: Sequence[Stage] = STAGES) -> list[tuple[int, Stage]]:
    """The selected stages, with their numbers. Raises ValueError for an unknown name."""
    names = [name for name in only.split(",") if name]
    unknown = set(names) - {stage.name for stage in stages}
    if unknown:
        known = ", ".join(stage.name for stage in stages)
        raise ValueError(f"no stage {', '.join(sorted(unknown))}: choose from {known}")
    return [(n, stage) for n, stage in enumerate(stages, 1) if not names or stage.name in names]


def take_all(session: Session, stages: Sequence[tuple[int, Stage]], again: bool, at_once: bool = False) -> list[str]:
    """Run stages in their order, or all at the same time; returns the names of those that have not passed."""
    with ThreadPoolExecutor(len(stages) if at_once else 1) as pool:
        passed = pool.map(lambda numbered: session.take(*numbered, again), stages)
        return [stage.name for (_, stage), ok in zip(stages, passed, strict=True) if not ok]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results; by default runs/gpu-DATE")
    parser.add_argument("--seconds", type=float, default=480.0, help="time for all stages together")
    parser.add_argument("--only", default="", help="names of stages, with commas")
    parser.add_argument("--again", action="store_true", help="run stages that have passed before, too")
    parser.add_argument("--at-once", action="store_true", help="all at the same time: their times mean nothing")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that this machine lacks")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU: figures mean nothing")
    args = parser.parse_args()
    try:
        stages = chosen(args.only)
    except ValueError as error:
        parser.error(str(error))
    end = time.monotonic() + args.seconds
    folder = (args.out or REPO / "runs" / f"gpu-{datetime.date.today().isoformat()}").resolve()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    env = environment(folder, args.wheels)
    try:
        about = provenance(env, args.dry)
    except ValueError as error:
        parser.error(str(error))
    about += "* all stages at the same time: times mean nothing\n" if args.at_once else ""
    session = Session(folder, env, end, args.dry, about)
    with nullcontext() if args.dry or args.at_once else compiling_ahead(folder, env):
        left = take_all(session, stages, args.again, at_once=args.at_once)
    print(f"results: {folder.name}/gpu.md{'; not passed: ' + ', '.join(left) if left else ''}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
