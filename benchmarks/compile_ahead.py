"""Compiles the kernels of tiles that will be launched later, in many processes that use no GPU.

A job makes the calls of a layer whose tensors have no memory: what is computed by torch costs nothing, and a launch
compiles its kernel for exactly the arguments of the real one and returns. Triton keeps the result on disk, where the
process that launches finds it.

    python benchmarks/compile_ahead.py            # counts what the tuner compiles, and compiles a part of it here
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import sys
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, Self

from checkout import use_checkout

use_checkout()

import torch
import triton
from triton.backends.compiler import GPUTarget
from tune_plan import Gpu, Task, Tiles, candidates_of, tasks

from clif.kernels.candidates import AFTER_TORCH
from clif.kernels.dual_lora_forms import DualLoraLinear
from clif.kernels.dual_lora_host import KernelLauncher
from clif.kernels.dual_lora_reference import MergedLinear, Projection, Segment
from clif.kernels.tile_file import TileFile
from clif.kernels.tiles import GradTiles, LinearTiles
from clif.kernels.tuning import Fixed


class Job(Protocol):
    """Launches whose kernels are to be compiled. It is sent to another process."""

    def key(self) -> tuple[Any, ...]:
        """Jobs with the same key compile the same kernels."""
        ...

    def __call__(self) -> None: ...


@dataclass(frozen=True)
class CompileJob:
    """Launches of one merged layer. lengths: rows of each slot; backward: of rows that all use the shadow."""

    sizes: tuple[int, ...]
    depth: int
    r: int
    lengths: tuple[tuple[int, int | None], ...]
    backward: bool
    tiles: Tiles

    def key(self) -> tuple[Any, ...]:
        """Jobs with the same key compile the same kernels: widths are arguments, like numbers of programs."""
        tiles = self.tiles
        if isinstance(tiles, LinearTiles):
            tiles = replace(tiles, programs=1, shrinkers=1, form="three" if tiles.form in AFTER_TORCH else tiles.form)
        full = isinstance(tiles, LinearTiles) and all(size % tiles.block_n == 0 for size in self.sizes)
        even = all(width % 16 == 0 for width in (*self.sizes, self.depth))
        return len(self.sizes), self.r, self.backward, tiles, full, even

    def __call__(self) -> None:
        layer = hollow_layer(self.sizes, self.depth, self.r)
        tiles, factors = self.tiles, GradTiles()
        if isinstance(tiles, GradTiles):
            tiles, factors = LinearTiles(), tiles
        elif tiles.form in AFTER_TORCH:
            tiles = replace(tiles, form="three")
        fused = DualLoraLinear(layer, KernelLauncher(torch.device("cpu"), Fixed(tiles, factors)))
        empty = partial(layer.weight.new_empty, sum(count for count, _ in self.lengths))
        grad, hidden = empty(sum(self.sizes)), empty(layer.a.shape[1])
        if isinstance(self.tiles, GradTiles):
            fused.factor_gradients(grad, empty(self.depth), hidden, hidden)
        elif self.backward:
            fused.through(grad, True)
        else:
            fused.forward(empty(self.depth), segments_of(self.lengths))


def hollow_layer(sizes: Sequence[int], depth: int, r: int, slots: int = 4) -> MergedLinear:
    """A merged layer in bfloat16 whose tensors have no memory."""
    empty = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    ranks, ends = len(sizes) * r, [sum(sizes[: i + 1]) for i in range(len(sizes))]
    members = tuple(Projection(end - size, end, i) for i, (size, end) in enumerate(zip(sizes, ends, strict=True)))
    a, b = empty((slots, ranks, depth)), empty((slots, sum(sizes), ranks))
    return MergedLinear(empty((sum(sizes), depth)), None, a, b, r, 0.5, members)


def segments_of(lengths: Sequence[tuple[int, int | None]]) -> tuple[Segment, ...]:
    """Rows of each slot, one after the other."""
    ends = [sum(count for count, _ in lengths[: i + 1]) for i in range(len(lengths))]
    return tuple(
        Segment(end - count, end, slot) for (count, slot), end in zip(lengths, ends, strict=True) if slot is not None
    )


class NoGpu:
    """What Triton asks its driver before it compiles, answered for a GPU that is not used here."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(capability: int) -> None:
    """From now on every launch of this process compiles its kernel for GPUs of this capability, and runs nothing."""
    os.nice(10)
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(NoGpu(capability))
    launch = triton.runtime.JITFunction.run

    def warm_up(kernel: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        return launch(kernel, *args, warmup=True, **options)

    triton.runtime.JITFunction.run = warm_up


def run_job(job: Job) -> float:
    """CPU seconds. Raises RuntimeError with the compiler's message: its own errors cannot be sent to others."""
    before = _cpu_seconds()
    try:
        job()
    except Exception as error:  # noqa: BLE001 - whatever it was, it is the result
        text = str(error).strip().splitlines()
        raise RuntimeError(f"{type(error).__name__}: {text[-1] if text else ''}") from None
    return _cpu_seconds() - before


def _cpu_seconds() -> float:
    """Of this process and its children, the assembler among them."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


class CompilePool:
    """Processes that compile, one for each core but one. Jobs that compile the same kernels are done once."""

    def __init__(self, capability: int | None, processes: int = 0) -> None:
        """capability: of the GPU; None: nothing is compiled, as in the interpreter. processes: 0 for the default."""
        self._done: dict[tuple[Any, ...], Future[float]] = {}
        self._capability, self._processes = capability, processes or max(1, len(os.sched_getaffinity(0)) - 1)
        self._pool = self._started()

    def _started(self) -> ProcessPoolExecutor | None:
        if self._capability is None:
            return None
        context = multiprocessing.get_context("forkserver")
        # The processes are copies of one that has imported these.
        context.set_forkserver_preload(["torch", "triton"])
        return ProcessPoolExecutor(self._processes, context, initializer=compile_only, initargs=(self._capability,))

    def submit(self, job: Job) -> Future[float]:
        """Jobs are begun in the order in which they were given. The result raises RuntimeError, see run_job."""
        key = job.key()
        if key not in self._done:
            try:
                self._done[key] = self._submit(job)
            except BrokenExecutor:
                # A compiler that crashed took the pool with it: only what was asked for until then is lost.
                self._pool = self._started()
                self._done[key] = self._submit(job)
        return self._done[key]

    def _submit(self, job: Job) -> Future[float]:
        if self._pool:
            return self._pool.submit(run_job, job)
        nothing: Future[float] = Future()
        nothing.set_result(0.0)
        return nothing

    def cpu_seconds(self) -> tuple[int, float]:
        """Jobs that are done, and what they took together."""
        done = [f.result() for f in self._done.values() if f.done() and not f.cancelled() and not f.exception()]
        return len(done), sum(done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)


class Launched:
    """Counts the kernels that this process launches, as Triton's listener: found on disk, or compiled here."""

    def __init__(self) -> None:
        self.found = self.compiled = 0

    def __call__(self, *, cache_hit: bool, **_: Any) -> None:
        self.found += cache_hit
        self.compiled += not cache_hit


def counted(gpu: Gpu) -> tuple[int, dict[tuple[Any, ...], CompileJob]]:
    """Candidates of the tuner's tasks, without those that follow from others' results, and one job for each key."""
    number, jobs = 0, {}
    for task in tasks(dry=False):
        for tiles in candidates_of(task, gpu, TileFile()) if task.r != 8 else ():
            number += 1
            job = job_of(task, tiles)
            jobs.setdefault(job.key(), job)
    return number, jobs


def job_of(task: Task, tiles: Tiles) -> CompileJob:
    return CompileJob(task.sizes, task.depth, task.r, task.lengths, task.what == "backward", tiles)


def main() -> int:
    """Count what the tuner compiles for an H100, and compile a part of it here."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--jobs", type=int, default=40, help="how many jobs to compile, one after the other")
    args = parser.parse_args()
    number, jobs = counted(Gpu(132, 90))
    sample = random.Random(0).sample(list(jobs.values()), args.jobs)
    with TemporaryDirectory() as cache, CompilePool(90, processes=1) as pool:
        # The pool starts its processes with the first job.
        os.environ["TRITON_CACHE_DIR"] = cache
        for job in sample:
            pool.submit(job).result()
        kernels = len(list(Path(cache).glob("*/*.cubin")))
        _, took = pool.cpu_seconds()
    mean = took / len(sample)
    print(f"{number} candidates, {len(jobs)} compilations; Triton {triton.__version__}")
    print(f"{len(sample)} of them: {kernels} kernels, {took:.1f} CPU seconds, {mean:.2f} each")
    print(f"all: {mean * len(jobs):.0f} CPU seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
