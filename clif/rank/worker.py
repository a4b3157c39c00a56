"""The life of a rank: join, load, loop, leave. Rank 0 also starts the control process and answers for its end."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from clif.adapters.peft_files import describe
from clif.config import Config
from clif.distributed.addresses import address_towards
from clif.distributed.collectives import PeersLost
from clif.distributed.launch_env import TORCHRUN, RankEnv, restarts_left
from clif.distributed.rendezvous import fewest_restarts
from clif.distributed.topology import Topology, make_topology
from clif.engine.base import Base, build_base
from clif.exit_report import Over, last_words
from clif.metrics.provenance import provenance
from clif.models.weights.files import is_gguf
from clif.models.weights.gguf import load_gguf, remove_unpacked
from clif.models.weights.loading import LoadedModel, load_model
from clif.rank.signals import SignalWatcher
from clif.rank.supervisor import ReplicaSupervisor
from clif.replica.build import build_replica, load_data
from clif.replica.records import RankRecords
from clif.replica.replica import Replica
from clif.storage.files import keep_private, write_atomic
from clif.storage.run_folder import CONFIG_FILE, PRIVATE, RunFolder, take_folder
from clif.tokenizer import ChatTokenizer
from clif.wire.channels import LeaderChannel
from clif.wire.keys import ADDRESS_FILE, Invitation, Keys, accept, read_secret
from clif.wire.messages import Goodbye, Hello, Signalled, Trouble, Up

log = logging.getLogger(__name__)
Control = subprocess.Popen[bytes]
INVITATION = "clif/control"
"""Key of torch's store, which anybody who reaches rank 0's host may read."""
CONTROL_LEAVES_S = 20.0
"""Less than the 30 s after which torchrun kills."""
ALONE_S = 60.0
"""A broken connection to the control process may be made again for so long; without it nobody sends Stop."""


def run_rank(config: Config, env: RankEnv) -> int:
    """Everything that one rank does; returns its exit code. Raises InputError before work, Over after it was said."""
    torch.set_num_threads(config.dist.threads_per_rank or _threads(env))
    signals = SignalWatcher(config.run.drain_s)
    # Before anything that takes time.
    _given_secret(config)
    topology = make_topology(config, env)
    folder = _agree_on_folder(config, topology)
    signals.on_signal = lambda _: folder.leave()
    try:
        code = _live(config, topology, folder, signals)
    finally:
        folder.leave()
    dist.destroy_process_group()
    return code


def _live(config: Config, topology: Topology, folder: RunFolder, signals: SignalWatcher) -> int:
    env, run_dir = topology.env, folder.path
    if folder.restarted:
        log.info("restarted by the launcher: the run goes on in %s", run_dir)
        config = _resuming(config)
    if env.rank == 0:
        write_atomic(run_dir / CONFIG_FILE, config.model_dump_json(indent=1).encode())
    restarts = fewest_restarts(topology.store, env.rank, env.world_size, restarts_left(os.environ))
    started = time.monotonic()
    loaded = _load(config, topology, run_dir, folder.restarted)
    # Not before: what loading puts into a cache may be meant for others as well.
    keep_private()
    load_s = time.monotonic() - started
    log.info("rank %d: %s in %s (%s), %.1f s", env.rank, config.model.path, loaded.dtype, loaded.dtype_reason, load_s)
    with _control_process(config, topology, folder, loaded.tokenizer, restarts, signals) as control:
        # Inside: a control process that is told to end has less to say than what this rank met.
        with last_words(env.rank, topology.store):
            code = _serve(config, topology, run_dir, loaded, load_s, control, signals)
        code = _code_for(env, code) if control is None else control.wait()
    if env.local_rank == 0 and code == 0:
        remove_unpacked(run_dir)
    return code


def _code_for(env: RankEnv, code: int) -> int:
    """What a rank without a control process exits with.

    torchrun on another host than rank 0's must not take the end of a run that failed for success: it would wait for the
    others to succeed as well, and they for it to restart. Other launchers kill all ranks at the first code that is
    not 0, rank 0 before its control process has closed its files.
    """
    return code if env.launcher == TORCHRUN else 0


def _load(config: Config, topology: Topology, run_dir: Path, restarted: bool) -> LoadedModel:
    env, tp_group = topology.env, topology.tp_group
    # One rank that nobody restarts has no one to unpack it for.
    if is_gguf(config.model.path) and (env.world_size > 1 or restarts_left(os.environ)):
        return load_gguf(config.model, topology.store, run_dir, topology.device, tp_group, restarted)
    return load_model(config.model, topology.device, config.run.seed, tp_group)


def _threads(env: RankEnv) -> int:
    """This rank's part of the host's cores, but not more than the launcher has bound it to (mpirun, Slurm)."""
    cores = os.cpu_count() or 1
    # Not every system can bind processes.
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return max(1, min(cores // env.local_world_size, bound))


def _serve(
    config: Config,
    topology: Topology,
    run_dir: Path,
    loaded: LoadedModel,
    load_s: float,
    control: Control | None,
    signals: SignalWatcher,
) -> int:
    """Join, loop until Stop, leave; returns the exit code that Stop gave."""
    channel = _connect(config, topology, run_dir) if topology.is_leader else None

    def send(message: Up) -> None:
        if channel is not None:
            channel.send(message)

    records = RankRecords(run_dir, topology.env.rank, config.metrics, provenance(config), _gpu(topology.device))
    base = build_base(config, loaded, topology.tp_group)
    data = load_data(config, loaded.tokenizer, topology.replica, len(topology.layout.replicas))

    def build(incarnation: int, steps: int) -> Replica:
        if incarnation:
            base.renew(config.run.seed)
        return build_replica(
            _resuming(config) if incarnation else config, topology, base, data, run_dir, records, send, steps
        )

    def say_hello(replica: Replica, incarnation: int) -> None:
        send(_hello(config, topology, replica, base, load_s, incarnation))

    # The group of all replicas is the one that most rounds need: made while nobody is being served.
    everybody = tuple(range(len(topology.layout.replicas)))
    topology.combined_group((everybody, (0,) * len(everybody)), number=0).result()
    # So every rank has its model: a leader comes here only when its peers have built theirs with it.
    if topology.env.local_rank == 0 and not restarts_left(os.environ):
        remove_unpacked(run_dir)
    supervisor = ReplicaSupervisor(topology, build, send, config.run.rebuilds, on_built=say_hello)
    try:
        _loop(supervisor, channel, control, signals)
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


def _loop(
    supervisor: ReplicaSupervisor, channel: LeaderChannel | None, control: Control | None, signals: SignalWatcher
) -> None:
    signalled = False
    signals.serving = True
    while not supervisor.replica.stopping:
        if signals.signal and channel is not None:
            if not signalled:
                channel.send(Signalled(replica=supervisor.replica.id, signal=signals.signal))
                signalled = True
            # Nobody is left to say Stop, or it should have come.
            if channel.lost_s is not None or signals.late:
                return
        if channel is not None and (channel.lost_s or 0.0) > ALONE_S:
            raise RuntimeError(f"no connection to the control process for {ALONE_S:.0f} s")
        supervisor.step(channel.receive(supervisor.replica.wait_s()) if channel is not None else None)
        # Nobody would ever say Stop again; torchrun ends the other ranks when this one fails.
        if control is not None and not supervisor.replica.stopping and control.poll() is not None:
            raise _left_alone(control)


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
        kv_tokens=config.engine.kv_tokens,
        max_context=config.model.max_context,
        vocabulary=base.stack.vocab_size,
        adapter=describe(base.bank.shapes()),
        heldout_rows=replica.member.report.num_rows,
        dtype=str(base.loaded.dtype).removeprefix("torch."),
        load_s=load_s,
        incarnation=incarnation,
        version=replica.engine.scheduler.slots.active,
    )


def _agree_on_folder(config: Config, topology: Topology) -> RunFolder:
    """The folder of the run: rank 0 takes it, the others learn which it is. Raises InputError on rank 0."""
    if topology.env.rank == 0:
        folder = take_folder(config, topology.job_store)
        # Left by the run that is resumed: its address must not be taken for the new one's.
        (folder.path / ADDRESS_FILE).unlink(missing_ok=True)
        topology.store.set("clif/run_dir", json.dumps([str(folder.path), folder.restarted]))
        return folder
    name, restarted = json.loads(topology.store.get("clif/run_dir"))
    # Another host may not see rank 0's folder.
    Path(name).mkdir(PRIVATE, parents=True, exist_ok=True)
    return RunFolder(Path(name), restarted)


def _resuming(config: Config) -> Config:
    """The same, for a run that the launcher has restarted."""
    return config.model_copy(update={"run": config.run.model_copy(update={"resume": True})})


def _given_secret(config: Config) -> bytes | None:
    """What dist.secret_file holds on this host; None without one. Raises InputError."""
    return None if config.dist.secret_file is None else read_secret(config.dist.secret_file)


def _connect(config: Config, topology: Topology, run_dir: Path) -> LeaderChannel:
    """The channel to the control process. Raises InputError when this host has not got the run's keys."""
    invitation = msgspec.json.decode(topology.store.get(INVITATION), type=Invitation)
    keys = accept(invitation, run_dir, _given_secret(config))
    return LeaderChannel(invitation.address, keys, topology.replica)


