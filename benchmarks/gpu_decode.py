"""GPU stage: a decode step of a full batch, by the engine itself and as one captured graph of the same parts.

    python benchmarks/gpu_decode.py [--dry] [SHAPE ...]

The limit is the time to read the weights and the KV cache once, at the copy rate measured just before. A graph is
replayed over other tokens, positions and blocks than it was captured with, and its logits must equal the eager ones bit
for bit. A variant that fails raises no error: its line says why.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from gpu_bench import Bench, Scale, bandwidth, launches, run_stage, seconds_of, spread

from clif.kernels.dual_lora_reference import Segment
from clif.kernels.paged_decode_table import DecodeRow, DecodeTable, StagedDecodeTable
from clif.models.dual_linear import LoraRows
from clif.models.head import top
from clif.models.layer_ops import CacheRows

VARIANTS = ("base", "torch", "triton")
"""Low-rank part of the captured step: none, by torch's products, by the dual LoRA kernel."""


@dataclass
class DecodePlan:
    """Attention of one new token per sequence, with everything that changes between steps in static tensors."""

    bench: Bench
    table: DecodeTable
    written: torch.Tensor

    def cache_rows(self, layer: int) -> CacheRows:
        return CacheRows(self.bench.runner.cache.layers[layer], self.written)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        runner = self.bench.runner
        cache = runner.cache.layers[layer]
        out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
        assert runner.paged is not None, "the decode kernel is needed: engine.decode_kernel=triton"
        runner.paged.attend(query, cache, self.table, scale, out)
        return out


