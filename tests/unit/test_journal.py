"""The journal (promises 1 and 6): what was written is there after any death, whole, and one process writes it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clif.cli import main
from clif.control.durability.journal import (
    Accepted,
    Began,
    Elapsed,
    Ended,
    Entered,
    Journal,
    JournalError,
    RoundBegan,
    RoundStored,
    VersionGiven,
    mend,
    parse,
)
from clif.storage.folder_lock import FolderLock
from clif.types import FinishReason, Request, Sampling


def accepted(id: int, at_s: float = 0.0) -> Accepted:
    request = Request(id=id, prompt=(1, 2, id), sampling=Sampling(max_tokens=4, stop=("\n",)))
    return Accepted(request=request, arrival_unix=1e9 + at_s, at_s=at_s)


def ended(id: int) -> Ended:
    return Ended(
        id=id, finish=FinishReason.LENGTH, detail="é", replica=1, version=2, token_s=(0.1, 0.2), finished_s=0.3
    )


LINES = [
    Began(load="f", first_id=0, continued=False),
    Entered(phase="open"),
    accepted(0),
    RoundBegan(round_id=1),
    ended(0),
    VersionGiven(version=1),
    RoundStored(round_id=1, version=1, heldout_loss=0.5, row={"state": "committed", "ended_s": None, "samples": 3}),
    Elapsed(load_s=1.5, run_s=2.5),
]


def reopened(folder) -> list:
    journal = Journal(folder)
    journal.close()
    return journal.past


def written(folder) -> bytes:
    journal = Journal(folder)
    for line in LINES:
        journal.write(line)
    journal.close()
    return (folder / "journal.jsonl").read_bytes()


def test_what_was_written_comes_back(tmp_path):
    written(tmp_path)
    assert reopened(tmp_path) == LINES


def test_a_journal_cut_anywhere_gives_all_whole_lines_and_takes_new_ones(tmp_path):
    whole = written(tmp_path)
    path = tmp_path / "journal.jsonl"
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        journal = Journal(tmp_path)
        assert journal.past == LINES[:kept]
        journal.write(ended(9))
        journal.close()
        assert reopened(tmp_path) == [*LINES[:kept], ended(9)]


@given(cut=st.integers(0, 200), junk=st.binary(max_size=60).filter(lambda b: b"\n" not in b))
def test_whatever_stands_at_the_end_does_no_harm(cut, junk):
    """A host that lost power may leave zeros or anything else there."""
    whole = b'{"type":"RoundBegan","round_id":7}\n' * 3
    lines, size = parse(whole[:cut] + junk)
    assert lines == [RoundBegan(round_id=7)] * len(lines)
    assert len(lines) >= whole[:cut].count(b"\n") and size == 35 * len(lines)


def test_a_last_line_that_is_damaged_but_ended_is_torn_too():
    assert parse(b'{"type":"RoundBegan","round_id":7}\n\x00\x00\x00\n') == ([RoundBegan(round_id=7)], 35)


def test_damage_in_the_middle_is_an_error_that_names_the_line():
    with pytest.raises(JournalError, match=r"line 2 .* damaged"):
        parse(b'{"type":"RoundBegan","round_id":7}\nrubbish\n{"type":"RoundBegan","round_id":7}\n')


def test_promise_1_a_changed_digit_in_the_journal_is_no_other_request(tmp_path):
    content = written(tmp_path)
    assert content.count(b'"prompt":[1,2,0]') == 1
    with pytest.raises(JournalError, match=r"line 3 of the journal is damaged \(its checksum is that of another line"):
        parse(content.replace(b'"prompt":[1,2,0]', b'"prompt":[1,9,0]'))


def test_lines_of_an_older_clif_have_no_checksum_and_those_after_one_that_has_must(tmp_path):
    content = written(tmp_path)
    old = b'{"type":"RoundBegan","round_id":7}\n'
    assert parse(old + content)[0] == [RoundBegan(round_id=7), *LINES]
    with pytest.raises(JournalError, match=r"line 9 .* \(its checksum is missing"):
        parse(content + old + content)


def test_a_line_nested_too_deeply_is_damage():
    deep = b'{"type":"RoundStored","round_id":1,"version":1,"heldout_loss":0.5,"row":{"a":' + b"[" * 100_000 + b"\n"
    with pytest.raises(JournalError, match=r"line 1 .* damaged \(maximum recursion depth"):
        parse(deep + GOOD % 1)


def journal_of(folder, content: bytes) -> None:
    (folder / "journal.jsonl").write_bytes(content)


GOOD = b'{"type":"RoundBegan","round_id":%d}\n'


@pytest.mark.parametrize(
    ("content", "damaged"),
    [
        (GOOD % 1 + b"\n" + GOOD % 2, [2]),
        (GOOD % 1 + b'{"type":"Ro\n' + b"\x00\x00\n" + GOOD % 2, [2, 3]),
        (b"rubbish\n" + GOOD % 1 + GOOD % 2 + b'{"type":"Rou', [1, 4]),
        (GOOD % 1 + (GOOD % 2).rstrip(b"\n"), []),
    ],
    ids=["empty line", "two torn lines", "first and last", "whole"],
)
def test_what_a_damaged_journal_is_refused_for_can_be_cut_out_and_the_rest_goes_on(tmp_path, content, damaged):
    journal_of(tmp_path, content)
    if len(damaged) and damaged != [4]:
        with pytest.raises(JournalError, match=rf"line {damaged[0]} .* damaged .*`clif mend RUN` cuts out"):
            Journal(tmp_path)
    lock = FolderLock(tmp_path)
    found, aside = mend(lock)
    lock.close()
    assert found == damaged and aside.exists() == bool(damaged)
    if damaged:
        assert aside.read_bytes() == content, "as it was"
        assert reopened(tmp_path) == [RoundBegan(round_id=1), RoundBegan(round_id=2)]


def test_the_command_mends_a_journal_and_says_what_that_may_cost(tmp_path, monkeypatch, capsys):
    journal_of(tmp_path, GOOD % 1 + b"\n" + GOOD % 2)
    for said in ("cut out: 1 damaged lines, 2. As it was: ", "no line of the journal is damaged"):
        monkeypatch.setattr("sys.argv", ["clif", "mend", str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            main()
        out = capsys.readouterr().out
        assert not ended.value.code and out.startswith(said)
    assert reopened(tmp_path) == [RoundBegan(round_id=1), RoundBegan(round_id=2)]


def test_a_journal_of_a_run_that_is_under_way_is_not_mended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("clif.storage.folder_lock.WAIT_S", 0.0)
    journal = Journal(tmp_path)
    monkeypatch.setattr("sys.argv", ["clif", "mend", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    journal.close()
    assert ended.value.code == 2 and "is in use by process" in capsys.readouterr().err


KILLED = """
import os, sys
from pathlib import Path
from clif.control.durability.journal import Journal, RoundBegan
journal = Journal(Path(sys.argv[1]))
for i in range(1000):
    journal.write(RoundBegan(round_id=i))
    journal.maybe_sync()
os.kill(os.getpid(), 9)
"""


def test_sigkill_loses_no_line_and_frees_the_lock(tmp_path):
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, str(tmp_path)], timeout=60)
    assert done.returncode == -9
    assert reopened(tmp_path) == [RoundBegan(round_id=i) for i in range(1000)]


def test_stamps_of_an_earlier_process_keep_their_distance(tmp_path):
    now = [100.0]
    journal = Journal(tmp_path, clock=lambda: now[0])
    unix = journal.unix(90.0)
    journal.close()
    now[0] = 5.0
    later = Journal(tmp_path, clock=lambda: now[0])
    # Next to no time has passed on the wall clock, so what came 10 s before the first came 10 s before the second.
    assert later.stamp(unix) == pytest.approx(-5.0, abs=1.0)
    later.close()


def test_an_error_of_the_disk_is_reported(tmp_path, monkeypatch):
    now = [0.0]
    journal = Journal(tmp_path, clock=lambda: now[0])

    def full(_: int) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("clif.control.durability.journal.os.fsync", full)
        journal.write(ended(1))
        now[0] = 10.0
        journal.maybe_sync()
        journal._thread.shutdown()
        with pytest.raises(OSError, match="disk full"):
            journal.maybe_sync()
    journal.close()
