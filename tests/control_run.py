"""The control server with fake leaders: real channels over loopback, scripted replicas, real files."""

import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import safetensors.numpy
import tokenizers

from clif.adapters.peft_files import PREFIX, describe
from clif.adapters.store import AdapterStore
from clif.config import Config, config_from_tree
from clif.control.__main__ import read_recorded
from clif.control.answers import Answers
from clif.control.durability.journal import Journal
from clif.control.durability.ledger import Ledger
from clif.control.durability.recovery import add_up, recover
from clif.control.durability.shutdown import ShutdownPolicy
from clif.control.ports import Ports
from clif.control.progress import Progress
from clif.control.quality import QualityCheck
from clif.control.records import Records
from clif.control.server import ControlServer
from clif.control.sources import TraceSource
from clif.data.instruct import read_rows
from clif.data.load import make_load
from clif.tokenizer import ChatTokenizer
from clif.types import FinishReason, HeldoutLoss, Request, RoundPlan, RoundResult, TokenEvent, Vote
from clif.wire import messages as wire
from clif.wire.channels import ControlChannel, LeaderChannel, decode_down
from clif.wire.keys import Keys

ANSWER = "yes please"
HELDOUT_TOKENS = 10
KEYS = Keys(b"0123456789abcdef" * 2)
SHAPES = {"layer.lora_A.weight": (8, 4), "layer.lora_B.weight": (4, 8)}
ADAPTER_JSON = json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16.0})


def adapter_bytes(value: float = 0.5) -> bytes:
    """A whole adapter in PEFT's naming."""
    return safetensors.numpy.save({PREFIX + name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()})


