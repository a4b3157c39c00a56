"""GPU stage: training alone, CLIF's step of the shadow against PEFT with AdamW under autocast, by size of the step, and
its captured passes against eager ones.

python benchmarks/gpu_training.py [--dry] [SHAPE ...]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any

import torch
from gpu_bench import (
    Bench,
    Scale,
    add_lines,
    host_launches,
    launches,
    per_layer,
    run_stage,
    run_step,
    samples,
    seconds_of,
    spread,
)
from gpu_figures import say

from clif.engine.engine import Engine
from clif.models.weights.loading import load_model
from clif.training.train_runner import TrainRunner

FIGURES = ("train-16384", "train-512")
"""Of the first two steps of a scale."""


class Peft:
    """A plain loop on the same samples: adapters in float32 under autocast, AdamW, clipping."""

    def __init__(self, bench: Bench) -> None:
        self.bench, adapter = bench, bench.config.adapter
        import peft  # a machine with a GPU may lack it

        lora = peft.LoraConfig(r=adapter.r, lora_alpha=int(adapter.lora_alpha), target_modules="all-linear")
        self.model: Any = peft.get_peft_model(load_model(bench.config.model, bench.device).model, lora)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=bench.config.train.lr, fused=True)

    def step(self, count: int, length: int) -> Callable[[], None]:
        ids = torch.tensor([s.ids for s in samples(self.bench.vocab, count, length)], device=self.bench.device)
        labels = ids.clone()
        labels[:, : length // 2] = -100
        return partial(self._step, ids, labels)

    def _step(self, ids: torch.Tensor, labels: torch.Tensor) -> None:
        dtype = self.bench.loaded.dtype
        with torch.autocast(self.bench.device.type, dtype, enabled=dtype != torch.float32):
            loss = self.model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.bench.config.train.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Training:
    """The measurements of one shape."""

    def __init__(self, shape: str, scale: Scale) -> None:
        self.scale, self.bench = scale, Bench(shape, scale)
        self.layers = self.bench.base.stack.num_layers
        self.parameters = sum(linear.base.shape.numel() for linear in self.bench.base.stack.linears)

    @cached_property
    def captured(self) -> tuple[Engine, TrainRunner]:
        """The log says how long capturing took, and how much memory it holds."""
        engine = self.bench.engine(graphs="auto", coserving="interleaved")
        return engine, self.bench.train_runner(engine)

    @cached_property
    def eager(self) -> tuple[Engine, TrainRunner]:
        engine = self.bench.engine(graphs="off", coserving="interleaved")
        return engine, self.bench.train_runner(engine)

    @cached_property
    def peft(self) -> Peft:
        return Peft(self.bench)

    def step(self, kind: tuple[Engine, TrainRunner], count: int, length: int) -> Callable[[], None]:
        engine, runner = kind
        return partial(run_step, engine, self.bench.trainer(engine, count, length, runner), count)

    def seconds(self, step: Callable[[], None], share: float = 3) -> list[float]:
        return seconds_of(step, self.bench.sync, self.scale.window_s / share)

    def size_line(self, number: int) -> str:
        """One size of a step, against PEFT."""
        count, length = self.scale.steps[number]
        step = self.step(self.captured, count, length)
        ours, tokens = self.seconds(step), count * length
        median = statistics.median(ours)
        # Forward and gradient of the input: the frozen base needs no gradient of its weights.
        rate = 4 * self.parameters * tokens / median / 1e12
        theirs, ratio = "not installed", ""
        if find_spec("peft") is not None:
            peft = self.seconds(self.peft.step(count, length))
            theirs, ratio = spread(peft, 1e-3), f"{statistics.median(peft) / median:.2f}"
            if number < len(FIGURES):
                say(FIGURES[number], statistics.median(peft) / median, f"{spread(ours, 1e-3)} ms, PEFT {theirs} ms")
        return (
            f"| {count} x {length} | {spread(ours, 1e-3)} | {tokens / median:.0f} | {rate:.0f} | {theirs} | {ratio} |"
        )

    def bucket_line(self, count: int, length: int) -> str:
        """A step of one pass, captured and eager."""
        found = []
        for kind in (self.captured, self.eager):
            step = self.step(kind, count, length)
            seconds = self.seconds(step, 10)
            kernels, launched = ("-", "-") if self.bench.device.type != "cuda" else self._launches(step)
            found += [spread(seconds, 1e-3), kernels, launched]
            print(f"    {count} x {length}: {found[-3:]}", flush=True)
        return f"| {count * length} | {' | '.join(found)} |"

    def _launches(self, step: Callable[[], None]) -> tuple[str, str]:
        """Kernels of a layer, forward and backward, and what the host launches in the whole step."""
        kernels = launches(step)
        for name, (count, busy) in sorted(kernels.items(), key=lambda item: -item[1][1])[:8]:
            print(f"    {busy:9.1f} us x{count:5d}  {name[:90]}", flush=True)
        return str(per_layer(kernels, self.layers)), str(host_launches(step))


def measure(shape: str, scale: Scale) -> list[str]:
    """Markdown of one shape."""
    training = Training(shape, scale)
    lines = [
        f"### Training alone, {scale.shown(shape)}, r={training.bench.config.adapter.r} all-linear, {scale.dtype}",
        "",
        "Milliseconds of a step: median (least to most).",
        "",
        "| samples x tokens | CLIF, ms | CLIF, tokens/s | TFLOP/s, linear layers | PEFT, ms | CLIF / PEFT |",
        "|---|---|---|---|---|---|",
    ]
    work = [(f"{c} x {n}", partial(training.size_line, i)) for i, (c, n) in enumerate(scale.steps)]
    add_lines(lines, work)
    lines += [
        "",
        "| tokens of the pass | captured, ms | kernels a layer | launches | eager, ms | kernels a layer | launches |",
        "|---|---|---|---|---|---|---|",
    ]
    add_lines(lines, [(f"{c} x {n}", partial(training.bucket_line, c, n)) for c, n in scale.buckets])
    return lines


if __name__ == "__main__":
    run_stage(measure)