@contextmanager
def _control_process(
    config: Config,
    topology: Topology,
    folder: RunFolder,
    tokenizer: ChatTokenizer,
    restarts: int,
    signals: SignalWatcher,
) -> Iterator[Control | None]:
    """On rank 0: start the control process and tell the others its address; when it dies, so does this rank.

    A process of its own, so that Python's lock never makes replica 0 the slow one.
    """
    if folder.lock is None:
        yield None
        return
    run_dir, lock = folder.path, folder.lock.fileno()
    tokenizer.save(run_dir / "tokenizer")
    salt = secrets.token_hex(16)
    keys = Keys.new(_given_secret(config), salt)
    keys.write(run_dir)
    command = [sys.executable, "-P", "-m", "clif.control", "--run-dir", str(run_dir)]
    command += ["--replicas", str(len(topology.layout.replicas)), "--host", _host(config, topology)]
    command += ["--parent", str(os.getpid()), "--restarts-left", str(restarts)]
    command += ["--lock", str(lock), *(["--restarted"] if folder.restarted else [])]
    process = subprocess.Popen(command, pass_fds=[lock])
    signals.on_signal = lambda _: _pass_on(process, signals, folder)
    try:
        address = _address(run_dir / ADDRESS_FILE, process, config.dist.timeout_s)
        topology.store.set(INVITATION, msgspec.json.encode(Invitation(address, salt, keys.fingerprint)).decode())
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            _wait(process, CONTROL_LEAVES_S)


