"""The control server and its clients in virtual time, with a front end that only notes messages: promises 1 and 10."""

from pathlib import Path

import msgspec
import pytest
from control_client import BEGIN_S, ENDS_S, Client, online
from control_run import Run

from clif.control.frontend import SILENT_S
from clif.control.frontend_process import start_again
from clif.control.policy.phases import ControlError
from clif.jobs.store import StoreFailed
from clif.types import FinishReason, TrainSample
from clif.wire.frontend import Beat, Command, GetConfig, GiveFeedback, Started, Withdraw


def test_promise_1_every_request_of_a_client_gets_exactly_one_end(tmp_path: Path) -> None:
    run = online(tmp_path)
    client = Client(run)
    asked = [client.ask(BEGIN_S + 0.1 * i) for i in range(20)]
    run.go()
    assert {client.end_of(i).finish for i in asked} <= {FinishReason.STOP, FinishReason.LENGTH}
    assert client.left, "the front end is told that the run is over"
    run.assert_promise_1()
    rows = {row["id"]: row for row in run.table("requests")}
    assert {rows[i]["prompt_tokens"] for i in asked} == {3}


def test_tokens_come_once_and_in_order(tmp_path: Path) -> None:
    run = online(tmp_path)
    client = Client(run)
    asked = client.ask(BEGIN_S)
    run.go()
    rows = {row["id"]: row for row in run.table("requests")}
    tokens = [token for event in client.events[asked] for token in event.tokens]
    assert len(tokens) == rows[asked]["output_tokens"] > 0


def test_requests_before_the_model_is_there_and_after_a_signal_are_refused_as_not_ready(tmp_path: Path) -> None:
    run = online(tmp_path)
    client = Client(run)
    early, late = client.ask(0.0), client.ask(ENDS_S + 0.5)
    # The drain lasts as long as one request is under way.
    client.ask(ENDS_S - 0.1, tokens=60)
    run.go()
    refused = {r.request_id: r.problem for r in client.refused}
    assert {early} <= set(refused) <= {early, late}
    assert all(problem.kind == "not_ready" for problem in refused.values())
    assert not {early, late} & {row["id"] for row in run.table("requests")}, "refused is not accepted"


def test_a_client_that_leaves_frees_its_request_at_the_replica(tmp_path: Path) -> None:
    run = online(tmp_path)
    client = Client(run)
    for leader in run.leaders:
        leader.serves = lambda: False
    asked = client.ask(BEGIN_S)
    client.at(BEGIN_S + 0.5, lambda: client.line.send(Withdraw(request_id=asked, reason="the client left")))
    run.go()
    (row,) = run.table("requests")
    assert (row["finish"], row["detail"]) == ("cancelled", "the client left")
    assert row["finished_s"] - row["arrival_s"] == pytest.approx(0.5, abs=0.01)


def test_withdrawing_what_is_not_a_clients_request_changes_nothing(tmp_path: Path) -> None:
    run = online(tmp_path, load={"kind": "constant", "rate_rps": 20.0, "duration_s": 0.6, "max_tokens": 8})
    client = Client(run)
    for request_id in range(12):
        client.at(BEGIN_S, lambda i=request_id: client.line.send(Withdraw(request_id=i, reason="mine")))  # type: ignore[misc]
    run.go()
    assert {row["finish"] for row in run.table("requests")} == {"stop"}


def test_an_unknown_model_is_refused_by_name(tmp_path: Path) -> None:
    run = online(tmp_path)
    client = Client(run)
    asked = client.ask(BEGIN_S, model="gpt-4")
    run.go()
    (refusal,) = client.refused
    assert refusal.request_id == asked
    assert (refusal.problem.kind, refusal.problem.param) == (
        "not_found",
        "model",
    ) and "gpt-4" in refusal.problem.message


