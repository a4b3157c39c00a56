"""Compiles the kernels of later GPU stages, in parallel and without launching them: Triton caches the result.

    python benchmarks/gpu_ahead.py            # started by gpu_stages.py beside the first stages
    python benchmarks/gpu_ahead.py --quantised  # those of gpu_quantised.py alone, which starts it
    python benchmarks/gpu_ahead.py --dry      # in the interpreter, tiny shapes: shows that every job reaches its kernel

A job builds and calls the same objects as a stage, so that each kernel is compiled for exactly the same arguments. Its
launch becomes a warm-up, which compiles and returns.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
from bench_kernels import compile_case
from kernel_cases import CASES, DRY_CASES, AnyCase
from tune_gpu import Tuner
from tune_plan import MODELS

from clif.engine.graphs import decode_sizes
from clif.engine.prompt_graphs import prompt_sizes
from clif.kernels.dual_lora_forms import DualLoraLinear
from clif.kernels.dual_lora_host import KernelLauncher
from clif.kernels.dual_lora_reference import SHADOW
from clif.kernels.paged_decode_host import PagedDecode
from clif.kernels.paged_prefill_host import PagedPrefill
from clif.kernels.quantised_host import QuantisedKernels
from clif.kernels.testing.dual_lora_specification import computed, random_batch, random_layer
from clif.kernels.testing.elementwise_specification import Draw, random_gate, random_heads, random_norm
from clif.kernels.testing.elementwise_specification import computed as computed_parts
from clif.kernels.testing.paged_decode_specification import random_decode
from clif.kernels.testing.paged_prefill_specification import random_prefill
from clif.kernels.tuning import Defaults, TileTable, load_table, table_path
from clif.models.quantising import FORMATS

DRY_RUN = "--dry" in sys.argv
DEVICE = torch.device("cpu" if DRY_RUN else "cuda")


@dataclass(frozen=True)
class LinearJob:
    """Forward of a merged layer, and its backward if rows of the shadow are among them."""

    sizes: tuple[int, ...]
    depth: int
    r: int
    lengths: tuple[tuple[int, int | None], ...]
    dtype: str = "bfloat16"
    bias: bool = False

    def __call__(self) -> None:
        dtype = getattr(torch, self.dtype)
        layer = random_layer(self.sizes, self.depth, self.r, dtype=dtype, device=str(DEVICE), bias=self.bias)
        computed(random_batch(layer, self.lengths), DualLoraLinear(layer, KernelLauncher(DEVICE, tiling())))


@dataclass(frozen=True)
class DecodeJob:
    """Attention of decode rows with heads of one size."""

    heads: int
    kv_heads: int
    d: int
    block_size: int
    dtype: str

    def __call__(self) -> None:
        dtype = getattr(torch, self.dtype)
        lengths = (3, 17) if DRY_RUN else (384,) * 64
        batch = random_decode(
            lengths, self.heads, self.kv_heads, self.d, self.block_size, dtype=dtype, device=str(DEVICE)
        )
        out = batch.q.new_zeros(batch.q.shape).flatten(1)
        PagedDecode(DEVICE).attend(batch.q, batch.cache, batch.table(), batch.scale, out)


@dataclass(frozen=True)
class PrefillJob:
    """Attention of prompts in captured steps, with heads of one size."""

    heads: int
    kv_heads: int
    d: int
    dtype: str

    def __call__(self) -> None:
        dtype = getattr(torch, self.dtype)
        batch = random_prefill(
            ((0, 18), (5, 22)), self.heads, self.kv_heads, self.d, 16, dtype=dtype, device=str(DEVICE)
        )
        kernel, q = PagedPrefill(), batch.rows.q
        table = batch.table(kernel.tile_tokens(self.heads // self.kv_heads, self.d, q.itemsize))
        kernel.attend(q, batch.rows.cache, table, batch.rows.scale, q.new_zeros(q.shape).flatten(1))


@dataclass(frozen=True)
class PartsJob:
    """What a layer computes between its products, forward and backward. inner: width of the gate."""

    width: int
    heads: int
    kv_heads: int
    d: int
    inner: int
    dtype: str

    def __call__(self) -> None:
        draw, rows = Draw(getattr(torch, self.dtype), str(DEVICE)), 3
        # The first norm of a layer has nothing to add; the last one's sum has no other reader.
        for adds, learns in ((True, True), (False, True), (True, False)):
            computed_parts(random_norm(rows, self.width, draw, adds=adds, learns=learns))
        computed_parts(random_heads(rows, self.heads, self.kv_heads, self.d, draw))
        computed_parts(random_gate(rows, self.inner, draw))


@dataclass(frozen=True)
class CaseJob:
    """All ways of a case of the kernels' benchmark."""

    case: AnyCase

    def __call__(self) -> None:
        compile_case(self.case)


