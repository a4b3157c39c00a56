"""What a rank does from start to exit: join, load, loop, leave. Rank 0 also starts the control process."""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist

from clif.adapters.peft_files import describe
from clif.config import Config
from clif.distributed.collectives import PeersLost
from clif.distributed.launch_env import TORCHRUN, RankEnv, restarts_left
from clif.distributed.rendezvous import fewest_restarts
from clif.distributed.topology import Topology, make_topology
from clif.engine.base import Base, build_base
from clif.engine.kv_size import resolve_kv_tokens
from clif.exit_report import last_words
from clif.metrics.provenance import provenance
from clif.models.weights.files import is_gguf
from clif.models.weights.gguf import load_gguf, remove_unpacked
from clif.models.weights.kept_forms import KEPT
from clif.models.weights.loading import LoadedModel, load_model
from clif.rank.control_process import Control, connect, control_process, given_secret
from clif.rank.serve_loop import serve_until_stop
from clif.rank.shared_folder import agree_on_folder, resuming
from clif.rank.signals import SignalWatcher
from clif.rank.supervisor import ReplicaSupervisor
from clif.rank.threads import choose_threads, read_machine
from clif.replica.build import build_replica, load_data
from clif.replica.records import RankRecords
from clif.replica.replica import Replica
from clif.storage.files import keep_private, write_atomic
from clif.storage.run_folder import CONFIG_FILE, RunFolder
from clif.wire.messages import Goodbye, Hello, Trouble, Up

log = logging.getLogger(__name__)


def run_rank(config: Config, env: RankEnv) -> int:
    """All work of one rank; returns its exit code.

    Raises InputError before any work, and ReportedExit once its error is shown.
    """
    threads, why = choose_threads(config.dist.threads_per_rank, os.environ, env, read_machine())
    torch.set_num_threads(threads)
    log.info("CPU threads of a rank: %d (%s)", threads, why)
    signals = SignalWatcher(config.run.drain_s)
    # First of all: a wrong file is refused before anything that takes time.
    given_secret(config)
    topology = make_topology(config, env)
    folder = agree_on_folder(config, topology)
    signals.on_signal = lambda _: folder.leave()
    try:
        code = _load_and_serve(config, topology, folder, signals)
    finally:
        folder.leave()
    dist.destroy_process_group()
    return code


def _load_and_serve(config: Config, topology: Topology, folder: RunFolder, signals: SignalWatcher) -> int:
    """Load the model and serve, on rank 0 beside the control process; returns the exit code."""
    env, run_dir = topology.env, folder.path
    if folder.restarted:
        log.info("restarted by the launcher: the run goes on in %s", run_dir)
        config = resuming(config)
    if env.rank == 0:
        write_atomic(run_dir / CONFIG_FILE, config.model_dump_json(indent=1).encode())
    restarts = fewest_restarts(topology.store, env.rank, env.world_size, restarts_left(os.environ))
    started = time.monotonic()
    loaded = _load(config, topology, run_dir, folder.restarted)
    # After loading: files that it adds to a model cache may be shared with other users.
    keep_private()
    load_s = time.monotonic() - started
    log.info("rank %d: %s in %s (%s), %.1f s", env.rank, config.model.path, loaded.dtype, loaded.dtype_reason, load_s)
    with control_process(config, topology, folder, loaded.tokenizer, restarts, signals) as control:
        # Inside the block: this rank's error says more than that of a control process that is terminated.
        with last_words(env.rank, topology.store):
            code = _serve(config, topology, run_dir, loaded, load_s, control, signals)
        code = _code_for(env, code) if control is None else control.wait()
    if env.local_rank == 0 and code == 0:
        remove_unpacked(run_dir)
    return code


def _code_for(env: RankEnv, code: int) -> int:
    """The exit code of a rank without a control process.

    A torchrun agent on another host must not mistake a failed run for a successful one: it would wait for the others to
    succeed, and they would wait for it to restart. Other launchers kill all ranks at the first code that is not 0, and
    so rank 0 before its control process has closed its files.
    """
    return code if env.launcher == TORCHRUN else 0


def _load(config: Config, topology: Topology, run_dir: Path, restarted: bool) -> LoadedModel:
    env, tp_group = topology.env, topology.tp_group
    # A single rank without restarts reads the file once: unpacking it to disk would not pay.
    unpacked = is_gguf(config.model.path) and config.model.weight_dtype != KEPT
    if unpacked and (env.world_size > 1 or restarts_left(os.environ)):
        return load_gguf(config.model, topology.store, run_dir, topology.device, tp_group, restarted)
    return load_model(config.model, topology.device, config.run.seed, tp_group)


def _serve(
    config: Config,
    topology: Topology,
    run_dir: Path,
    loaded: LoadedModel,
    load_s: float,
    control: Control | None,
    signals: SignalWatcher,
) -> int:
    """Join, loop until Stop, leave; returns the exit code that Stop carries."""
    channel = connect(config, topology, run_dir) if topology.is_leader else None

    def send(message: Up) -> None:
        if channel is not None:
            channel.send(message)

    records = RankRecords(run_dir, topology.env.rank, config.metrics, provenance(config), _gpu(topology.device))
    base = build_base(config, loaded, topology.tp_group)
    # Once for all incarnations, whose caches are then as large.
    config = resolve_kv_tokens(config, base, topology.tp_group, topology.env.local_world_size)
    data = load_data(config, loaded.tokenizer, topology.replica, len(topology.layout.replicas))

    def build(incarnation: int, steps: int) -> Replica:
        if incarnation:
            base.renew(config.run.seed)
        return build_replica(
            resuming(config) if incarnation else config, topology, base, data, run_dir, records, send, steps
        )

    def say_hello(replica: Replica, incarnation: int) -> None:
        send(_hello(config, topology, replica, base, load_s, incarnation))

    # Most rounds need the group of all replicas: it is made before any request is served.
    replicas = tuple(range(len(topology.layout.replicas)))
    topology.combined_group((replicas, (0,) * len(replicas)), number=0).result()
    # At this point every rank has its model: a leader arrives here only after its peers have built theirs.
    if topology.env.local_rank == 0 and not restarts_left(os.environ):
        remove_unpacked(run_dir)
    supervisor = ReplicaSupervisor(topology, build, send, config.run.rebuilds, on_built=say_hello)
    try:
        serve_until_stop(supervisor, channel, control, signals)
    except Exception as error:
        gone = isinstance(error, PeersLost)
        send(Trouble(replica=topology.replica, error=f"{type(error).__name__}: {error}", gone=gone))
        raise
    finally:
        supervisor.close()
        records.close()
        send(Goodbye(replica=topology.replica))
        if channel is not None:
            channel.close()
    return supervisor.replica.exit_code


def _gpu(device: torch.device) -> str | None:
    """The GPU's UUID for NVML, whose numbering ignores CUDA_VISIBLE_DEVICES; None on a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None


def _hello(config: Config, topology: Topology, replica: Replica, base: Base, load_s: float, incarnation: int) -> Hello:
    return Hello(
        replica=replica.id,
        rank=topology.env.rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        max_batch=config.engine.max_batch,
        kv_tokens=replica.engine.config.num_kv_tokens,
        max_context=config.model.max_context,
        vocabulary=base.stack.vocab_size,
        adapter=describe(base.bank.shapes()),
        heldout_rows=replica.member.report.num_rows,
        dtype=str(base.loaded.dtype).removeprefix("torch."),
        load_s=load_s,
        incarnation=incarnation,
        version=replica.engine.scheduler.slots.active,
        versions=replica.engine.scheduler.slots.held,
    )
