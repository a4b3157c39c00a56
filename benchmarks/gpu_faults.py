"""GPU stage: what no GPU has run yet, each part for itself and short, so that a minute shows what fails.

    python benchmarks/gpu_faults.py [--dry]

Captured steps against the same region run eagerly, bit for bit; answers with and without graphs and overlap, with
promotions and draws; waits of the host where there must be none; kernels against their references; training beside
serving, in every way, against training between steps.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from checkout import REPO
from gpu_bench import DRY, FULL, Bench, add_job, graphs_of, memory_mib, run_step
from gpu_checks import Check, run_checks
from gpu_coserving import WAYS

from clif import LLM
from clif.engine.engine import Engine
from clif.engine.jobs import Slices
from clif.kernels.testing.elementwise_specification import (
    Draw,
    computed,
    random_gate,
    random_heads,
    random_norm,
    violations,
)
from clif.models.varlen import varlen_fault
from clif.training.trainer import ShadowTrainer
from clif.types import NO_TOKEN, Request, Sampling

DRY_RUN = "--dry" in sys.argv
DEVICE = "cpu" if DRY_RUN else "cuda"
SMALL = replace(DRY, device=DEVICE, batch=6 if DRY_RUN else 12)
"""Small enough for many engines, and float32, where no rounding turns a greedy token into another one."""
ANSWER, STEPS, PART = (7, 2, 2) if DRY_RUN else (24, 3, 4)
"""Tokens of the longest answer, optimizer steps beside serving, and requests of each adapter version."""


@cache
def large() -> Bench:
    scale = DRY if DRY_RUN else replace(FULL, buckets=FULL.buckets[-1:])
    return Bench(scale.shapes[0], scale)


@cache
def small() -> Bench:
    return Bench(SMALL.shapes[0], SMALL)


def every_captured_size() -> str:
    """A replay against its own region run eagerly, with other requests than it was captured with."""
    engine = large().engine(overlap=False)
    found = {size: _difference(engine, size) for size in reversed(graphs_of(engine).sizes)}
    return ", ".join(f"{size} rows differ by {error:.1e}" for size, error in found.items() if error)


def _difference(engine: Engine, size: int) -> float:
    runner, scheduler, graphs = engine.runner, engine.scheduler, graphs_of(engine)
    for i in range(size):
        scheduler.add(large().request(2 + i % 7, 8), engine.clock())
    while any(s.num_uncomputed_tokens > 1 for s in scheduler.sequences):
        engine.serve()
    chunks = scheduler.schedule()
    with engine.streams.serving(), torch.no_grad():
        batch = runner.fill(chunks)
        assert batch.captured is not None, f"{len(chunks)} rows are not captured"
        before = runner._last_tokens.clone()
        batch.captured.replay()
        logits, tokens = (t.clone() for t in batch.captured.result)
        runner._last_tokens.copy_(before)
        eager, eager_tokens = graphs._step(size)
    large().sync()
    scheduler.settle(chunks, tokens.tolist()[: len(chunks)], engine.clock())
    large().cancel_all(engine)
    if torch.equal(logits, eager) and torch.equal(tokens, eager_tokens) and int(tokens.min()) != NO_TOKEN:
        return 0.0
    return float((logits - eager).float().norm() / eager.float().norm()) or math.nan


def requests(bench: Bench, first: int, count: int) -> list[Request]:
    """Prompts and answers of different lengths; every second one draws its tokens."""
    return [
        Request(
            id=1000 + i,
            prompt=bench.request(3 + i % 4, 1, seed=i).prompt,
            sampling=Sampling(max_tokens=ANSWER - i % 5, temperature=0.8 * (i % 2), top_p=0.9, seed=i, ignore_eos=True),
        )
        for i in range(first, first + count)
    ]


def same_answers() -> str:
    """Two promotions and a cancellation between steps: graphs and overlap change no token, nor what is captured."""
    plain = _answers(small(), small().engine(graphs="off", overlap=False))
    wrong = []
    for graphs, overlap in (("off", True), ("auto", False), ("auto", True)):
        engine = small().engine(graphs=graphs, overlap=overlap)
        sizes = dict(engine.runner.graphs.captured) if engine.runner.graphs else {}
        found = _answers(small(), engine)
        different = [id for id, tokens in plain.items() if found[id] != tokens]
        if different:
            wrong.append(f"graphs {graphs}, overlap {overlap}: {len(different)} of {len(plain)} answers differ")
        if sizes != (engine.runner.graphs.captured if engine.runner.graphs else {}):
            wrong.append("something was captured again")
    return "; ".join(wrong)


def _answers(bench: Bench, engine: Engine) -> dict[int, list[int]]:
    """Tokens of each request but of the one that is cancelled."""
    found: dict[int, list[int]] = {}
    for number in range(3):
        if number:
            _promote(bench, engine, 1 + number)
        for request in requests(bench, number * PART, PART):
            found[request.id] = []
            engine.scheduler.add(request, engine.clock())
        for _ in range(ANSWER // 5):
            serve_once(engine, found)
    engine.scheduler.cancel(1001)
    while engine.serving:
        serve_once(engine, found)
    del found[1001]
    return found


def serve_once(engine: Engine, found: dict[int, list[int]]) -> None:
    for event in engine.step():
        found[event.request_id] += event.tokens


def _promote(bench: Bench, engine: Engine, version: int) -> None:
    slots, bank = engine.scheduler.slots, bench.bank
    rng, slot = torch.Generator().manual_seed(version), slots.free_slot()
    assert slot is not None, "no slot is free"
    state = {name: (torch.randn(t.shape, generator=rng) * 0.2).to(t) for name, t in bank.shadow_state().items()}
    bench.sync()
    with engine.streams.training():
        bank.fill_slot(slot, state)
    slots.promote(version, slot)


def waits_of_a_decode_step() -> str:
    """The host launches a step and never waits for the device, but for tokens by their own event."""
    bench = large()
    engine = bench.engine()
    bench.top_up(engine)
    while any(s.num_uncomputed_tokens > 1 for s in engine.scheduler.sequences):
        engine.serve()
    waits = _waits(engine.serve, 5)
    bench.cancel_all(engine)
    return "" if waits <= 0 else f"{waits} waits in 5 steps"


def waits_of_training() -> str:
    """An optimizer step reads its loss once."""
    bench = large()
    engine = bench.engine(coserving="interleaved")
    count, length = bench.scale.buckets[0]
    trainer = bench.trainer(engine, count, length)
    run_step(engine, trainer, count)
    waits = _waits(lambda: run_step(engine, trainer, count), 1)
    return "" if waits <= 1 else f"{waits} waits in an optimizer step"


def _waits(work: Callable[[], object], times: int) -> int:
    """How often the host waits for the device, as torch warns of it."""
    if DRY_RUN:
        work()
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(times):
                work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
    for warning in found:
        print(f"    {warning.filename}:{warning.lineno}: {str(warning.message).splitlines()[0][:100]}", flush=True)
    return len(found)


def varlen() -> str:
    """torch's attention of packed sequences, forward and backward."""
    if DRY_RUN:
        return ""
    sizes = (64, 80, 128)
    return "; ".join(fault for d in sizes if (fault := varlen_fault(torch.device(DEVICE), torch.bfloat16, d)))


