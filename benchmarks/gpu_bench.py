"""Shared parts of the GPU stages: an engine at the shape of a 1B or 8B model with random weights, and its timing.

Every stage is a script of its own (see gpu_stages.py). `--dry` runs it on a CPU with a tiny model: it shows that the
script works, and its figures mean nothing.
"""

from __future__ import annotations

import gc
import logging
import platform
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from checkout import REPO, commit, use_checkout

use_checkout()

import msgspec
import torch

from clif.config import Config, ConfigError, config_from_tree
from clif.distributed.collectives import TpGroup
from clif.engine.base import build_base
from clif.engine.build import build_engine
from clif.engine.capture import Captured
from clif.engine.checked_capture import CheckedRecorder, CheckedRegion
from clif.engine.engine import Engine
from clif.engine.graphs import DecodeGraphs
from clif.engine.jobs import Job, Slices
from clif.engine.kv_size import resolve_kv_tokens
from clif.kernels.paged_decode_reference import PagedDecodeReference
from clif.kernels.paged_prefill_reference import PagedPrefillReference
from clif.models.varlen import varlen_reference
from clif.models.weights.loading import LoadedModel, load_model
from clif.training.train_runner import TrainRunner
from clif.training.trainer import ShadowTrainer
from clif.types import Request, Sampling, TrainSample

TTFT_MS, TPOT_MS = 400.0, 50.0
"""The promise of the co-serving stage."""


@dataclass(frozen=True)
class Scale:
    """Sizes of a stage. prompt, answer: tokens; window_s: seconds of one measurement. model: in place of all shapes."""

    shapes: tuple[str, ...]
    device: str
    dtype: str
    batch: int
    prompt: int
    answer: int
    window_s: float
    repeats: int
    steps: tuple[tuple[int, int], ...]
    """Training steps as (samples, tokens of each): the largest, the smallest, one between."""
    buckets: tuple[tuple[int, int], ...]
    """The same for steps of one captured pass, by the tokens that it is captured for."""
    model: str = ""
    prefill: int = 512
    """engine.max_prefill_tokens, which decides how large captured steps with prompts are."""

    def shown(self, shape: str) -> str:
        """What is really measured."""
        return self.model or shape

    @property
    def captured(self) -> tuple[int, ...]:
        """Rows of captured passes."""
        return tuple(count * length for count, length in self.buckets)


FULL = Scale(
    ("llama-1b", "llama-8b"), "cuda", "bfloat16", 64, 256, 256, 2.0, 2,
    ((32, 512), (4, 128), (8, 512)), ((2, 128), (4, 128), (4, 256), (4, 512)),
)  # fmt: skip
DRY = Scale(
    FULL.shapes, "cpu", "float32", 4, 12, 12, 0.2, 1, ((4, 16), (1, 16), (2, 16)), ((1, 16), (2, 16)), "tiny-llama",
    48,
)  # fmt: skip


def run_stage(measure: Callable[[str, Scale], list[str]]) -> None:
    """Measure the shapes that the command line names, or the first of the scale, and print Markdown last.

    Exits with 1 if a line of it FAILED.
    """
    scale = scale_of(sys.argv)
    named = [word for word in sys.argv[1:] if not word.startswith("-")]
    logging.basicConfig(level=logging.INFO, format="[%(name)s] %(message)s", stream=sys.stdout)
    print(provenance(), flush=True)
    text = "\n\n".join("\n".join(measure(shape, scale)) for shape in named or scale.shapes[:1])
    print("\n" + text)
    sys.exit(1 if "FAILED " in text else 0)


def scale_of(arguments: list[str]) -> Scale:
    """FULL, or with --dry DRY. Exits with a sentence if there is no GPU."""
    scale = DRY if "--dry" in arguments else FULL
    if scale.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU here: add --dry, or use a machine that has one")
    return scale


