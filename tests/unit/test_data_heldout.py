"""Rows without splits: a share of the prompts is held out, the same in every process."""

from __future__ import annotations

import json
import random

import msgspec
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from clif.config import Config, DataConfig, config_from_tree
from clif.data.check import check_inputs
from clif.data.heldout import HeldoutParts, heldout_parts, hold_out, probe_rows, read_data
from clif.data.instruct import DataError, Row
from clif.distributed.layout import make_layout
from clif.errors import ConfigError
from clif.replica.build import load_data
from clif.tokenizer import ChatTokenizer

DATA = DataConfig(train_split="train", heldout_split="test")


def rows_of(prompts: list[str]) -> list[Row]:
    return [Row(id=i, messages=({"role": "user", "content": p},), answer=f"a{i}") for i, p in enumerate(prompts)]


def held_out(rows: list[Row]) -> set[str]:
    return {row.messages[0]["content"] for row in rows if row.split == "test"}


@given(st.lists(st.text("abc", min_size=1, max_size=3), min_size=2), st.floats(0.001, 0.999), st.integers(0, 9))
def test_the_share_of_prompts_is_held_out_and_none_is_on_both_sides(prompts, share, seed):
    different = len(set(prompts))
    if different < 2:
        with pytest.raises(DataError, match="one prompt only"):
            hold_out(rows_of(prompts), DATA, share, seed)
        return
    rows = hold_out(rows_of(prompts), DATA, share, seed)
    trained = {row.messages[0]["content"] for row in rows if row.split == "train"}
    assert held_out(rows) | trained == set(prompts) and not held_out(rows) & trained
    assert len(held_out(rows)) == min(max(round(share * different), 1), different - 1)
    assert [row.id for row in rows] == list(range(len(prompts)))


def test_which_are_held_out_depends_on_the_seed_and_not_on_the_order():
    prompts = [f"p{i}" for i in range(100)]
    mixed = random.Random(0).sample(prompts, 100)
    first = held_out(hold_out(rows_of(prompts), DATA, 0.2, 5))
    assert held_out(hold_out(rows_of(mixed), DATA, 0.2, 5)) == first
    assert held_out(hold_out(rows_of(prompts), DATA, 0.2, 6)) != first


def config(tmp_path, rows: list[dict[str, str]], **data: object) -> Config:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config_from_tree({"model": {"path": "m"}, "data": {"path": str(path), **data}, "load": {"kind": "poisson"}})


def test_own_data_without_splits_are_trained_on_with_a_held_out_share(tmp_path):
    settings = config(tmp_path, [{"prompt": f"p{i}", "completion": "c"} for i in range(20)], heldout_share=0.1)
    check_inputs(settings, make_layout(1))
    assert sum(row.split == "test" for row in read_data(settings)) == 2


def test_a_share_beside_rows_that_have_a_split_is_refused(tmp_path):
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": "c", "split": "test"}]
    with pytest.raises(DataError, match=r'row 1 \(from 0\) has the split "test", but data\.heldout_share'):
        check_inputs(config(tmp_path, rows, heldout_share=0.5), make_layout(1))


def test_a_share_needs_two_splits(tmp_path):
    with pytest.raises(ConfigError, match=r'heldout_split are both "test": change one'):
        config(tmp_path, [], heldout_share=0.5, train_split="test")


@pytest.mark.parametrize(
    ("lengths", "sentence"),
    [
        ({"train": (9, 9), "test": (1, 1)}, "none of the 1 training rows of replica 0 can be used"),
        ({"train": (1, 9), "test": (1, 1)}, "none of the 1 training rows of replica 1 can be used"),
        ({"train": (1, 1), "test": (9, 9)}, "none of the 2 held-out rows that decide promotions can be used"),
    ],
)
def test_every_replica_ends_with_the_same_sentence_when_one_would_have_no_sample(tmp_path, lengths, sentence):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"w": 0}, unk_token="w"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    rows = [
        {"prompt": "w", "completion": "w " * length, "split": split}
        for split, each in lengths.items()
        for length in each
    ]
    settings = config(tmp_path, rows, max_sample_tokens=8)
    for replica in range(2):
        with pytest.raises(DataError, match=sentence):
            load_data(settings, ChatTokenizer(words, None, [1]), replica, 2)


# --- what decides promotions, and what is reported ---------------------------------------------------


def judged(prompts: list[str], seed: int = 0, **sections: dict[str, object]) -> tuple[list[Row], Config]:
    rows = [msgspec.structs.replace(row, split="test") for row in rows_of(prompts)]
    tree = {"model": {"path": "m"}, "run": {"seed": seed}, "data": {"path": __file__}, **sections}
    return rows, config_from_tree(tree)


def prompts_of(part: tuple[Row, ...] | list[Row]) -> set[str]:
    return {row.messages[0]["content"] for row in part}


