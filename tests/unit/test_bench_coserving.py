"""The co-serving comparison on hand-made numbers: what is read, what is worked out, and what is reported."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coserving import MODES, Plan, command
from measures import (
    Capacity,
    Measures,
    RunData,
    compare,
    measure,
    read_run,
    serve_capacity,
    slice_share,
    train_capacity,
)
from plots import cumulative, plot_latency, plot_timeline, running, training_rates
from report import GOALS, Results, goal_table, markdown, row_table, spread

from clif.config import load_config
from clif.metrics.collect import collect
from clif.metrics.schema import CONTROL_TABLES, RANK_TABLES
from clif.metrics.writer import TableWriter

REPO = Path(__file__).resolve().parents[2]


def array(*values: float) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=float)


RUN = RunData(
    arrival_s=array(0.0, 1.0, 9.0),
    dispatched_s=array(0.0, 1.0, 9.0),
    finished_s=array(2.0, 5.0, 12.0),
    ttft_s=array(0.1, 0.3, math.nan),
    met=np.array([True, True, False]),
    token_s=array(0.1, 1.1, 2.0, 9.5, 10.5, 11.0),
    gaps_s=array(0.1, 0.2, 0.3),
    step_s=array(-1.0, 3.0, 9.9, 10.1),
    step_tokens=array(100, 200, 300, 400),
    round_s=array(8.0, 4.0, 16.0),
    round_tokens=array(600, 1000, 200),
)


def row(mode: str, **values: Any) -> Measures:
    base = Measures(mode, 0.7, 1, 10, 70.0, 0.0, (100.0, 400.0), (20.0, 50.0), 1.0, 2.0)
    return replace(base, **values)


CAPACITY = Capacity(serve_tps=100.0, train_tps=1000.0)
ROWS = [
    row("clif", train_tps=300.0, output_tps=68.0, itl_ms=(22.0, 60.0), attainment=0.98, goodput_rps=1.9),
    row("serve_only"),
    row("time_slice", train_tps=310.0, goodput_rps=0.5),
    row("split", train_tps=500.0, goodput_rps=1.0),
]


# --- reading -------------------------------------------------------------------------------------


@pytest.fixture
def run_h5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The load opens at 5 s of the control file; the rank's file began 2 s of wall time before that file."""
    walls = iter([1002.0, 1000.0])
    monkeypatch.setattr("clif.metrics.writer.time.time", lambda: next(walls))
    user = {"purpose": "user", "prompt_tokens": 3, "output_tokens": 3, "finish": "length", "slo_met": True}
    with TableWriter(tmp_path / "control.h5", CONTROL_TABLES, {}, lambda: 0.0) as writer:
        for number, at in ((0, 0.5), (1, 1.0)):
            writer.row("load", request=number, at_s=at, prompt_tokens=3, max_tokens=3)
            stamps = {"arrival_s": 5 + at, "dispatched_s": 5 + at, "first_token_s": 6 + at, "finished_s": 7 + at}
            writer.row("requests", id=number, ttft_s=1.0, **stamps, **user)
        for request, gap in ((1, 0.25), (1, 0.5), (0, 0.125)):
            writer.row("gaps", request=request, itl_s=gap)
        writer.row("requests", id=9, arrival_s=1.0, finished_s=2.0, **(user | {"purpose": "probe"}))
        for number, state in ((1, "committed"), (2, "discarded")):
            members = {"members": "0", "version": 1, "tokens": 50, "started_s": 6.0, "ended_s": 9.0, "reason": "test"}
            writer.row("rounds", round_id=number, state=state, **members)
    with TableWriter(tmp_path / "rank-00000.h5", RANK_TABLES, {}, lambda: 0.0) as writer:
        for step, round_id in ((1, 1), (2, 2)):
            values = {"samples": 4, "tokens": 50, "loss": 1.0, "lr": 1e-3, "seconds": 0.1}
            writer.row("train_steps", t=10.0, step=step, round_id=round_id, **values)
    return collect(tmp_path)


