"""Puts a replica together from the configuration: model, adapters, data, engine, round member."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clif.adapters.bank import AdapterBank
from clif.adapters.peft_io import read_folder
from clif.adapters.slots import SlotTable
from clif.config import Config
from clif.data.instruct import Row, encode_samples, read_rows, shard_rows, split_rows
from clif.models.loading import LoadedModel
from clif.replica.checkpoint import Checkpoint, CheckpointWriter, load_checkpoint
from clif.replica.engine import Engine
from clif.replica.heldout import Heldout
from clif.replica.member import Member
from clif.replica.records import RankRecords
from clif.replica.replica import Replica
from clif.replica.runner import build_runner
from clif.replica.scheduler import Scheduler
from clif.replica.trainer import ShadowTrainer
from clif.store import AdapterStore
from clif.text import ChatTokenizer
from clif.topology import Topology
from clif.types import TrainSample
from clif.wire.messages import Up

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplicaData:
    """This replica's training and held-out samples."""

    train: list[TrainSample]
    heldout: list[TrainSample]


def load_data(config: Config, tokenizer: ChatTokenizer, replica: int, replicas: int) -> ReplicaData:
    """Read, share out and tokenise the instruction data; rows that cannot be used are logged with the reason.

    Raises DataError.
    """
    if config.data.path is None:
        return ReplicaData([], [])
    rows = read_rows(config.data.path)
    train: list[Row] = []
    if config.train.enabled:
        train = shard_rows(split_rows(rows, config.data.train_split), config.data.shard, replica, replicas)
    heldout = split_rows(rows, config.data.heldout_split)[: config.data.heldout_rows][replica::replicas]
    return ReplicaData(_encode(config, tokenizer, train), _encode(config, tokenizer, heldout))


def _encode(config: Config, tokenizer: ChatTokenizer, rows: list[Row]) -> list[TrainSample]:
    samples, reasons = encode_samples(rows, tokenizer, min(config.data.max_sample_tokens, config.model.max_context))
    for reason in reasons:
        log.warning("sample rejected: %s", reason)
    return samples


def build_replica(
    config: Config,
    topology: Topology,
    loaded: LoadedModel,
    run_dir: Path,
    records: RankRecords,
    tell: Callable[[Up], None],
) -> Replica:
    """Everything of one rank but the loop."""
    runner, bank = build_runner(config, loaded)
    data = load_data(config, loaded.tokenizer, topology.replica, len(topology.layout.replicas))
    slots = SlotTable(config.adapter.serving_slots)
    scheduler = Scheduler(config.engine, slots, loaded.tokenizer.eos_ids, loaded.tokenizer.decode)
    engine = Engine(runner, scheduler, config.slo)
    trainer = ShadowTrainer(runner, bank, data.train, config.train, config.run.seed)
    checkpoints = CheckpointWriter(run_dir / "checkpoints", topology.env.rank)
    if config.run.resume:
        _resume(AdapterStore(run_dir), checkpoints.path, bank, slots, trainer)

    def on_version(version: int, round_id: int) -> None:
        records.version(version, round_id, replica.ticks, slots.slot_of(version) or 0)
        checkpoints.save(Checkpoint(version, round_id, trainer.snapshot(), trainer.cursor_state()))

    member = Member(
        topology=topology,
        trainer=trainer,
        heldout=Heldout(runner, data.heldout, config.engine.eval_tokens),
        slots=slots,
        base=config.model.path,
        tell=tell,
        # Once per replica: its ranks all take the same steps.
        on_step=records.step if topology.is_leader else lambda *_: None,
        on_version=on_version,
        tick=lambda: replica.ticks,
        micro_batch=config.train.micro_batch,
    )
    replica = Replica(config, topology.replica, engine, member, records, tell, checkpoints.wait)
    return replica


def _resume(store: AdapterStore, checkpoint: Path, bank: AdapterBank, slots: SlotTable, trainer: ShadowTrainer) -> None:
    """Serve and go on training from the last promoted version; its optimizer state comes along where it is known.

    Raises AdapterError or ValueError when what is on disk does not fit this run.
    """
    current, slot = store.current(), slots.free_slot()
    if current is None or slot is None:
        return
    state = read_folder(bank, store.place(current.number))
    bank.fill_slot(slot, state)
    slots.promote(current.number, slot)
    bank.set_shadow(state)
    if not checkpoint.is_file():
        return
    saved = load_checkpoint(checkpoint, bank.shadow.device)
    # A rank that died between the adapter's and its own checkpoint goes on from the adapter, with fresh moments.
    if saved.version == current.number:
        trainer.resume(saved.trainer, saved.cursor)