def elementwise() -> str:
    """Norms, rotation with the write to the cache, and gates, at the shapes of 1B and 8B models."""
    wrong = []
    for dtype in (torch.bfloat16, torch.float32):
        draw = Draw(dtype, DEVICE)
        for rows, width, d, inner in ((3, 96, 16, 80),) if DRY_RUN else ((64, 2048, 64, 8192), (300, 4096, 128, 14336)):
            heads = width // d
            batches = (
                random_norm(rows, width, draw),
                random_heads(rows, heads, 2, d, draw),
                random_gate(rows, inner, draw),
            )
            for batch in batches:
                faults = violations(batch, computed(batch), dtype)
                wrong += [f"{type(batch).__name__} {rows} x {width} {dtype}: {fault}" for fault in faults]
    return "; ".join(wrong)


def captured_training() -> str:
    """A step by captured passes against one by eager passes: loss and gradient."""
    wrong = []
    for bench, bound in ((small(), 1e-4), (large(), 2e-2)):
        count, length = bench.scale.buckets[-1]
        found = []
        for graphs in ("off", "auto"):
            engine = bench.engine(graphs=graphs, coserving="interleaved")
            runner = bench.train_runner(engine)
            if graphs == "auto" and runner.graphs is None and bench.loaded.dtype != torch.float32:
                wrong.append("nothing is captured, see the log")
            trainer = bench.trainer(engine, count, length, runner)
            before = trainer.snapshot()
            bench.sync()
            losses = _losses(engine, trainer, count, 1)
            bench.sync()
            found.append((losses[0], bench.bank.gradient.clone()))
            trainer.restore(before)
        (loss, gradient), (other_loss, other) = found
        error = float((other - gradient).norm() / gradient.norm())
        if not (error < bound and abs(other_loss - loss) < bound * loss):
            wrong.append(f"{bench.loaded.dtype}: loss {other_loss} of {loss}, gradient differs by {error:.1e}")
    return "; ".join(wrong)


def _losses(engine: Engine, trainer: ShadowTrainer, count: int, steps: int) -> list[float]:
    losses: list[float] = []
    add_job(engine, _steps(trainer, count, steps, losses))
    while engine.jobs:
        engine.step()
    return losses


def _steps(trainer: ShadowTrainer, count: int, steps: int, losses: list[float]) -> Slices[None]:
    for _ in range(steps):
        losses.append((yield from trainer.step(count, 1)).loss)


def beside_serving(way: str) -> str:
    """Losses and tokens of a way are those of training and serving one after the other."""
    expected, found = _one_after_the_other(small), _together(small(), way, at_once=True)
    different = sum(found[1][id] != tokens for id, tokens in expected[1].items())
    far = [f"loss {a} of {b}" for a, b in zip(found[0], expected[0], strict=True) if not abs(a - b) < 1e-4 * b]
    return "; ".join([*far, *([f"{different} answers differ"] if different else [])])