def test_stamps_of_requests_tokens_and_steps_count_from_the_start_of_the_load(run_h5: Path) -> None:
    run = read_run(run_h5)
    assert run.arrival_s.tolist() == [0.5, 1.0] and run.finished_s.tolist() == [2.5, 3.0]
    assert run.token_s.tolist() == [1.5, 1.625, 2.0, 2.25, 2.75]
    assert run.step_s.tolist() == [pytest.approx(3.0)], "10 s of a file that began 2 s before, less the 5 s to the load"


def test_steps_of_discarded_rounds_and_requests_of_probes_do_not_count(run_h5: Path) -> None:
    run = read_run(run_h5)
    assert run.step_tokens.tolist() == [50.0] and run.round_tokens.tolist() == [50.0]
    assert len(run.met) == 2


# --- working out ---------------------------------------------------------------------------------


def test_throughput_is_what_happened_within_the_load_and_latency_that_of_all_requests() -> None:
    found = measure(RUN, "clif", 0.7, 2, load_s=10.0)
    assert (found.output_tps, found.train_tps) == (0.4, 50.0)
    assert found.attainment == pytest.approx(2 / 3) and found.goodput_rps == 0.2
    assert found.itl_ms == (pytest.approx(200.0), pytest.approx(298.0))
    assert found.ttft_ms[0] == pytest.approx(200.0) and found.requests == 3


def test_serving_capacity_is_taken_while_others_wait() -> None:
    assert serve_capacity(RUN) == pytest.approx(3 / 9)
    with pytest.raises(ValueError, match="raise the number of requests"):
        serve_capacity(replace(RUN, dispatched_s=array(0.0, 0.0, 0.0)))


def test_training_capacity_leaves_out_the_first_round() -> None:
    assert train_capacity(RUN) == pytest.approx((600 + 200) / (16 - 4))
    with pytest.raises(ValueError, match="1 rounds were committed, 2 are needed"):
        train_capacity(replace(RUN, round_s=array(1.0), round_tokens=array(5)))


def test_ratios_compare_clif_with_serving_alone_and_with_the_better_of_the_others() -> None:
    found = compare(ROWS, CAPACITY)
    assert found["efficiency"] == pytest.approx(0.68 + 0.3)
    assert found["training"] == pytest.approx(0.3)
    assert found["attainment_lost"] == pytest.approx(0.02)
    assert found["itl_p99"] == pytest.approx(1.2)
    assert found["goodput"] == pytest.approx(1.9)
    assert set(found) == {goal.key for goal in GOALS}


def test_what_did_not_run_is_not_compared() -> None:
    assert compare(ROWS[1:], CAPACITY) == {}
    alone = compare(ROWS[:1], CAPACITY)
    assert math.isnan(alone["goodput"]) and math.isnan(alone["itl_p99"]) and alone["training"] == 0.3


def test_the_share_of_time_slice_is_corrected_by_what_it_gave_before() -> None:
    assert slice_share(0.3, 1.0) == pytest.approx(0.3)
    assert slice_share(0.3, 2.0) == pytest.approx(0.15)
    assert slice_share(0.9, 0.5) == 1.0
    assert slice_share(0.3, 0.0) == 0.3 and slice_share(0.0, 1.0) == 0.01


# --- reporting -----------------------------------------------------------------------------------


def results() -> Results:
    second = [replace(r, repeat=2, train_tps=r.train_tps * 0.5) for r in ROWS]
    light = [replace(ROWS[0], load=0.3, train_tps=800.0)]
    return Results(0.7, [CAPACITY, CAPACITY], [*ROWS, *light, *second], shares=[0.3, 0.2])


def test_figures_are_medians_with_the_least_and_the_most() -> None:
    assert spread([9.0, 1.0, 2.0], ".1f") == "2.0 (1.0 to 9.0)"
    assert spread([1.0, math.nan], ".0f") == "1" and spread([], ".0f") == "-"


def test_goals_are_judged_by_the_median_of_the_repeats() -> None:
    lines = goal_table(results().ratios())
    assert "| training / training alone | at least 0.45 | 0.225 (0.150 to 0.300) | no |" in lines
    assert "| p99 gap between tokens / that of serving alone | at most 1.25 | 1.200 (1.200 to 1.200) | yes |" in lines
    assert all(line.endswith("| - | not measured |") for line in goal_table([{}])[2:])


