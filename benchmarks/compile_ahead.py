"""Compiles the kernels of tiles that will be launched later, in many processes that use no GPU.

A job makes the calls of a layer whose tensors have no memory: what is computed by torch costs nothing, and a launch
compiles its kernel for exactly the arguments of the real one and returns. Triton keeps the result on disk, where the
process that launches finds it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from checkout import use_checkout

use_checkout()

import torch
import triton
from triton.backends.compiler import GPUTarget

from clif.kernels.candidates import AFTER_TORCH
from clif.kernels.dual_lora_forms import DualLoraLinear
from clif.kernels.dual_lora_host import KernelLauncher
from clif.kernels.dual_lora_reference import MergedLinear, Projection, Segment
from clif.kernels.tiles import GradTiles, LinearTiles
from clif.kernels.tuning import Fixed

Tiles = LinearTiles | GradTiles


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


def run_job(job: CompileJob) -> None:
    """Raises RuntimeError with the compiler's message: its own errors cannot be sent to another process."""
    try:
        job()
    except Exception as error:  # noqa: BLE001 - whatever it was, it is the result
        text = str(error).strip().splitlines()
        raise RuntimeError(f"{type(error).__name__}: {text[-1] if text else ''}") from None


class CompilePool:
    """Processes that compile, one for each core but one. Jobs that compile the same kernels are done once."""

    def __init__(self, capability: int | None) -> None:
        """capability: of the GPU; None: nothing is compiled, as in the interpreter."""
        self._done: dict[tuple[Any, ...], Future[None]] = {}
        self._pool: ProcessPoolExecutor | None = None
        if capability is not None:
            context = multiprocessing.get_context("forkserver")
            # The processes are copies of one that has imported torch and Triton.
            context.set_forkserver_preload(["torch", "triton"])
            processes = max(1, len(os.sched_getaffinity(0)) - 1)
            self._pool = ProcessPoolExecutor(processes, context, initializer=compile_only, initargs=(capability,))

    def submit(self, job: CompileJob) -> Future[None]:
        """Jobs are begun in the order in which they were given. The result raises RuntimeError, see run_job."""
        key = job.key()
        if key not in self._done:
            self._done[key] = self._pool.submit(run_job, job) if self._pool else _nothing()
        return self._done[key]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _nothing() -> Future[None]:
    done: Future[None] = Future()
    done.set_result(None)
    return done