class Bench:
    """One model shape: a base whose engines share the model and the adapters, and serve an adapter as version 1."""

    def __init__(self, shape: str, scale: Scale, weights: str = "auto", loaded: Any = None, **engine: Any) -> None:
        self.scale, self.device = scale, torch.device(scale.device)
        self._tree = _tree(shape, scale, engine)
        self._tree["model"]["weight_dtype"] = weights
        self.config = _config(self._tree)
        self.loaded: LoadedModel = loaded or load_model(self.config.model, self.device)
        self.base = build_base(self.config, self.loaded)
        self.bank = self.base.bank
        state = {name: torch.randn_like(factor) * 0.01 for name, factor in self.bank.shadow_state().items()}
        self.bank.fill_slot(0, state)
        self.vocab = self.base.stack.vocab_size
        self._ids = iter(range(1 << 60))

    def engine(self, **fields: Any) -> Engine:
        """A new engine with its own KV cache and an untrained cost model. fields: of engine, over those of the bench.

        Raises ConfigError for what cannot be used on this device.
        """
        config = _config({**self._tree, "engine": {**self._tree["engine"], **fields}})
        config = resolve_kv_tokens(config, self.base, TpGroup())
        engine = build_engine(config, self.base)
        if self.device.type == "cpu" and config.engine.graphs != "off":
            # In place of CUDA graphs: the same regions under the rules of a capture.
            engine.runner.paged = PagedDecodeReference()  # type: ignore[assignment]
            engine.runner.prefill, recorder = PagedPrefillReference(), CheckedRecorder()
            engine.runner.capture_prompts(recorder, config.model.max_context)
            engine.runner.capture(recorder, config.model.max_context)
            if not engine.training_half.strategy.fuses:
                engine.runner.train_recorder = CheckedRecorder()
                self.base.stack.varlen = varlen_reference
        engine.scheduler.slots.promote(1, 0)
        return engine

    def train_runner(self, engine: Engine) -> TrainRunner:
        """Captures the layers of passes, where the engine has them captured."""
        self.sync()
        with engine.streams.training():
            runner = TrainRunner(engine.runner, self.scale.captured)
        self.sync()
        return runner

    def trainer(self, engine: Engine, count: int, length: int, runner: TrainRunner | None = None) -> ShadowTrainer:
        """A trainer on `count` samples of `length` tokens. runner: by default one of its own."""
        runner, drawn = runner or self.train_runner(engine), self.samples(count, length)
        with engine.streams.training():
            return ShadowTrainer(runner, self.bank, drawn, self.config.train)

    def samples(self, count: int, length: int) -> list[TrainSample]:
        """The second half of each is targets."""
        return samples(self.vocab, count, length)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def request(self, prompt: int, answer: int, seed: int | None = None) -> Request:
        """A request with a prompt that only one of the same seed has."""
        number = next(self._ids)
        rng = torch.Generator().manual_seed(number if seed is None else seed)
        ids = torch.randint(100, self.vocab, (prompt,), generator=rng).tolist()
        return Request(id=number, prompt=tuple(ids), sampling=Sampling(max_tokens=answer, ignore_eos=True))

    def clean(self) -> None:
        """Give back the memory of engines that are no longer referred to."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def top_up(self, engine: Engine) -> None:
        """Add fresh requests until the batch is full. Answers differ in length, so that prompts come one by one."""
        while len(engine.scheduler.sequences) < self.scale.batch:
            engine.scheduler.add(self.mixed_request(), engine.clock())

    def mixed_request(self, seed: int | None = None) -> Request:
        """A request of a load: its answer has half to one and a half times the scale's length."""
        request = self.request(self.scale.prompt, self.scale.answer, seed)
        answer = self.scale.answer // 2 + (request.id if seed is None else seed) * 31 % self.scale.answer
        return msgspec.structs.replace(request, sampling=Sampling(max_tokens=answer, ignore_eos=True))

    def cancel_all(self, engine: Engine) -> None:
        """End all requests, and settle what is under way."""
        for sequence in engine.scheduler.sequences:
            engine.scheduler.cancel(sequence.request.id)
        while engine.serving:
            engine.serve()

    @property
    def weights(self) -> int:
        """Bytes of the weights that a decode step reads: linear layers and head."""
        stack = self.base.stack
        bases = (*(linear.base for linear in stack.linears), stack.head.base)
        return sum(tensor.nbytes for base in bases for tensor in base.tensors)

    def kv(self, engine: Engine, tokens: float) -> float:
        """Bytes of keys and values of `tokens` tokens, in all layers."""
        return tokens * engine.runner.cache.bytes / engine.config.num_kv_tokens


