"""The comparison of two runs sees one other token, one other loss and one other column, and follows renamed words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import same_numbers
from same_numbers import app
from same_numbers_rules import RULES
from typer.testing import CliRunner

from clif.metrics.schema import TABLES, create

STEP = {"rank": 0, "round_id": 1, "step": 1, "samples": 4, "tokens": 40, "loss": 2.5, "grad_norm": 1.0, "lr": 0.01}
REQUEST = {"id": 7, "version": 1, "purpose": b"user", "prompt_tokens": 5, "output_tokens": 3, "finish": b"length"}
ANSWER = {"id": 7, "version": 1, "purpose": "user", "finish": "length", "prompt": "Say", "answer": "one two three"}


def write(record: Path, setting: str, *, loss: float = 2.5, answer: str = "one two three") -> h5py.File:
    """A run of one step and one request; the open file, for more changes."""
    run = record / setting
    (run / "adapters" / "v0001").mkdir(parents=True)
    (run / "adapters" / "v0001" / "weights").write_bytes(b"1234")
    (run / "answers.jsonl").write_text(json.dumps(ANSWER | {"answer": answer}) + "\n")
    file = h5py.File(run / "run.h5", "w")
    for name, row in (("train_steps", STEP | {"loss": loss}), ("requests", REQUEST), ("ticks", {"regime": b"alone"})):
        table = TABLES[name]
        data = create(file, table)
        values = np.array([table.fill], dtype=table.dtype)
        for column in row.keys() & set(table.dtype.names):
            values[column] = row[column]
        data.resize((1,))
        data[:] = values
    return file


def compare(before: Path, after: Path, *renamed: str) -> tuple[int, str]:
    arguments = [part for pair in renamed for part in ("--renamed", pair)]
    done = CliRunner().invoke(app, ["compare", str(before), str(after), *arguments])
    return done.exit_code, done.output


def pair(folder: Path, setting: str = "smoke", **changed: Any) -> tuple[Path, Path]:
    write(folder / "before", setting).close()
    write(folder / "after", setting, **changed).close()
    return folder / "before", folder / "after"


def test_equal_runs_are_the_same_and_it_is_said_how_much_was_compared(tmp_path):
    code, said = compare(*pair(tmp_path))
    assert code == 0 and said.endswith("same numbers\n")
    assert "1 of 1 rows by id version (3 tokens)" in said and "1 of 1 rows by rank round_id step" in said


@pytest.mark.parametrize(
    ("changed", "seen"),
    [({"loss": 2.5000001}, "loss 2.5, then 2.5000001"), ({"answer": "one two tree"}, "then 'one two tree'")],
    ids=["loss", "token"],
)
def test_one_other_loss_or_token_is_a_difference(tmp_path, changed, seen):
    code, said = compare(*pair(tmp_path, **changed))
    assert code == 1 and seen in said and said.endswith("1 differences\n")


def test_a_tolerance_is_for_losses_only(tmp_path):
    assert compare(*pair(tmp_path / "loss", "smoke-fused", loss=2.5000001))[0] == 0
    assert compare(*pair(tmp_path / "much", "smoke-fused", loss=2.51))[0] == 1
    assert compare(*pair(tmp_path / "token", "smoke-fused", answer="one two tree"))[0] == 1


def test_other_weights_are_a_difference(tmp_path):
    before, after = pair(tmp_path)
    (after / "smoke" / "adapters" / "v0001" / "weights").write_bytes(b"1235")
    code, said = compare(before, after)
    assert code == 1 and "DIFFERENT weights" in said


def retype(file: h5py.File) -> None:
    rows = file["requests"][:].astype(
        [(n, "f8" if n == "prompt_tokens" else t) for n, t in TABLES["requests"].dtype.descr]
    )
    del file["requests"]
    file["requests"] = rows


def drop(file: h5py.File) -> None:
    del file["ticks"]


def add(file: h5py.File) -> None:
    file["news"] = np.zeros(1, dtype=[("t", "f8")])


def lose(file: h5py.File) -> None:
    file["train_steps"].resize((0,))


@pytest.mark.parametrize("change", [retype, drop, add, lose])
def test_another_type_table_or_number_of_rows_is_a_difference(tmp_path, change: Callable[[h5py.File], None]):
    before, after = pair(tmp_path)
    with h5py.File(after / "smoke" / "run.h5", "r+") as file:
        change(file)
    code, said = compare(before, after)
    assert code == 1 and "DIFFERENT" in said


def test_a_run_that_only_one_record_has_is_a_difference(tmp_path):
    before, after = pair(tmp_path)
    write(after, "demo").close()
    assert compare(before, after)[0] == 1


def test_renamed_words_columns_and_tables_are_compared_in_their_new_names(tmp_path, monkeypatch):
    before, after = pair(tmp_path)
    with h5py.File(after / "smoke" / "run.h5", "r+") as file:
        ticks, names = file["ticks"][:], {"regime": "strategy"}
        ticks["regime"] = b"single"
        ticks.dtype.names = tuple(names.get(name, name) for name in ticks.dtype.names)
        units = {name: value for name, value in file["ticks"].attrs.items() if name.startswith("unit.")}
        del file["ticks"]
        file["steps"] = ticks
        for name, value in units.items():
            file["steps"].attrs[name.replace("regime", "strategy")] = value
    rules = [same_numbers.Rule("steps", words="strategy") if rule.table == "ticks" else rule for rule in RULES]
    monkeypatch.setattr(same_numbers, "RULES", rules)
    renamed = ("ticks=steps", "ticks.regime=strategy", "ticks.regime:alone=single")
    assert compare(before, after, *renamed)[0] == 0
    for left_out in renamed:
        assert compare(before, after, *(pair for pair in renamed if pair != left_out))[0] == 1, left_out


def test_every_table_has_a_rule_and_every_rule_names_columns_that_exist():
    assert {rule.table for rule in RULES} == TABLES.keys() | {"answers", "weights"}
    for rule in RULES:
        if rule.table in TABLES:
            columns = {*TABLES[rule.table].dtype.names, "rank"}
            assert {*f"{rule.keys} {rule.same} {rule.near} {rule.words}".split()} <= columns, rule.table


def test_an_older_checkout_is_asked_in_its_own_words(monkeypatch):
    monkeypatch.setattr(same_numbers, "KEYS", {"engine.mode": "engine.way"})
    monkeypatch.setattr(same_numbers, "VALUES", {("engine.way", "old"): "new"})
    assert same_numbers._older("engine.way=new") == "engine.way=old"
    assert same_numbers._older("engine.way=old") == "engine.mode=old"
    assert same_numbers._older("engine.mode=old") == "engine.mode=old"
    assert same_numbers._older("run.seed=1") == "run.seed=1"