def _pass_on(process: Control, signals: SignalWatcher, folder: RunFolder) -> None:
    """A launcher knows nothing of the control process: rank 0 passes signals on, and waits if it does not serve yet."""
    process.send_signal(getattr(signal, signals.signal))
    if not signals.serving:
        _wait(process, CONTROL_LEAVES_S)
        folder.leave()


def _left_alone(process: Control) -> Exception:
    """The control process is no more. It has said why, unless it was killed."""
    if process.returncode < 0:
        return RuntimeError(f"the control process was killed by signal {-process.returncode}")
    return Over(process.returncode or 1)


def _wait(process: Control, timeout_s: float) -> None:
    """Give the control process time to end all requests and close its files; it also ends when this rank is gone."""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        log.warning("the control process has not ended after %.0f s; it will when it is through", timeout_s)


def _host(config: Config, topology: Topology) -> str:
    if config.dist.control_host is not None:
        return config.dist.control_host
    master = topology.env.master
    return "127.0.0.1" if topology.env.one_host or master is None else address_towards(master[0])


def _address(file: Path, process: Control, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while not file.exists():
        if process.poll() is not None:
            raise _left_alone(process)
        if time.monotonic() > deadline:
            raise RuntimeError(f"the control process gave no address within {timeout_s:.0f} s")
        time.sleep(0.02)
    return file.read_text()
