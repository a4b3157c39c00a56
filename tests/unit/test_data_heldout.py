"""Rows without splits: a share of the prompts is held out, the same in every process."""

from __future__ import annotations

import json
import random

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from clif.config import Config, DataConfig, config_from_tree
from clif.data.check import check_inputs
from clif.data.heldout import hold_out, read_data
from clif.data.instruct import DataError, Row
from clif.errors import ConfigError
from clif.layout import make_layout
from clif.replica.build import load_data
from clif.text import ChatTokenizer

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
        ({"train": (1, 1), "test": (9, 9)}, "none of the 2 held-out rows can be used"),
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
