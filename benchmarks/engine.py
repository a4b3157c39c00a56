"""Speed of the engine alone, as ratios within one run: serving against transformers, training against PEFT.

    python benchmarks/engine.py --model assets/smollm2-135m-instruct.gguf --out benchmarks

Every contender does the same work on the same weights in the same dtype with all cores; contenders take turns
within each repeat, so that a slow moment of the machine hits all of them.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from clif.adapters.slots import SlotTable
from clif.config import Config, config_from_tree
from clif.metrics.provenance import cpu_model, git_commit
from clif.models.loading import LoadedModel, load_model
from clif.replica.base import build_runner
from clif.replica.engine import Engine
from clif.replica.jobs import Job
from clif.replica.scheduler import Scheduler
from clif.replica.trainer import ShadowTrainer
from clif.types import Request, Sampling, TrainSample

REQUESTS, PROMPT, ANSWER = 32, 48, 64
SAMPLES, LENGTH, TARGETS = 4, 128, 64
CPU = torch.device("cpu")
Contender = tuple[str, Callable[[], None]]


def prompts(vocab: int) -> list[list[int]]:
    """Token ids of REQUESTS different prompts; special tokens, which lie at the beginning, are left out."""
    rng = torch.Generator().manual_seed(0)
    return torch.randint(100, vocab, (REQUESTS, PROMPT), generator=rng).tolist()


def clif_serving(config: Config, loaded: LoadedModel) -> Callable[[], None]:
    runner, _ = build_runner(config, loaded)
    scheduler = Scheduler(config.engine, SlotTable(2), loaded.tokenizer.eos_ids, loaded.tokenizer.decode)
    engine = Engine(runner, scheduler, config.slo)

    def run() -> None:
        for i, ids in enumerate(prompts(runner.stack.vocab_size)):
            sampling = Sampling(max_tokens=ANSWER, ignore_eos=True)
            scheduler.add(Request(id=i, prompt=tuple(ids), sampling=sampling), 0.0)
        while engine.serving:
            engine.serve()

    return run


def static_batch(model: Any) -> Callable[[], None]:
    """transformers.generate on one batch; equal prompt lengths, so that nothing is padded."""

    def run() -> None:
        ids = torch.tensor(prompts(model.config.vocab_size))
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False
        )
        assert out.shape[1] == PROMPT + ANSWER

    return run


def continuous_batch(model: Any) -> Callable[[], None]:
    """transformers' own continuous batching."""
    settings = transformers.GenerationConfig(max_new_tokens=ANSWER, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def run() -> None:
        out = model.generate_batch(prompts(model.config.vocab_size), generation_config=settings, progress_bar=False)
        assert sum(len(r.generated_tokens) for r in out.values()) == REQUESTS * ANSWER

    return run


def samples(vocab: int) -> list[TrainSample]:
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(100, vocab, (SAMPLES, LENGTH), generator=rng).tolist()
    return [TrainSample(id=i, ids=tuple(row), target_start=LENGTH - TARGETS) for i, row in enumerate(ids)]


def clif_training(config: Config, loaded: LoadedModel) -> Callable[[], None]:
    runner, bank = build_runner(config, loaded)
    trainer = ShadowTrainer(runner, bank, samples(runner.stack.vocab_size), config.train)

    def run() -> None:
        job = Job("step", trainer.step(SAMPLES, 1))
        while job.upcoming is not None:
            job.run()

    return run


def peft_training(config: Config, model: Any) -> Callable[[], None]:
    """A plain step: PEFT's adapters in float32 under autocast where the base is not, AdamW, clipping."""
    import peft  # a machine with a GPU may lack it: see gpu.py

    adapter = config.adapter
    lora = peft.LoraConfig(r=adapter.r, lora_alpha=int(adapter.lora_alpha), target_modules="all-linear")
    wrapped = peft.get_peft_model(model, lora)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.train.lr, fused=True)
    batch = samples(model.config.vocab_size)
    ids = torch.tensor([s.ids for s in batch], device=model.device)
    labels = ids.clone()
    labels[:, : LENGTH - TARGETS] = -100
    half = model.dtype != torch.float32

    def run() -> None:
        with torch.autocast(model.device.type, model.dtype, enabled=half):
            loss = wrapped(ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return run


def race(contenders: list[Contender], repeats: int) -> dict[str, list[float]]:
    """Seconds of each contender in each repeat, after one warm-up of each."""
    seconds: dict[str, list[float]] = {name: [] for name, _ in contenders}
    for repeat in range(repeats + 1):
        for name, run in contenders:
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(title: str, tokens: int, seconds: dict[str, list[float]]) -> list[str]:
    """Markdown: tokens/s as median (least to most), and CLIF's median ratio to each with its spread."""
    ours = next(iter(seconds.values()))
    lines = [f"## {title}", "", "| contender | tokens/s | CLIF is faster by |", "|---|---|---|"]
    for name, times in seconds.items():
        rates = sorted(tokens / t for t in times)
        ratios = sorted(t / o for t, o in zip(times, ours, strict=True))
        rate = f"{statistics.median(rates):.0f} ({rates[0]:.0f} to {rates[-1]:.0f})"
        lines.append(f"| {name} | {rate} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")
    return [*lines, ""]


def main(
    model: Annotated[str, typer.Option(help="as model.path in a configuration")],
    out: Annotated[Path, typer.Option(help="folder for the dated file")] = Path("benchmarks"),
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    repeats: Annotated[int, typer.Option(min=3)] = 3,
) -> None:
    """Compare serving and training speed on a CPU and write a dated file."""
    config = config_from_tree(
        {
            "model": {"path": model, "dtype": dtype, "device": "cpu", "max_context": 256},
            "engine": {"max_batch": REQUESTS, "kv_tokens": 8192, "max_prefill_tokens": 2048},
            "train": {"enabled": False},
        }
    )
    config = config.model_copy(update={"train": config.train.model_copy(update={"enabled": True})})

    def fresh() -> LoadedModel:
        return load_model(config.model, CPU)

    serving: list[Contender] = [
        ("CLIF", clif_serving(config, fresh())),
        ("transformers.generate, static batch", static_batch(fresh().model)),
        ("transformers generate_batch", continuous_batch(fresh().model)),
    ]
    training: list[Contender] = [
        ("CLIF", clif_training(config, fresh())),
        ("PEFT + AdamW", peft_training(config, fresh().model)),
    ]
    today = datetime.date.today().isoformat()
    lines = [f"# Engine alone, {today}, {dtype}", "", *_provenance(repeats)]
    lines += table(
        f"Greedy serving, {REQUESTS} requests at once, {PROMPT} + {ANSWER} tokens each, base model",
        REQUESTS * ANSWER,
        race(serving, repeats),
    )
    lines += table(
        f"LoRA training step, {SAMPLES} x {LENGTH} tokens, {TARGETS} targets each, r={config.adapter.r}, all-linear",
        SAMPLES * LENGTH,
        race(training, repeats),
    )
    path = out / f"engine-{dtype}-{today}.md"
    path.write_text("\n".join(lines))
    print(path.read_text())


def _provenance(repeats: int) -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return [
        f"* command: `python {' '.join(sys.argv)}`",
        f"* machine: {cpu_model()}, {torch.get_num_threads()} threads, {platform.system()}",
        f"* versions: Python {platform.python_version()}, {versions}; commit {git_commit() or 'unknown'}",
        f"* median of {repeats} repeats in turns, with the least and the most",
        "",
    ]


if __name__ == "__main__":
    typer.run(main)
