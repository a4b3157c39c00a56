"""Summary figures on hand-made data, against values worked out by hand."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import h5py
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from clif.metrics.collect import collect
from clif.metrics.figures import count_reasons, wilson
from clif.metrics.schema import CONTROL_TABLES, RANK_TABLES
from clif.metrics.summary import summarize, write_summary
from clif.metrics.summary_print import print_summary
from clif.metrics.writer import TableWriter, next_path


class Clock:
    """Monotonic seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def request(writer: TableWriter, number: int, finish: str, **values: Any) -> None:
    row = {
        "purpose": "user", "replica": 0, "version": 0, "prompt_tokens": 3, "output_tokens": 2,
        "arrival_s": 1.0, "finished_s": 2.0, "slo_met": True,
    }  # fmt: skip
    writer.row("requests", id=number, finish=finish, **(row | values))


def round_(writer: TableWriter, number: int, state: str, **values: Any) -> None:
    row = {"members": "0,1", "version": number, "samples": 10, "tokens": 400, "steps": 4, "reason": "test"}
    writer.row("rounds", round_id=number, state=state, **(row | values))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    clock = Clock()
    with TableWriter(tmp_path / "control.h5", CONTROL_TABLES, {}, clock) as writer:
        for number in range(1, 8):
            writer.row("load", request=number, at_s=float(number), prompt_tokens=3, max_tokens=8)
        for number, ttft in ((1, 0.1), (2, 0.2), (3, 0.3)):
            request(writer, number, "stop", ttft_s=ttft, tpot_s=0.01, e2e_s=1.0, slo_met=number != 3)
        request(writer, 4, "failed", ttft_s=0.4, e2e_s=9.0, version=1, finished_s=11.0)
        request(writer, 5, "rejected", output_tokens=0, detail="too long: 9 [tokens]")
        request(writer, 6, "cancelled", version=1)
        request(writer, 100, "stop", purpose="probe", ttft_s=77.0, e2e_s=77.0, slo_met=False, finished_s=90.0)
        for gap in (0.01, 0.02, 0.03):
            writer.row("gaps", request=1, itl_s=gap)
        transition = [(0, 0, "serving", "serving"), (1, 1, "serving", "serving"),
                      (4, 0, "serving", "idle"), (10, 0, "idle", "combined"),
                      (15, 0, "combined", "serving"), (16, 1, "serving", "failed")]  # fmt: skip
        for now, replica, before, after in transition:
            clock.now = 1000.0 + now
            writer.row("transitions", replica=replica, from_state=before, to_state=after, reason="test")
        round_(writer, 1, "committed", started_s=2.0, ended_s=6.0, running_requests=3, heldout_candidate=0.5)
        round_(writer, 2, "discarded", started_s=7.0, ended_s=12.0)
        for phase, loss in (("before", 3.5), ("after", 0.5)):
            writer.row("quality", phase=phase, heldout_loss=loss, heldout_tokens=100)
        writer.row("quality", phase="after", exact_match=0.25, exact_match_rows=8)
        clock.now = 1020.0
    for rank in range(2):
        with TableWriter(tmp_path / f"rank-0000{rank}.h5", RANK_TABLES, {}) as writer:
            for step in range(3):
                writer.row("train_steps", step=step, round_id=1, samples=4, tokens=50, loss=1.0, lr=1e-3, seconds=0.1)
    return tmp_path


def test_a_summary_tells_of_which_run_it_is_and_how_fast_tokens_came(run_dir: Path) -> None:
    config = {"run": {"mode": "split"}}
    with TableWriter(run_dir / "control.r1.h5", CONTROL_TABLES, {"config": json.dumps(config)}) as writer:
        resumed = writer.path
    with h5py.File(run_dir / "control.h5", "a") as first, h5py.File(resumed, "a") as second:
        first.attrs["start_unix"], second.attrs["start_unix"] = 1_700_000_000.0, 1_700_000_900.0
    summary = write_summary(run_dir)
    shown = {key: summary["run"][key] for key in ("name", "mode", "started")}
    assert shown == {"name": run_dir.name, "mode": "split", "started": "2023-11-14T22:13:20+00:00"}
    # Five requests of two tokens each, from 1 s to 11 s.
    assert summary["slo"]["output_tokens_per_s"] == 1.0
    console = Console(file=io.StringIO(), width=100)
    print_summary(summary, console)
    assert "split" in console.file.getvalue() and "output_tokens_per_s" in console.file.getvalue()


