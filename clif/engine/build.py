"""The one builder of an engine, which serves and trains in one process, from the configuration and a model."""

from __future__ import annotations

import logging

import torch

from clif.adapters.slots import SlotTable
from clif.config import Config, ConfigError
from clif.distributed.collectives import TpGroup
from clif.distributed.topology import choose_device
from clif.engine.base import Base, build_base
from clif.engine.capture import Recorder, choose_recorder, choose_train_recorder
from clif.engine.checked_capture import CaptureError
from clif.engine.coserving.concurrent import Concurrent
from clif.engine.coserving.fused import Fused
from clif.engine.coserving.interleaved import Interleaved
from clif.engine.coserving.strategy import Strategy
from clif.engine.coserving.time_slice import TimeSlice
from clif.engine.cost_model import CostModel
from clif.engine.engine import Engine
from clif.engine.job_queue import JobQueue, SliceThread
from clif.engine.kv_size import resolve_kv_tokens
from clif.engine.runner import ModelRunner
from clif.engine.scheduler import Scheduler
from clif.engine.stopwatch import choose_stopwatch
from clif.engine.streams import Streams, choose_streams
from clif.engine.train_stream import TrainStream
from clif.engine.train_thread import TrainThread
from clif.engine.training_half import TrainingHalf
from clif.models.weights.loading import LoadedModel, load_model
from clif.types import CoservingMode

log = logging.getLogger(__name__)
STRATEGIES: dict[CoservingMode, type[Strategy]] = {
    CoservingMode.INTERLEAVED: Interleaved,
    CoservingMode.FUSED: Fused,
    CoservingMode.CONCURRENT: Concurrent,
}
AHEAD = {"cuda": 2}
"""Slices that the device is given at a time while nothing is served: a GPU does one while the host prepares another."""


def load_engine(config: Config, loaded: LoadedModel | None, tp_group: TpGroup | None) -> Engine:
    """An engine on a base of its own. Collective over the group. See Engine.from_config."""
    if loaded is None:
        loaded = load_model(config.model, choose_device(config.model.device, 0), config.run.seed, tp_group)
    base, tp_group = build_base(config, loaded, tp_group), tp_group or TpGroup()
    return build_engine(resolve_kv_tokens(config, base, tp_group), base, tp_group)


def build_engine(config: Config, base: Base, tp_group: TpGroup | None = None) -> Engine:
    """An engine with its own KV cache, slots and scheduler, on an existing base.

    config: with a number as engine.kv_tokens, see resolve_kv_tokens(). Raises ConfigError for a co-serving mode that
    cannot be used.
    """
    tp_group, tokenizer, threads = tp_group or TpGroup(), base.loaded.tokenizer, torch.get_num_threads()
    device = base.loaded.device
    coserving = choose_coserving(config, device, tp_group, threads)
    if not is_measured(config, device, tp_group):
        log.info("co-serving: %s", coserving)
    slots = SlotTable(config.adapter.serving_slots)
    runner = base.runner(config.engine)
    recorder = choose_recorder(config.engine, device, tp_group.size, runner.paged is not None)
    if recorder is not None:
        _capture(runner, recorder, config.model.max_context)
    if config.train.enabled:
        # While modes are measured, those that do not fuse need captured layers.
        fuses = coserving == CoservingMode.FUSED and not is_measured(config, device, tp_group)
        varlen = base.stack.varlen is not None
        runner.train_recorder = choose_train_recorder(config.engine, device, tp_group.size, varlen, fuses)
    engine = Engine(
        runner,
        Scheduler(
            config.engine, slots, tokenizer.eos_ids, tokenizer.decode, base.guides, base.stack.spec.widest_window
        ),
        TrainingHalf(make_strategy(coserving, config)),
        tp_group,
        overlap=device.type == "cuda" if config.engine.overlap == "auto" else config.engine.overlap,
        asynchronous=device.type == "cuda",
    )
    use_coserving(engine, config, coserving)
    return engine


def use_coserving(engine: Engine, config: Config, coserving: str) -> None:
    """Train in this way from now on, with nothing measured. The engine has no jobs; the device is waited for."""
    device, concurrent = engine.runner.device, coserving == CoservingMode.CONCURRENT
    streams = engine.streams = choose_streams(device, concurrent)
    # A GPU decodes for many rows as fast as for few: its batch is limited by memory and not by its speed.
    keeps_gaps = device.type == "cpu"
    engine.training_half = TrainingHalf(
        make_strategy(coserving, config, keeps_gaps),
        JobQueue(choose_thread(device, streams, torch.get_num_threads()) if concurrent else None),
        shared=engine.tp_group.size > 1,
        stopwatch=choose_stopwatch(device),
        ahead=AHEAD.get(device.type, 1),
    )
    engine.runner.fuses = engine.training_half.strategy.fuses
    engine.runner.bank.on_fill = streams.publish
    # What was made until now was made on another stream.
    streams.synchronize()


