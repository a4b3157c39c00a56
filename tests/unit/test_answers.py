"""Answers are kept on wish, for the owner alone, and one line is one answer whatever happens to the disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from control_run import make_config
from helpers import request
from scripted_replica import ANSWER, make_tokenizer

from clif.control.answers import FILE, SAMPLE, Answers
from clif.control.dispatcher import RequestRecord
from clif.control.quality import Judgement, QualityCheck
from clif.data.heldout import read_data
from clif.types import FinishReason, Purpose, Request


def ended(id: int, tokens: tuple[int, ...] = (7, 8), purpose: Purpose = Purpose.USER, **values: Any) -> RequestRecord:
    asked = Request(id=id, prompt=(1, 2), sampling=request(id, [1]).sampling, purpose=purpose)
    return RequestRecord(asked, 0.0, tokens=list(tokens), finish=FinishReason.STOP, version=3, replica=1, **values)


def answers(folder: Path, wanted: Any = "all") -> Answers:
    return Answers(folder, wanted, lambda ids: " ".join(f"t{i}" for i in ids))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_answers_of_users_are_kept_only_on_wish(tmp_path: Path) -> None:
    for wanted, ids in (("none", []), ("sample", [0, SAMPLE]), ("all", list(range(SAMPLE + 1)))):
        folder = tmp_path / wanted
        folder.mkdir()
        kept = answers(folder, wanted)
        for id in range(SAMPLE + 1):
            kept.keep(ended(id), None)
        kept.close()
        assert (folder / FILE).exists() is bool(ids)
        assert not ids or [line["id"] for line in lines(folder)] == ids


def test_a_probe_is_kept_with_the_known_answer(tmp_path: Path) -> None:
    kept = answers(tmp_path, "none")
    kept.keep(ended(1, purpose=Purpose.PROBE), Judgement("t7 t9", False))
    kept.keep(ended(2, purpose=Purpose.PROBE, text="cut short"), Judgement("cut short", True))
    assert lines(tmp_path)[0] == {
        "id": 1, "purpose": "probe", "replica": 1, "version": 3, "finish": "stop", "prompt": "t1 t2", "answer": "t7 t8",
        "expected": "t7 t9", "exact_match": False,
    }  # fmt: skip
    assert (lines(tmp_path)[1]["answer"], lines(tmp_path)[1]["exact_match"]) == ("cut short", True)


def test_what_was_not_answered_has_no_line(tmp_path: Path) -> None:
    answers(tmp_path).keep(ended(1, tokens=()), None)
    assert not (tmp_path / FILE).exists()


def test_only_the_owner_can_read_answers_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        answers(tmp_path).keep(ended(1), None)
    finally:
        os.umask(before)
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_a_line_torn_by_a_kill_spoils_no_other(tmp_path: Path) -> None:
    answers(tmp_path).keep(ended(1), None)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole + whole[:20])
    answers(tmp_path).keep(ended(2), None)
    first, torn, last = (tmp_path / FILE).read_text().splitlines()
    assert (json.loads(first)["id"], json.loads(last)["id"]) == (1, 2) and torn == first[:20]


def test_a_full_disk_costs_answers_and_no_request_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept, write, room = answers(tmp_path), os.write, [10, 0, 0]

    def filling(file: int, data: bytes) -> int:
        if not room:
            return write(file, data)
        if left := room.pop(0):
            return write(file, data[:left])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", filling)
    for id in range(5):
        kept.keep(ended(id), None)
    torn, *whole = (tmp_path / FILE).read_text().splitlines()
    assert len(torn) == 10 and [json.loads(line)["id"] for line in whole] == [3, 4]
    assert caplog.text.count("No space left on device") == 1


def test_a_probe_that_failed_is_no_wrong_answer(tmp_path: Path) -> None:
    config, tokenizer = make_config(tmp_path), make_tokenizer()
    check = QualityCheck(config, read_data(config), tokenizer)
    answered, failed = (RequestRecord(probe, 0.0) for probe in check.begin([]))
    answered.finish, answered.text = FinishReason.STOP, ANSWER
    failed.finish = FinishReason.FAILED
    assert check.on_probe(answered) == Judgement(ANSWER, True) and check.on_probe(failed) == Judgement(ANSWER, None)
    assert (check.result.exact_match, check.result.probes, check.pending) == (1.0, 1, False)
