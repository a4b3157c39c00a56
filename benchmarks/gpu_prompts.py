"""GPU stage: captured steps with prompts, 1B: whether they are right, and how long they take.

    python benchmarks/gpu_prompts.py [--dry]

The kernel against its specification; a replay of each size against its own region run eagerly, bit for bit, and near
the step that is launched kernel by kernel; answers with and without graphs and overlap, of prompts in chunks. Then
milliseconds of steps with prompts, captured and eager, for a few mixes.
"""

from __future__ import annotations

import statistics
import sys
import time
from functools import cache, partial

import torch
from gpu_bench import add_lines, graph_seconds, spread
from gpu_checks import Check, run_checks
from gpu_faults import DEVICE, DRY_RUN, large, serve_once, small
from gpu_figures import say
from msgspec import structs

from clif.config import ConfigError
from clif.engine.engine import Engine
from clif.engine.prompt_graphs import PromptGraphs
from clif.engine.scheduler import Chunk
from clif.kernels.paged_prefill_host import PagedPrefill
from clif.kernels.testing.paged_decode_specification import violations
from clif.kernels.testing.paged_prefill_specification import random_prefill
from clif.types import NO_TOKEN

MIXES = (((12,), 3), ((20, 20), 0)) if DRY_RUN else (((128,), 31), ((512,), 0), ((512,) * 4, 0))
"""Steps with prompts as (tokens of each new prompt, requests that continue an answer)."""
STEPS = 1 if DRY_RUN else 10
"""Measured steps of each mix."""
RUNNING, PIECE, FAR = (1, 32, 1e-4) if DRY_RUN else (5, 200, 0.1)
"""Answers beside prompts, tokens of a prompt, and how far bfloat16 lets two ways of attention be apart."""


def every_captured_size_with_prompts() -> str:
    """A replay against its own region run eagerly, with prompts that it was not captured with; and the eager step."""
    engine = engine_of("auto")
    graphs = _captured(engine)
    return "; ".join(fault for size in reversed(graphs.sizes) if (fault := _prompt_fault(engine, graphs, size)))


def _prompt_fault(engine: Engine, graphs: PromptGraphs, size: int) -> str:
    runner, scheduler = engine.runner, engine.scheduler
    chunks = _with_prompts(engine, min(size, engine.config.max_prefill_tokens + RUNNING))
    with engine.streams.serving(), torch.no_grad():
        batch = runner.fill(chunks)
        assert batch.captured is graphs.captured[size], f"a step of {size} rows is not captured as such"
        before, count = runner._last_tokens.clone(), batch.sampling
        batch.captured.replay()
        logits, tokens = (t[:count].clone() for t in batch.captured.result)
        runner._last_tokens.copy_(before)
        again, tokens_again = (t[:count].clone() for t in graphs.step(size))
        runner._last_tokens.copy_(before)
        plain, _ = runner.compute(runner._batches.fill(chunks, paged=True))
    large().sync()
    scheduler.settle(chunks, tokens.tolist(), engine.clock())
    large().cancel_all(engine)
    found = [("its region", again, 0.0), ("the eager step", plain, FAR)]
    apart = [(name, float((x - logits).float().norm() / logits.float().norm()), most) for name, x, most in found]
    print(f"    {size} rows: " + ", ".join(f"{error:.1e} from {name}" for name, error, _ in apart), flush=True)
    wrong = [f"{error:.1e} from {name}" for name, error, most in apart if not error <= most]
    if not torch.equal(tokens, tokens_again) or int(tokens.min()) == NO_TOKEN:
        wrong.append("other tokens than its region")
    return f"{size} rows: {', '.join(wrong)}" if wrong else ""


def _with_prompts(engine: Engine, rows: int) -> list[Chunk]:
    """A step of so many rows: answers under way, a prompt behind a reused block, and new ones."""
    bench, scheduler = large(), engine.scheduler
    running = [bench.request(20, 8) for _ in range(RUNNING)]
    for request in running:
        scheduler.add(request, engine.clock())
    while any(s.num_uncomputed_tokens > 1 for s in scheduler.sequences):
        engine.serve()
    block = engine.config.block_size
    again = structs.replace(bench.request(block + 8, 2), prompt=running[0].prompt[:block] + bench.request(8, 2).prompt)
    scheduler.add(again, engine.clock())
    left = rows - RUNNING - 8
    while left > 0:
        scheduler.add(bench.request(min(left, PIECE), 2), engine.clock())
        left -= PIECE
    chunks = scheduler.schedule()
    assert sum(c.stop - c.start for c in chunks) == rows, f"{rows} rows were asked for"
    assert any(c.start == block for c in chunks), "no block was reused"
    return chunks