class DecodeStep:
    """One decode step of a full batch at one context length, with static inputs that load() fills."""

    def __init__(self, bench: Bench, adapter: bool) -> None:
        self.bench, batch = bench, bench.scale.batch
        self.size, self.context = bench.config.engine.block_size, bench.scale.prompt + bench.scale.answer // 2
        per = -(-(self.context + bench.scale.answer // 2) // self.size)
        self.blocks = [list(range(i * per, (i + 1) * per)) for i in range(batch)]
        self.ids = torch.zeros(batch, dtype=torch.int64, device=bench.device)
        self.positions, written = torch.zeros_like(self.ids), torch.zeros_like(self.ids)
        table = StagedDecodeTable(batch, per, self.size, bench.device)
        self.plan = DecodePlan(bench, table, written)
        self.segments = (Segment(0, batch, 0),) if adapter else ()
        for layer in bench.runner.cache.layers:
            layer.normal_(0, 0.5)

    def load(self, step: int) -> None:
        """The tokens, positions and slots of the step-th token after the context."""
        rng = torch.Generator().manual_seed(step)
        self.ids.copy_(torch.randint(100, self.bench.vocab, (len(self.ids),), generator=rng))
        length = self.context + step
        at, inside = divmod(length - 1, self.size)
        self.positions.fill_(length - 1)
        self.plan.written.copy_(torch.tensor([blocks[at] * self.size + inside for blocks in self.blocks]))
        self.plan.table.refill([DecodeRow(i, length, blocks) for i, blocks in enumerate(self.blocks)])

    @torch.no_grad()
    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [batch, vocabulary] and the greedy tokens [batch]."""
        stack = self.bench.runner.stack
        sub_batch = stack.sub_batch(LoraRows(len(self.ids), self.segments), self.positions, self.plan)
        (hidden,) = stack.layers(0, stack.num_layers, [stack.embed(self.ids)], [sub_batch])
        logits = stack.head(stack.norm(hidden))
        return logits, top(logits)[1]


def engine_step(shape: str, scale: Scale, copy_bps: float, kernel: str) -> str:
    """A whole step of the engine with a full batch of answers, host included."""
    bench = Bench(shape, scale, decode_kernel=kernel)
    engine = bench.engine()
    bench.top_up(engine)
    while any(s.num_uncomputed_tokens > 1 for s in (*engine.scheduler.running, *engine.scheduler.waiting)):
        engine.serve()
    times = []
    for _ in range(14):
        bench.sync()
        start = time.perf_counter()
        engine.serve()
        bench.sync()
        if engine.record.prefill_tokens == 0 and engine.record.decode_rows == scale.batch:
            times.append(time.perf_counter() - start)
    limit = (bench.weights + bench.kv(sum(s.num_computed_tokens for s in engine.scheduler.running))) / copy_bps
    times = times[2:] or [float("nan")]
    line = f"| engine, decode_kernel={kernel} | {spread(times, 1e-3)} | {limit / statistics.median(times):.1%} | | |"
    bench.cancel_all(engine)
    return line


def captured(shape: str, scale: Scale, copy_bps: float, variant: str) -> str:
    """A step made of the same parts: eager, captured, and captured with refill and tokens read back."""
    bench = Bench(shape, scale, decode_kernel="triton", lora_kernel="triton" if variant == "triton" else "torch")
    step = DecodeStep(bench, variant != "base")
    step.load(0)
    first = step.forward()[0].clone()
    step.load(1)
    second = step.forward()[0].clone()
    eager = seconds_of(step.forward, bench.sync, 0.2)
    if bench.device.type != "cuda":
        return f"| parts, LoRA: {variant} | eager {spread(eager, 1e-3)} | | | |"
    graph, logits, tokens, capture_s = _capture(step)
    for number, expected in ((0, first), (1, second)):
        step.load(number)
        graph.replay()
        torch.cuda.synchronize()
        if not torch.equal(logits, expected):
            error = float((logits - expected).float().norm() / expected.float().norm())
            print(f"DIFFERS: {shape}, {variant}: replay {number} is {error:.1e} from the eager logits", flush=True)
    replays = [_device_seconds(graph) for _ in range(30)]

    def whole() -> None:
        step.load(2)
        graph.replay()
        tokens.tolist()

    whole_s = seconds_of(whole, bench.sync, 0.2)
    limit = (bench.weights + bench.kv(scale.batch * step.context)) / copy_bps
    kernels = launches(graph.replay)
    for name, (count, busy) in sorted(kernels.items(), key=lambda item: -item[1][1])[:8]:
        print(f"    {busy:8.1f} us x{count:4d}  {name[:90]}", flush=True)
    ways = {"eager": eager, "graph": replays, "with refill and tokens": whole_s}
    shown = "; ".join(f"{way} {spread(seconds, 1e-3)}" for way, seconds in ways.items())
    count = sum(count for count, _ in kernels.values())
    share = limit / statistics.median(replays)
    return f"| parts, LoRA: {variant} | {shown} | {share:.1%} | {count} | capture {capture_s:.2f} s |"


def _capture(step: DecodeStep) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor, float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step.forward()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    start, graph = time.perf_counter(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        logits, tokens = step.forward()
    torch.cuda.synchronize()
    return graph, logits, tokens, time.perf_counter() - start


def _device_seconds(graph: Any) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) * 1e-3


def generate_line(shape: str, scale: Scale) -> str:
    """transformers.generate on one static batch; the stack does not change the model itself."""
    bench = Bench(shape, scale)
    ids = torch.randint(100, bench.vocab, (scale.batch, scale.prompt), device=bench.device)
    answer = max(8, scale.answer // 8)
    start = time.perf_counter()
    bench.loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=answer, min_new_tokens=answer
    )
    bench.sync()
    rate = scale.batch * answer / (time.perf_counter() - start)
    return f"| transformers.generate, {answer} tokens | {scale.batch / rate * 1e3:.3g} ms a token of the batch | | | |"


def measure(shape: str, scale: Scale) -> list[str]:
    """Markdown of one shape."""
    copy_bps = bandwidth(torch.device(scale.device))
    context = scale.prompt + scale.answer // 2
    lines = [
        f"### Decode, {shape}, {scale.batch} requests, context about {context}, {scale.dtype}",
        "",
        f"Copy rate {copy_bps / 1e9:.0f} GB/s.",
        "",
        "| what | ms: median (least to most) | of the limit | kernels | |",
        "|---|---|---|---|---|",
    ]
    kernels = ("torch", "triton") if scale.device == "cuda" else ("torch",)
    work = [(engine_step, (shape, scale, copy_bps, kernel)) for kernel in kernels]
    work += [(captured, (shape, scale, copy_bps, variant)) for variant in VARIANTS if scale.device == "cuda"]
    work.append((generate_line, (shape, scale)))
    for call, arguments in work:
        lines.append(_line_of(call, arguments))
        print(lines[-1], flush=True)
        if scale.device == "cuda":
            torch.cuda.empty_cache()
    return lines


def _line_of(call: Any, arguments: tuple[Any, ...]) -> str:
    try:
        return str(call(*arguments))
    except Exception as error:  # noqa: BLE001 - whatever it was, its line says it and the next variant comes
        return f"| {arguments[-1]} | FAILED {type(error).__name__}: {str(error).splitlines()[0][:200]} | | | |"


if __name__ == "__main__":
    run_stage(measure, shapes=2)
