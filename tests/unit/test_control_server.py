"""The control server with fake leaders: real channels over loopback, scripted replicas, real files."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import pytest
import tokenizers

import clif
from clif.config import Config, config_from_tree
from clif.control.__main__ import read_recorded
from clif.control.ending import DRAINED, Ending
from clif.control.journal import Journal
from clif.control.ledger import Ledger
from clif.control.phases import ControlError, Phase
from clif.control.quality import QualityCheck
from clif.control.records import Records
from clif.control.recovery import add_up, recover
from clif.control.server import ControlServer
from clif.control.status import Status
from clif.data.instruct import read_rows
from clif.data.load import make_load
from clif.metrics.collect import collect
from clif.store import AdapterStore
from clif.text import ChatTokenizer
from clif.types import FinishReason, HeldoutLoss, Purpose, Request, RoundPlan, RoundResult, TokenEvent, Vote
from clif.wire import messages as wire
from clif.wire.channels import ControlChannel, LeaderChannel, decode_down

ANSWER = "yes please"
HELDOUT_TOKENS = 10


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

    def __init__(self, address: str, replica: int, secret: str = "s", silent_after: int | None = None) -> None:
        super().__init__(daemon=True)
        self.address, self.replica, self.secret = address, replica, secret
        self.silent_after = silent_after
        self.fails_after: int | None = None
        self.fails_for_s = 0.2
        self.wakes = False
        self.life = 0
        self.version = 0
        self.pretends_to_run = 0
        self.gone = threading.Event()
        self.serves_after: threading.Event | None = None
        self.states: list[str] = []
        self.installed: list[int] = []
        self.running: dict[int, tuple[Request, int, int]] = {}
        self.plan: RoundPlan | None = None
        self.submitted = 0
        self.tokenizer = make_tokenizer()
        self.end = threading.Event()
        self.exit_code: int | None = None

    def run(self) -> None:
        self.channel = LeaderChannel(self.address, self.replica)
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
                self.begin_anew("RuntimeError: out of memory")
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

    def begin_anew(self, error: str) -> None:
        self.channel.send(wire.Trouble(replica=self.replica, error=error, returning=True))
        self.life, self.running, self.plan = self.life + 1, {}, None
        self.end.wait(self.fails_for_s)
        self.channel.send(self.hello())
        # As a replica does: what was sent before is not meant for this life.
        while not self.end.is_set():
            orders = [decode_down(payload) for payload in self.channel.receive(0.002)]
            places = [i for i, x in enumerate(orders) if x == wire.Welcome(life=self.life)]
            for order in orders[places[0] + 1 :] if places else [x for x in orders if isinstance(x, wire.Stop)]:
                self.obey(order)
            if places:
                return

    def hello(self) -> wire.Hello:
        return wire.Hello(
            replica=self.replica, rank=self.replica, host="h", pid=1, secret=self.secret, max_batch=4, kv_tokens=8192,
            max_context=2048, heldout_rows=1, dtype="float32", load_s=0.0, life=self.life, version=self.version,
        )  # fmt: skip

    def report(self) -> wire.Report:
        return wire.Report(
            replica=self.replica, running=self.pretends_to_run or len(self.running), waiting=0, kv_used=0, busy=0.1,
            version=self.version, training_steps=0, training_loss=1.0, serve_samples=((1.0, 0.0, 0.01),),
            train_samples=((4.0, 1.0, 0.1),),
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
            self.running[message.request.id] = (message.request, version, len(message.answer))
        elif isinstance(message, wire.Cancel):
            self.running.pop(message.request_id, None)
        elif isinstance(message, wire.SetState):
            self.states.append(message.state.value)
        elif isinstance(message, wire.BeginRound):
            self.plan = message.plan
            done = RoundResult(
                round_id=self.plan.round_id, replica=me, samples=8, tokens=80, steps=2, loss=1.0, finite=True
            )
            self.channel.send(wire.StepsDone(result=done))
        elif isinstance(message, wire.Aggregate):
            vote = Vote(
                round_id=message.round_id, replica=me, finite=True, candidate_loss=1.0, active_loss=20.0,
                tokens=HELDOUT_TOKENS, product_error=0.1,
            )  # fmt: skip
            self.channel.send(wire.Voted(vote=vote))
        elif isinstance(message, wire.Settle):
            self.settle(message)
        elif isinstance(message, wire.Install):
            self.version = message.version
            self.installed.append(message.version)
            self.channel.send(wire.Settled(replica=me, round_id=0, version=self.version, tick=1))
        elif isinstance(message, wire.Evaluate):
            loss = 1.0 if self.version else 20.0
            result = HeldoutLoss(replica=me, version=self.version, loss=loss, tokens=HELDOUT_TOKENS)
            self.channel.send(wire.Evaluated(result=result))
        elif isinstance(message, wire.Rebuild):
            self.begin_anew(message.reason)
        elif isinstance(message, wire.Stop):
            self.exit_code = message.code
            self.channel.send(wire.Goodbye(replica=me))
            self.end.set()

    def settle(self, message: wire.Settle) -> None:
        if message.commit:
            self.version = message.version
        if message.publish:
            published = wire.Published(
                version=message.version, round_id=message.round_id, config_json="{}", weights=b"weights"
            )
            self.channel.send(published)
        settled = wire.Settled(replica=self.replica, round_id=message.round_id, version=self.version, tick=1)
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
        self.channel = ControlChannel()
        config.run_dir.mkdir(exist_ok=True)
        store = AdapterStore(config.run_dir)
        self.journal = Journal(config.run_dir)
        past, recorded = add_up(self.journal.past), read_recorded(config.run_dir)
        recovery = recover(past, self.load, options.pop("relaunched", False), store.rounds(), recorded)
        self.server = ControlServer(
            config,
            self.channel,
            time.monotonic,
            replicas=leaders,
            secret="s",
            quality=QualityCheck(config, rows, tokenizer, recovery.starts),
            store=store,
            records=Records(config.run_dir, config, time.monotonic),
            status=Status("plain"),
            ledger=Ledger(self.journal, recovery),
            ending=Ending(**{k: options.pop(k) for k in ("stop_reason", "signalled", "restarts_left") if k in options}),
        )
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


def test_a_run_goes_through_all_phases_and_commits_a_round(tmp_path: Path) -> None:
    run = Run(make_config(tmp_path))
    run.go()
    assert run.server.phase is Phase.DONE
    run.assert_promise_1()
    requests = run.table("requests")
    assert len(requests) == len(run.load) + 4
    assert {row["finish"] for row in requests} == {"stop"}
    (ended,) = run.table("rounds")
    assert (ended["state"], ended["members"], ended["version"], ended["samples"]) == ("committed", "0,1", 1, 16)
    assert ended["heldout_candidate"] == pytest.approx(0.1) and ended["heldout_active"] == pytest.approx(2.0)
    before, after = run.table("quality")
    assert (before["phase"], before["heldout_loss"], before["exact_match"]) == ("before", 2.0, 0.0)
    assert (after["phase"], after["heldout_loss"], after["exact_match"]) == ("after", pytest.approx(0.1), 1.0)
    assert json.loads((run.config.run_dir / "adapters" / "current.json").read_text())["version"] == 1
    first = [row for row in run.table("transitions") if row["from_state"] == row["to_state"]]
    assert sorted((row["replica"], row["to_state"]) for row in first) == [(0, "serving"), (1, "serving")]
    assert all("combined" in leader.states for leader in run.leaders)


def test_a_replica_outside_the_round_gets_the_new_adapter(tmp_path: Path) -> None:
    run = Run(make_config(tmp_path, federation={"min_members": 1}))
    run.leaders[1].pretends_to_run = 4
    run.go()
    (ended,) = run.table("rounds")
    assert ended["members"] == "0"
    assert run.leaders[1].installed == [1] and run.leaders[1].states == []
    assert [leader.version for leader in run.leaders] == [1, 1]
    # It was installed before the closing measurement, which is of one version only.
    assert run.table("quality")[1]["heldout_loss"] == pytest.approx(0.1)


def test_promise_1_every_request_ends_when_a_replica_falls_silent(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        control={"lost_after_s": 2.0},
        train={"enabled": False},
        federation={"rounds": None},
        quality={"exact_match_rows": 0},
    )
    run = Run(config, silent={1: 3})
    # Until then replica 0 only fills up, so that replica 1 gets its share for certain.
    run.leaders[0].serves_after = run.leaders[1].gone
    run.go()
    assert run.server.phase is Phase.DONE
    run.assert_promise_1()
    ends = Counter(row["finish"] for row in run.table("requests"))
    assert ends == {"stop": len(run.load)}
    assert [row["to_state"] for row in run.table("transitions") if row["replica"] == 1][-1] == "failed"


SERVES: dict[str, dict[str, Any]] = {
    "train": {"enabled": False},
    "federation": {"rounds": None},
    "quality": {"exact_match_rows": 0},
}


def came_back(run: Run, replica: int) -> bool:
    states = [row["to_state"] for row in run.table("transitions") if row["replica"] == replica]
    return states[states.index("failed") + 1 :][:1] == ["serving"]


def failing(config: Config, **options: Any) -> Run:
    """Replica 1 fails while it holds two requests; until then replica 0 only fills up, so that it gets them."""
    run = Run(config, **options)
    run.leaders[1].fails_after = 2
    run.leaders[0].serves_after = run.leaders[1].gone
    return run


def test_a_replica_that_fails_comes_back_and_nobody_loses_a_request(tmp_path: Path) -> None:
    run = failing(make_config(tmp_path, **SERVES, load={"duration_s": 1.5, "rate_rps": 8.0}))
    run.go()
    run.assert_promise_1()
    assert {row["finish"] for row in run.table("requests")} == {"stop"}
    assert came_back(run, 1)
    assert any("out of memory" in row["reason"] for row in run.table("transitions"))
    assert {row["replica"] for row in run.table("requests")} == {0, 1}


def test_with_restarts_left_a_replica_that_is_rebuilt_interrupts_nobody(tmp_path: Path) -> None:
    run = failing(make_config(tmp_path, **SERVES), restarts_left=3)
    run.go()
    assert run.server.phase is Phase.DONE
    run.assert_promise_1()


def test_the_only_replica_may_fail_and_its_requests_wait_for_it(tmp_path: Path) -> None:
    run = Run(make_config(tmp_path, **SERVES), leaders=1)
    run.leaders[0].fails_after = 2
    run.go()
    run.assert_promise_1()
    assert {row["finish"] for row in run.table("requests")} == {"stop"}


def test_a_replica_that_wakes_up_after_it_was_counted_as_lost_begins_anew(tmp_path: Path) -> None:
    slow = {"duration_s": 4.0, "rate_rps": 5.0}
    run = Run(make_config(tmp_path, **SERVES, control={"lost_after_s": 0.5}, load=slow), silent={1: 2})
    run.leaders[1].wakes = True
    run.leaders[0].serves_after = run.leaders[1].gone
    run.go()
    run.assert_promise_1()
    assert {row["finish"] for row in run.table("requests")} == {"stop"}
    assert came_back(run, 1) and run.leaders[1].life == 1


def fail_in_the_first_round(leader: FakeLeader) -> None:
    obey, failed = leader.obey, []

    def fail_once(message: wire.Down) -> None:
        if isinstance(message, wire.BeginRound) and not failed:
            failed.append(message.plan.round_id)
            leader.begin_anew("RuntimeError: out of memory")
        else:
            obey(message)

    leader.obey = fail_once  # type: ignore[method-assign]


def test_a_replica_that_comes_back_gets_the_version_that_was_stored_meanwhile(tmp_path: Path) -> None:
    load = {"duration_s": 4.0, "rate_rps": 5.0}
    run = Run(make_config(tmp_path, federation={"min_members": 1}, load=load))
    fail_in_the_first_round(run.leaders[1])
    run.leaders[1].fails_for_s = 2.5
    run.go()
    assert [row["members"] for row in run.table("rounds") if row["state"] == "committed"] == ["0"]
    assert came_back(run, 1) and run.leaders[1].installed == [1]
    run.assert_promise_1()


def test_a_replica_that_does_not_come_back_is_given_up(tmp_path: Path) -> None:
    run = Run(make_config(tmp_path, **SERVES, dist={"timeout_s": 0.5}), leaders=1)
    run.leaders[0].fails_after, run.leaders[0].fails_for_s = 2, 30.0
    with pytest.raises(ControlError, match="no replica that serves is left"):
        run.go()
    assert {row["finish"] for row in run.table("requests")} == {"stop", "failed"}
    run.assert_promise_1()


def test_a_member_that_fails_in_a_round_ends_the_round_and_is_in_the_next(tmp_path: Path) -> None:
    run = Run(make_config(tmp_path))
    fail_in_the_first_round(run.leaders[1])
    run.go()
    first, second = run.table("rounds")
    assert (first["state"], second["state"]) == ("discarded", "committed")
    assert "replica 1 was lost: RuntimeError: out of memory" in first["reason"]
    assert second["members"] == "0,1" and run.leaders[0].plan is not None
    assert run.leaders[0].plan.lives == (0, 1)
    run.assert_promise_1()


def test_promise_1_when_the_run_is_stopped_every_request_ends_as_failed_with_the_reason(tmp_path: Path) -> None:
    def busy(server: ControlServer) -> bool:
        return server.phase is Phase.OPEN and server.dispatcher.outstanding > 0

    config = make_config(tmp_path, load={"rate_rps": 1000.0, "max_requests": 20})
    run = Run(config, stop_reason=lambda: "rank 0 died" if busy(run.server) else "")
    with pytest.raises(ControlError, match="rank 0 died"):
        run.go()
    run.assert_promise_1()
    failed = [row for row in run.table("requests") if row["finish"] == "failed"]
    assert failed and all("rank 0 died" in row["detail"] for row in failed)


def test_a_drain_lets_what_runs_end_and_takes_no_more_load(tmp_path: Path) -> None:
    def busy() -> str:
        return "got SIGTERM" if run.server.phase is Phase.OPEN and run.server.dispatcher.running else ""

    run = Run(make_config(tmp_path, load={"rate_rps": 50.0, "duration_s": 20.0}), signalled=busy)
    run.go()
    assert run.server.drained == "got SIGTERM" and run.server.phase is Phase.DONE
    run.assert_promise_1()
    users = [row for row in run.table("requests") if row["purpose"] == "user"]
    assert 0 < len(users) < len(run.load) and {row["finish"] for row in users} == {"stop"}


def test_what_does_not_end_in_the_drain_is_cancelled_with_the_reason(tmp_path: Path) -> None:
    def busy() -> str:
        return "got SIGTERM" if run.server.dispatcher.outstanding and run.server.phase is Phase.OPEN else ""

    config = make_config(
        tmp_path, run={"drain_s": 0.3}, quality={"exact_match_rows": 0}, train={"enabled": False},
        federation={"rounds": None},
    )  # fmt: skip
    run = Run(config, signalled=busy)
    for leader in run.leaders:
        leader.serves_after = threading.Event()
    run.go()
    run.assert_promise_1()
    rows = run.table("requests")
    assert rows and {(row["finish"], row["detail"]) for row in rows} == {("cancelled", "got SIGTERM")}


@pytest.mark.parametrize(("restarts_left", "ends"), [(0, {"failed"}), (1, set())])
def test_open_requests_of_a_lost_run_are_ended_or_left_to_the_restart(
    tmp_path: Path, restarts_left: int, ends: set[str]
) -> None:
    """Promise 1. The next start answers them once, and offers nothing twice."""

    def broken() -> str:
        stuck = run.server.phase is Phase.OPEN and run.server.dispatcher.outstanding >= 3
        return "rank 0 died" if stuck else ""

    sections: dict[str, Any] = {
        "quality": {"exact_match_rows": 0}, "train": {"enabled": False}, "federation": {"rounds": None},
    }  # fmt: skip
    config = make_config(tmp_path, **sections)
    run = Run(config, stop_reason=broken, restarts_left=restarts_left)
    for leader in run.leaders:
        leader.serves_after = threading.Event()
    with pytest.raises(ControlError, match="rank 0 died"):
        run.go()
    assert {row["finish"] for row in run.table("requests")} == ends
    assert run.exit_codes() == {1}, "every host's torchrun must see that the run failed"
    again = Run(config, relaunched=True)
    again.go()
    assert again.exit_codes() == {0}
    assert again.server.phase is Phase.DONE and not again.server.drained
    with h5py.File(collect(config.run_dir), "r") as file:
        requests, load = file["requests"][:], file["load"][:]
    everything = Counter({i: 1 for i in range(len(run.load))})
    assert Counter(requests["id"].tolist()) == Counter(load["request"].tolist()) == everything
    assert Counter(requests["finish"].tolist())[b"stop"] >= len(run.load) - (3 if ends else 0)
    once_more = Run(config, relaunched=True)
    once_more.go()
    assert once_more.server.dispatcher.ended[FinishReason.STOP] == 0, "the run was through"


def test_with_restarts_left_a_lost_replica_ends_the_run_without_ending_its_requests(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, control={"lost_after_s": 1.0}, train={"enabled": False}, federation={"rounds": None},
        quality={"exact_match_rows": 0},
    )  # fmt: skip
    run = Run(config, silent={1: 1}, restarts_left=1)
    run.leaders[0].serves_after = run.leaders[1].gone
    with pytest.raises(ControlError, match="replica 1 is lost"):
        run.go()
    assert {row["finish"] for row in run.table("requests")} <= {"stop"}


def test_a_replica_that_hangs_in_a_drain_leaves_nothing_open_though_restarts_are_left(tmp_path: Path) -> None:
    def silent() -> str:
        return "got SIGTERM" if run.leaders[1].gone.is_set() else ""

    config = make_config(
        tmp_path, run={"drain_s": 1.0}, control={"lost_after_s": 0.5}, train={"enabled": False},
        federation={"rounds": None}, quality={"exact_match_rows": 0},
    )  # fmt: skip
    run = Run(config, silent={1: 1}, restarts_left=1, signalled=silent)
    run.leaders[0].serves_after = run.leaders[1].gone
    run.go()
    assert run.server.drained
    run.assert_promise_1()


@pytest.mark.parametrize("gone", [False, True])
def test_in_a_drain_requests_are_left_open_only_for_a_replica_that_lost_a_rank(tmp_path: Path, gone: bool) -> None:
    """torchrun signals the others when a rank dies, and then starts all anew; after an error alone it does not."""

    def fail(message: wire.Down) -> None:
        obey(message)
        if isinstance(message, wire.Ping):
            first.channel.send(wire.Trouble(replica=0, error="no answer from ranks [1]", gone=gone))
            second.serves_after = None

    sections: dict[str, Any] = {
        "quality": {"exact_match_rows": 0}, "train": {"enabled": False}, "federation": {"rounds": None},
    }  # fmt: skip
    run = Run(
        make_config(tmp_path, **sections),
        restarts_left=1,
        signalled=lambda: "got SIGTERM" if run.server.dispatcher.outstanding > 2 else "",
    )
    first, second = run.leaders
    first.serves_after = second.serves_after = threading.Event()
    obey, first.obey = first.obey, fail  # type: ignore[method-assign]
    if gone:
        with pytest.raises(ControlError, match="replica 0 is lost"):
            run.go()
        assert run.server.dispatcher.outstanding
    else:
        run.go()
        run.assert_promise_1()


def test_one_signalled_rank_drains_the_run(tmp_path: Path) -> None:
    run = Run(make_config(tmp_path, load={"duration_s": 20.0}))

    # Whichever of them gets the first request: where no queue is, one replica may get all of them.
    def signal_on_request(leader: FakeLeader) -> None:
        obey = leader.obey

        def tell(message: wire.Down) -> None:
            obey(message)
            if isinstance(message, wire.Submit) and message.request.purpose is Purpose.USER:
                leader.channel.send(wire.Signalled(replica=leader.replica, signal="SIGTERM"))

        leader.obey = tell  # type: ignore[method-assign]

    for leader in run.leaders:
        signal_on_request(leader)
    run.go()
    assert run.server.drained in ("replica 0 got SIGTERM", "replica 1 got SIGTERM")
    assert run.exit_codes() == {DRAINED}
    run.assert_promise_1()


def test_a_signal_while_all_leave_changes_nothing(tmp_path: Path) -> None:
    run = Run(make_config(tmp_path), signalled=lambda: "late" if run.server.phase is Phase.STOPPING else "")
    run.go()
    assert run.server.phase is Phase.DONE and not run.server.drained


def test_a_leader_with_a_wrong_secret_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def both_spoke() -> bool:
        return run.server.fleet.missing == (1,) and "wrong secret" in caplog.text

    run = Run(make_config(tmp_path), stop_reason=lambda: "enough" if both_spoke() else "")
    run.leaders[1].secret = "wrong"
    with pytest.raises(ControlError, match="enough"):
        run.go()
    assert run.server.phase is Phase.GATHER


def test_a_replica_that_cannot_start_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    run = Run(make_config(tmp_path), leaders=1)

    def fail(leader: FakeLeader = run.leaders[0]) -> None:
        channel = LeaderChannel(leader.address, 0)
        channel.send(wire.Trouble(replica=0, error="model file is missing"))
        channel.close()

    run.leaders[0].run = fail  # type: ignore[method-assign]
    with pytest.raises(ControlError, match="model file is missing"):
        run.go()


# --- the process ---------------------------------------------------------------------------------


def prepare(tmp_path: Path) -> tuple[Config, list[str], dict[str, str]]:
    config = make_config(tmp_path)
    config.run_dir.mkdir()
    (config.run_dir / "config.json").write_text(config.model_dump_json())
    make_tokenizer().save(config.run_dir / "tokenizer")
    command = [sys.executable, "-P", "-m", "clif.control", "--run-dir", str(config.run_dir)]
    environment = {**os.environ, "PYTHONPATH": str(Path(clif.__file__).parents[1]), "CLIF_SECRET": "s"}
    return config, [*command, "--replicas", "1"], environment


def wait_for(path: Path, text: str = "") -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{path} does not say {text!r}"
        time.sleep(0.05)


def test_the_process_runs_to_the_end_with_exit_code_0_and_a_summary(tmp_path: Path) -> None:
    config, command, environment = prepare(tmp_path)
    config_json = config.model_copy(update={"federation": config.federation.model_copy(update={"min_members": 1})})
    (config.run_dir / "config.json").write_text(config_json.model_dump_json())
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_for(config.run_dir / "control.address", "tcp://")
        leader = FakeLeader((config.run_dir / "control.address").read_text(), 0)
        leader.start()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    summary = json.loads((config.run_dir / "summary.json").read_text())
    assert summary["requests"]["submitted"] == 12 and summary["training"]["rounds_completed"] == 1
    leader.join(10)


def test_sigterm_ends_the_process_with_a_clear_last_line(tmp_path: Path) -> None:
    config, command, environment = prepare(tmp_path)
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_for(config.run_dir / "control.address", "tcp://")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors.strip().splitlines()[-1] == "clif: drained: got SIGTERM; run.resume=true goes on from here"


def test_an_address_that_is_not_ours_is_named(tmp_path: Path) -> None:
    _, command, environment = prepare(tmp_path)
    done = subprocess.run(
        [*command, "--host", "192.0.2.1"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "dist.control_host" in done.stderr.strip().splitlines()[-1]


def test_the_process_ends_when_its_parent_dies(tmp_path: Path) -> None:
    config, command, environment = prepare(tmp_path)
    told, address = tmp_path / "stderr", config.run_dir / "control.address"
    code = f"""
import os, subprocess, time
subprocess.Popen({command!r}, stderr=open({str(told)!r}, "w"))
while not os.path.exists({str(address)!r}):
    time.sleep(0.05)
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=True)
    wait_for(told, "rank 0 died")
