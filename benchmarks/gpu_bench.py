"""Shared parts of the GPU stages: an engine at the shape of a 1B or 8B model with random weights, and its timing.

Every stage is a script of its own (see gpu_stages.py). `--dry` runs it on a CPU with a tiny model: it shows that the
script works, and its figures mean nothing.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from checkout import REPO, commit, use_checkout

use_checkout()

import torch

from clif.config import Config, config_from_tree
from clif.engine.build import make_strategy
from clif.engine.engine import Engine
from clif.engine.jobs import Job
from clif.engine.scheduler import Scheduler
from clif.engine.training_half import TrainingHalf
from clif.models.weights.loading import LoadedModel, load_model
from clif.training.train_runner import TrainRunner
from clif.training.trainer import ShadowTrainer
from clif.types import Request, Sampling, TrainSample


@dataclass(frozen=True)
class Scale:
    """Sizes of a stage. prompt, answer: tokens; window_s: seconds of one measurement."""

    shapes: tuple[str, ...]
    device: str
    dtype: str
    batch: int
    prompt: int
    answer: int
    window_s: float
    repeats: int
    steps: tuple[tuple[int, int], ...]
    """Training steps as (samples, tokens of each)."""


FULL = Scale(("llama-1b", "llama-8b"), "cuda", "bfloat16", 64, 256, 256, 2.0, 3, ((4, 128), (8, 512), (32, 512)))
DRY = Scale(("tiny-llama",), "cpu", "float32", 4, 12, 12, 0.2, 2, ((2, 16),))


def run_stage(measure: Callable[[str, Scale], list[str]], shapes: int) -> None:
    """Measure the shapes that the command line names, or the first `shapes` of the scale, and print Markdown last."""
    scale = scale_of(sys.argv)
    named = [word for word in sys.argv[1:] if not word.startswith("-")]
    print(provenance(), flush=True)
    text = ["\n".join(measure(shape, scale)) for shape in named or scale.shapes[:shapes]]
    print("\n" + "\n\n".join(text))


def scale_of(arguments: list[str]) -> Scale:
    """FULL, or with --dry DRY. Exits with a sentence if there is no GPU."""
    scale = DRY if "--dry" in arguments else FULL
    if scale.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU here: add --dry, or use a machine that has one")
    return scale


class Bench:
    """One model shape: a runner with an adapter that serves, and a shadow that learns."""

    def __init__(self, shape: str, scale: Scale, **engine: Any) -> None:
        self.scale, self.device = scale, torch.device(scale.device)
        self.config = _config(shape, scale, engine)
        self.loaded: LoadedModel = load_model(self.config.model, self.device)
        built = Engine.from_config(self.config, self.loaded)
        self.runner, self.bank, self.slots = built.runner, built.runner.bank, built.scheduler.slots
        state = {name: torch.randn_like(factor) * 0.01 for name, factor in self.bank.shadow_state().items()}
        self.bank.fill_slot(0, state)
        self.slots.promote(1, 0)
        self.vocab = self.runner.stack.vocab_size
        self._ids = iter(range(1 << 60))

    def engine(self, coserving: str = "interleaved") -> Engine:
        """A new engine on the same runner, with an untrained cost model."""
        scheduler = Scheduler(self.config.engine, self.slots, (), self.loaded.tokenizer.decode)
        return Engine(self.runner, scheduler, TrainingHalf(make_strategy(coserving, self.config)))

    def trainer(self, count: int, length: int) -> ShadowTrainer:
        """A trainer on `count` samples of `length` tokens, of which the second half are targets."""
        runner = TrainRunner(self.runner)
        return ShadowTrainer(runner, self.bank, samples(self.vocab, count, length), self.config.train)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def top_up(self, engine: Engine) -> None:
        """Add fresh requests until the batch is full. Answers differ in length, so that prompts come one by one."""
        while len(engine.scheduler.running) + len(engine.scheduler.waiting) < self.scale.batch:
            number = next(self._ids)
            rng = torch.Generator().manual_seed(number)
            prompt = torch.randint(100, self.vocab, (self.scale.prompt,), generator=rng).tolist()
            sampling = Sampling(max_tokens=self.scale.answer // 2 + number % self.scale.answer, ignore_eos=True)
            engine.scheduler.add(Request(id=number, prompt=tuple(prompt), sampling=sampling), engine.clock())

    def cancel_all(self, engine: Engine) -> None:
        for sequence in [*engine.scheduler.running, *engine.scheduler.waiting]:
            engine.scheduler.cancel(sequence.request.id)

    @property
    def weights(self) -> int:
        """Bytes of the weights that a decode step reads: linear layers and head."""
        stack = self.runner.stack
        bases = (*(linear.base for linear in stack.linears), stack.head.base)
        return sum(base.shape.numel() * base.dtype.itemsize for base in bases)

    def kv(self, tokens: int) -> float:
        """Bytes of keys and values of `tokens` tokens, in all layers."""
        return tokens * self.runner.cache.bytes / self.config.engine.kv_tokens


def run_step(trainer: ShadowTrainer, count: int) -> None:
    """One optimizer step over `count` samples."""
    job = Job("step", trainer.step(count, 1))
    while job.upcoming is not None:
        job.run()


def samples(vocab: int, count: int, length: int) -> list[TrainSample]:
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(100, vocab, (count, length), generator=rng).tolist()
    return [TrainSample(id=i, ids=tuple(row), target_start=length // 2) for i, row in enumerate(ids)]


def seconds_of(work: Callable[[], object], sync: Callable[[], None], window_s: float) -> list[float]:
    """Seconds of each call within a window after two warm-ups, at least three, each waited for."""
    for _ in range(2):
        work()
    sync()
    times: list[float] = []
    while sum(times) < window_s or len(times) < 3:
        start = time.perf_counter()
        work()
        sync()
        times.append(time.perf_counter() - start)
    return times


def spread(values: list[float], unit: float = 1.0) -> str:
    """Median (least to most), in units of `unit`."""
    median, least, most = (v / unit for v in (statistics.median(values), min(values), max(values)))
    return f"{median:.3g} ({least:.3g} to {most:.3g})"


def bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes/s that a copy of `size` bytes reads and writes."""
    source = torch.empty(size if device.type == "cuda" else 1 << 22, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    return 2 * source.nbytes / statistics.median(seconds_of(lambda: target.copy_(source), sync, 0.01))


def launches(work: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """The kernels of one call: name -> (launches, microseconds in all)."""
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        work()
        torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = {}
    for event in record.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count, busy = found.get(event.name, (0, 0.0))
            found[event.name] = count + 1, busy + event.device_time
    return found


def provenance() -> str:
    """One line: machine and versions."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU: figures mean nothing"
    versions = [f"torch {torch.__version__}", *(f"{name} {_version(name)}" for name in ("triton", "transformers"))]
    return f"{device}; Python {platform.python_version()}, {', '.join(versions)}; commit {commit()}"


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "missing"


def _config(shape: str, scale: Scale, engine: dict[str, Any]) -> Config:
    longest = scale.prompt + 2 * scale.answer
    tree = {
        "model": {
            "path": f"random:{Path(REPO) / 'configs' / 'models' / f'{shape}.json'}",
            "dtype": scale.dtype,
            "device": scale.device,
            "max_context": longest,
        },
        "engine": {
            "max_batch": scale.batch,
            "kv_tokens": -(-scale.batch * longest // 16) * 16,
            "activation_mib": 8192,
            **engine,
        },
        "slo": {"ttft_ms": 10000, "tpot_ms": 100, "margin": 0.2},
        "train": {"enabled": False},
    }
    config = config_from_tree(tree)
    return config.model_copy(update={"train": config.train.model_copy(update={"enabled": True})})
