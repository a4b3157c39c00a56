"""The control process, as the ranks see it: rank 0 starts it, every leader connects to it. Free of torch."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import msgspec

from clif.config import Config
from clif.distributed.addresses import address_towards
from clif.distributed.launch_env import RankEnv
from clif.distributed.layout import Layout
from clif.distributed.rendezvous import KeyValues
from clif.exit_report import ReportedExit
from clif.rank.signals import SignalWatcher
from clif.storage.run_folder import RunFolder
from clif.tokenizer import ChatTokenizer
from clif.wire.channels import LeaderChannel
from clif.wire.keys import ADDRESS_FILE, Invitation, Keys, accept, read_secret

log = logging.getLogger(__name__)
Control = subprocess.Popen[bytes]
INVITATION = "clif/control"
"""Key in torch's store, which every process that reaches rank 0's host can read."""
CONTROL_LEAVES_S = 20.0
"""Seconds that the control process has to end; below the 30 s after which torchrun kills the ranks."""


class RankTopology(Protocol):
    """What is needed here of a Topology. replica: its replica's id."""

    @property
    def env(self) -> RankEnv: ...

    @property
    def layout(self) -> Layout: ...

    @property
    def replica(self) -> int: ...

    @property
    def store(self) -> KeyValues: ...


def given_secret(config: Config) -> bytes | None:
    """The content of dist.secret_file on this host; None if it is not configured. Raises InputError."""
    return None if config.dist.secret_file is None else read_secret(config.dist.secret_file)


def connect(config: Config, topology: RankTopology, run_dir: Path) -> LeaderChannel:
    """The channel to the control process. Raises InputError on a host that lacks the run's keys."""
    invitation = msgspec.json.decode(topology.store.get(INVITATION), type=Invitation)
    keys = accept(invitation, run_dir, given_secret(config))
    return LeaderChannel(invitation.address, keys, topology.replica)


@contextmanager
def control_process(
    config: Config,
    topology: RankTopology,
    folder: RunFolder,
    tokenizer: ChatTokenizer,
    restarts: int,
    signals: SignalWatcher,
) -> Iterator[Control | None]:
    """On rank 0: start the control process and publish its address. None on the other ranks.

    It is a process of its own, so that Python's global lock does not slow down replica 0. restarts: how often the
    launcher will still restart the ranks. Raises what control_ended() returns when the process ends at once, and
    RuntimeError when it publishes no address within dist.timeout_s.
    """
    if folder.lock is None:
        yield None
        return
    run_dir, lock = folder.path, folder.lock.fileno()
    tokenizer.save(run_dir / "tokenizer")
    salt = secrets.token_hex(16)
    keys = Keys.new(given_secret(config), salt)
    keys.write(run_dir)
    command = [sys.executable, "-P", "-m", "clif.control", "--run-dir", str(run_dir)]
    command += ["--replicas", str(len(topology.layout.replicas)), "--host", _host(config, topology)]
    command += ["--parent", str(os.getpid()), "--restarts-left", str(restarts)]
    command += ["--lock", str(lock), *(["--restarted"] if folder.restarted else [])]
    process = subprocess.Popen(command, pass_fds=[lock])
    signals.on_signal = lambda _: _forward_signal(process, signals, folder)
    try:
        address = _read_address(run_dir / ADDRESS_FILE, process, config.dist.timeout_s)
        topology.store.set(INVITATION, msgspec.json.encode(Invitation(address, salt, keys.fingerprint)).decode())
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            _wait(process, CONTROL_LEAVES_S)


def _forward_signal(process: Control, signals: SignalWatcher, folder: RunFolder) -> None:
    """Forward a signal, since no launcher knows the control process; wait for its end if this rank does not serve."""
    process.send_signal(getattr(signal, signals.signal))
    if not signals.serving:
        _wait(process, CONTROL_LEAVES_S)
        folder.leave()


def control_ended(process: Control) -> Exception:
    """The error to raise after the control process has ended. It has printed its own reason unless it was killed."""
    if process.returncode < 0:
        return RuntimeError(f"the control process was killed by signal {-process.returncode}")
    return ReportedExit(process.returncode or 1)


def _wait(process: Control, timeout_s: float) -> None:
    """Wait while the control process ends all requests and closes its files; it also ends once this rank is gone."""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        log.warning("the control process has not ended after %.0f s; it will when it is through", timeout_s)


def _host(config: Config, topology: RankTopology) -> str:
    if config.dist.control_host is not None:
        return config.dist.control_host
    master = topology.env.master
    return "127.0.0.1" if topology.env.one_host or master is None else address_towards(master[0])


def _read_address(file: Path, process: Control, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while not file.exists():
        if process.poll() is not None:
            raise control_ended(process)
        if time.monotonic() > deadline:
            raise RuntimeError(f"the control process gave no address within {timeout_s:.0f} s")
        time.sleep(0.02)
    return file.read_text()
