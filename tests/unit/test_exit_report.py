"""What ends a process is said in a sentence where a person can mend it, and once."""

from __future__ import annotations

import errno

import pytest
import torch
import torch.distributed

from clif.config import ConfigError
from clif.exit_report import ReportedExit, last_words, sentence_of

CASES = [
    (ConfigError("set x"), "set x"),
    (OSError(errno.ENOSPC, "No space left on device", "runs/a"), "runs/a: No space left on device: make room"),
    (OSError(errno.EROFS, "Read-only file system"), "Read-only file system: give yourself the permission"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.json"), "a.json: No such file or directory"),
    (OSError("cannot open the file"), "cannot open the file"),
    (TimeoutError("rank 0 does not answer: see its log"), "rank 0 does not answer"),
    (MemoryError(), "the host has no memory left"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "the host has no memory left"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), r"CUDA out of memory. Tried: lower engine.kv_tokens"),
]


@pytest.mark.parametrize(("error", "expected"), CASES, ids=lambda value: type(value).__name__)
def test_what_a_person_can_mend_becomes_a_sentence(error, expected):
    assert sentence_of(error).startswith(expected)


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyError("x"), ValueError("x"), AssertionError()])
def test_a_bug_keeps_its_traceback(error):
    assert sentence_of(error) is None
    with pytest.raises(type(error)) as raised, last_words():
        raise error
    assert raised.value is error


def test_rank_0_speaks_at_once_and_another_rank_after_it_with_its_number(capsys, monkeypatch):
    waited = []
    monkeypatch.setattr("clif.exit_report.time.sleep", waited.append)
    for rank in (0, 3):
        with pytest.raises(ReportedExit) as reported, last_words(rank), last_words(rank):
            raise ConfigError("set x")
        assert reported.value.code == 2
    assert capsys.readouterr().err == "error: set x\nerror on rank 3: set x\n" and waited == [2.0]


def test_where_ranks_share_a_store_one_of_them_speaks_however_slowly_the_others_end(capsys, monkeypatch):
    monkeypatch.setattr("clif.exit_report.time.sleep", lambda _: None)
    store = torch.distributed.HashStore()
    for rank in (2, 1, 0):
        with pytest.raises(ReportedExit, match="code 2"), last_words(rank, store):
            raise ConfigError("set x")
    assert capsys.readouterr().err == "error on rank 2: set x\n"