def test_an_id_is_never_used_twice(tmp_path: Path) -> None:
    run = online(tmp_path)
    client = Client(run)
    client.ask(BEGIN_S)
    client.next_id -= 1
    client.ask(BEGIN_S + 1)
    run.go()
    assert [r.problem.kind for r in client.refused] == ["failed"] and len(run.table("requests")) == 1


def test_the_journal_and_the_tables_hold_no_word_of_a_client(tmp_path: Path) -> None:
    run = online(tmp_path)
    client = Client(run)
    client.ask(BEGIN_S, prompt=(111, 112, 113))
    run.go()
    lines = "\n".join(map(str, run.journal.lines))
    assert "withheld=3" in lines and "111" not in lines and "112" not in lines
    assert not (run.config.run_dir / "answers.jsonl").exists()


class Dies:
    """A FrontendChild that ends once, at a time of the run."""

    def __init__(self, run: Run, seconds: float) -> None:
        self.run, self.at_s, self.next_id = run, 1000.0 + seconds, 0

    def step(self, now: float, next_id: int) -> str:
        if self.next_id or now < self.at_s:
            return ""
        self.next_id = next_id
        return "killed by signal 9"

    def kill(self, reason: str) -> None:
        raise AssertionError(reason)

    def close(self) -> None:
        return


def test_what_a_front_end_sent_before_it_died_is_not_taken_for_the_next_ones(tmp_path: Path) -> None:
    run = online(tmp_path)
    assert run.frontend is not None
    child = run.frontend._child = Dies(run, BEGIN_S)
    client = Client(run)
    # Its last messages are read after its end.
    late = client.ask(BEGIN_S + 0.1)
    client.at(BEGIN_S + 0.1, lambda: client.line.send(Command(id=0, action=GetConfig())))
    client.at(BEGIN_S + 0.2, lambda: client.line.send(Started(pid=8)))
    client.next_id = late
    asked = client.ask(BEGIN_S + 0.3)
    run.go()
    assert child.next_id == late == asked, "the next one goes on with the ids that are not used"
    assert client.end_of(asked).finish is FinishReason.STOP and not client.refused
    assert client.replies == [] and len(run.table("requests")) == 1


class Killed:
    """A FrontendChild that ends when it is killed."""

    def __init__(self) -> None:
        self.ended, self.reasons = "", list[str]()

    def step(self, now: float, next_id: int) -> str:
        ended, self.ended = self.ended, ""
        return ended

    def kill(self, reason: str) -> None:
        self.ended = reason
        self.reasons.append(reason)

    def close(self) -> None:
        return


def test_a_front_end_that_is_stopped_is_killed_and_its_requests_are_cancelled(tmp_path: Path) -> None:
    run = Run(online(tmp_path).config, signalled=lambda: "got SIGTERM" if run.time() >= 1045.0 else "")
    assert run.frontend is not None
    child = run.frontend._child = Killed()
    for leader in run.leaders:
        leader.serves = lambda: False
    client = Client(run)
    for seconds in range(1, 10):
        client.at(seconds, lambda: client.line.send(Beat()))
    client.ask(BEGIN_S)
    run.go()
    (row,) = run.table("requests")
    assert row["finish"] == "cancelled" and "said nothing" in row["detail"] and len(child.reasons) == 1
    assert row["finished_s"] - row["arrival_s"] == pytest.approx(9 - BEGIN_S + SILENT_S, abs=0.5)


def test_a_front_end_is_not_killed_for_a_break_in_which_the_control_process_did_not_run(tmp_path: Path) -> None:
    frontend = online(tmp_path).frontend
    assert frontend is not None
    child = frontend._child = Killed()
    encode = msgspec.msgpack.encode
    frontend.take(0.0, encode(Started(pid=7)))
    for now in (0.0, 1.0, 500.0):
        frontend.watch(now)
    frontend.take(501.0, encode(Beat()))
    frontend.watch(501.0)
    assert not child.reasons


class Boom(Exception):
    """The control process dies."""


