"""What the control server does in runs with scripted replicas, and the process around it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from control_run import SERVES, Run, came_back, make_config
from scripted_replica import KEYS, ScriptedReplica, SocketReplica, make_tokenizer

import clif
import clif.control.__main__ as control_process
from clif.config import Config
from clif.control.durability.shutdown import DRAINED
from clif.control.policy.phases import ControlError, Phase
from clif.control.server import ControlServer
from clif.types import Purpose
from clif.wire import messages as wire


def test_a_run_goes_through_all_phases_and_commits_a_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(make_config(tmp_path))
    run.go()
    last = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clif: time")][-1]
    assert "phase done" in last and "0 to come" in last, "what is shown last is how it ended"
    assert run.server.phase is Phase.DONE
    run.assert_promise_1()
    requests = run.table("requests")
    assert len(requests) == len(run.load) + 4
    assert {row["finish"] for row in requests} == {"stop"}
    (ended,) = run.table("rounds")
    assert (ended["state"], ended["members"], ended["version"], ended["samples"]) == ("committed", "0,1", 1, 16)
    assert ended["noise_scale"] == run.server.federation.noise_scale == 1e6, "what the coordinator is given"
    assert ended["heldout_candidate"] == pytest.approx(0.1) and ended["heldout_active"] == pytest.approx(2.0)
    before, after = run.table("quality")
    assert (before["phase"], before["heldout_loss"], before["exact_match"]) == ("before", 2.0, 0.0)
    assert (after["phase"], after["heldout_loss"], after["exact_match"]) == ("after", pytest.approx(0.1), 1.0)
    assert json.loads((run.config.run_dir / "adapters" / "current.json").read_text())["version"] == 1
    kept = [json.loads(line) for line in (run.config.run_dir / "answers.jsonl").read_text().splitlines()]
    assert [(a["purpose"], a["exact_match"]) for a in kept] == [("probe", False)] * 2 + [("probe", True)] * 2
    first = [row for row in run.table("transitions") if row["from_state"] == row["to_state"]]
    assert sorted((row["replica"], row["to_state"]) for row in first) == [(0, "serving"), (1, "serving")]
    assert {row["reason"] for row in first} == {
        f"joined: rank {r}, process 1 on h, float32, loaded in 0.0 s" for r in (0, 1)
    }
    combined = [row["replica"] for row in run.table("transitions") if row["to_state"] == "combined"]
    assert sorted(combined) == [0, 1]


def test_a_replica_outside_the_round_gets_the_new_adapter(tmp_path: Path) -> None:
    run = Run(make_config(tmp_path, federation={"min_members": 1}))
    # A step of an answer takes longer than the promise to a token.
    run.leaders[1].busy, run.leaders[1].serve_timings = 1.0, ((1.0, 0.0, 50.0),)
    run.go()
    (ended,) = run.table("rounds")
    assert ended["members"] == "0"
    assert run.leaders[1].installed == [1] and run.leaders[1].plan is None
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
    run.leaders[0].serves = lambda: run.leaders[1].gone
    run.go()
    assert run.server.phase is Phase.DONE
    run.assert_promise_1()
    ends = Counter(row["finish"] for row in run.table("requests"))
    assert ends == {"stop": len(run.load)}
    assert [row["to_state"] for row in run.table("transitions") if row["replica"] == 1][-1] == "failed"


def failing(config: Config, **options: Any) -> Run:
    """Replica 1 fails while it holds two requests; until then replica 0 only fills up, so that it gets them."""
    run = Run(config, **options)
    run.leaders[1].fails_after = 2
    run.leaders[0].serves = lambda: run.leaders[1].gone
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
    run.leaders[0].serves = lambda: run.leaders[1].gone
    run.go()
    run.assert_promise_1()
    assert {row["finish"] for row in run.table("requests")} == {"stop"}
    assert came_back(run, 1) and run.leaders[1].incarnation == 1


def fail_in_the_first_round(leader: ScriptedReplica) -> None:
    obey, failed = leader.obey, []

    def fail_once(message: wire.Down) -> None:
        if isinstance(message, wire.BeginRound) and not failed:
            failed.append(message.plan.round_id)
            leader.rebuild("RuntimeError: out of memory")
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
    assert run.leaders[0].plan.incarnations == (0, 1)
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
        leader.serves = lambda: False
    run.go()
    run.assert_promise_1()
    rows = run.table("requests")
    assert rows and {(row["finish"], row["detail"]) for row in rows} == {("cancelled", "got SIGTERM")}


@pytest.mark.parametrize(("restarts_left", "ends", "files"), [(0, {"failed"}, False), (1, set(), True)])
def test_open_requests_of_a_lost_run_are_ended_or_left_to_the_restart(
    tmp_path: Path, restarts_left: int, ends: set[str], files: bool
) -> None:
    """Promise 1. The next start answers them once, and offers nothing twice."""

    def broken() -> str:
        stuck = run.server.phase is Phase.OPEN and run.server.dispatcher.outstanding >= 3
        return "rank 0 died" if stuck else ""

    sections: dict[str, Any] = {
        "quality": {"exact_match_rows": 0}, "train": {"enabled": False}, "federation": {"rounds": None},
    }  # fmt: skip
    config = make_config(tmp_path, **sections)
    run = Run(config, files=files, stop_reason=broken, restarts_left=restarts_left)
    for leader in run.leaders:
        leader.serves = lambda: False
    with pytest.raises(ControlError, match="rank 0 died"):
        run.go()
    assert {row["finish"] for row in run.table("requests")} == ends
    assert run.exit_codes() == {1}, "every host's torchrun must see that the run failed"
    again = Run(config, files=files, after=run)
    again.go()
    assert again.exit_codes() == {0}
    assert again.server.phase is Phase.DONE and not again.server.drained
    requests, load = again.of_all_starts("requests"), again.of_all_starts("load")
    everything = Counter({i: 1 for i in range(len(run.load))})
    assert Counter(row["id"] for row in requests) == Counter(row["request"] for row in load) == everything
    assert Counter(row["finish"] for row in requests)["stop"] >= len(run.load) - (3 if ends else 0)
    once_more = Run(config, files=files, after=again)
    once_more.go()
    assert not once_more.server.finished, "the run was through"


def test_with_restarts_left_a_lost_replica_ends_the_run_without_ending_its_requests(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, control={"lost_after_s": 1.0}, train={"enabled": False}, federation={"rounds": None},
        quality={"exact_match_rows": 0},
    )  # fmt: skip
    run = Run(config, silent={1: 1}, restarts_left=1)
    run.leaders[0].serves = lambda: run.leaders[1].gone
    with pytest.raises(ControlError, match="replica 1 is lost"):
        run.go()
    assert {row["finish"] for row in run.table("requests")} <= {"stop"}


def test_a_replica_that_hangs_in_a_drain_leaves_nothing_open_though_restarts_are_left(tmp_path: Path) -> None:
    def silent() -> str:
        return "got SIGTERM" if run.leaders[1].gone else ""

    config = make_config(
        tmp_path, run={"drain_s": 1.0}, control={"lost_after_s": 0.5}, train={"enabled": False},
        federation={"rounds": None}, quality={"exact_match_rows": 0},
    )  # fmt: skip
    run = Run(config, silent={1: 1}, restarts_left=1, signalled=silent)
    run.leaders[0].serves = lambda: run.leaders[1].gone
    run.go()
    assert run.server.drained
    run.assert_promise_1()


@pytest.mark.parametrize("gone", [False, True])
def test_in_a_drain_requests_are_left_open_only_for_a_replica_that_lost_a_rank(tmp_path: Path, gone: bool) -> None:
    """torchrun signals the others when a rank dies, and then starts all anew; after an error alone it does not."""

    def fail(message: wire.Down) -> None:
        obey(message)
        if isinstance(message, wire.Ping):
            first.send(wire.Trouble(replica=0, error="no answer from ranks [1]", gone=gone))
            second.serves = lambda: True

    sections: dict[str, Any] = {
        "quality": {"exact_match_rows": 0}, "train": {"enabled": False}, "federation": {"rounds": None},
    }  # fmt: skip
    run = Run(
        make_config(tmp_path, **sections),
        restarts_left=1,
        signalled=lambda: "got SIGTERM" if run.server.dispatcher.outstanding > 2 else "",
    )
    first, second = run.leaders
    first.serves = second.serves = lambda: False
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
    def signal_on_request(leader: ScriptedReplica) -> None:
        obey = leader.obey

        def signal_once(message: wire.Down) -> None:
            obey(message)
            if isinstance(message, wire.Submit) and message.request.purpose is Purpose.USER:
                leader.send(wire.Signalled(replica=leader.replica, signal="SIGTERM"))

        leader.obey = signal_once  # type: ignore[method-assign]

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


def test_a_replica_that_cannot_start_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    run = Run(make_config(tmp_path), leaders=1)

    def fail() -> None:
        run.leaders[0].send(wire.Trouble(replica=0, error="model file is missing"))

    run.leaders[0].start = fail  # type: ignore[method-assign]
    with pytest.raises(ControlError, match="model file is missing"):
        run.go()


# --- the process ---------------------------------------------------------------------------------


def prepare(tmp_path: Path) -> tuple[Config, list[str], dict[str, str]]:
    config = make_config(tmp_path)
    config.run_dir.mkdir()
    (config.run_dir / "config.json").write_text(config.model_dump_json())
    make_tokenizer().save(config.run_dir / "tokenizer")
    KEYS.write(config.run_dir)
    command = [sys.executable, "-P", "-m", "clif.control", "--run-dir", str(config.run_dir)]
    environment = {**os.environ, "PYTHONPATH": str(Path(clif.__file__).parents[1])}
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
        leader = SocketReplica(ScriptedReplica(0), (config.run_dir / "control.address").read_text())
        leader.start()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    summary = json.loads((config.run_dir / "summary.json").read_text())
    assert summary["requests"]["submitted"] == 12 and summary["training"]["rounds_completed"] == 1
    status = json.loads((config.run_dir / "status.json").read_text())
    assert status["run"]["phase"] == "done" and status["totals"]["requests"]["stop"] == 12
    leader.join(10)


def test_sigterm_ends_the_process_with_a_clear_last_line(tmp_path: Path) -> None:
    config, command, environment = prepare(tmp_path)
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_for(config.run_dir / "control.address", "tcp://")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors.strip().splitlines()[-1] == "clif: ended before all replicas were there: got SIGTERM"


def test_an_address_that_is_not_ours_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, command, _ = prepare(tmp_path)
    monkeypatch.setattr(sys, "argv", [*command[command.index("clif.control") :], "--host", "192.0.2.1"])
    for name in ("keep_private", "allow_connections", "ProcessWatcher"):
        monkeypatch.setattr(control_process, name, lambda *_: None)
    assert control_process.main() == 1
    assert "dist.control_host" in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_process_ends_when_its_parent_dies(tmp_path: Path) -> None:
    config, command, environment = prepare(tmp_path)
    stderr, address = tmp_path / "stderr", config.run_dir / "control.address"
    code = f"""
import os, subprocess, time
subprocess.Popen({command!r}, stderr=open({str(stderr)!r}, "w"))
while not os.path.exists({str(address)!r}):
    time.sleep(0.05)
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=True)
    wait_for(stderr, "rank 0 died")
