"""GPU stage: the engine's own decode step of a full batch, captured and eager, with and without overlap.

    python benchmarks/gpu_decode.py [--dry] [SHAPE ...]

The limit is the time to read the weights and the KV cache once, at the copy rate measured just before. Tokens of the
captured engine must equal those of the eager one. A measurement that fails ends no other: its line says why.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from gpu_bench import (
    Bench,
    Scale,
    add_lines,
    bandwidth,
    count_kernels,
    graph_seconds,
    graphs_of,
    memory_mib,
    per_layer,
    run_stage,
    spread,
)
from gpu_figures import say

from clif.engine.engine import Engine
from clif.engine.sampling import SampledTokens

WAYS = (("auto", "auto"), ("auto", False), ("off", True), ("off", False))
"""engine.graphs and engine.overlap of each measurement."""
STEPS, WARM_UP = 64, 4
"""Steps of a measurement, and steps before it without prompts."""


@dataclass(frozen=True)
class Steps:
    """Steady steps of a full batch. seconds: of each; host_s: of each, less the wait for tokens; context: tokens in the
    cache, all requests together, in the middle of the measurement."""

    seconds: list[float]
    host_s: list[float]
    context: float

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


class Decode:
    """The measurements of one shape. The context of a request is `scale.prompt + scale.answer / 2` on average."""

    def __init__(self, shape: str, scale: Scale, bench: Bench | None = None) -> None:
        """bench: of this shape, by default one of dense weights."""
        self.name, self.scale = "8b" if shape == "llama-8b" else "1b", scale
        self.copy_bps = bandwidth(torch.device(scale.device))
        self.bench = bench or Bench(shape, scale)
        self.steps = min(STEPS, scale.answer // 4)
        self.generated_s: float | None = None
        self.measured: dict[tuple[object, object], Steps] = {}

    @property
    def context(self) -> int:
        return self.scale.prompt + self.scale.answer // 2

    def fill(self, engine: Engine) -> None:
        """A full batch whose prompts are computed, half of the measured steps below the context."""
        # Those whose prompts come first are ahead by the steps that the other prompts take.
        ahead = self.scale.batch * self.context // engine.config.max_prefill_tokens + WARM_UP
        for _ in range(self.scale.batch):
            request = self.bench.request(self.context - (self.steps + ahead) // 2, self.steps + 2 * ahead + WARM_UP)
            engine.scheduler.add(request, engine.clock())
        while any(s.num_uncomputed_tokens > 1 for s in engine.scheduler.sequences):
            engine.serve()
        for _ in range(WARM_UP):
            engine.serve()

    def run(self, engine: Engine) -> Steps:
        """Steady steps. The last one is waited for, as each next one would be."""
        self.fill(engine)
        seconds, host_s, context = [], [], 0.0
        self.bench.sync()
        with waiting() as waited:
            for number in range(self.steps):
                start, waited[0] = time.perf_counter(), 0.0
                engine.serve()
                seconds.append(time.perf_counter() - start)
                host_s.append(seconds[-1] - waited[0])
                if number == self.steps // 2:
                    context = sum(s.num_computed_tokens for s in engine.scheduler.running)
        self.bench.sync()
        self.bench.cancel_all(engine)
        return Steps(seconds, host_s, context)

    def share(self, engine: Engine, steps: Steps) -> float:
        """Of the limit: the time to read weights and KV cache once, over that of a step."""
        return (self.bench.weights + self.bench.kv(engine, steps.context)) / self.copy_bps / steps.median_s

    def engine_line(self, graphs: str, overlap: bool | str) -> str:
        engine = self.bench.engine(graphs=graphs, overlap=overlap)
        steps = self.measured[graphs, overlap] = self.run(engine)
        share, rate = self.share(engine, steps), self.scale.batch / steps.median_s
        if (graphs, overlap) == WAYS[0]:
            say(f"decode-{self.name}", share, f"{spread(steps.seconds, 1e-3)} ms a step")
        figures = f"{spread(steps.seconds, 1e-3)} | {spread(steps.host_s, 1e-3)} | {rate:.0f} | {share:.1%}"
        return f"| graphs {graphs}, overlap {overlap} | {figures} |"

    def host_line(self) -> str:
        """By how much a whole step is longer than the device's part of it, with nothing overlapped."""
        engine, steps = self.bench.engine(graphs="auto", overlap=False), self.measured["auto", False]
        self.fill(engine)
        graph = graphs_of(engine).captured[self.scale.batch]
        device_s = [graph_seconds(graph, self.bench.device) for _ in range(10)]
        self.bench.cancel_all(engine)
        outside = steps.median_s - statistics.median(device_s)
        if self.name == "1b":
            say("host-1b", outside * 1e3, f"step {spread(steps.seconds, 1e-3)} ms, graph {spread(device_s, 1e-3)} ms")
        return f"* the graph alone: {spread(device_s, 1e-3)} ms; outside of it: {outside * 1e3:.3g} ms of a step"

    def lora_line(self) -> str:
        """The same engine on a base without adapters."""
        engine, steps = self.bench.engine(graphs="auto", overlap="auto"), self.measured[WAYS[0]]
        self.fill(engine)
        with_lora = count_kernels(engine, self.scale.batch)
        self.bench.cancel_all(engine)
        with without(self.bench, *ADAPTER):
            bare = self.bench.engine(graphs="auto", overlap="auto")
            bare_steps = self.run(bare)
            self.fill(bare)
            kernels = count_kernels(bare, self.scale.batch)
            self.bench.cancel_all(bare)
        ratio = bare_steps.median_s / steps.median_s
        if self.name == "1b":
            say("lora-1b", ratio, f"{spread(bare_steps.seconds, 1e-3)} ms a step without")
            if kernels:
                say("kernels-1b", per_layer(kernels, self.layers), f"{per_layer(with_lora, self.layers)} with LoRA")
        for name, (count, busy) in sorted(with_lora.items(), key=lambda item: -item[1][1])[:12]:
            print(f"    {busy:8.1f} us x{count:4d}  {name[:90]}", flush=True)
        counts = f"{per_layer(kernels, self.layers)} kernels a layer, {per_layer(with_lora, self.layers)} with LoRA"
        return f"* without LoRA {spread(bare_steps.seconds, 1e-3)} ms a step: {ratio:.3f} with / without; {counts}"

    def torch_lora_line(self) -> str:
        """The same engine whose adapters are torch's products, of all slots for all rows."""
        with without(self.bench, *KERNEL):
            steps = self.run(self.bench.engine(graphs="auto", overlap="auto"))
        return f"* with LoRA by torch's products {spread(steps.seconds, 1e-3)} ms a step"

    def capture_line(self) -> str:
        """What capturing costs, once per start: the log has it too."""
        before = memory_mib(self.bench)
        plain = self.bench.engine(graphs="off")
        without_mib = memory_mib(self.bench) - before
        captured = self.bench.engine(graphs="auto")
        graphs, with_mib = graphs_of(captured), memory_mib(self.bench) - before - without_mib
        del plain
        return f"* capture of {len(graphs.sizes)} sizes: {graphs.capture_s:.2f} s, {with_mib - without_mib:.0f} MiB"

    def generate_line(self) -> str:
        """transformers.generate on one static batch: what a token more costs, its prompts left out."""
        ids = torch.randint(100, self.bench.vocab, (self.scale.batch, self.scale.prompt), device=self.bench.device)
        short, long = 4, 4 + max(4, self.scale.answer // 8)
        seconds = {tokens: self._generate(ids, tokens) for tokens in (short, short, long)}
        token_s = (seconds[long] - seconds[short]) / (long - short)
        ratio = token_s / self.measured[WAYS[0]].median_s
        if self.name == "1b":
            say("generate-1b", ratio, f"{token_s * 1e3:.3g} ms a token of the batch")
        return (
            f"* transformers.generate: {token_s * 1e3:.3g} ms a token of the batch; CLIF is {ratio:.1f} times as fast"
        )

    def _generate(self, ids: torch.Tensor, tokens: int) -> float:
        start, mask = time.perf_counter(), torch.ones_like(ids)
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        self.bench.loaded.model.generate(ids, attention_mask=mask, do_sample=False, **lengths)
        self.bench.sync()
        return time.perf_counter() - start

    @property
    def layers(self) -> int:
        return self.bench.base.stack.num_layers


@contextmanager
def waiting() -> Iterator[list[float]]:
    """Seconds that the host waits for tokens, added up in the one element of the list."""
    read, waited = SampledTokens.read, [0.0]

    def timed(tokens: SampledTokens) -> list[int]:
        start = time.perf_counter()
        try:
            return read(tokens)
        finally:
            waited[0] += time.perf_counter() - start

    SampledTokens.read = timed  # type: ignore[method-assign]
    try:
        yield waited
    finally:
        SampledTokens.read = read  # type: ignore[method-assign]


ADAPTER, KERNEL = ("lora", "_kernels", "_captured"), ("_captured",)
"""What a linear layer computes its adapters with, and its kernel for captured steps alone."""


@contextmanager
def without(bench: Bench, *parts: str) -> Iterator[None]:
    """Linear layers that lack these parts, for engines that are made meanwhile."""
    kept = [{part: vars(linear)[part] for part in parts} for linear in bench.base.stack.linears]
    for linear, held in zip(bench.base.stack.linears, kept, strict=True):
        vars(linear).update(dict.fromkeys(held))
    try:
        yield
    finally:
        for linear, held in zip(bench.base.stack.linears, kept, strict=True):
            vars(linear).update(held)


def measure(shape: str, scale: Scale) -> list[str]:
    """Markdown of one shape."""
    decode = Decode(shape, scale)
    lines = [
        f"### Decode, {scale.shown(shape)}, {scale.batch} requests, context about {decode.context}, {scale.dtype}",
        "",
        f"Copy rate {decode.copy_bps / 1e9:.0f} GB/s. Milliseconds of a step: median (least to most).",
        "",
        "| engine | whole step, ms | host without waiting, ms | tokens/s | of the limit |",
        "|---|---|---|---|---|",
    ]
    work: list[tuple[str, Callable[[], str]]] = [
        (f"graphs {graphs}, overlap {overlap}", partial(decode.engine_line, graphs, overlap))
        for graphs, overlap in WAYS
    ]
    work += [("", str), ("the graph", decode.host_line), ("transformers.generate", decode.generate_line)]
    work += [("LoRA", decode.lora_line), ("LoRA by torch", decode.torch_lora_line), ("capture", decode.capture_line)]
    add_lines(lines, work)
    return lines


if __name__ == "__main__":
    run_stage(measure)