@dataclass(frozen=True)
class QuantisedJob:
    """Products with a weight of 8 or 4 bits, of a few and of many rows."""

    kind: str
    out: int
    depth: int
    rows: tuple[int, ...]
    dtype: str
    experts: int = 0

    def __call__(self) -> None:
        dtype, kernels = getattr(torch, self.dtype), QuantisedKernels(DEVICE)
        matrix = FORMATS[self.kind](torch.ones(self.out, self.depth, dtype=dtype, device=DEVICE))
        for rows in self.rows:
            kernels.product(torch.ones(rows, self.depth, dtype=dtype, device=DEVICE), matrix, None)
        kernels.dense(matrix, dtype)
        if self.experts:
            ends = torch.zeros(self.experts, dtype=torch.int32, device=DEVICE)
            kernels.grouped(torch.ones(self.rows[-1], self.depth, dtype=dtype, device=DEVICE), matrix, ends)


Job = LinearJob | DecodeJob | PrefillJob | PartsJob | CaseJob | QuantisedJob
SHAPES = {"1b": PartsJob(2048, 32, 8, 64, 8192, "bfloat16"), "8b": PartsJob(4096, 32, 8, 128, 14336, "bfloat16")}


def jobs(dry: bool) -> Iterator[Job]:
    """In the order in which the stages need them."""
    if dry:
        yield LinearJob((32, 16), 32, 8, ((3, 0), (4, SHADOW)))
        yield DecodeJob(4, 2, 16, 4, "float32")
        yield PrefillJob(4, 2, 16, "float32")
        yield PartsJob(32, 4, 2, 16, 48, "float32")
        yield CaseJob(DRY_CASES[0])
        yield QuantisedJob("int8", 32, 64, (3,), "float32")
        return
    yield from of_model("1b")
    yield from quantised()
    # The small model in float32 of the first stage: 4 heads on 2 of 16 numbers, 64 wide.
    yield PartsJob(64, 4, 2, 16, 128, "float32")
    yield DecodeJob(4, 2, 16, 16, "float32")
    yield PrefillJob(4, 2, 16, "float32")
    for sizes, depth in (((64, 32, 32), 64), ((64,), 64), ((128, 128), 64), ((64,), 128)):
        yield LinearJob(sizes, depth, 8, ((12, 0),), "float32")
    yield from of_model("8b")
    kinds = ((13, 0), (5, None), (40, 1), (71, SHADOW))
    yield LinearJob((512, 256), 1024, 16, kinds, "float32", bias=True)
    yield LinearJob((4096,), 4096, 16, ((48, 0), (16, 1)))
    yield DecodeJob(21, 7, 80, 12, "float32")
    yield from map(CaseJob, CASES)


def quantised() -> Iterator[QuantisedJob]:
    """Products of a full batch of the 1B shape, and of the check of a start."""
    for kind in ("int8", "int4", "fp8"):
        yield QuantisedJob(kind, 72, 288, (5, 50, 200), "bfloat16", experts=3)
        for sizes, depth in (*MODELS["1b"], ((128256,), 2048)):
            yield QuantisedJob(kind, sum(sizes), depth, (64,), "bfloat16")


def of_model(model: str) -> Iterator[Job]:
    """Kernels of the captured steps of all sizes, and those of training between products."""
    parts = SHAPES[model]
    yield parts
    yield DecodeJob(parts.heads, parts.kv_heads, parts.d, 16, parts.dtype)
    yield PrefillJob(parts.heads, parts.kv_heads, parts.d, parts.dtype)
    tiles = tiling()
    for sizes, depth in MODELS[model]:
        # One size for each way to cut rows and columns, the largest first, as they are captured.
        captured = (*decode_sizes(64), *prompt_sizes(64, 2048))
        by_tiles = {tiles.linear(rows, depth, sum(sizes), 8, False): rows for rows in captured}
        for rows in sorted(by_tiles.values(), reverse=True):
            yield LinearJob(sizes, depth, 8, ((rows, 0),))


def tiling() -> Defaults | TileTable:
    """The tiles that captured steps use here: of the table, if this GPU was tuned."""
    defaults = Tuner.here(DRY_RUN).defaults
    path = None if DRY_RUN else table_path(torch.cuda.get_device_name(DEVICE))
    return load_table(path, replace(defaults, captured=True)) if path and path.is_file() else defaults


def compile_only() -> None:
    """Every launch of this process compiles its kernel and runs nothing."""
    if DRY_RUN:
        return
    launch = triton.runtime.JITFunction.run

    def warm_up(kernel: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        return launch(kernel, *args, warmup=True, **options)

    triton.runtime.JITFunction.run = warm_up


def _work(job: Job) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def main() -> int:
    alone = "--quantised" in sys.argv
    wanted: list[Job] = list(quantised()) if alone and not DRY_RUN else list(jobs(DRY_RUN))
    processes = max(1, (os.cpu_count() or 2) // (1 if alone else 2))
    context, failed = multiprocessing.get_context("spawn"), 0
    with ProcessPoolExecutor(min(processes, len(wanted)), context, initializer=compile_only) as pool:
        running = {pool.submit(_work, job): job for job in wanted}
        for done in as_completed(running):
            error = done.exception()
            failed += error is not None
            shown = f"{type(error).__name__}: {error}" if error else f"{done.result():.1f} s"
            print(f"{running[done]}: {shown}", flush=True)
    print(f"{len(wanted) - failed} of {len(wanted)} compiled")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