def add_job(engine: Engine, work: Slices[Any]) -> None:
    """Append a job. All of training, also what is done between slices, belongs to the engine's stream for it."""
    with engine.streams.training():
        engine.jobs.append(Job("steps", work))


def run_step(engine: Engine, trainer: ShadowTrainer, count: int) -> None:
    """One optimizer step over `count` samples, without the engine's decisions."""
    with engine.streams.training():
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


def add_lines(lines: list[str], work: Iterable[tuple[str, Callable[[], str]]]) -> None:
    """Append the line of each call, and print it at once.

    A call that fails ends no other: its line says why, and the log has its traceback.
    """
    for name, call in work:
        form = "| {} | {} |" if lines and lines[-1].startswith("|") else "* {}: {}"
        try:
            lines.append(call())
        except ConfigError as error:
            lines.append(form.format(name, f"not here: {error}"))
        except Exception as error:  # noqa: BLE001 - whatever it was, its line says it and the next one comes
            traceback.print_exc(file=sys.stdout)
            lines.append(form.format(name, f"FAILED {type(error).__name__}: {_first_line(error)}"))
        print(lines[-1], flush=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]


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


def graphs_of(engine: Engine) -> DecodeGraphs:
    """The captured steps of an engine. Raises ConfigError where it has none."""
    if engine.runner.graphs is None:
        raise ConfigError("nothing is captured, see the log")
    return engine.runner.graphs


def graph_seconds(graph: Captured[Any], device: torch.device, times: int = 10) -> float:
    """Seconds of the device for a captured step, the mean of several replays over the same buffers."""
    if device.type != "cuda":
        start_s = time.perf_counter()
        graph.replay()
        return time.perf_counter() - start_s
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1000 / times


def count_kernels(engine: Engine, size: int) -> dict[str, tuple[int, float]]:
    """The kernels of a captured step, as in launches(); on a CPU operators stand for them."""
    graph = graphs_of(engine).captured[size]
    if not isinstance(graph, CheckedRegion):
        return launches(graph.replay)
    operators = Counter(operator.name for operator in graph.operators if not operator.idle)
    return {name: (count, 0.0) for name, count in operators.items()}


def per_layer(kernels: dict[str, tuple[int, float]], layers: int) -> int:
    """Kernels of one layer: a kernel that runs in all layers does so a multiple of that often."""
    return sum(count // layers for count, _ in kernels.values())


def memory_mib(bench: Bench) -> float:
    """MiB that the allocator holds on the device; 0 on a CPU."""
    if bench.device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    return torch.cuda.memory_reserved() / 2**20


HOST_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")


def host_launches(work: Callable[[], object]) -> int:
    """How often the host launches something in one call: a kernel, or a whole graph."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        work()
        torch.cuda.synchronize()
    return sum(event.name.startswith(HOST_LAUNCHES) for event in record.events())


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


def _tree(shape: str, scale: Scale, engine: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a bench, as plain values."""
    longest = scale.prompt + 2 * scale.answer
    return {
        "model": {
            "path": f"random:{Path(REPO) / 'configs' / 'models' / f'{scale.shown(shape)}.json'}",
            "dtype": scale.dtype,
            "device": scale.device,
            "max_context": longest,
        },
        "engine": {
            "max_batch": scale.batch,
            "max_prefill_tokens": scale.prefill,
            "kv_tokens": -(-scale.batch * longest // 16) * 16,
            "activation_mib": 8192,
            **engine,
        },
        "slo": {"ttft_ms": TTFT_MS, "tpot_ms": TPOT_MS, "margin": 0.2},
        "train": {"enabled": False},
    }


def _config(tree: dict[str, Any]) -> Config:
    """Training is enabled without the data that a whole run needs for it."""
    config = config_from_tree(tree)
    return config.model_copy(update={"train": config.train.model_copy(update={"enabled": True})})