def prompts_in_chunks() -> str:
    """Prompts that a step's budget cuts, behind a common beginning and beside answers: graphs change no token."""
    found = []
    for graphs, overlap in (("off", False), ("auto", False), ("auto", True)):
        engine = small().engine(graphs=graphs, overlap=overlap, max_prefill_tokens=20)
        answers: dict[int, list[int]] = {}
        common = small().request(18, 1, seed=0).prompt
        for i in range(6 if DRY_RUN else 24):
            own = small().request(2 + 3 * i % 8, 7, seed=1 + i)
            request = structs.replace(own, id=2000 + i, prompt=(common[: i % 19] + own.prompt))
            answers[request.id] = []
            engine.scheduler.add(request, engine.clock())
            serve_once(engine, answers)
        while engine.serving:
            serve_once(engine, answers)
        found.append(answers)
    different = [sum(one[id] != tokens for id, tokens in found[0].items()) for one in found[1:]]
    return f"{different} of {len(found[0])} answers differ, without and with overlap" if any(different) else ""


def prefill() -> str:
    """The kernel for prompts of captured steps within the specification, at the shapes of 1B and 8B models."""
    shapes = ((4, 2, 16),) if DRY_RUN else ((32, 8, 64), (32, 8, 128))
    chunks = ((0, 18), (16, 17), (5, 22)) if DRY_RUN else ((0, 150), (64, 65), (90, 260), (0, 2))
    wrong = []
    for heads, kv_heads, d in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            batch = random_prefill(chunks, heads, kv_heads, d, 16, dtype=dtype, device=DEVICE)
            kernel, q = PagedPrefill(), batch.rows.q
            out = q.new_zeros(q.shape).flatten(1)
            table = batch.table(kernel.tile_tokens(heads // kv_heads, d, q.itemsize))
            kernel.attend(q, batch.rows.cache, table, batch.rows.scale, out)
            wrong += [f"{heads} heads of {d}, {dtype}: {fault}" for fault in violations(batch.rows, out)]
    return "; ".join(wrong)


@cache
def engine_of(graphs: str) -> Engine:
    """An engine whose steps hold the prompts of every mix, with captured steps or without."""
    budget = max(large().scale.prefill, *(sum(prompts) for prompts, _ in MIXES))
    return large().engine(graphs=graphs, overlap=False, max_prefill_tokens=budget)


def times() -> str:
    """Prints the figures: steps with new prompts beside answers, each from its schedule to its tokens."""
    scale, graphs = large().scale, _captured(engine_of("auto"))
    lines = [
        f"### Steps with prompts, {scale.shown(scale.shapes[0])}, {scale.dtype}",
        "",
        "| prompt tokens + answers | captured, ms | eager, ms | eager / captured | its graph alone |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    add_lines(lines, [(str(mix), partial(_line, *mix)) for mix in MIXES])
    print(f"\nCapturing {len(graphs.sizes)} sizes of up to {graphs.sizes[-1]} rows took {graphs.capture_s:.2f} s.")
    return next((line for line in lines if "FAILED " in line), "")


def _line(prompts: tuple[int, ...], answers: int) -> str:
    captured, eager = engine_of("auto"), engine_of("off")
    seconds, eager_s = (_steps(engine, prompts, answers) for engine in (captured, eager))
    graphs, device = _captured(captured), large().device
    size = next(size for size in graphs.sizes if size >= sum(prompts) + answers)
    alone_s = graph_seconds(graphs.captured[size], device)
    ratio = statistics.median(eager_s) / statistics.median(seconds)
    if answers:
        say("prompt-1b", statistics.median(seconds) * 1e3, f"{spread(eager_s, 1e-3)} ms eager")
    times = f"{spread(seconds, 1e-3)} | {spread(eager_s, 1e-3)} | {ratio:.2f} | {alone_s * 1e3:.3g} of {size} rows"
    return f"| {len(prompts)} x {prompts[0]} + {answers} | {times} |"


def _captured(engine: Engine) -> PromptGraphs:
    if engine.runner.prompt_graphs is None:
        raise ConfigError("no step with prompts is captured, see the log")
    return engine.runner.prompt_graphs


def _steps(engine: Engine, prompts: tuple[int, ...], answers: int) -> list[float]:
    """Seconds of steps of this mix, without the first two."""
    bench, seconds = large(), list[float]()
    for _ in range(answers):
        engine.scheduler.add(bench.request(bench.scale.prompt // 2, bench.scale.answer), engine.clock())
    while any(s.num_uncomputed_tokens > 1 for s in engine.scheduler.sequences):
        engine.serve()
    for _ in range(STEPS + 2):
        added = [bench.request(length, 2) for length in prompts]
        for request in added:
            engine.scheduler.add(request, engine.clock())
        bench.sync()
        start = time.perf_counter()
        engine.serve()
        seconds.append(time.perf_counter() - start)
        for request in added:
            engine.scheduler.cancel(request.id)
    bench.cancel_all(engine)
    return seconds[2:]


CHECKS: tuple[tuple[str, Check], ...] = (
    ("every captured size with prompts replays what its region computes", every_captured_size_with_prompts),
    ("milliseconds of steps with prompts", times),
    ("prompts in chunks and behind a common beginning: graphs change no token", prompts_in_chunks),
    ("attention of prompts to the cache within the specification", prefill),
)


if __name__ == "__main__":
    sys.exit(run_checks("Captured steps with prompts", CHECKS))
