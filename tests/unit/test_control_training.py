"""Rounds through the control server: what becomes of what was trained, and what is said when nothing does."""

from __future__ import annotations

from pathlib import Path

import pytest
from control_run import Run, make_config

from clif.metrics.summary import write_summary

NO_LOAD = {"load": {"kind": "none"}, "quality": {"exact_match_rows": 0}}


def test_when_linger_is_over_what_was_trained_is_averaged_and_judged(tmp_path: Path) -> None:
    run = Run(make_config(tmp_path, **NO_LOAD, run={"linger_s": 0.5}))
    for leader in run.leaders:
        leader.trains_until_told = True
    run.go()
    (row,) = run.table("rounds")
    assert (row["state"], row["samples"], row["version"]) == ("committed", 16, 1)


def test_giving_up_is_told_in_the_log_and_in_the_summary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(make_config(tmp_path, **NO_LOAD), files=True)
    for leader in run.leaders:
        leader.candidate_loss = 30.0
    run.go()
    assert [plan.lr_scale for plan in run.leaders[0].plans] == [1.0, 0.5, 0.25, 0.125]
    why = "4 rounds in a row were discarded"
    assert [row["gave_up"] for row in run.table("rounds")] == ["", "", "", why]
    (said,) = [r.message for r in caplog.records if "given up" in r.message]
    assert said == f"training is given up: {why}, the last because: held-out loss 3.0000 is worse than 2.0000"
    assert write_summary(run.config.run_dir)["training"]["gave_up"] == why


def test_no_round_begins_before_the_latency_of_serving_is_known(tmp_path: Path) -> None:
    steady = {"kind": "constant", "rate_rps": 20.0, "duration_s": 1.0, "max_tokens": 8}
    run = Run(make_config(tmp_path, load=steady, run={"linger_s": 1.0}, quality={"exact_match_rows": 0}))
    for leader in run.leaders:
        leader.serve_timings = ()
    run.go()
    (row,) = run.table("rounds")
    assert row["started_s"] > max(load["t"] for load in run.table("load")), "nothing was known while the load came"
