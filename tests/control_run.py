"""The control server with scripted replicas: in virtual time and in memory, unless a test wants sockets or files."""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
from scripted_replica import ANSWER, KEYS, ScriptedReplica, SocketReplica, drive, make_tokenizer

from clif.adapters.store import AdapterStore
from clif.config import Config, config_from_tree
from clif.control.__main__ import read_recorded
from clif.control.answers import Answers
from clif.control.durability.journal import Journal, Line
from clif.control.durability.ledger import Ledger
from clif.control.durability.recovery import Recorded, add_up, recover
from clif.control.durability.shutdown import ShutdownPolicy
from clif.control.frontend import Frontend
from clif.control.ports import Ports
from clif.control.progress import Progress
from clif.control.quality import QualityCheck
from clif.control.records import Records
from clif.control.server import ControlServer
from clif.control.sources import Source, TraceSource
from clif.control.status_file import StatusFile
from clif.data.instruct import read_rows
from clif.data.load import make_load
from clif.jobs.store import JobStore
from clif.metrics.writer import next_path
from clif.quality.process import Scoring, ScoringProcess
from clif.simulate.channel import SimChannel
from clif.simulate.memory import MemoryLog, MemorySink
from clif.simulate.virtual_time import VirtualTime
from clif.wire.channels import ControlChannel


