"""What a run asks of its data is held against the data before any rank loads a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clif.config import Config, config_from_tree
from clif.data.check import check_inputs
from clif.data.instruct import DataError
from clif.distributed.layout import make_layout


def config(tmp_path: Path, **sections: Any) -> Config:
    """Four rows to train on, of clients a and b, and three that are held out."""
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "p", "completion": "c"}
    rows = [{**row, "split": "train", "client": client} for client in "aabb"] + [{**row, "split": "test"}] * 3
    path.write_text("\n".join(map(json.dumps, rows)))
    sections["data"] = {"path": str(path), **sections.get("data", {})}
    return config_from_tree({"model": {"path": "m"}, "load": {"kind": "constant"}, **sections})


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (
            {"quality": {"exact_match_rows": 100_000}},
            r': quality\.exact_match_rows asks for 100000 rows, but 3 have the split "test": lower it',
        ),
        ({"data": {"heldout_rows": 4}}, r': data\.heldout_rows asks for 4 rows, but 3 have the split "test": lower it'),
        (
            {"data": {"heldout_rows": 4}, "train": {"enabled": False}},
            r": data\.heldout_rows asks for 4 rows, but 3 have",
        ),
    ],
)
def test_more_rows_than_the_data_has_are_refused(tmp_path, sections, sentence):
    with pytest.raises(DataError, match=sentence):
        check_inputs(config(tmp_path, **sections), make_layout(1))


def test_as_many_rows_as_there_are_are_accepted(tmp_path):
    check_inputs(config(tmp_path, data={"heldout_rows": 3}, quality={"exact_match_rows": 3}), make_layout(2))


def test_shards_that_leave_a_trainer_without_rows_are_refused(tmp_path):
    by_client = config(tmp_path, data={"shard": "client"})
    check_inputs(by_client, make_layout(2))
    with pytest.raises(DataError, match=r": 2 clients cannot be shared by 3 replicas"):
        check_inputs(by_client, make_layout(3))
    with pytest.raises(DataError, match=r": 4 training rows cannot be shared by 5 replicas"):
        check_inputs(config(tmp_path), make_layout(5))
    # Of those that only serve none needs a client.
    check_inputs(config(tmp_path, data={"shard": "client"}, run={"mode": "split", "trainers": 2}), make_layout(5))


def test_rows_without_a_client_are_refused_where_clients_share(tmp_path):
    settings = config(tmp_path, data={"shard": "client", "train_split": "test", "heldout_split": "train"})
    with pytest.raises(DataError, match=r': row 4 .*has no "client": add the field, or set data\.shard to round_robin'):
        check_inputs(settings, make_layout(1))