@given(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1), st.integers(0, 9))
def test_what_gates_promotions_and_what_is_reported_share_no_prompt(prompts, seed):
    rows, settings = judged(prompts, seed)
    parts = heldout_parts(rows, settings)
    if len(set(prompts)) < 2:
        assert parts.shared and len(parts.report) == len(rows), "one prompt has to do for both"
        return
    gate, report = prompts_of(parts.gate), prompts_of(parts.report)
    assert not gate & report and gate | report == set(prompts)
    assert 0 <= len(gate) - len(report) <= 1
    assert len(parts.gate) + len(parts.report) == len(rows) and not parts.shared


def test_parts_depend_on_the_seed_and_not_on_the_order_of_the_file():
    prompts = [f"p{i}" for i in range(100)]
    rows, settings = judged(prompts)
    parts = heldout_parts(rows, settings)
    mixed = random.Random(0).sample(rows, 100)
    assert heldout_parts(mixed, settings) == parts
    assert heldout_parts(rows, judged(prompts, seed=1)[1]) != parts
    assert [row.id for row in parts.gate] != sorted(row.id for row in parts.gate), "the first rows are drawn as well"


def test_heldout_rows_are_drawn_from_all_over_the_file_and_dealt_out_by_halves():
    rows, settings = judged([f"p{i}" for i in range(100)], data={"path": __file__, "heldout_rows": 8})
    parts = heldout_parts(rows, settings)
    assert (len(parts.gate), len(parts.report)) == (4, 4)
    assert max(row.id for row in (*parts.gate, *parts.report)) > 50


def test_without_training_all_held_out_rows_are_reported_on():
    rows, settings = judged(["a", "b", "c"], run={"mode": "serve_only"}, train={"enabled": False})
    parts = heldout_parts(rows, settings)
    assert not parts.gate and {row.id for row in parts.report} == {0, 1, 2}
    assert heldout_parts([], settings) == HeldoutParts((), ())


def test_probes_are_drawn_from_what_is_reported_and_never_gate_a_promotion():
    rows, settings = judged([f"p{i}" for i in range(100)], quality={"exact_match_rows": 20})
    probes = probe_rows(rows, settings)
    assert len(probes) == 20 and prompts_of(probes) <= prompts_of(heldout_parts(rows, settings).report)
    assert [row.id for row in probes] != list(range(20)), "not the first rows of the file"
    few = judged([], quality={"exact_match_rows": 96}, data={"path": __file__, "heldout_rows": 8})[1]
    others = probe_rows(rows, few)
    assert prompts_of(others).isdisjoint(prompts_of(heldout_parts(rows, few).gate)), "also beyond data.heldout_rows"
    assert prompts_of(heldout_parts(rows, few).report) <= prompts_of(others)


def test_more_probes_than_rows_that_are_reported_on_are_refused(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "c", "split": "test" if i < 10 else "train"} for i in range(20)]
    for count in (5, 6):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree = {"model": {"path": "m"}, "data": {"path": str(path)}, "quality": {"exact_match_rows": count}}
        if count == 5:
            check_inputs(config_from_tree(tree), make_layout(1))
            continue
        with pytest.raises(DataError, match="exact_match_rows 6 exceeds the 5 held-out rows that decide no prom"):
            check_inputs(config_from_tree(tree), make_layout(1))


def test_replicas_share_each_part_and_say_when_one_prompt_has_to_do_for_both(tmp_path, caplog):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"p{i}": i for i in range(20)}, unk_token="p0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    rows = [{"prompt": f"p{i}", "completion": "p1", "split": "test" if i < 10 else "train"} for i in range(20)]
    data = [load_data(config(tmp_path, rows), ChatTokenizer(words, None, [1]), r, 2) for r in range(2)]
    gate, report = ([s.id for d in data for s in part(d)] for part in (lambda d: d.gate, lambda d: d.report))
    assert sorted(gate + report) == list(range(10)) and len(gate) == len(report)
    assert "one held-out prompt is used" not in caplog.text
    load_data(config(tmp_path, rows[9:]), ChatTokenizer(words, None, [1]), 0, 1)
    assert "one held-out prompt is used: it decides promotions and" in caplog.text


def test_every_replica_has_a_row_to_judge_by_and_none_is_reported_twice(tmp_path):
    """A round of members without any would be discarded: no held-out token was judged."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"p{i}": i for i in range(20)}, unk_token="p0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    rows = [{"prompt": f"p{i}", "completion": "p1", "split": "test" if i < 4 else "train"} for i in range(20)]
    data = [load_data(config(tmp_path, rows), ChatTokenizer(words, None, [1]), r, 5) for r in range(5)]
    gate, report = [[s.id for s in d.gate] for d in data], [s.id for d in data for s in d.report]
    assert [len(ids) for ids in gate] == [1] * 5 and len({i for ids in gate for i in ids}) == 2
    assert len(report) == len(set(report)) == 2