def make_tokenizer() -> ChatTokenizer:
    words = {w: i for i, w in enumerate(["</s>", "<unk>", "ask", "no", *ANSWER.split(), "now"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    return ChatTokenizer(tokenizer, None, [0])


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
        "control": {"period_s": 0.05, "report_s": 0.02, "hold_s": 0.1, "smoothing_s": 0.1, "lost_after_s": 20.0},
        "load": {"kind": "constant", "rate_rps": 20.0, "duration_s": 0.6, "max_tokens": 8},
        "quality": {"exact_match_rows": 2, "max_tokens": 8},
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return config_from_tree(tree)


class FakeLeader(threading.Thread):
    """A scripted replica: answers one token per turn and knows the right answer from version 1 on."""

    def __init__(self, address: str, replica: int, silent_after: int | None = None) -> None:
        super().__init__(daemon=True)
        self.address, self.replica = address, replica
        self.silent_after = silent_after
        self.fails_after: int | None = None
        self.fails_for_s = 0.2
        self.wakes = False
        self.incarnation = 0
        self.version = 0
        self.pretends_to_run = 0
        self.gone = threading.Event()
        self.serves_after: threading.Event | None = None
        self.installed: list[int] = []
        self.running: dict[int, tuple[Request, int, int]] = {}
        self.plan: RoundPlan | None = None
        self.plans: list[RoundPlan] = []
        self.trains_until_told = False
        self.candidate_loss = 1.0
        self.serve_timings: tuple[tuple[float, float, float], ...] = ((1.0, 0.0, 0.01),)
        self.submitted = 0
        self.tokenizer = make_tokenizer()
        self.end = threading.Event()
        self.exit_code: int | None = None

    def run(self) -> None:
        self.channel = LeaderChannel(self.address, KEYS, self.replica)
        self.channel.send(self.hello())
        reported = 0.0
        while not self.end.is_set():
            for payload in self.channel.receive(0.002):
                self.obey(decode_down(payload))
            if self.silent_after is not None and self.submitted >= self.silent_after:
                self.serve()
                self.gone.set()
                if not self.wakes:
                    self.end.wait(30)
                    break
                self.silent_after = None
                self.end.wait(1.5)
            if self.fails_after is not None and self.submitted >= self.fails_after:
                self.fails_after = None
                self.serve()
                self.gone.set()
                self.rebuild("RuntimeError: out of memory")
            if self.serves_after is None or self.serves_after.is_set():
                self.serve()
            if time.monotonic() - reported > 0.02:
                reported = time.monotonic()
                self.channel.send(self.report())
        if self.exit_code is None:
            # The server may have gone before its last word was read.
            for payload in self.channel.receive(1.0):
                self.obey(decode_down(payload))
        self.channel.close()

    def rebuild(self, error: str) -> None:
        self.channel.send(wire.Trouble(replica=self.replica, error=error, returning=True))
        self.incarnation, self.running, self.plan = self.incarnation + 1, {}, None
        self.end.wait(self.fails_for_s)
        self.channel.send(self.hello())
        # As a replica does: what was sent before is not meant for this incarnation.
        while not self.end.is_set():
            orders = [decode_down(payload) for payload in self.channel.receive(0.002)]
            places = [i for i, x in enumerate(orders) if x == wire.Welcome(incarnation=self.incarnation)]
            for order in orders[places[0] + 1 :] if places else [x for x in orders if isinstance(x, wire.Stop)]:
                self.obey(order)
            if places:
                return

    def hello(self) -> wire.Hello:
        return wire.Hello(
            replica=self.replica, rank=self.replica, host="h", pid=1, max_batch=4, kv_tokens=8192,
            max_context=2048, vocabulary=8, adapter=describe(SHAPES),
            heldout_rows=1, dtype="float32", load_s=0.0, incarnation=self.incarnation, version=self.version,
        )  # fmt: skip

    def report(self) -> wire.Report:
        return wire.Report(
            replica=self.replica, running=self.pretends_to_run or len(self.running), waiting=0, kv_used=0, busy=0.1,
            version=self.version, training_steps=0, last_loss=1.0, serve_timings=self.serve_timings,
            train_timings=((4.0, 1.0, 0.1),),
        )  # fmt: skip

    def serve(self) -> None:
        events = []
        for number, (request, version, count) in list(self.running.items()):
            answer = self.tokenizer.encode_answer(ANSWER if version else "no")
            last = count + 1 == min(len(answer), request.sampling.max_tokens)
            finish = FinishReason.STOP if last else None
            events.append(TokenEvent(request_id=number, tokens=(answer[count],), version=version, finish=finish))
            if last:
                del self.running[number]
            else:
                self.running[number] = (request, version, count + 1)
        if events:
            self.channel.send(wire.Tokens(replica=self.replica, events=tuple(events)))

    def obey(self, message: wire.Down) -> None:
        me = self.replica
        if isinstance(message, wire.Submit):
            self.submitted += 1
            version = self.version if message.version is None else message.version
            self.running[message.request.id] = (message.request, version, len(message.output_ids))
        elif isinstance(message, wire.Cancel):
            self.running.pop(message.request_id, None)
        elif isinstance(message, wire.BeginRound):
            self.plan = message.plan
            self.plans.append(message.plan)
            if not self.trains_until_told:
                self.steps_done(message.plan.round_id)
        elif isinstance(message, wire.FinishSteps):
            self.steps_done(message.round_id)
        elif isinstance(message, wire.Aggregate):
            vote = Vote(
                round_id=message.round_id, replica=me, finite=True,
                candidate_loss=self.candidate_loss, active_loss=20.0,
                tokens=HELDOUT_TOKENS, error2=0.01, product2=1.0,
            )  # fmt: skip
            self.channel.send(wire.Voted(vote=vote))
        elif isinstance(message, wire.Settle):
            self.settle(message)
        elif isinstance(message, wire.Install):
            self.version = message.version
            self.installed.append(message.version)
            self.channel.send(wire.Settled(replica=me, round_id=0, version=self.version, step=1))
        elif isinstance(message, wire.Evaluate):
            loss = 1.0 if self.version else 20.0
            result = HeldoutLoss(replica=me, version=self.version, loss=loss, tokens=HELDOUT_TOKENS)
            self.channel.send(wire.Evaluated(result=result))
        elif isinstance(message, wire.Rebuild):
            self.rebuild(message.reason)
        elif isinstance(message, wire.Stop):
            self.exit_code = message.code
            self.channel.send(wire.Goodbye(replica=me))
            self.end.set()

    def steps_done(self, round_id: int) -> None:
        done = RoundResult(
            round_id=round_id, replica=self.replica, samples=8, tokens=80, targets=40, steps=2, loss=1.0,
            finite=True, noise_scale=1e6,
        )  # fmt: skip
        self.channel.send(wire.StepsDone(result=done))

    def settle(self, message: wire.Settle) -> None:
        if message.commit:
            self.version = message.version
        if message.publish:
            published = wire.Published(
                replica=self.replica, version=message.version, round_id=message.round_id, config_json=ADAPTER_JSON,
                weights=adapter_bytes(),
            )  # fmt: skip
            self.channel.send(published)
        settled = wire.Settled(replica=self.replica, round_id=message.round_id, version=self.version, step=1)
        self.channel.send(settled)


class Run:
    """A server with its fake leaders."""

    def __init__(self, config: Config, leaders: int = 2, **options: Any) -> None:
        self.config = config
        tokenizer = make_tokenizer()
        path = config.data.path
        assert path is not None
        rows = read_rows(path)
        self.load = make_load(config, rows, tokenizer)
        self.channel = ControlChannel(KEYS, leaders)
        config.run_dir.mkdir(exist_ok=True)
        store = AdapterStore(config.run_dir)
        self.journal = Journal(config.run_dir)
        past, recorded = add_up(self.journal.past), read_recorded(config.run_dir)
        recovery = recover(past, self.load, options.pop("relaunched", False), store.rounds(), recorded)
        ports = Ports(
            channel=self.channel,
            sources=[TraceSource(recovery.load)],
            quality=QualityCheck(config, rows, tokenizer, recovery.starts),
            store=store,
            records=Records.in_file(config.run_dir, config, time.monotonic),
            answers=Answers(config.run_dir, config.metrics.answers, tokenizer.decode),
            display=Progress("plain"),
            ledger=Ledger(self.journal, recovery),
            shutdown=ShutdownPolicy(
                **{k: options.pop(k) for k in ("stop_reason", "signalled", "restarts_left") if k in options}
            ),
        )
        self.server = ControlServer(config, ports, time.monotonic, leaders)
        silent = options.pop("silent", {})
        self.leaders = [FakeLeader(self.channel.address, i, silent_after=silent.get(i)) for i in range(leaders)]

    def go(self) -> None:
        for leader in self.leaders:
            leader.start()
        try:
            self.server.run()
        finally:
            for leader in self.leaders:
                leader.end.set()
            for leader in self.leaders:
                leader.join(10)
            self.channel.close()
            self.journal.close()

    def table(self, name: str) -> list[dict[str, Any]]:
        with h5py.File(self.config.run_dir / "control.h5", "r") as file:
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
