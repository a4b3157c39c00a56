"""The control process: python -P -m clif.control --run-dir RUN --replicas N. Started by rank 0.

Reads RUN/config.json, RUN/tokenizer and the keys of RUN/control.key, writes its address to RUN/control.address and runs
until the run is complete.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from pathlib import Path

import zmq

from clif.adapters.store import AdapterStore
from clif.config import Config
from clif.control.answers import Answers
from clif.control.durability.journal import JOURNAL_FILE, Journal
from clif.control.durability.ledger import Ledger
from clif.control.durability.recovery import Recorded, add_up, recover
from clif.control.durability.shutdown import DRAINED, ShutdownPolicy
from clif.control.frontend import Frontend
from clif.control.frontend_process import FrontendProcess, former_port, listen
from clif.control.policy.phases import ControlError
from clif.control.ports import Ports
from clif.control.progress import Progress, ProgressHandler
from clif.control.quality import QualityCheck
from clif.control.records import Records
from clif.control.server import ControlServer
from clif.control.sources import TraceSource
from clif.control.status_file import StatusFile
from clif.data.heldout import read_data
from clif.data.load import make_load
from clif.distributed.addresses import refuse_link_local
from clif.exit_report import sentence_of
from clif.jobs.samples import sweep_files
from clif.jobs.store import JobStore
from clif.metrics.sources import earlier_rows
from clif.storage.disk_space import Room
from clif.storage.files import allow_connections, keep_private, write_atomic
from clif.storage.folder_lock import FolderLock
from clif.tokenizer import ChatTokenizer
from clif.types import Purpose
from clif.wire.channels import ControlChannel
from clif.wire.keys import ADDRESS_FILE, Keys

log = logging.getLogger(__name__)
SIGNALS = {signal.SIGTERM: "got SIGTERM", signal.SIGINT: "interrupted (SIGINT)"}


class ProcessWatcher:
    """Watches for signals and for the death of the parent process (rank 0). Each method gives a reason, or ""."""

    def __init__(self, parent: int | None) -> None:
        self._parent = os.getppid() if parent is None else parent
        self._signal = ""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def parent_died(self) -> str:
        return "rank 0 died" if os.getppid() != self._parent else ""

    def signalled(self) -> str:
        return self._signal

    def _on_signal(self, number: int, _frame: object) -> None:
        # The first signal is the reason: a terminal interrupts all processes, and the launcher then ends them.
        self._signal = self._signal or SIGNALS[signal.Signals(number)]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -P -m clif.control", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of the run: config.json, tokenizer/")
    parser.add_argument("--replicas", type=int, required=True, help="number of replicas that will report")
    parser.add_argument("--parent", type=int, help="process id of rank 0 (default: the parent process)")
    parser.add_argument("--restarted", action="store_true", help="the launcher has restarted all ranks")
    parser.add_argument("--restarts-left", type=int, default=0, help="how often the launcher will still do so")
    parser.add_argument("--lock", type=int, help="open file with the folder's lock, from the parent process")
    parser.add_argument("--host", help="address to bind (default: dist.control_host, else loopback)")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace, progress: Progress, config: Config, watcher: ProcessWatcher) -> tuple[str, bool]:
    """Everything between reading the configuration and the summary. Returns (why the run was drained, or "", and
    whether all replicas had come).

    Raises ControlError, InputError or OSError.
    """
    run_dir: Path = arguments.run_dir
    # The lock comes first: while another control process has the folder, nothing is read or written.
    lock = FolderLock(run_dir) if arguments.lock is None else FolderLock.inherited(run_dir, arguments.lock)
    tokenizer = ChatTokenizer.load(run_dir / "tokenizer")
    rows = read_data(config)
    load = make_load(config, rows, tokenizer)
    room = Room(run_dir, give_up=lambda: watcher.parent_died() or watcher.signalled())
    store = AdapterStore(run_dir, room)
    journal = Journal(run_dir, lock=lock, room=room)
    store.sweep()
    recovery = recover(
        add_up(journal.past), load, arguments.restarted, store.rounds(), read_recorded(run_dir), store.loaded()
    )
    if recovery.lost:
        log.warning(
            "%d requests of before are lost: they were submitted, but %s does not name them. They count as unfinished",
            len(recovery.lost),
            run_dir / JOURNAL_FILE,
        )
    host = arguments.host or config.dist.control_host or "127.0.0.1"
    channel = open_channel(host, Keys.read(run_dir), arguments.replicas)
    frontend = open_frontend(config, run_dir, channel, recovery.starts, arguments.restarted)
    jobs = open_jobs(config, run_dir)
    records = Records.in_file(run_dir, config, time.monotonic)
    answers = Answers(run_dir, config.metrics.answers, tokenizer.decode)
    try:
        ports = Ports(
            channel=channel,
            sources=[TraceSource(recovery.load), *([] if frontend is None else [frontend])],
            quality=QualityCheck(config, rows, tokenizer, recovery.starts),
            store=store,
            records=records,
            answers=answers,
            display=progress,
            ledger=Ledger(journal, recovery),
            shutdown=ShutdownPolicy(watcher.parent_died, watcher.signalled, arguments.restarts_left),
            frontend=frontend,
            status_file=StatusFile(run_dir),
            jobs=jobs,
        )
        server = ControlServer(config, ports, time.monotonic, arguments.replicas)
        # The address comes last: a leader that finds it can connect at once.
        write_atomic(run_dir / ADDRESS_FILE, channel.address.encode())
        server.run()
    finally:
        jobs.close()
        records.close()
        answers.close()
        journal.close()
        channel.close()
    return server.drained, server.began


def read_recorded(run_dir: Path) -> Recorded:
    """What the tables of earlier control processes hold."""
    requests = earlier_rows(run_dir, "requests")
    users = requests[requests["purpose"] == Purpose.USER.value.encode()]
    return Recorded(
        frozenset(users["id"].tolist()),
        frozenset(earlier_rows(run_dir, "load")["request"].tolist()),
        frozenset(earlier_rows(run_dir, "rounds")["round_id"].tolist()),
        frozenset(earlier_rows(run_dir, "adapters")["version"].tolist()),
    )


def open_channel(host: str, keys: Keys, replicas: int) -> ControlChannel:
    refuse_link_local("dist.control_host", host)
    try:
        return ControlChannel(keys, replicas, host)
    except zmq.ZMQError as error:
        raise ControlError(f"cannot listen on {host} ({error}): set dist.control_host to an own address") from error


def open_frontend(
    config: Config, run_dir: Path, channel: ControlChannel, start: int, restarted: bool
) -> Frontend | None:
    """The port for clients, if there is to be one. Its process starts with the server's first step."""
    if not config.online:
        return None
    child = FrontendProcess(run_dir, listen(config.serve.http, former_port(run_dir) if restarted else 0))
    log.info("clients: %s/v1, the live page: %s", child.url, child.url)
    return Frontend(channel, child, start)


