"""Figures of the GPU stages and the open load of the co-serving stage, without a model."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from gpu_bench import add_lines, per_layer
from gpu_figures import NAMES, ROWS, read, say, table
from gpu_load import Load, Outcome, Served, Slo, arrivals, best_way, outcome, percentile

from clif.config import ConfigError
from clif.types import Request, Sampling


def test_a_figure_is_printed_at_once_and_read_back_with_its_note(capsys):
    say("decode-1b", 0.61, "1.3 (1.2 to 1.4) ms a step")
    say("decode-1b", 0.62)
    assert read(["noise", *capsys.readouterr().out.splitlines()]) == {"decode-1b": (0.62, "")}


def test_a_figure_that_no_table_has_is_refused():
    with pytest.raises(ValueError, match="no figure decode-2b: choose from backward-16, "):
        say("decode-2b", 1.0)


def test_the_table_says_of_every_row_whether_its_goal_is_met():
    found = {name: (1.0, "") for name in NAMES} | {"host-1b": (0.4, ""), "gap-100": (1.3, "")}
    rows = {line.split(" | ")[0].lstrip("| "): line.rsplit(" | ", 1)[1].rstrip(" |") for line in table(found)[4:-1]}
    assert len(rows) == len(ROWS)
    assert rows["host time of a step outside the graph, 1B"] == "yes"
    assert rows["p99 gap between tokens, with training / without"] == "no"
    assert rows["the same, 512 tokens"] == "no"


def test_a_figure_that_was_not_measured_meets_and_misses_no_goal():
    lines = table({"kept-70": (0.8, ""), "lost-70": (0.0, ""), "train-512": (math.nan, "")})
    assert any(
        line.endswith("| 80% at 70 % load, 0 lost, not measured at 100 %, not measured lost | ? |") for line in lines
    )
    assert any(line.endswith("| not measured | ? |") and "512" in line for line in lines)


def test_a_dry_run_meets_no_goal():
    assert all(line.endswith("| dry run |") for line in table({"train-512": (9.0, "")}, dry=True)[4:-1])


SLO = Slo(0.4, 0.05)


@pytest.mark.parametrize(
    ("stamps", "met"),
    [
        ([1.3, 1.35, 1.4], True),
        ([1.5, 1.51], False),
        ([1.1, 1.1, 1.25], False),
        ([1.1, 1.2, 1.2], True),
        ([1.4], True),
        ([], False),
    ],
)
def test_a_request_is_in_time_if_its_first_token_and_the_others_on_average_are(stamps, met):
    assert SLO.met(1.0, stamps) == met


def served(stamps: dict[int, list[float]], trained: float = 0.0) -> Served:
    arrived = {id: 0.1 * i for i, id in enumerate(stamps)}
    return Served(1.0, trained, 0, arrived, stamps)


def test_a_request_is_lost_that_serving_alone_met_whatever_its_number_is():
    alone = served({1: [0.1, 0.11], 2: [0.9, 0.91], 3: [0.3, 0.31]})
    both = served({7: [0.1, 0.13], 8: [0.9, 0.93], 9: [0.9, 0.93]}, trained=300.0)
    found = outcome("fused", alone, both, 400.0, SLO)
    assert (found.met, found.lost, found.kept) == (1, 1, 0.75) and found.gap == pytest.approx(3.0)


def test_arrivals_are_the_same_for_the_same_seed_and_as_many_as_their_rate_says():
    times = arrivals(100.0, 10.0, seed=1)
    assert times == arrivals(100.0, 10.0, seed=1) != arrivals(100.0, 10.0, seed=2)
    assert times == sorted(times) and 900 < len(times) < 1100


def test_the_way_of_the_final_table_loses_fewest_requests_and_then_keeps_most_training():
    loads = {
        1.0: [
            Outcome("fused", 9, 1, 0.9, 1.0),
            Outcome("concurrent", 9, 0, 0.3, 1.0),
            Outcome("other", 9, 0, 0.9, 1.0),
        ],
        0.7: [Outcome("fused", 9, 0, 0.9, 1.0), Outcome("concurrent", 9, 0, 0.6, 1.0)],
    }
    assert best_way(loads) == "concurrent"
    assert best_way({}) is None


def test_a_percentile_of_nothing_is_no_number():
    assert percentile(range(1, 101), 0.99) == 99 and math.isnan(percentile([], 0.5))


def test_a_measurement_that_fails_ends_no_other_and_says_why_where_it_stands(capsys):
    def fails() -> str:
        raise RuntimeError("out of memory\nand more")

    def lacks() -> str:
        raise ConfigError("a cpu has none")

    lines = ["|---|---|"]
    add_lines(lines, [("first", fails), ("second", lacks), ("third", lambda: ""), ("fourth", fails), ("fifth", str)])
    assert lines[1] == "| first | FAILED RuntimeError: out of memory |"
    assert lines[2] == "| second | not here: a cpu has none |"
    assert lines[4:] == ["* fourth: FAILED RuntimeError: out of memory", ""]
    assert "Traceback" in capsys.readouterr().out


def test_kernels_of_a_layer_are_those_that_run_in_every_layer():
    found = {"norm": (2 * 16 + 1, 1.0), "product": (4 * 16, 9.0), "embedding": (1, 1.0), "argmax": (2, 1.0)}
    assert per_layer(found, 16) == 6


def test_a_load_waits_for_a_slot_and_tells_the_engine_who_waits():
    added: list[tuple[int, float]] = []
    heard: list[tuple[int, list[int]]] = []

    class Engine:
        scheduler = SimpleNamespace(max_batch=2, sequences=[])
        serving = True
        backlog = None

        def clock(self) -> float:
            return 100.0

        def plan(self, arrivals):
            heard.append((self.backlog.waiting, [waiting.id for waiting in self.backlog.oldest]))

        def learn(self, plan) -> None:
            pass

        def serve(self, plan):
            return [SimpleNamespace(request_id=id, tokens=(1,)) for id, _ in added] + [
                SimpleNamespace(request_id=99, tokens=(1,))
            ]

    engine = Engine()

    def add(request: Request, arrived_s: float) -> None:
        engine.scheduler.sequences.append(request)
        added.append((request.id, arrived_s))

    engine.scheduler.add = add
    requests = [Request(id=i, prompt=(1, 2), sampling=Sampling(max_tokens=5)) for i in range(4)]
    load = Load(engine, requests, [0.0, 0.0, 0.0, 1e9])
    load.step()
    assert heard == [(1, [2])] and [id for id, _ in added] == [0, 1]
    assert all(99.0 < arrived <= 100.0 for _, arrived in added)
    engine.scheduler.sequences.clear()
    load.step()
    assert [id for id, _ in added] == [0, 1, 2] and not load.idle
    assert {id: len(stamps) for id, stamps in load.served.stamps.items()} == {0: 2, 1: 2, 2: 1, 3: 0}
    assert load.served.output == 5
    engine.serving = False
    assert load.idle
