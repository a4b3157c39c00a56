"""The engine on one GPU at the shapes of 1B and 8B models, with random weights: ratios within one run.

    python benchmarks/gpu.py                  # at most 9 minutes; needs torch, transformers and CLIF's own packages
    python benchmarks/gpu.py --dry            # on a CPU in seconds: shows that all of it runs, its figures mean nothing

Serving is closed-loop: a request that ends is followed by the next. Co-serving efficiency is serving tokens/s divided
by those of serving alone, plus training tokens/s divided by those of training alone; taking turns gives 1 at most.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from engine import LENGTH, SAMPLES, peft_training, samples

from clif.adapters.slots import SlotTable
from clif.config import Config, config_from_tree
from clif.metrics.provenance import cpu_model, git_commit
from clif.models.loading import LoadedModel, load_model
from clif.replica.base import build_runner
from clif.replica.engine import Engine
from clif.replica.jobs import Job
from clif.replica.scheduler import Scheduler
from clif.replica.trainer import ShadowTrainer
from clif.types import Request, Sampling

REPO = Path(__file__).resolve().parents[1]
WAYS = ("turns", "mixed")


@dataclass(frozen=True)
class Scale:
    """How large everything is. window_s: seconds of each measurement."""

    shapes: tuple[str, ...]
    device: str
    dtype: str
    batch: int
    prompt: int
    answer: int
    window_s: float
    repeats: int


FULL = Scale(("llama-1b", "llama-8b"), "cuda", "bfloat16", 64, 256, 256, 8.0, 3)
DRY = Scale(("tiny-llama",), "cpu", "float32", 4, 12, 12, 0.4, 2)


class Bench:
    """One model shape: an engine with an adapter that serves, and a shadow that learns."""

    def __init__(self, shape: str, scale: Scale) -> None:
        self.scale, self.device = scale, torch.device(scale.device)
        self.config = _config(shape, scale)
        self.loaded: LoadedModel = load_model(self.config.model, self.device)
        self.runner, self.bank = build_runner(self.config, self.loaded)
        self.slots = SlotTable(2)
        state = {name: torch.randn_like(factor) * 0.01 for name, factor in self.bank.shadow_state().items()}
        self.bank.fill_slot(0, state)
        self.slots.promote(1, 0)
        self.samples = samples(self.runner.stack.vocab_size)
        self.trainer = ShadowTrainer(self.runner, self.bank, self.samples, self.config.train)
        self._ids = iter(range(1 << 60))

    def engine(self, way: str) -> Engine:
        scheduler = Scheduler(self.config.engine, self.slots, (), self.loaded.tokenizer.decode)
        return Engine(self.runner, scheduler, self.config.slo, way)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def top_up(self, engine: Engine) -> None:
        while len(engine.scheduler.running) + len(engine.scheduler.waiting) < self.scale.batch:
            number = next(self._ids)
            rng = torch.Generator().manual_seed(number)
            prompt = torch.randint(100, self.runner.stack.vocab_size, (self.scale.prompt,), generator=rng).tolist()
            # Answers of different lengths, so that prompts do not all come at once.
            sampling = Sampling(max_tokens=self.scale.answer // 2 + number % self.scale.answer, ignore_eos=True)
            engine.scheduler.add(Request(id=number, prompt=tuple(prompt), sampling=sampling), engine.clock())

    def rates(self, way: str, serves: bool, trains: bool) -> tuple[float, float, list[float]]:
        """Serving tokens/s, training tokens/s and the gaps between ticks, s, after a warm-up of a third."""
        engine, out, trained, gaps = self.engine(way), 0, 0, []
        begin = time.perf_counter()
        start, last = None, begin
        while (now := time.perf_counter()) < begin + self.scale.window_s * 4 / 3:
            if start is None and now > begin + self.scale.window_s / 3:
                start, out, trained, gaps = now, 0, 0, []
            if serves:
                self.top_up(engine)
                out += sum(len(event.tokens) for event in engine.serve())
            if trains:
                if not engine.jobs:
                    engine.jobs.append(Job("step", self.trainer.step(len(self.samples), 1)))
                engine.learn()
                trained += LENGTH * len(self.samples) * (engine.record.train_kind == "optimizer")
            self.sync()
            gaps.append(time.perf_counter() - last)
            last = time.perf_counter()
        for sequence in [*engine.scheduler.running, *engine.scheduler.waiting]:
            engine.scheduler.cancel(sequence.request.id)
        seconds = time.perf_counter() - (start or begin)
        return out / seconds, trained / seconds, gaps

    def decode_step(self) -> tuple[float, float]:
        """Seconds of a pure decode tick at full batch, and the bytes of weights and KV that it must read."""
        engine, times = self.engine("turns"), []
        self.top_up(engine)
        while any(s.pending > 1 for s in (*engine.scheduler.running, *engine.scheduler.waiting)):
            engine.serve()
        for _ in range(12):
            self.sync()
            start = time.perf_counter()
            engine.serve()
            self.sync()
            if engine.record.prefill_tokens == 0 and engine.record.decode_rows == self.scale.batch:
                times.append(time.perf_counter() - start)
        cache = self.runner.cache
        context = sum(s.computed for s in engine.scheduler.running)
        kv = context * cache.bytes / self.config.engine.kv_tokens
        weights = (
            sum(linear.weight.nbytes for linear in self.runner.stack.linears) + self.runner.stack.head.weight.nbytes
        )
        return statistics.median(times or [float("nan")]), weights + kv


def bandwidth(device: torch.device, dry: bool) -> float:
    """Bytes/s that a large copy reads and writes."""
    source = torch.empty((1 << 22) if dry else (1 << 30), dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(times)


def peft_rate(bench: Bench) -> float:
    """Training tokens/s of a plain PEFT + AdamW step, NaN where peft is missing."""
    if find_spec("peft") is None:
        return float("nan")
    step = peft_training(bench.config, load_model(bench.config.model, bench.device).model)
    step()
    bench.sync()
    count, start = 0, time.perf_counter()
    while time.perf_counter() < start + bench.scale.window_s / 2:
        step()
        bench.sync()
        count += 1
    return count * LENGTH * SAMPLES / (time.perf_counter() - start)


def static_rate(bench: Bench) -> float:
    """Tokens/s of transformers.generate on one static batch: the stack leaves the model itself as it was."""
    model, scale = bench.loaded.model, bench.scale
    ids = torch.randint(100, bench.runner.stack.vocab_size, (scale.batch, scale.prompt), device=bench.device)
    arguments = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=scale.answer, min_new_tokens=scale.answer, **arguments)
    bench.sync()
    return scale.batch * scale.answer / (time.perf_counter() - start)


def measure(shape: str, scale: Scale, copy_bps: float) -> list[str]:
    """Markdown lines of one shape."""
    bench = Bench(shape, scale)
    step_s, needed = bench.decode_step()
    lines = [f"## {shape}", ""]
    lines.append(
        f"* decode step, batch {scale.batch}: {step_s * 1e3:.2f} ms; reading weights and KV at the copy bandwidth "
        f"would take {needed / copy_bps * 1e3:.2f} ms: {needed / copy_bps / step_s:.0%} of what that allows"
    )
    lines += [
        "",
        "| what | serving tokens/s | training tokens/s | tick p99, ms | efficiency |",
        "|---|---|---|---|---|",
    ]
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(scale.repeats):
        serve, _, quiet = bench.rates("turns", serves=True, trains=False)
        _, train, _ = bench.rates("turns", serves=False, trains=True)
        lines.append(f"| alone, repeat {repeat + 1} | {serve:.0f} | {train:.0f} | {_p99(quiet):.1f} | 1 |")
        for way in WAYS:
            serving, training, gaps = bench.rates(way, serves=True, trains=True)
            both = serving / serve + training / max(train, 1e-9)
            found[way].append(both)
            rates = f"{serving:.0f} | {training:.0f} | {_p99(gaps):.1f} | {both:.2f}"
            lines.append(f"| {way}, repeat {repeat + 1} | {rates} |")
    lines.append("")
    for way, values in found.items():
        lines.append(f"* {way}: efficiency {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
    lines.append(f"* PEFT + AdamW: {peft_rate(bench):.0f} training tokens/s (nan: peft is not installed)")
    lines.append(f"* transformers.generate, one static batch of {scale.batch}: {static_rate(bench):.0f} tokens/s")
    return [*lines, ""]


def _p99(gaps: list[float]) -> float:
    return sorted(gaps)[int(0.99 * (len(gaps) - 1))] * 1e3 if gaps else float("nan")


def _config(shape: str, scale: Scale) -> Config:
    longest = scale.prompt + 2 * scale.answer
    tree = {
        "model": {
            "path": f"random:{REPO / 'configs' / 'models' / f'{shape}.json'}",
            "dtype": scale.dtype,
            "device": scale.device,
            "max_context": longest,
        },
        "engine": {"max_batch": scale.batch, "kv_tokens": -(-scale.batch * longest // 16) * 16, "activation_mib": 8192},
        "slo": {"ttft_ms": 10000, "tpot_ms": 100, "margin": 0.2},
        "train": {"enabled": False},
    }
    config = config_from_tree(tree)
    return config.model_copy(update={"train": config.train.model_copy(update={"enabled": True})})


def main(
    dry: Annotated[bool, typer.Option(help="a tiny model on the CPU: figures mean nothing")] = False,
    out: Annotated[Path, typer.Option(help="folder for the dated file")] = REPO / "benchmarks",
) -> None:
    """Measure the engine on one GPU and write a dated file."""
    scale = DRY if dry else FULL
    if scale.device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no NVIDIA GPU here: run with --dry, or on a machine that has one")
    device = torch.device(scale.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    copy_bps = bandwidth(device, dry)
    today = datetime.date.today().isoformat()
    lines = [
        f"# Engine on one device, {today}",
        "",
        f"* command: `python {' '.join(sys.argv)}`",
        f"* machine: {name}, copy bandwidth {copy_bps / 1e9:.0f} GB/s",
        f"* versions: Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {version('transformers')}; commit {git_commit() or 'unknown'}",
        "",
    ]
    for shape in scale.shapes:
        lines += measure(shape, scale, copy_bps)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    path = out / f"gpu{'-dry' if dry else ''}-{today}.md"
    path.write_text("\n".join(lines))
    print(path.read_text())


if __name__ == "__main__":
    typer.run(main)
