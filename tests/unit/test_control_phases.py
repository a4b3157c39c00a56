"""Phases as data, the progress display, and what the control plane may import."""

import dataclasses
import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import clif
from clif.config import Config, config_from_tree
from clif.control.policy.phases import GATHER_S, ControlError, Facts, Phase, next_phase, rounds_may_start
from clif.control.progress import Progress, ProgressHandler, Snapshot, choose_mode

CONFIG: Config = config_from_tree(
    {"model": {"path": "m"}, "train": {"enabled": False}, "run": {"max_s": 1000.0, "linger_s": 10.0}}
)


def facts(phase: Phase, **values: Any) -> Facts:
    return Facts(phase, entered_s=0.0, started_s=0.0, **values)


@pytest.mark.parametrize(
    ("now", "given", "expected"),
    [
        (1.0, facts(Phase.GATHER, missing=(1,)), None),
        (1.0, facts(Phase.GATHER), Phase.BASELINE),
        (1.0, facts(Phase.GATHER, opened=True), Phase.OPEN),
        (1.0, facts(Phase.GATHER, opened=True, missing=(1,)), None),
        (1.0, facts(Phase.GATHER, over=True), Phase.STOPPING),
        (1.0, facts(Phase.GATHER, drain_reason="SIGTERM", missing=(1,)), Phase.STOPPING),
        (1.0, facts(Phase.OPEN, drain_reason="SIGTERM", exhausted=False, load_left=3), Phase.DRAIN),
        (1.0, facts(Phase.CLOSING, drain_reason="SIGTERM", measuring=True), Phase.DRAIN),
        (1.0, facts(Phase.DRAIN, drain_reason="SIGTERM", load_left=3), Phase.STOPPING),
        (19.0, facts(Phase.DRAIN, drain_reason="SIGTERM", outstanding=1), None),
        (19.0, facts(Phase.DRAIN, drain_reason="SIGTERM", federating=True), None),
        (20.0, facts(Phase.DRAIN, drain_reason="SIGTERM", outstanding=1, federating=True), Phase.STOPPING),
        (1.9, facts(Phase.STOPPING, drain_reason="SIGTERM", awaiting_goodbye=(1,)), None),
        (2.0, facts(Phase.STOPPING, drain_reason="SIGTERM", awaiting_goodbye=(1,)), Phase.DONE),
        (1.0, facts(Phase.BASELINE, measuring=True), None),
        (1.0, facts(Phase.BASELINE), Phase.OPEN),
        (1.0, facts(Phase.OPEN, exhausted=False, load_left=1), None),
        (1.0, facts(Phase.OPEN, outstanding=5), Phase.LINGER),
        (50.0, facts(Phase.LINGER, outstanding=1), None),
        (5.0, facts(Phase.LINGER, federating=True), None),
        (5.0, facts(Phase.LINGER, wants_rounds=True), None),
        (11.0, facts(Phase.LINGER, wants_rounds=True), Phase.CLOSING),
        (11.0, facts(Phase.LINGER, federating=True), None),
        (999.0, facts(Phase.LINGER, federating=True), Phase.CLOSING),
        (5.0, facts(Phase.LINGER), Phase.CLOSING),
        (5.0, facts(Phase.CLOSING, outstanding=1), None),
        (5.0, facts(Phase.CLOSING), Phase.STOPPING),
        (1001.0, facts(Phase.OPEN, exhausted=False, load_left=5, outstanding=5), Phase.STOPPING),
        (1.0, facts(Phase.STOPPING, awaiting_goodbye=(0,)), None),
        (60.0, facts(Phase.STOPPING, awaiting_goodbye=(0,)), Phase.DONE),
        (1.0, facts(Phase.STOPPING), Phase.DONE),
        (1.0, facts(Phase.DONE), None),
    ],
)
def test_a_phase_ends_when_its_work_is_done(now: float, given: Facts, expected: Phase | None) -> None:
    phase, reason = next_phase(now, given, CONFIG)
    assert phase is expected and reason


@pytest.mark.parametrize(
    ("now", "given", "word"),
    [
        (GATHER_S + 1, facts(Phase.GATHER, missing=(3,)), "3"),
        (1.0, facts(Phase.OPEN, serving=0, exhausted=False, load_left=1), "no replica that serves"),
        (1001.0, facts(Phase.BASELINE, measuring=True), "run.max_s"),
    ],
)
def test_a_run_that_cannot_go_on_says_why(now: float, given: Facts, word: str) -> None:
    patient = CONFIG if word != "3" else CONFIG.model_copy(update={"run": CONFIG.run.model_copy(update={"max_s": 1e9})})
    with pytest.raises(ControlError, match=word):
        next_phase(now, given, patient)


def test_no_round_begins_with_the_first_requests_of_a_load() -> None:
    """What serving takes is unknown then, so nobody can tell what it leaves; window_s bounds the wait."""
    new = facts(Phase.OPEN, latency_known=False)
    assert not rounds_may_start(9.9, new, CONFIG)
    assert rounds_may_start(10.0, new, CONFIG), "few requests tell little, and leave much"
    baseline = CONFIG.model_copy(update={"run": CONFIG.run.model_copy(update={"mode": "time_slice"})})
    assert rounds_may_start(1.0, new, baseline), "a baseline looks at nothing"
    assert rounds_may_start(1.0, facts(Phase.LINGER, latency_known=False, wants_rounds=True), CONFIG)