def test_every_mode_and_load_has_one_row() -> None:
    rows = [line.split(" | ")[:2] for line in row_table(results())[2:]]
    modes = [("clif", "70%"), ("serve_only", "70%"), ("time_slice", "70%"), ("split", "70%"), ("clif", "30%")]
    assert rows == [[f"| {mode}", load] for mode, load in modes]


def test_the_report_holds_where_the_figures_come_from() -> None:
    text = markdown("coserving", ["command: x"], "run: {name: bench}", results(), ["a.png"])
    for part in ("# coserving", "* command: x", "run: {name: bench}", "![a.png](a.png)", "share 0.30, 0.20"):
        assert part in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Goals", "## Alone", "## Together", "## Configuration",
    ]  # fmt: skip
    alone = text.partition("## Alone")[2].partition("## Together")[0]
    assert "| serving only, saturated | 100 (100 to 100) |" in alone and "| training only | 1000 (" in alone


def test_plots_show_every_mode_the_promises_and_what_ran_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr("plots.plt.close", figures.append)
    plot_latency({"clif": [RUN, RUN], "split": [RUN]}, (1500.0, 200.0), tmp_path / "l.png")
    plot_timeline(RUN, 10.0, 500.0, tmp_path / "t.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("l.png", "t.png"))
    (latency, timeline), drawn = figures, []
    for axis in latency.axes:
        clif, split, promise = (line.get_xdata() for line in axis.lines)
        drawn.append((list(clif), list(split), promise[0]))
        assert [text.get_text() for text in axis.get_legend().get_texts()][:2] == ["clif", "split"]
    assert drawn[0] == ([100.0, 100.0, 300.0, 300.0], [100.0, 300.0], 1500.0)
    assert drawn[1] == (pytest.approx([100, 100, 200, 200, 300, 300]), pytest.approx([100, 200, 300]), 200.0)
    above, below = timeline.axes
    (area,) = above.collections
    assert area.get_paths()[0].vertices[:, 1].max() == 2.0, "two requests at once"
    assert [bar.get_height() for bar in below.patches] == training_rates(RUN, 10.0)[1].tolist()
    assert below.lines[0].get_ydata()[0] == 500.0


def test_what_is_plotted_is_what_was_measured() -> None:
    assert cumulative(array(0.2, 0.1, math.nan))[0].tolist() == [100.0, 200.0]
    assert cumulative(array(0.2, 0.1))[1].tolist() == [0.5, 1.0]
    assert running(RUN, array(0.5, 1.5, 3.0, 6.0, 9.0)).tolist() == [1.0, 2.0, 1.0, 0.0, 1.0]
    starts, rates = training_rates(RUN, 4.0)
    assert starts.tolist() == [0.0, 2.0] and rates.tolist() == [0.0, 100.0]


# --- starting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*MODES, "train_only"])
@pytest.mark.parametrize("name", ["bench.yaml", "bench-smoke.yaml"])
def test_every_mode_is_accepted_with_the_configuration_that_comes_along(tmp_path: Path, mode: str, name: str) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("")
    plan = Plan(REPO / "configs" / name, tmp_path, 2, 5.0, 64, MODES, ())
    line = command(plan, mode, "x", 3, [f"data.path={data}"])
    start = line.index("--config") + 2
    config = load_config(line[start - 1], tuple(line[start:]))
    assert config.run.mode == mode and config.run.seed == 3 and config.run_dir == tmp_path / "x"


def test_every_mode_has_the_same_cores_and_replicas() -> None:
    plan = Plan(Path("c.yaml"), Path("runs"), 8, 5.0, 10, MODES, ())
    lines = [command(plan, mode, "x", 1, []) for mode in MODES]
    assert all("dist.threads_per_rank=4" in line and line[line.index("--nproc-per-node") + 1] == "2" for line in lines)
    alone = command(replace(plan, ranks=1), "clif", "x", 1, [])
    assert {"dist.threads_per_rank=8", "layout.replicas=1"} <= {*alone}
    assert alone[alone.index("--nproc-per-node") + 1] == "1"