def captured_beside_serving() -> str:
    """Losses of captured passes on a stream of their own; tokens depend on the batch that they were rounded in."""
    expected, (found, _) = _one_after_the_other(large)[0], _together(large(), "concurrent", at_once=True)
    # The backward of torch's attention adds in any order: later losses may be a little further apart.
    bounds = [1e-5, *[1e-2] * (len(found) - 1)]
    return "; ".join(
        f"loss {a} of {b}" for a, b, e in zip(found, expected, bounds, strict=True) if not abs(a - b) < e * b
    )


@cache
def _one_after_the_other(bench: Callable[[], Bench]) -> tuple[list[float], dict[int, list[int]]]:
    return _together(bench(), "interleaved", at_once=False)


def _together(bench: Bench, way: str, at_once: bool) -> tuple[list[float], dict[int, list[int]]]:
    """Losses of optimizer steps, and answers through two promotions."""
    count, length = bench.scale.buckets[-1]
    # Dry runs have seen captured steps above, where each replay is checked, and slow.
    engine = bench.engine(coserving=way, graphs="off" if DRY_RUN else "auto")
    trainer, losses = bench.trainer(engine, count, length), list[float]()
    with engine.streams.training():
        before = trainer.snapshot()
    if at_once:
        add_job(engine, _steps(trainer, count, STEPS, losses))
    else:
        losses = _losses(engine, trainer, count, STEPS)
    answers = _answers(bench, engine)
    while engine.jobs:
        engine.step()
    engine.close()
    with engine.streams.training():
        trainer.restore(before)
    bench.sync()
    return losses, answers


def automatic_cache() -> str:
    """With engine.kv_tokens auto the cache takes what is free, and prompts, captured steps and training still run."""
    bench = large()
    bench.clean()
    before = memory_mib(bench)
    # More requests than any GPU has room for. Each may draw its token: with twice as many that alone fills a GPU.
    most = bench.scale.batch if DRY_RUN else 4096
    engine = bench.engine(kv_tokens="auto", max_batch=most, coserving="interleaved")
    # More than the largest captured step has rows, all of them at a time before the first one ends.
    for _ in range(engine.scheduler.max_batch // 7):
        engine.scheduler.add(bench.request(40, 80), engine.clock())
    count, length = bench.scale.steps[0]
    trainer = bench.trainer(engine, count, length)
    add_job(engine, _steps(trainer, count, 1, []))
    for _ in range(4 if DRY_RUN else 60):
        engine.step()
    bench.cancel_all(engine)
    _losses(engine, trainer, count, 1)
    if not DRY_RUN:
        print(f"    {torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB are free at the end", flush=True)
    del engine, trainer
    bench.clean()
    # A replica that is rebuilt needs as large a cache again. Workspaces of streams stay.
    kept = memory_mib(bench) - before
    if kept > 1024:
        return f"{kept:.0f} MiB are kept of what nobody uses any more"
    return ""


def library() -> str:
    """clif.LLM answers alike with and without graphs, and gives its memory back."""
    found, held = [], []
    path = f"random:{REPO / 'configs' / 'models' / SMALL.shown(SMALL.shapes[0])}.json"
    for graphs in ("off", "auto", "auto"):
        with LLM(path, model={"device": DEVICE, "dtype": SMALL.dtype}, engine={"graphs": graphs}) as llm:
            answers = llm.generate([[5, 6, 7], [8, 9]], Sampling(max_tokens=ANSWER, ignore_eos=True))
        found.append([answer.token_ids for answer in answers])
        held.append(0 if DRY_RUN else torch.cuda.memory_allocated())
    if found[0] != found[1]:
        return f"{found[1]} with graphs, {found[0]} without"
    # Workspaces of libraries stay, for each stream once.
    return "" if held[2] - held[1] < 256 << 20 else f"holds {(held[2] - held[1]) >> 20} MiB more each time"


CHECKS: tuple[tuple[str, Check], ...] = (
    ("every captured size replays what its region computes, bit for bit", every_captured_size),
    ("graphs and overlap change no token, through promotions", same_answers),
    ("norms, rotation and gates within the specification", elementwise),
    ("attention of packed sequences, both directions", varlen),
    ("a decode step waits for nothing", waits_of_a_decode_step),
    ("an optimizer step waits once", waits_of_training),
    ("captured training has the loss and the gradient of eager training", captured_training),
    *((f"{way}: losses and tokens are those of one after the other", partial(beside_serving, way)) for way in WAYS),
    ("captured passes beside serving have the losses of captured passes alone", captured_beside_serving),
    ("the library captures, answers and gives its memory back", library),
    ("engine.kv_tokens auto leaves room for everything else", automatic_cache),
)


if __name__ == "__main__":
    if DRY_RUN:
        # For slices on a thread of their own.
        torch.set_num_threads(2)
    sys.exit(run_checks("What no GPU has run before", CHECKS))