def open_jobs(config: Config, run_dir: Path) -> JobStore:
    """RUN/jobs.db, if clients may create jobs or have done so before; otherwise nothing is kept on disk."""
    lasting = config.train.enabled and (config.online or JobStore.exists(run_dir))
    store = JobStore(run_dir if lasting else None)
    if lasting:
        sweep_files(run_dir, store.files())
    return store


def summarise(run_dir: Path) -> None:
    """Merge the files of all ranks, write RUN/summary.json and print it."""
    from clif.metrics.summary import write_summary
    from clif.metrics.summary_print import print_summary

    print_summary(write_summary(run_dir))


def main() -> int:
    """0 only if the run went through, 143 if a signal ended it in good order, else 1 or 2.

    The last line on stderr says why it did not go through.
    """
    arguments = parse()
    keep_private()
    allow_connections()
    watcher = ProcessWatcher(arguments.parent)
    try:
        config = Config.model_validate_json((arguments.run_dir / "config.json").read_text())
    except (OSError, ValueError) as error:
        print(f"clif: cannot read the run's configuration: {error}", file=sys.stderr)
        return 2
    progress = Progress(config.run.status)
    logging.basicConfig(handlers=[ProgressHandler(progress)], level=logging.INFO, format="%(message)s")
    try:
        drained, began = run(arguments, progress, config, watcher)
    except Exception as error:
        said = str(error) if isinstance(error, ControlError) else sentence_of(error)
        if said is None:
            raise
        print(f"clif: the run did not go through: {said}", file=sys.stderr)
        return 1
    finally:
        progress.close()
    return _conclude(arguments.run_dir, drained, began)


def _conclude(run_dir: Path, drained: str, began: bool) -> int:
    """Summarise what ran, say why it ended early if it did, and return the exit code."""
    if drained and not began:
        print(f"clif: ended before all replicas were there: {drained}", file=sys.stderr)
        return DRAINED
    problem = ""
    try:
        summarise(run_dir)
    except Exception as error:
        said = sentence_of(error)
        if said is None:
            raise
        problem = f", but its files could not be summarised: {said}"
    if drained:
        print(f"clif: drained: {drained}{problem}; run.resume=true goes on from here", file=sys.stderr)
        return DRAINED
    if problem:
        print(f"clif: the run went through{problem}", file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