def test_promise_1_each_submitted_request_is_counted_by_its_one_terminal_event(run_dir: Path) -> None:
    assert write_summary(run_dir)["requests"] == {
        "submitted": 7, "accepted": 6, "unfinished": 1, "duplicate_ends": 0,
        "finished": {"stop": 3, "length": 0, "cancelled": 1, "rejected": 1, "failed": 1},
        "reasons": {
            end: [{"count": 1, "reason": reason}]
            for end, reason in (("cancelled", "no reason given"), ("rejected", "too long: 9 [tokens]"),
                                ("failed", "no reason given"))
        },
    }  # fmt: skip


def test_slo_attainment_counts_failed_rejected_and_cancelled_as_missed(run_dir: Path) -> None:
    slo = write_summary(run_dir)["slo"]
    assert slo["attainment"] == pytest.approx(2 / 6)
    assert slo["duration_s"] == pytest.approx(10.0)
    assert slo["goodput_rps"] == pytest.approx(0.2)


def test_percentiles_are_milliseconds_of_users_only(run_dir: Path) -> None:
    slo = write_summary(run_dir)["slo"]
    assert slo["ttft_ms"] == pytest.approx({"p50": 250.0, "p90": 370.0, "p99": 397.0})
    assert slo["itl_ms"] == pytest.approx({"p50": 20.0, "p90": 28.0, "p99": 29.8})
    assert slo["tpot_ms"]["p99"] == pytest.approx(10.0)
    assert slo["e2e_ms"] == pytest.approx({"p50": 1000.0, "p90": 1000.0, "p99": 1000.0})


def test_training_counts_committed_rounds_and_all_steps(run_dir: Path) -> None:
    assert write_summary(run_dir)["training"] == pytest.approx(
        {
            "tokens": 400,
            "tokens_per_s": 40.0,
            "span_s": 10.0,
            "samples": 10,
            "optimizer_steps": 6,
            "rounds_completed": 1,
            "rounds_discarded": 1,
            "gave_up": None,
        }
    )


def test_states_add_up_to_the_end_of_the_run(run_dir: Path) -> None:
    summary = write_summary(run_dir)
    assert summary["states_end_s"] == pytest.approx(20.0)
    assert summary["states"] == {
        "0": pytest.approx({"serving": 9.0, "idle": 6.0, "combined": 5.0, "failed": 0.0}),
        "1": pytest.approx({"serving": 15.0, "idle": 0.0, "combined": 0.0, "failed": 4.0}),
    }


def test_failures_of_replicas_are_told_with_the_reason_and_when_they_were_back(run_dir: Path) -> None:
    assert write_summary(run_dir)["failures"] == [{"replica": 1, "reason": "test", "rebuild_s": None}]
    clock = Clock()
    with TableWriter(next_path(run_dir, "control"), CONTROL_TABLES, {}, clock) as writer:
        changes = (("serving", "serving", 1.0), ("serving", "failed", 0.5), ("failed", "serving", 9.0))
        for before, after, seconds in changes:
            writer.row("transitions", replica=0, from_state=before, to_state=after, reason=f"to {after}")
            clock.now += seconds
    summary = write_summary(run_dir)
    assert summary["failures"][1:] == [{"replica": 0, "reason": "to failed", "rebuild_s": pytest.approx(0.5)}]
    stream = io.StringIO()
    print_summary(summary, Console(file=stream, width=120))
    assert "to failed; back after 0.5 s" in stream.getvalue() and "test; not rebuilt" in stream.getvalue()