def test_rounds_start_while_load_comes_and_later_only_if_wanted() -> None:
    assert rounds_may_start(1.0, facts(Phase.OPEN), CONFIG)
    assert not rounds_may_start(1.0, facts(Phase.LINGER), CONFIG)
    assert rounds_may_start(1.0, facts(Phase.LINGER, wants_rounds=True), CONFIG)
    assert not rounds_may_start(11.0, facts(Phase.LINGER, wants_rounds=True), CONFIG)
    for phase in (Phase.GATHER, Phase.BASELINE, Phase.CLOSING, Phase.STOPPING):
        assert not rounds_may_start(1.0, facts(phase, wants_rounds=True), CONFIG)


# --- display -------------------------------------------------------------------------------------

SNAPSHOT = Snapshot(
    seconds=3.0, phase="open", pressure="low", states={"idle": 2}, running=1, queued=0, load_left=9,
    finished={"stop": 4, "rejected": 65, "failed": 0}, ttft_s=[0.1, 0.2], itl_s=[0.01], last_loss=1.5,
    training_steps=7, version=1, round="2 training",
    slack=dict.fromkeys(range(5), "no request waits"),
)  # fmt: skip


def test_progress_is_live_on_a_terminal_plain_elsewhere_and_off_under_ci() -> None:
    assert choose_mode("auto", True, {}) == "live"
    assert choose_mode("auto", False, {}) == "plain"
    assert choose_mode("auto", True, {"CI": "true"}) == "off"
    assert choose_mode("plain", True, {"CI": "true"}) == "plain"


def test_plain_progress_is_one_line_with_what_matters() -> None:
    stream = io.StringIO()
    progress = Progress("plain", stream)
    assert progress.due(0.0)
    progress.show(0.0, SNAPSHOT)
    assert not progress.due(1.0) and progress.due(10.0)
    (line,) = stream.getvalue().splitlines()
    for word in (
        "1 running",
        "9 to come",
        "2 idle",
        "loss of the last 1.500",
        "2 training",
        "v1",
        "10/10 ms",
        "finished stop 4, rejected 65 |",
        "slack replica 0: no request waits; replica 1: no request waits; replica 2: no request waits; and 2 more |",
    ):
        assert word in line
    progress.note("round 2 [committed]")
    assert "round 2 [committed]" in stream.getvalue()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A narrow one, as rich sees it by the environment."""
    for name, value in {"COLUMNS": "40", "LINES": "50", "FORCE_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    return io.StringIO()


def lines_of(terminal: io.StringIO) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()).replace("\r", "\n").split("\n")


def test_no_line_of_the_live_table_is_wider_than_the_terminal_so_that_no_frame_stays_behind(terminal) -> None:
    progress = Progress("live", terminal)
    for now in range(3):
        progress.show(float(now), SNAPSHOT)
        progress.note("a line that is longer than forty columns, as the reasons of rounds are")
    progress.close()
    progress.close()
    lines = lines_of(terminal)
    assert "clif: a line that is longer than forty" in " ".join(line.strip() for line in lines)
    assert max(map(len, lines)) <= 40, max(lines, key=len)


def test_there_is_no_live_table_while_ranks_load_and_write_to_the_terminal(terminal) -> None:
    progress = Progress("live", terminal)
    progress.show(0.0, dataclasses.replace(SNAPSHOT, phase="gather"))
    progress.note("waiting")
    progress.close()
    assert terminal.getvalue() == "clif: waiting\n"


def test_off_is_silent_but_for_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    progress = Progress("off", stream)
    handler = ProgressHandler(progress)
    progress.note("nothing")
    handler.emit(logging.LogRecord("n", logging.INFO, "f", 1, "info", (), None))
    handler.emit(logging.LogRecord("n", logging.ERROR, "f", 1, "replica lost", (), None))
    assert not progress.due(0.0) and stream.getvalue() == ""
    assert "replica lost" in capsys.readouterr().err


# --- imports -------------------------------------------------------------------------------------


def fresh_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(clif.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-P", *arguments], env=environment, capture_output=True, text=True, timeout=60
    )


def test_control_imports_no_torch_and_nothing_of_the_replica() -> None:
    code = """
import importlib, pkgutil, sys
sys.modules["torch"] = sys.modules["transformers"] = None  # importing them would raise
import clif.control
for module in pkgutil.iter_modules(clif.control.__path__):
    importlib.import_module("clif.control." + module.name)
import clif.latency, clif.metrics.summary
print([m for m in sys.modules if m.startswith(("clif.replica", "clif.engine", "clif.training", "clif.models"))])
"""
    done = fresh_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_control_help_works_without_torch() -> None:
    code = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["control", "--help"]
runpy.run_module("clif.control", run_name="__main__")
"""
    done = fresh_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "--run-dir" in done.stdout
