"""Scores in the control loop, in virtual time: they are never waited for while requests are served."""

import io
from pathlib import Path
from typing import Any

import pytest
from control_run import Run, make_config
from rich.console import Console

from clif.clients.status_print import print_quality
from clif.control.policy.phases import Phase
from clif.control.policy.scoring import SCORING_S, give_up_scoring
from clif.quality.process import Outcome
from clif.quality.score import score
from clif.quality.work import Work

HEAVY = {"quality": {"metrics": ["loss", "exact_match", "json_valid"]}}


class SlowScoring:
    """Scores after some virtual seconds each; None: never."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.run: Any = None
        self.began: list[tuple[float, str]] = []
        self.stopped = 0
        self._work: Work | None = None

    def start(self, work: Work) -> None:
        assert self._work is None, "one at a time"
        self.began.append((self.run.time(), self.run.server.phase))
        self._work = work

    def poll(self) -> Outcome | None:
        if self._work is None or self.seconds is None or self.run.time() < self.began[-1][0] + self.seconds:
            return None
        work, self._work = self._work, None
        return Outcome(scores=tuple(score(work)))

    def stop(self) -> None:
        self.stopped += 1
        self._work = None


def slow_run(tmp_path: Path, seconds: float | None, **sections: Any) -> tuple[Run, SlowScoring]:
    scoring = SlowScoring(seconds)
    scoring.run = run = Run(make_config(tmp_path, **{**HEAVY, **sections}), scoring=scoring)
    return run, scoring


def test_the_load_begins_while_answers_are_scored_and_the_run_ends_after_the_last_score(tmp_path: Path) -> None:
    run, scoring = slow_run(tmp_path, seconds=5.0)
    run.go()
    run.assert_promise_1()
    first = min(row["arrival_s"] for row in run.table("requests") if row["purpose"] == "user")
    (before_s, _), (after_s, phase) = scoring.began
    assert first < before_s - 1000.0 + 1.0, "it does not wait for the 5 s of the first scores"
    assert phase is Phase.CLOSING and run.time() >= after_s + 5.0
    assert {row["phase"] for row in run.table("scores")} == {"before", "after"}
    ttfts = [row["ttft_s"] for row in run.table("requests") if row["purpose"] == "user"]
    assert max(ttfts) < 1.0, "requests are served as without scores"


def test_scores_that_never_come_are_given_up_and_the_run_goes_through(tmp_path: Path) -> None:
    run, scoring = slow_run(tmp_path, None, run={"max_s": 1000.0, "linger_s": 1.0})
    run.go()
    run.assert_promise_1()
    assert run.table("scores") == [] and len(run.table("quality")) == 2 and scoring.stopped >= 2
    assert run.time() - 1000.0 < 2 * SCORING_S + 60


def test_the_limit_of_scores_grows_with_what_tests_may_take(tmp_path: Path) -> None:
    assert give_up_scoring(SCORING_S - 1, 0.0, make_config(tmp_path)) == (False, "not scored within 120 s")
    tests = {"test_command": ["run", "{program}"], "test_timeout_s": 30.0}
    assert give_up_scoring(SCORING_S + 59, 0.0, make_config(tmp_path, quality=tests)) == (
        False,
        "not scored within 180 s",
    )
    assert give_up_scoring(SCORING_S + 61, 0.0, make_config(tmp_path, quality=tests))[0]


def test_scores_are_by_version_and_show_that_it_learned(tmp_path: Path) -> None:
    """The scripted replicas know the right answer from version 1 on."""
    run = Run(make_config(tmp_path))
    run.go()
    found = {(r["version"], r["metric"]): r for r in run.table("scores") if r["group"] == "all"}
    assert found[0, "exact_match"]["value"] == 0.0 and found[1, "exact_match"]["value"] == 1.0
    assert found[1, "exact_match"]["low"] > found[0, "exact_match"]["low"] and found[1, "exact_match"]["count"] == 2
    before, after = run.table("quality")
    assert found[0, "loss"]["value"] == before["heldout_loss"] and found[1, "loss"]["value"] == after["heldout_loss"]
    (status_0, status_1) = run.server.status.body(run.time())["quality"]
    assert (status_0["version"], status_1["version"]) == (0, 1)
    assert status_1["scores"]["exact_match"]["value"] == 1.0
    out = io.StringIO()
    print_quality({"quality": [status_0, status_1]}, Console(file=out, width=120))
    assert "exact_match" in out.getvalue() and out.getvalue().isascii()


def test_earlier_versions_answer_after_the_load_so_that_each_has_its_line(tmp_path: Path) -> None:
    run = Run(make_config(tmp_path, quality={"earlier_versions": 2}, federation={"rounds": 3}))
    run.go()
    versions = [row["version"] for row in run.table("adapters")]
    assert versions == [1, 2, 3]
    scored = [(r["phase"], r["version"]) for r in run.table("scores") if r["metric"] == "exact_match"]
    assert scored == [("before", 0), ("after", 3), ("after", 1), ("after", 2)]
    before, after = run.table("quality")
    assert after["exact_match_rows"] == before["exact_match_rows"] == 2, "only the active version's answers are meant"


def test_what_cannot_be_scored_is_logged_and_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(SlowScoring):
        def start(self, work: Work) -> None:
            raise OSError(12, "Cannot allocate memory")

    run = Run(make_config(tmp_path, **HEAVY), scoring=Broken(1.0))
    run.go()
    run.assert_promise_1()
    assert "answers of version 0 are not scored: its process cannot be started (Cannot allocate memory)" in caplog.text