def test_quality_and_adapters(run_dir: Path) -> None:
    summary = write_summary(run_dir)
    assert summary["quality"] == {
        "heldout_loss_before": 3.5, "heldout_loss_after": 0.5,
        "exact_match_before": None, "exact_match_before_interval": None, "exact_match_before_rows": 0,
        "exact_match_after": 0.25, "exact_match_after_rows": 8,
        "exact_match_after_interval": [pytest.approx(0.0715, abs=1e-3), pytest.approx(0.5907, abs=1e-3)],
        "versions": [], "groups": [],
    }  # fmt: skip
    assert summary["adapters"] == {
        "versions_served": {"0": 3, "1": 2},
        "promotions": [{"version": 1, "round_id": 1, "running_requests": 3, "heldout_loss": 0.5}],
    }


def test_restart_adds_up_and_never_subtracts_across_processes(run_dir: Path) -> None:
    clock = Clock()
    with TableWriter(next_path(run_dir, "control"), CONTROL_TABLES, {}, clock) as writer:
        writer.row("load", request=101, at_s=0.0, prompt_tokens=3, max_tokens=8)
        request(writer, 101, "stop", arrival_s=500.0, finished_s=505.0)
        writer.row("transitions", replica=0, from_state="serving", to_state="serving", reason="test")
        clock.now += 7.0
    summary = write_summary(run_dir)
    assert summary["requests"]["submitted"] == 8 and summary["requests"]["duplicate_ends"] == 0
    assert summary["slo"]["duration_s"] == pytest.approx(15.0)
    assert summary["states"]["0"]["serving"] == pytest.approx(16.0)
    assert summary["run"]["duration_s"] == pytest.approx(27.0)


def test_summary_json_is_strict_and_follows_newer_files(run_dir: Path) -> None:
    run_h5 = collect(run_dir)
    first = write_summary(run_dir)
    before = run_h5.stat().st_mtime_ns
    write_summary(run_dir)
    assert run_h5.stat().st_mtime_ns == before
    os.utime(run_dir / "control.h5")
    write_summary(run_dir)
    assert run_h5.stat().st_mtime_ns > before
    text = (run_dir / "summary.json").read_text()
    assert "NaN" not in text and json.loads(text) == first


def test_run_without_events_gives_nulls_and_prints(tmp_path: Path) -> None:
    with TableWriter(tmp_path / "control.h5", CONTROL_TABLES, {}):
        pass
    summary = summarize(collect(tmp_path))
    assert summary["slo"]["attainment"] is None and summary["slo"]["itl_ms"]["p50"] is None
    assert summary["training"]["tokens_per_s"] is None and summary["states"] == {}
    print_summary(summary, Console(file=io.StringIO()))


def test_printed_summary_is_plain_ascii(run_dir: Path) -> None:
    out = io.StringIO()
    print_summary(write_summary(run_dir), Console(file=out, width=100))
    assert out.getvalue().isascii() and "attainment" in out.getvalue() and "rejected 1" in out.getvalue()
    assert "1: too long: 9 [tokens]" in out.getvalue(), "brackets are text"
    assert "0.25 (95 %: 0.07148 to 0.5907, 8 answers)" in out.getvalue()


@given(st.integers(1, 400), st.data())
def test_the_interval_of_a_share_holds_it_stays_within_0_and_1_and_tightens(count: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, count))
    low, high = wilson(hits, count) or (2.0, -1.0)
    assert 0 <= low <= hits / count <= high <= 1 and low < high
    narrow = wilson(hits * 4, count * 4)
    assert narrow is not None and narrow[1] - narrow[0] < high - low
    assert wilson(0, 0) is None


def test_the_interval_of_a_share_is_wilsons() -> None:
    """The textbook case: 0 of 10 is 0 to 0.278."""
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(45, 64) == pytest.approx((0.5823, 0.8009), abs=1e-4)


def test_reasons_that_differ_in_numbers_only_are_counted_together_with_their_range() -> None:
    sentences = [f"prompt {n} + max_tokens 64 exceed 512 tokens" for n in (600, 500, 700)] + ["replica 2 was lost"]
    assert count_reasons(sentences) == [
        {"count": 3, "reason": "prompt 500 to 700 + max_tokens 64 exceed 512 tokens"},
        {"count": 1, "reason": "replica 2 was lost"},
    ]
    assert count_reasons([]) == []
