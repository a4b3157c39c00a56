"""Builds a replica from the configuration: model, adapters, data, engine, round member."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from clif.adapters.bank import AdapterBank
from clif.adapters.peft_io import read_folder
from clif.adapters.slots import SlotTable
from clif.adapters.store import AdapterStore
from clif.config import Config
from clif.data.heldout import heldout_parts, read_data
from clif.data.instruct import Row, check_some_fit, encode_samples, shard_rows, split_rows
from clif.distributed.roles import role_of
from clif.distributed.topology import Topology
from clif.engine.base import Base
from clif.engine.build import build_engine, is_measured, trial_engine, use_coserving
from clif.engine.coserving.measure import MODES, Load, Work, choose_by, measure
from clif.engine.engine import Engine
from clif.replica.records import RankRecords
from clif.replica.replica import Replica
from clif.tokenizer import ChatTokenizer
from clif.training.checkpoint import CheckpointWriter, find_checkpoint
from clif.training.heldout import Heldout
from clif.training.job_switch import JobState, JobSwitch
from clif.training.masters import UNKNOWN, Masters
from clif.training.member import Member
from clif.training.train_runner import TrainRunner
from clif.training.trainer import ShadowTrainer
from clif.types import CLIF, CoservingMode, TrainSample
from clif.wire.messages import Up

log = logging.getLogger(__name__)
STAND_IN_TOKENS = 128


@dataclass(frozen=True)
class ReplicaData:
    """This replica's samples: for training, for votes on candidates, and for the quality report."""

    train: list[TrainSample]
    gate: list[TrainSample]
    report: list[TrainSample]


def load_data(config: Config, tokenizer: ChatTokenizer, replica: int, replicas: int) -> ReplicaData:
    """Read, shard and tokenise the instruction data; unusable rows are logged with the reason.

    Raises DataError, the same in every replica, also if a trainer would have no sample or no replica a held-out row.
    """
    if config.data.path is None:
        return ReplicaData([], [], [])
    rows = read_data(config)
    limit = min(config.data.max_sample_tokens, config.model.max_context)
    train = _training_rows(config, rows, replica, replicas) if config.train.enabled else {}
    for trainer, shard in train.items():
        check_some_fit(shard, f"training rows of replica {trainer}", tokenizer, limit)
    # Without training, held-out rows may be missing: then quality is not measured.
    parts = heldout_parts(rows, config)
    if config.train.enabled:
        check_some_fit(parts.gate, "held-out rows that decide promotions", tokenizer, limit)
        check_some_fit(parts.report, "held-out rows that quality is measured on", tokenizer, limit)
    if parts.shared:
        log.warning("one held-out prompt is used: it decides promotions and quality is measured on it as well")
    # A replica that only serves needs no shard; it gets one, so that all replicas are built alike.
    mine = train.get(replica) or next(iter(train.values()), [])
    # A round whose members have no held-out row would be discarded: few rows are shared by several members.
    few = 0 < len(parts.gate) <= replica
    gate = [parts.gate[replica % len(parts.gate)]] if few else parts.gate[replica::replicas]
    judged = (_encode(part, tokenizer, limit) for part in (gate, parts.report[replica::replicas]))
    return ReplicaData(_encode(mine, tokenizer, limit), *judged)


def _training_rows(config: Config, rows: list[Row], replica: int, replicas: int) -> dict[int, list[Row]]:
    """The shards of all training replicas: each rank checks all of them, so that all raise the same error."""
    trainers = [r for r in range(replicas) if role_of(r, replicas, config.run).trains] or [replica]
    chosen = split_rows(rows, config.data.train_split)
    indices = enumerate(trainers)
    return {r: shard_rows(chosen, config.data.shard, index, len(trainers)) for index, r in indices}


def _encode(rows: Sequence[Row], tokenizer: ChatTokenizer, limit: int) -> list[TrainSample]:
    samples, reasons = encode_samples(rows, tokenizer, limit)
    for reason in reasons:
        log.warning("sample rejected: %s", reason)
    return samples


def build_replica(
    config: Config,
    topology: Topology,
    base: Base,
    data: ReplicaData,
    run_dir: Path,
    records: RankRecords,
    send: Callable[[Up], None],
    steps: int = 0,
) -> Replica:
    """All parts of one rank except its loop; with run.resume from the checkpoints. steps: steps that it took before."""
    engine = build_engine(config, base, topology.tp_group)
    if not role_of(topology.replica, len(topology.layout.replicas), config.run).trains:
        engine.runner.train_recorder = None
    with engine.streams.training():
        runner = TrainRunner(engine.runner)
    if data.train:
        runner.check_samples(max(len(sample.ids) for sample in data.train))
    if is_measured(config, topology.device, topology.tp_group):
        choose_by_trial(engine, runner, config, data.train)
    with engine.streams.training():
        return _around_engine(config, topology, base, data, run_dir, records, send, steps, engine, runner)