def make_config(tmp_path: Path, **sections: dict[str, Any]) -> Config:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "ask now", "completion": ANSWER, "split": s} for s in ("train", "train", "test", "test")]
    data.write_text("\n".join(map(json.dumps, rows)))
    tree: dict[str, Any] = {
        "run": {"name": "run", "out_dir": str(tmp_path), "linger_s": 30.0, "max_s": 60.0, "status": "plain"},
        "model": {"path": "fake"},
        "data": {"path": str(data)},
        "slo": {"ttft_ms": 60000.0, "tpot_ms": 60000.0},
        "federation": {"rounds": 1, "local_steps": 2, "min_members": 2},
        "control": {"period_s": 0.1, "report_s": 0.02, "hold_s": 0.1, "smoothing_s": 0.1, "lost_after_s": 20.0},
        "load": {"kind": "constant", "rate_rps": 20.0, "duration_s": 0.6, "max_tokens": 8},
        "quality": {"exact_match_rows": 2, "max_tokens": 8},
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return config_from_tree(tree)


class Run:
    """A server with its scripted replicas.

    sockets: over ZeroMQ, in real time, with files. files: a journal and HDF5 in the run's folder, as a restart needs.
    silent: by replica, after how many requests it hangs. sources: of requests, beside the configured load. jobs: files
    lie in the run's folder; the records of jobs, too, if files is true. The other options are those of ShutdownPolicy.
    after: the start before this one in the same folder, by the launcher.
    """

    def __init__(
        self,
        config: Config,
        leaders: int = 2,
        *,
        sockets: bool = False,
        files: bool = False,
        after: "Run | None" = None,
        silent: dict[int, int] | None = None,
        sources: Sequence[Source] = (),
        jobs: bool = False,
        scoring: Scoring | None = None,
        **shutdown: Any,
    ) -> None:
        self.config, self.sockets, self.files = config, sockets, files or sockets
        self.time = VirtualTime(start_s=1000.0)
        self.clock: Callable[[], float] = time.monotonic if sockets else self.time
        self.channel: Any = ControlChannel(KEYS, leaders) if sockets else SimChannel(self.time)
        self.starts: list[Run] = [*(after.starts if after else ()), self]
        self.journal: Any = MemoryLog()
        self.sink = MemorySink(self.clock)
        self.leaders = [ScriptedReplica(i, silent_after=(silent or {}).get(i)) for i in range(leaders)]
        config.run_dir.mkdir(exist_ok=True)
        self.jobs = JobStore(config.run_dir if jobs and files else None)
        self.jobs.run_dir = config.run_dir
        self.scoring = scoring or ScoringProcess()
        self.server = self._server(leaders, sources, ShutdownPolicy(**shutdown))

    def _server(self, leaders: int, sources: Sequence[Source], shutdown: ShutdownPolicy) -> ControlServer:
        config, run_dir, tokenizer = self.config, self.config.run_dir, make_tokenizer()
        assert config.data.path is not None
        rows = read_rows(config.data.path)
        self.load = make_load(config, rows, tokenizer)
        run_dir.mkdir(exist_ok=True)
        store, records = AdapterStore(run_dir), Records(self.sink)
        self.frontend: Frontend | None = None
        if self.files:
            self.journal = Journal(run_dir, self.clock)
            past, recorded = self.journal.past, read_recorded(run_dir)
            self.path = next_path(run_dir, "control")
            records = Records.in_file(run_dir, config, self.clock)
        else:
            past, recorded = self._left_in_memory()
        recovery = recover(add_up(past), self.load, len(self.starts) > 1, store.rounds(), recorded)
        if config.online:
            self.frontend = Frontend(self.channel, None, recovery.starts)
            sources = [*sources, self.frontend]
        ports = Ports(
            channel=self.channel,
            sources=[TraceSource(recovery.load), *sources],
            quality=QualityCheck(config, rows, tokenizer, recovery.starts),
            store=store,
            records=records,
            answers=Answers(run_dir, config.metrics.answers, tokenizer.decode),
            display=Progress("plain"),
            ledger=Ledger(self.journal, recovery),
            shutdown=shutdown,
            jobs=self.jobs,
            scoring=self.scoring,
            frontend=self.frontend,
            status_file=StatusFile(run_dir) if self.files else None,
        )
        return ControlServer(config, ports, self.clock, leaders)

    def go(self) -> None:
        """The whole run. Raises ControlError as the server does."""
        threads = [SocketReplica(leader, self.channel.address) for leader in self.leaders if self.sockets]
        for thread in threads:
            thread.start()
        for leader in self.leaders if not self.sockets else ():
            drive(leader, self.time, self.channel)
        try:
            self.server.run()
        finally:
            # What the server said last is read though it is gone.
            end = self.time() + 1.0
            while not self.sockets and self.time.advance(end):
                pass
            for thread in threads:
                thread.end.set()
            for thread in threads:
                thread.join(10)
            if self.sockets:
                self.channel.close()
            if self.files:
                self.journal.close()

    def _left_in_memory(self) -> tuple[list[Line], Recorded]:
        """By the starts before: lines of the journal, and what has a row."""
        former = self.starts[:-1]
        rows = {name: [row for run in former for row in run.sink.rows[name]] for name in self.sink.rows}
        return [line for run in former for line in run.journal.lines], Recorded(
            requests=frozenset(row["id"] for row in rows["requests"] if row["purpose"] == "user"),
            offered=frozenset(row["request"] for row in rows["load"]),
            rounds=frozenset(row["round_id"] for row in rows["rounds"]),
            versions=frozenset(row["version"] for row in rows["adapters"]),
        )

    def of_all_starts(self, name: str) -> list[dict[str, Any]]:
        return [row for run in self.starts for row in run.table(name)]

    def table(self, name: str) -> list[dict[str, Any]]:
        if not self.files:
            return self.sink.rows[name]
        with h5py.File(self.path, "r") as file:
            rows = file[name][:]
        return [
            {k: row[k].decode() if isinstance(row[k], bytes) else row[k].item() for k in rows.dtype.names}
            for row in rows
        ]

    def exit_codes(self) -> set[int | None]:
        """What the ranks were told to exit with."""
        return {leader.exit_code for leader in self.leaders}

    def assert_promise_1(self) -> None:
        ends = Counter(row["id"] for row in self.table("requests") if row["purpose"] == "user")
        assert ends == Counter(row["request"] for row in self.table("load"))


SERVES: dict[str, dict[str, Any]] = {
    "train": {"enabled": False},
    "federation": {"rounds": None},
    "quality": {"exact_match_rows": 0},
}


def came_back(run: Run, replica: int) -> bool:
    states = [row["to_state"] for row in run.table("transitions") if row["replica"] == replica]
    return states[states.index("failed") + 1 :][:1] == ["serving"]
