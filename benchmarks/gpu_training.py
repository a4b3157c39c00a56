"""GPU stage: training alone, CLIF's step of the shadow against PEFT with AdamW under autocast, by size of the step.

python benchmarks/gpu_training.py [--dry] [SHAPE ...]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib.util import find_spec

import torch
from gpu_bench import Bench, Scale, launches, run_stage, run_step, samples, seconds_of, spread

from clif.models.weights.loading import load_model


def peft_step(bench: Bench, count: int, length: int) -> Callable[[], None]:
    """A plain step on the same samples: adapters in float32 under autocast, AdamW, clipping."""
    import peft  # a machine with a GPU may lack it

    adapter, half = bench.config.adapter, bench.loaded.dtype != torch.float32
    lora = peft.LoraConfig(r=adapter.r, lora_alpha=int(adapter.lora_alpha), target_modules="all-linear")
    wrapped = peft.get_peft_model(load_model(bench.config.model, bench.device).model, lora)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=bench.config.train.lr, fused=True)
    ids = torch.tensor([s.ids for s in samples(bench.vocab, count, length)], device=bench.device)
    labels = ids.clone()
    labels[:, : length // 2] = -100

    def run() -> None:
        with torch.autocast(bench.device.type, bench.loaded.dtype, enabled=half):
            loss = wrapped(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, bench.config.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return run


def measure(shape: str, scale: Scale) -> list[str]:
    """Markdown of one shape."""
    bench = Bench(shape, scale)
    parameters = sum(linear.base.shape.numel() for linear in bench.runner.stack.linears)
    lines = [
        f"### Training alone, {shape}, r={bench.config.adapter.r} all-linear, {scale.dtype}",
        "",
        "| samples x tokens | CLIF, ms | CLIF, tokens/s | TFLOP/s, linear layers | launches | PEFT, ms | CLIF / PEFT |",
        "|---|---|---|---|---|---|---|",
    ]
    for count, length in scale.steps:
        trainer = bench.trainer(count, length)
        ours = seconds_of(lambda t=trainer, c=count: run_step(t, c), bench.sync, scale.window_s / 3)
        tokens, median = count * length, statistics.median(ours)
        # Forward and gradient of the input: the frozen base needs no gradient of its weights.
        rate = 4 * parameters * tokens / median / 1e12
        found = launches(lambda t=trainer, c=count: run_step(t, c)) if bench.device.type == "cuda" else {}
        theirs, ratio = "not installed", ""
        if find_spec("peft") is not None:
            peft = seconds_of(peft_step(bench, count, length), bench.sync, scale.window_s / 3)
            theirs, ratio = spread(peft, 1e-3), f"{statistics.median(peft) / median:.2f}"
        total = sum(n for n, _ in found.values())
        own = f"{spread(ours, 1e-3)} | {tokens / median:.0f} | {rate:.0f} | {total}"
        lines.append(f"| {count} x {length} | {own} | {theirs} | {ratio} |")
        print(lines[-1], flush=True)
        for name, (launched, busy) in sorted(found.items(), key=lambda item: -item[1][1])[:8]:
            print(f"    {busy:9.1f} us x{launched:5d}  {name[:90]}", flush=True)
    return lines


if __name__ == "__main__":
    run_stage(measure, shapes=1)