def choose_by_trial(
    engine: Engine,
    runner: TrainRunner,
    config: Config,
    samples: Sequence[TrainSample],
    modes: Sequence[CoservingMode] = MODES,
) -> None:
    """Try serving and training in each mode, and use the best from now on. The engine has nothing to do yet.

    samples: a few of them are trained on, without an optimizer step.
    """
    chosen = samples[: config.train.micro_batch] or _stand_ins(config)
    measured = measure(
        partial(trial_engine, engine, config),
        Work(
            partial(runner.loss_and_gradients, chosen, sum(sample.targets for sample in chosen)),
            sum(len(sample.ids) for sample in chosen),
            runner.stack.num_layers,
        ),
        Load.of(engine.config, config.model.max_context),
        modes,
    )
    runner.bank.gradient.zero_()
    mode, figures = choose_by(measured, config.slo.tpot_ms / 1000)
    use_coserving(engine, config, mode)
    if engine.runner.fuses:
        # Their memory is free for others.
        runner.graphs = None
    log.info("co-serving: %s (measured: %s)", mode, figures)


def _stand_ins(config: Config) -> list[TrainSample]:
    """Samples to measure with where jobs bring theirs later."""
    length = min(STAND_IN_TOKENS, config.data.max_sample_tokens, config.model.max_context)
    sample = TrainSample(id=0, ids=(0,) * length, target_start=length // 2)
    return [sample] * config.train.micro_batch


def _around_engine(
    config: Config,
    topology: Topology,
    base: Base,
    data: ReplicaData,
    run_dir: Path,
    records: RankRecords,
    send: Callable[[Up], None],
    steps: int,
    engine: Engine,
    runner: TrainRunner,
) -> Replica:
    """Everything that trains, and the replica."""
    bank, slots = base.bank, engine.scheduler.slots
    trainer = ShadowTrainer(runner, bank, data.train, config.train, config.run.seed)
    checkpoints = CheckpointWriter(run_dir / "checkpoints", topology.env.rank)
    masters = Masters(bank, slots, partial(bank.reset, config.run.seed))
    if config.run.resume:
        _resume(AdapterStore(run_dir), checkpoints, bank, slots, masters, trainer)

    own = JobState(Heldout(runner, data.gate, config.engine.eval_tokens), checkpoints)
    folder, tokens = run_dir / "checkpoints", config.engine.eval_tokens
    job_switch = JobSwitch(trainer, own, data.gate, folder, topology.env.rank, tokens)

    def on_version(version: int, round_id: int) -> None:
        records.version(version, round_id, replica.steps, slots.slot_of(version) or 0)

    member = Member(
        topology=topology,
        trainer=trainer,
        report=Heldout(runner, data.report, config.engine.eval_tokens),
        slots=slots,
        masters=masters,
        base_name=config.model.path,
        send=send,
        job_switch=job_switch,
        # One per replica: all of its ranks take the same steps.
        on_step=records.train_step if topology.is_leader else lambda *_: None,
        on_version=on_version,
        engine_step=lambda: replica.steps,
        micro_batch=config.train.micro_batch,
        half_steps=config.federation.half_steps,
    )
    replica = Replica(config, topology.replica, engine, member, records, send, job_switch.wait, steps)
    return replica


def _resume(
    store: AdapterStore,
    checkpoints: CheckpointWriter,
    bank: AdapterBank,
    slots: SlotTable,
    masters: Masters,
    trainer: ShadowTrainer,
) -> None:
    """Continue from the active version of adapter `clif`, with the last committed moments and sample cursor.

    Other versions that are to be held come from the control process. Raises AdapterError or ValueError if the files do
    not fit this run.
    """
    stored = store.read()
    # The leader's versions count: the control process may store another one while the peers read.
    last, active = bank.tp_group.broadcast_ints([stored.last, stored.active.get(CLIF, 0)])
    slot = slots.free_slot()
    if not last or slot is None:
        return
    state = read_folder(bank, store.path(active)) if active else None
    if state is not None:
        bank.fill_slot(slot, state)
        slots.promote(active, slot)
        masters.add(active, bank.flat(state))
    saved = find_checkpoint(checkpoints, store.rounds(last), bank.shadow.device)
    if saved is not None and saved.trainer["shadow"].shape != bank.shadow.shape:
        # tp_size has changed: the adapter is sharded again, but the moments belong to shards that no longer exist.
        log.warning("the checkpoint is of other parts of the model: the optimizer begins with fresh moments")
    elif saved is not None:
        trainer.resume(saved.trainer, saved.cursor)
        # Its shadow may be that of a version that is no longer active, or of one that came before the last.
        masters.shadow = UNKNOWN
    # A replica that had not installed the last version yet keeps its own moments and takes the promoted shadow.
    masters.begin_from(active)