def test_requests_of_a_control_process_that_died_end_as_failed_and_are_not_answered_again(tmp_path: Path) -> None:
    run = online(tmp_path)
    client = Client(run)
    for leader in run.leaders:
        leader.serves = lambda: False
    asked = client.ask(BEGIN_S, prompt=(5, 6, 7, 8))

    def die() -> None:
        raise Boom

    client.at(BEGIN_S + 0.5, die)
    run.server._close_out = lambda reason: None  # type: ignore[method-assign]
    with pytest.raises(Boom):
        run.go()
    again = Run(run.config, after=run, signalled=lambda: "got SIGTERM" if again.time() >= 1003.0 else "")
    fresh = Client(again, start=1)
    other = fresh.ask(BEGIN_S)
    again.go()
    rows = {row["id"]: row for row in again.table("requests")}
    assert rows[asked]["finish"] == "failed" and "its connection ended" in rows[asked]["detail"]
    assert rows[asked]["prompt_tokens"] == 4
    assert fresh.end_of(other).finish is FinishReason.STOP, "ids of the new start are its own"


def test_the_status_tells_when_requests_are_accepted(tmp_path: Path) -> None:
    run = online(tmp_path)
    client = Client(run)
    run.go()
    said = [(status.ready, status.reason) for status in client.status]
    assert said[0] == (False, "the model is being loaded")
    assert (True, "") in said and said[-1][0] is False


def test_a_command_is_answered_and_one_that_fails_ends_nothing(tmp_path: Path) -> None:
    run = online(tmp_path)
    client = Client(run)
    assert run.frontend is not None
    client.at(BEGIN_S, lambda: client.line.send(Command(id=1, action=GetConfig())))
    run.go()
    (reply,) = client.replies
    assert reply.id == 1 and b'"port":0' in reply.body and reply.problem is None


def test_a_full_disk_under_the_store_of_jobs_ends_the_run_before_any_reply_of_that_step(tmp_path: Path) -> None:
    sections = {"train": {"enabled": True}, "jobs": {"allow_feedback": True}}
    run = Run(online(tmp_path, **sections).config, jobs=True, signalled=lambda: "")
    client = Client(run)

    def give(number: int, length: int) -> None:
        sample = TrainSample(id=0, ids=(1,) * length, target_start=1)
        client.line.send(Command(id=number, action=GiveFeedback(digest=str(number), sample=sample)))

    def fill() -> None:
        db = run.jobs._db
        db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0] + 1}")
        give(1, 2)
        give(2, 100_000)

    client.at(BEGIN_S, fill)
    with pytest.raises(StoreFailed, match="full"):
        run.go()
    assert client.replies == [] and run.jobs.feedback_waiting() == 0


def test_bytes_that_cannot_be_read_end_nothing(tmp_path: Path) -> None:
    run = online(tmp_path)
    client = Client(run)
    client.at(BEGIN_S, lambda: client.line.send_bytes(b"\xc1"))
    asked = client.ask(BEGIN_S + 0.1)
    run.go()
    assert client.end_of(asked).finish is FinishReason.STOP


def test_an_end_by_an_error_ends_the_requests_of_clients_too(tmp_path: Path) -> None:
    config = online(tmp_path).config
    run = Run(config, stop_reason=lambda: "rank 0 died" if run.time() > 1002.0 else "", restarts_left=2)
    client = Client(run)
    for leader in run.leaders:
        leader.serves = lambda: False
    asked = client.ask(BEGIN_S)
    with pytest.raises(ControlError, match="rank 0 died"):
        run.go()
    assert client.end_of(asked).finish is FinishReason.FAILED, "the next start cannot answer it: it is told"


def test_a_front_end_that_ends_again_and_again_starts_later_each_time_and_one_that_never_lasts_ends_the_run() -> None:
    waits = [start_again(lives, "exit code 1") for lives in range(10)]
    assert waits[:2] == [0.0, 0.0] and waits == sorted(waits) and waits[-1] == 30.0
    with pytest.raises(ControlError, match="right after its start, the last one: killed by signal 9"):
        start_again(10, "killed by signal 9")
