"""Damaged input ends in a sentence or in success: no traceback, no hang. What was found has tests of its own."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch
from helpers import make_rig, random_state
from mutations import BINARY, TEXT, damaged

from clif.adapters import peft_io
from clif.adapters.store import CONFIG_FILE, WEIGHTS_FILE
from clif.config import DataConfig, config_from_tree
from clif.control.durability.journal import Accepted, Began, Ended, Entered, Journal, RoundStored, mend, parse
from clif.control.durability.recovery import Recorded, add_up, recover
from clif.data.heldout import hold_out
from clif.data.instruct import check_some_fit, encode_samples, read_rows, split_rows
from clif.data.load import make_load
from clif.errors import InputError
from clif.storage.folder_lock import FolderLock
from clif.types import FinishReason, Request, Sampling

QUICK = range(300)
MANY = range(1000, 5000)
slow = pytest.mark.slow
BOTH = [pytest.param(QUICK, id="quick"), pytest.param(MANY, id="many", marks=[slow, pytest.mark.timeout(3600)])]


def lines_of(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ROWS = lines_of(
    {"instruction": "Do", "input": "this", "output": "done", "split": "train", "client": 3},
    {"messages": [{"role": "user", "content": "é \U0001f600"}, {"role": "assistant", "content": "b"}], "split": "test"},
    {"prompt": "p", "completion": "c", "split": "train", "id": 10**12, "score": 1e-3},
    {"prompt": "q", "completion": "c", "split": "test"},
)


@pytest.mark.parametrize("seeds", BOTH)
def test_damaged_rows(tmp_path, byte_tokenizer, seeds):
    path = tmp_path / "rows.jsonl"
    for seed in seeds:
        path.write_bytes(damaged(ROWS, seed))
        try:
            rows = read_rows(path)
            check_some_fit(rows, "rows", byte_tokenizer, 200)
            encode_samples(rows, byte_tokenizer, 200)
            rows = split_rows(rows, "train")
            hold_out([msgspec.structs.replace(row, split=None) for row in rows], DataConfig(), 0.5, 1)
        except InputError as refused:
            assert "\n" not in str(refused) and len(str(refused)) < 2000, seed


TRACES = {
    "azure": b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:17:03.9799600,480,10\r\n"
    b"2023-11-16 18:17:05.9799600+01:00,318,8\r\n",
    "burstgpt": b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,47,18,490,Chat\n"
    b'45.5,GPT-4,108,0,1087,"API log"\n',
    "mooncake": lines_of(
        {"timestamp": 0, "input_length": 675, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 305, "input_length": 732, "output_length": 4, "hash_ids": [0, 2]},
    ),
}


@pytest.mark.parametrize("seeds", BOTH)
@pytest.mark.parametrize("format", TRACES)
def test_damaged_traces(tmp_path, byte_tokenizer, format, seeds):
    path, data = tmp_path / "trace", tmp_path / "rows.jsonl"
    path.write_bytes(TRACES[format])
    data.write_bytes(ROWS)
    trace = {"path": str(path), "format": format, "lengths": "trace", "prompt_scale": 0.5, "max_prompt_tokens": 2000}
    config = config_from_tree(
        {
            "model": {"path": "m"},
            "train": {"enabled": False},
            "data": {"path": str(data)},
            "load": {"kind": "trace", "trace": trace},
        }
    )
    rows = read_rows(data)
    for seed in seeds:
        path.write_bytes(damaged(TRACES[format], seed))
        try:
            load = make_load(config, rows, byte_tokenizer)
        except InputError as refused:
            assert "\n" not in str(refused), seed
        else:
            assert all(len(s.request.prompt) <= 2000 for s in load), seed


@pytest.fixture(scope="module")
def adapter(tiny_config, tmp_path_factory):
    """(bank, folder of an adapter that fits it)"""
    rig = make_rig(f"random:{tiny_config}", adapter={"target_modules": r".*layers\.0\..*q_proj", "r": 1})
    folder = tmp_path_factory.mktemp("adapter")
    (folder / CONFIG_FILE).write_text(peft_io.config_json(rig.bank, "base"))
    (folder / WEIGHTS_FILE).write_bytes(peft_io.write_weights(random_state(rig.bank, 1)))
    return rig.bank, folder


@pytest.mark.parametrize("seeds", BOTH)
@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_damaged_adapters(adapter, name, seeds):
    bank, folder = adapter
    whole = (folder / name).read_bytes()
    try:
        for seed in seeds:
            (folder / name).write_bytes(damaged(whole, seed, (*BINARY, *TEXT)))
            try:
                state = peft_io.read_folder(bank, folder)
            except InputError as refused:
                assert len(str(refused)) < 2000, seed
            else:
                assert all(v.dtype is torch.float32 and bool(v.isfinite().all()) for v in state.values()), seed
    finally:
        (folder / name).write_bytes(whole)


LINES = [
    Began(load="f", first_id=0, continued=False),
    Entered(phase="open"),
    Accepted(request=Request(id=0, prompt=(1, 2), sampling=Sampling(stop=("\n",))), arrival_unix=1e9, at_s=0.5),
    Ended(id=0, finish=FinishReason.STOP, detail="é", replica=1, version=2, token_s=(0.1,), finished_s=0.3),
    RoundStored(round_id=1, version=1, heldout_loss=0.5, row={"state": "committed", "ended_s": None}),
]


def journal_in(folder: Path) -> bytes:
    journal = Journal(folder)
    for line in LINES:
        journal.write(line)
    journal.close()
    return (folder / "journal.jsonl").read_bytes()


@pytest.mark.parametrize("seeds", BOTH)
def test_damaged_journals_say_nothing_that_was_not_written(tmp_path, seeds):
    whole = journal_in(tmp_path)
    for seed in seeds:
        try:
            lines, _ = parse(damaged(whole, seed, (*BINARY, *TEXT)))
        except InputError as refused:
            assert "`clif mend RUN`" in str(refused), seed
        else:
            assert all(line in LINES for line in lines), seed
            recover(add_up(lines), [], True, frozenset({1}), Recorded())


def test_damaged_journals_are_mended(tmp_path):
    whole = journal_in(tmp_path)
    path = tmp_path / "journal.jsonl"
    for seed in range(100):
        path.write_bytes(damaged(whole, seed, (*BINARY, *TEXT)))
        lock = FolderLock(tmp_path)
        _, aside = mend(lock)
        aside.unlink(missing_ok=True)
        journal = Journal(tmp_path, lock=lock)
        assert all(line in LINES for line in journal.past), seed
        journal.close()
