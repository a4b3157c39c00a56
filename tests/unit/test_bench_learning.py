"""The learning benchmark: which rows a replica has, what is measured next, and what its tables and verdicts say."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from learning import plan
from learning_data import Example, Sizes, client_of, read_task, shares
from learning_results import (
    Result,
    Unit,
    append,
    compare_table,
    forget_table,
    left,
    lost,
    ratios,
    read,
    sweep_table,
    verdicts,
)
from learning_ways import Bench, Recipe, steps_of_round

from clif.data.instruct import Row
from clif.types import TrainSample

TASKS = ("one", "two")


def example(i: int, client: str) -> Example:
    row = Row(id=i, messages=(), answer="a")
    return Example(row, TrainSample(id=i, ids=(5 + i % 7, 6, 7, 8 + i % 3, 9), target_start=2), client)


EXAMPLES = [example(i, client) for i, client in enumerate("aaaabbbcde")]


def result(part: str, data: str, way: str, loss: float, exact: float, seed: int = 0, second: float = 0.5) -> Result:
    return Result(Unit(seed, part, data, way), loss, exact, gate=loss / 2, second=second)


RESULTS = [
    result("compare", "one", "base", 4.0, 0.0),
    result("compare", "one", "central", 1.0, 0.8),
    result("compare", "one", "single", 1.1, 0.8),
    result("compare", "one", "iid", 1.01, 0.8),
    result("compare", "one", "iid", 1.5, 0.9, seed=1),
    result("forget", "one>two", "replay 0", 2.0, 0.3),
    result("forget", "one>two", "replay 0.1", 1.2, 0.79),
    result("sweep", "one", "lr 0.002 rank 8", 1.1, 0.7),
]


def test_rows_in_turn_are_as_many_for_each_replica_and_all_are_used() -> None:
    parts = shares(EXAMPLES, 2, "iid")
    assert [len(part) for part in parts] == [5, 5]
    assert sorted(e.row.id for part in parts for e in part) == list(range(10))


def test_by_client_no_client_is_cut_and_replicas_have_about_as_many_rows() -> None:
    parts = shares(EXAMPLES, 2, "client")
    clients = [{e.client for e in part} for part in parts]
    assert not clients[0] & clients[1] and clients[0] | clients[1] == set("abcde")
    assert [len(part) for part in parts] == [5, 5]


@pytest.mark.parametrize(
    ("fields", "client"),
    [
        ({"client": 3, "domain": "dolly"}, "3"),
        ({"domain": "BookRestaurant", "output": "x"}, "BookRestaurant"),
        ({"domain": "banking", "output": "card_arrival"}, "card_arrival"),
        ({"output": "x"}, "x"),
    ],
)
def test_a_rows_client_is_its_own_or_its_domain_or_its_answer(fields: dict[str, object], client: str) -> None:
    assert client_of(fields) == client


@pytest.mark.parametrize(("left_over", "steps"), [(1000, 20), (80, 10), (3, 1)])
def test_a_last_round_is_as_short_as_its_samples_are_few(left_over: int, steps: int) -> None:
    assert steps_of_round(left_over, 8, 20) == steps


def test_a_seed_is_whole_before_the_next_one_and_a_pair_comes_behind_its_first_task() -> None:
    units = plan(TASKS, 2, ("compare", "forget", "sweep"))
    assert [unit.seed for unit in units] == sorted(unit.seed for unit in units)
    assert len(set(units)) == len(units)
    assert units.index(Unit(0, "compare", "one", "iid")) < units.index(Unit(0, "forget", "one>two", "replay 0.1"))
    assert {unit.seed for unit in units if unit.part == "sweep"} == {0}


def test_what_is_measured_is_read_back_and_not_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "results.jsonl"
    assert read(file) == []
    for one in RESULTS:
        append(file, one)
    assert read(file) == RESULTS
    assert left([RESULTS[0].unit, Unit(9, "compare", "one", "iid")], RESULTS) == [Unit(9, "compare", "one", "iid")]


def test_losses_and_points_are_compared_seed_by_seed() -> None:
    iid, central = {0: RESULTS[3], 1: RESULTS[4]}, {0: RESULTS[1]}
    assert ratios(iid, central) == [pytest.approx(1.01)]
    assert lost(iid, {0: RESULTS[5]}) == [pytest.approx(50.0)]


def test_verdicts_give_the_figure_and_the_goal() -> None:
    assert [(line.split(": ")[1].split(",")[0], line.rsplit(" ", 1)[1]) for line in verdicts(RESULTS)] == [
        ("1.010", "met"),
        ("0.918", "met"),
        ("1.000", "met"),
        ("50.000", "missed"),
    ]
    assert verdicts([]) == []


def test_tables_have_a_line_for_each_measure_and_a_dash_for_what_is_missing() -> None:
    table = compare_table(RESULTS, ("base", "central", "iid", "client"))
    assert table[2] == "| one | loss | 4.000 | 1.000 | 1.255 (1.010 to 1.500) | - | 1.010 | 0.918 |"
    assert forget_table(RESULTS)[2:] == [
        "| one>two | replay 0 | 80.0% | 30.0% | 50.0 | 1.010 | 2.000 | 50.0% |",
        "| one>two | replay 0.1 | 80.0% | 79.0% | 1.0 | 1.010 | 1.200 | 50.0% |",
    ]
    assert sweep_table(RESULTS)[2] == "| one | lr 0.002 rank 8 | 0.550 | 1.100 | 70.0% |"


class Words:
    """A tokenizer of words."""

    def encode_chat(self, messages: object) -> list[int]:
        return [1, 2, 3]

    def encode_answer(self, text: str) -> list[int]:
        return [*range(10, 10 + len(text.split())), 0]


def test_rows_are_drawn_by_the_seed_and_long_ones_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"instruction": f"do {i}", "output": "w " * (1 + i % 9), "split": "test" if i % 3 == 0 else "train"}
        for i in range(60)
    ]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = Sizes(train=10, gate=3, report=4, tokens=9)
    tasks = [read_task(tmp_path, "words", Words(), sizes, seed) for seed in (0, 0, 1)]  # type: ignore[arg-type]
    assert tasks[0] == tasks[1] != tasks[2]
    task = tasks[0]
    assert task is not None
    assert [len(part) for part in (task.train, task.gate, task.report)] == [10, 3, 4]
    assert all(len(e.sample.ids) <= 9 for e in [*task.train, *task.gate, *task.report])
    assert not {e.row.id for e in task.gate} & {e.row.id for e in task.report}
    assert read_task(tmp_path, "absent", Words(), sizes, 0) is None  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bench(tiny_config: Path) -> Bench:
    return Bench(f"random:{tiny_config}", "float32", Recipe(local_steps=2, epochs=4, lr=0.01, warmup_steps=0))


def test_rounds_learn_and_replicas_with_the_same_samples_are_one(bench: Bench) -> None:
    samples = [e.sample for e in EXAMPLES[:8]]
    gate = EXAMPLES[:8]
    alone = bench.federated([samples], gate, seed=3)
    assert alone.promoted > 0 and alone.samples == 32
    assert bench.gate(gate, alone.adapter) < bench.loss(gate, None)
    assert torch.equal(bench.federated([samples], gate, seed=3).adapter, alone.adapter), "a run can be repeated"
    both = bench.federated([samples[:4], samples[4:]], gate, seed=3)
    assert both.samples == 32 and not torch.equal(both.adapter, alone.adapter)


def test_a_round_goes_half_of_the_way_where_that_alone_is_better(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.zeros_like(bench.bank.shadow)
    average = torch.ones_like(base)
    for at_half, found in ((1.0, (0.5, 1.0, 0.5)), (4.0, (1.0, 3.0, 1.0))):
        losses = iter([3.0, at_half])
        monkeypatch.setattr(bench, "gate", lambda *_, left=losses: next(left))
        candidate, loss, step = bench._judged([], base, 2.0, average)
        assert (float(candidate[0]), loss, step) == found


def test_without_a_better_version_a_run_ends_early_and_has_what_it_began_with(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.use(Recipe(local_steps=1, epochs=50, warmup_steps=0, patience=2))
    bench.bank.reset(1)
    base, losses = bench.bank.shadow.detach().clone(), itertools.count()
    monkeypatch.setattr(bench, "gate", lambda *_: next(losses))
    learnt = bench.federated([[e.sample for e in EXAMPLES]], EXAMPLES[:4], 0, base)
    assert (learnt.promoted, learnt.rounds) == (0, 2) and torch.equal(learnt.adapter, base)


def test_an_adapter_is_scored_by_its_own_answers(bench: Bench) -> None:
    base, learnt = bench.score(EXAMPLES[:3], None), bench.score(EXAMPLES[:3], torch.randn_like(bench.bank.shadow))
    assert base.loss != learnt.loss and 0 <= base.exact <= 1
