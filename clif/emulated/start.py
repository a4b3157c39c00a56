"""A run with an emulated engine: one process is rank 0 and hosts all replicas, a thread for each. Free of torch."""

from __future__ import annotations

import logging
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from clif.adapters.peft_files import describe
from clif.config import Config
from clif.distributed.launch_env import RankEnv
from clif.distributed.layout import Layout
from clif.distributed.rendezvous import KeyValues, LocalStore
from clif.emulated.member import shapes
from clif.emulated.replica import EmulatedReplica, EmulatedSupervisor, Watch
from clif.emulated.step_times import StepTimes, step_times
from clif.emulated.tokenizer import read_tokenizer
from clif.exit_report import last_words
from clif.metrics.provenance import provenance
from clif.rank.control_process import Control, connect, control_process, given_secret
from clif.rank.serve_loop import serve_until_stop
from clif.rank.signals import SignalWatcher
from clif.replica.records import RankRecords
from clif.storage.files import keep_private, write_atomic
from clif.storage.run_folder import CONFIG_FILE, take_folder
from clif.tokenizer import ChatTokenizer
from clif.wire.keys import ADDRESS_FILE
from clif.wire.messages import Goodbye, Hello, Trouble

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Topology:
    """Rank 0, and which replica one of its threads is."""

    layout: Layout
    store: KeyValues
    replica: int = 0

    @property
    def env(self) -> RankEnv:
        return RankEnv(0, 1, 0, 1)


@dataclass(frozen=True)
class Emulated:
    """What all replicas of the process share. vocabulary: token ids are below it. watch: of a benchmark."""

    config: Config
    run_dir: Path
    times: StepTimes
    tokenizer: ChatTokenizer
    watch: Watch | None

    @property
    def vocabulary(self) -> int:
        return int(self.tokenizer.tokenizer.get_vocab_size(with_added_tokens=True))


def run_emulated(config: Config, layout: Layout, watch: Watch | None = None) -> int:
    """All of a run but the control process, which it starts; returns the exit code.

    Raises InputError before any work, and ReportedExit once an error is shown.
    """
    assert config.engine.emulated is not None
    signals = SignalWatcher(config.run.drain_s)
    given_secret(config)
    times = step_times(config.engine.emulated, config.run.seed)
    tokenizer = read_tokenizer(config.model.path)
    keep_private()
    topology = Topology(layout, LocalStore())
    folder = take_folder(config, topology.store)
    signals.on_signal = lambda _: folder.leave()
    log.info("the engine is emulated (%s): every answer is the same text", config.engine.emulated)
    try:
        (folder.path / ADDRESS_FILE).unlink(missing_ok=True)
        write_atomic(folder.path / CONFIG_FILE, config.model_dump_json(indent=1).encode())
        with control_process(config, topology, folder, tokenizer, 0, signals) as control:
            assert control is not None, "this process holds the folder's lock"
            with last_words():
                _serve_all(Emulated(config, folder.path, times, tokenizer, watch), topology, control, signals)
            return control.wait()
    finally:
        folder.leave()


def _serve_all(emulated: Emulated, topology: Topology, control: Control, signals: SignalWatcher) -> None:
    """Serve as all replicas until they are told to leave; raises the error of one that failed."""
    replicas = range(len(topology.layout.replicas))
    with ThreadPoolExecutor(len(replicas), "replica") as threads:
        ends = [
            threads.submit(_serve, emulated, Topology(topology.layout, topology.store, replica=r), control, signals)
            for r in replicas
        ]
    for end in ends:
        end.result()


def _serve(emulated: Emulated, topology: Topology, control: Control, signals: SignalWatcher) -> None:
    config, replica = emulated.config, topology.replica
    channel = connect(config, topology, emulated.run_dir)
    rank = topology.layout.replicas[replica][0]
    records = RankRecords(emulated.run_dir, rank, config.metrics, provenance(config))

    def build(steps: int) -> EmulatedReplica:
        parts = emulated.times, emulated.tokenizer, records
        return EmulatedReplica(config, replica, *parts, channel.send, emulated.watch, steps)

    def say_hello(built: EmulatedReplica, incarnation: int) -> None:
        channel.send(_hello(emulated, built, rank, incarnation))

    try:
        serve_until_stop(EmulatedSupervisor(build, say_hello), channel, control, signals)
    except Exception as error:
        channel.send(Trouble(replica=replica, error=f"{type(error).__name__}: {error}"))
        raise
    finally:
        records.close()
        channel.send(Goodbye(replica=replica))
        channel.close()


def _hello(emulated: Emulated, replica: EmulatedReplica, rank: int, incarnation: int) -> Hello:
    config = emulated.config
    return Hello(
        replica=replica.id,
        rank=rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        max_batch=config.engine.max_batch,
        kv_tokens=config.kv_tokens_bound,
        max_context=config.model.max_context,
        vocabulary=emulated.vocabulary,
        adapter=describe(shapes(config.adapter)),
        heldout_rows=int(config.train.enabled and config.data.path is not None),
        dtype="emulated",
        load_s=0.0,
        incarnation=incarnation,
        version=replica.scheduler.slots.active,
        versions=replica.scheduler.slots.held,
    )
