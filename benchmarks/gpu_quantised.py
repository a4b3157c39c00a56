"""GPU stage: decode steps with weights of 16, 8 and 4 bits in one run, and the products of their layers by themselves.

    python benchmarks/gpu_quantised.py [--dry] [SHAPE ...]

The limit of a step is the time to read the weights, as they are stored, and the KV cache once, at the copy rate
measured just before. Products are replays of a graph over matrices that do not fit the cache together.
"""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch
from checkout import REPO
from gpu_bench import Bench, Scale, add_lines, run_stage, spread
from gpu_decode import Decode
from timing import Way, contest
from torch.nn.functional import linear

from clif.config.model import ModelConfig
from clif.engine.runner import ModelRunner
from clif.kernels.fp8_matrix import Fp8Matrix
from clif.kernels.kv_types import FP8, FP8_MOST
from clif.models.quantised_weight import QuantisedWeight
from clif.models.quantising import FORMATS, choose_quantised
from clif.models.weights.loading import LoadedModel, load_model

STORED = tuple(kind for kind in FORMATS if kind != "nf4" or find_spec("bitsandbytes"))
KINDS: tuple[tuple[str, str], ...] = (("auto", "auto"), *((kind, "auto") for kind in STORED), ("auto", "fp8"))
"""model.weight_dtype and engine.kv_dtype of each measurement."""
ROWS = (1, 64, 256, 1024)
LONGEST_S = 30.0
"""Seconds to wait for the compiler, which otherwise works for one kernel after the other."""
IN_CACHE = 256 << 20
"""Bytes that are certainly more than the cache of any GPU keeps, with those that a product reads between."""


@contextmanager
def compiling(dry: bool) -> Iterator[None]:
    """Compile the kernels of these weights meanwhile, in other processes, and wait for them at the end."""
    if dry:
        yield
        return
    command = [sys.executable, str(Path(__file__).parent / "gpu_ahead.py"), "--quantised"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
        process.wait(LONGEST_S)
    except subprocess.TimeoutExpired:
        print("the kernels are not compiled yet: the lines below take longer", flush=True)
    finally:
        process.kill()
        process.wait()


def engine_line(shape: str, scale: Scale, loaded: LoadedModel, kind: str, kv_dtype: str) -> str:
    """A decode step of a full batch, captured and overlapped. Nothing else is captured: that would take most of the
    time."""
    own = replace(loaded, model=copy.deepcopy(loaded.model))
    bench = Bench(shape, scale, kind, own, kv_dtype=kv_dtype)
    decode = Decode(shape, scale, bench)
    one_size = patch("clif.engine.graphs.decode_sizes", lambda most: [most])
    with one_size, patch.object(ModelRunner, "capture_prompts", lambda *_: None):
        engine = bench.engine(graphs="auto", overlap="auto")
    steps = decode.run(engine)
    share, rate = decode.share(engine, steps), scale.batch / steps.median_s
    mib = bench.weights / 2**20
    del engine, decode, bench
    gc.collect()
    return f"| {kind} | {kv_dtype} | {spread(steps.seconds, 1e-3)} | {rate:.0f} | {share:.1%} | {mib:.0f} |"


def ways_of(weights: list[torch.Tensor], x: torch.Tensor) -> Iterator[tuple[str, Way]]:
    """Every way to multiply with these weights, which are one layer's and its copies."""
    yield "16 bits", lambda layer: linear(x, weights[layer])
    for kind in STORED:
        kernels = kernels_of(kind, x.device, x.dtype)
        bases = [QuantisedWeight(FORMATS[kind](weight), None, x.dtype, kernels) for weight in weights]
        yield kind, partial(_forward, bases, x)
    if x.device.type == "cuda":
        yield "fp8, rows as well", partial(_scaled, [Fp8Matrix.of(weight) for weight in weights], x)


kernels_of = cache(choose_quantised)


def _forward(bases: list[QuantisedWeight], x: torch.Tensor, layer: int) -> torch.Tensor:
    return bases[layer].forward(x)


def _scaled(matrices: list[Fp8Matrix], x: torch.Tensor, layer: int) -> torch.Tensor:
    """torch's product of FP8 numbers, whose rows are rounded first."""
    scale = (x.abs().amax(1, keepdim=True).float() / FP8_MOST).clamp_min_(1e-12)
    rows = (x / scale).to(FP8)
    matrix = matrices[layer]
    return torch._scaled_mm(
        rows, matrix.numbers.T, scale_a=scale, scale_b=matrix.scales.T, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def product_line(rows: int, out: int, depth: int, scale: Scale) -> str:
    """Microseconds of each way, and what an FP8 product with rounded rows differs by."""
    device, dtype = torch.device(scale.device), getattr(torch, scale.dtype)
    copies = max(2, IN_CACHE // (out * depth)) if device.type == "cuda" else 2
    weights = [torch.randn(out, depth, device=device, dtype=dtype) for _ in range(copies)]
    x = torch.randn(rows, depth, device=device, dtype=dtype)
    found, failed = contest(dict(ways_of(weights, x)), copies, 5 if device.type == "cuda" else 1, device)
    names = ("16 bits", *STORED, "fp8, rows as well")
    cells = [f"{found[name].median:.1f}" if name in found else failed.get(name, "-") for name in names]
    return f"| {depth} to {out} | {rows} | {' | '.join(cells)} |"


def measure(shape: str, scale: Scale) -> list[str]:
    """Markdown of one shape."""
    dry = scale.device == "cpu"
    lines = [
        f"### Decode with weights of 16, 8 and 4 bits, {scale.shown(shape)}, {scale.batch} requests, {scale.dtype}", "",
        "| weights | KV cache | whole step, ms | tokens/s | of the limit | MiB of linear layers and head |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    with compiling(dry):
        tree = {"path": f"random:{REPO / 'configs' / 'models' / f'{scale.shown(shape)}.json'}", "dtype": scale.dtype}
        loaded = load_model(ModelConfig(**tree, max_context=64), torch.device(scale.device))
        dense = [(f"weights {KINDS[0][0]}", partial(engine_line, shape, scale, loaded, *KINDS[0]))]
        add_lines(lines, dense)
    work: list[tuple[str, Callable[[], str]]] = [
        (f"weights {kind}, cache {kv}", partial(engine_line, shape, scale, loaded, kind, kv)) for kind, kv in KINDS[1:]
    ]
    add_lines(lines, work)
    lines += ["", "| layer | rows | " + " | ".join(["16 bits, us", *STORED, "fp8, rows as well"]) + " |"]
    lines.append("|---" * (3 + len(STORED) + 1) + "|")
    shapes = [(64, 32)] if dry else [(3072, 2048), (16384, 2048), (28672, 4096)]
    products = [
        (f"{rows} rows, {depth} to {out}", partial(product_line, rows, out, depth, scale))
        for out, depth in shapes
        for rows in (ROWS[:2] if dry else ROWS)
    ]
    add_lines(lines, products)
    return lines


if __name__ == "__main__":
    run_stage(measure)