def choose_thread(device: torch.device, streams: Streams, threads: int) -> SliceThread:
    """What computes slices beside serving steps."""
    return TrainStream(streams, choose_stopwatch(device)) if device.type == "cuda" else TrainThread(threads)


def trial_engine(engine: Engine, config: Config, coserving: str) -> Engine:
    """An engine that serves and trains in this way with the model of another, which has nothing to do meanwhile.

    Requests, blocks, slots, costs and jobs are its own; its requests read what lies in the first slot, and write none.
    """
    slots = SlotTable(config.adapter.serving_slots)
    slots.promote(1, 0)
    trial = Engine(
        engine.runner,
        Scheduler(engine.config, slots, (), lambda _: "", window=engine.scheduler.window),
        TrainingHalf(make_strategy(coserving, config)),
        engine.tp_group,
        clock=engine.clock,
        overlap=engine.overlap,
        asynchronous=engine.asynchronous,
    )
    use_coserving(trial, config, coserving)
    return trial


def is_measured(config: Config, device: torch.device, tp_group: TpGroup) -> bool:
    """Whether the co-serving mode of a replica is decided by a measurement when it starts."""
    serves = config.run.mode == "clif" and config.load.kind != "none"
    auto = config.engine.coserving == CoservingMode.AUTO
    return auto and device.type == "cuda" and tp_group.size == 1 and config.train.enabled and serves


def _capture(runner: ModelRunner, recorder: Recorder, max_context: int) -> None:
    try:
        # The largest first: others fit into their memory.
        runner.capture_prompts(recorder, max_context)
    except CaptureError as error:
        log.warning("no CUDA graphs of steps with prompts, which are launched kernel by kernel: %s", error)
    try:
        runner.capture(recorder, max_context)
    except CaptureError as error:
        log.warning("no CUDA graphs, steps are launched kernel by kernel: %s", error)


def make_strategy(coserving: str, config: Config, keeps_gaps: bool = False) -> Strategy:
    """A strategy without measurements. coserving: a CoservingMode except AUTO, or the baseline "time_slice".

    keeps_gaps: slices between steps leave gaps between tokens about as long as they are without training.
    """
    parts = CostModel(), config.engine, config.slo
    if coserving == "time_slice":
        return TimeSlice(*parts, config.run.training_share)
    if coserving == CoservingMode.INTERLEAVED:
        return Interleaved(*parts, keeps_gaps=keeps_gaps)
    return STRATEGIES[CoservingMode(coserving)](*parts)


def choose_coserving(config: Config, device: torch.device, tp_group: TpGroup, threads: int) -> str:
    """The co-serving mode of the configuration, or the one that suits the device. threads: of this rank, on a CPU.

    On a GPU a replica of one rank has captured training layers, which cannot be fused; where all modes are measured
    (see is_measured()), the mode here is that of the time before. Those of several ranks are fused. A CPU computes as
    fast for a few rows as for many, so that fusing saves nothing there (measured at 70 % load: 36 training tokens/s
    fused, 95 interleaved); with several threads a concurrent slice uses what small operations leave of them. Raises
    ConfigError for a mode that cannot be used.
    """
    on_cpu = device.type == "cpu"
    way: str = config.engine.coserving
    if way == CoservingMode.AUTO:
        alone = CoservingMode.CONCURRENT if threads > 1 and tp_group.size == 1 else CoservingMode.INTERLEAVED
        on_gpu = CoservingMode.FUSED if tp_group.size > 1 else CoservingMode.INTERLEAVED
        way = alone if on_cpu else on_gpu
    if config.run.mode == "time_slice":
        way = "time_slice"
    if tp_group.size > 1 and way in ("concurrent", "time_slice"):
        # Both depend on the clock of each rank; and collectives belong to one thread and one stream.
        raise ConfigError(f"{way} needs replicas of one rank: set layout.tp_size=1, or another engine.coserving")
    if way == "concurrent" and on_cpu and threads < 2:
        raise ConfigError(
            "engine.coserving concurrent needs a CPU rank with at least 2 threads: set dist.threads_per_rank, or "
            "engine.coserving=fused"
        )
    return way
