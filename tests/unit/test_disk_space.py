"""A disk that is full for a moment delays what is written; one that stays full is named; nothing written is lost."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from control_run import Run, make_config

import clif.storage.files
from clif.adapters.store import AdapterStore
from clif.control.durability.journal import Journal, RoundBegan
from clif.exit_report import sentence_of
from clif.metrics import writer as writer_module
from clif.metrics.schema import RANK_TABLES
from clif.metrics.writer import TableWriter
from clif.storage.disk_space import Room, is_full
from clif.types import AdapterVersion

FULL = OSError(errno.ENOSPC, "No space left on device")


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def patient(path: Path, limit_s: float = 10.0, **options) -> Room:
    time = Time()
    return Room(path, limit_s, time.clock, time.sleep, **options)


def failing(times: int, call, error: Exception = FULL):
    """call, that the disk refuses the first times."""
    left = [times]

    def run(*args):
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return call(*args)

    return run


def test_what_a_full_disk_refuses_is_done_once_there_is_room_and_both_are_said(tmp_path, caplog):
    assert patient(tmp_path).repeat(failing(3, lambda: "done")) == "done"
    full, room = caplog.messages
    assert full == f"the disk of {tmp_path} is full: waiting up to 10 s for room" and "has room again after" in room


def test_a_disk_that_stays_full_ends_the_process_with_a_sentence(tmp_path):
    with pytest.raises(OSError, match="No space left") as raised:
        patient(tmp_path).repeat(failing(10_000, lambda: None))
    assert (
        sentence_of(raised.value) == f"{tmp_path}: No space left on device: make room, then go on with run.resume=true"
    )


def test_whoever_is_told_to_end_does_not_wait_for_room(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        patient(tmp_path, limit_s=1e9, give_up=lambda: "got SIGTERM").repeat(failing(10_000, lambda: None))


def test_other_errors_of_a_disk_are_not_waited_for(tmp_path):
    with pytest.raises(OSError, match="Input/output error"):
        patient(tmp_path).repeat(failing(1, lambda: None, OSError(errno.EIO, "Input/output error")))


def test_a_full_disk_is_known_also_where_a_library_says_it_in_its_text_only():
    assert is_full(RuntimeError("Unable to flush file (file write failed: errno = 28, error message = 'No space'"))
    assert is_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert not is_full(RuntimeError("errno = 5")) and not is_full(ValueError("28"))


def test_no_line_of_the_journal_is_lost_or_torn_by_a_disk_that_is_full_for_a_moment(tmp_path, monkeypatch):
    journal = Journal(tmp_path, room=patient(tmp_path))
    write, calls = os.write, [0]

    def crowded(file: int, data: bytes) -> int:
        """Each second call is refused, and each other one takes a part of the line only."""
        calls[0] += 1
        if calls[0] % 2:
            raise FULL
        return write(file, data[:7])

    with monkeypatch.context() as patch:
        patch.setattr("clif.control.durability.journal.os.write", crowded)
        for number in range(5):
            journal.write(RoundBegan(round_id=number))
    journal.close()
    again = Journal(tmp_path)
    again.close()
    assert again.past == [RoundBegan(round_id=number) for number in range(5)]


def test_a_journal_that_cannot_be_forced_to_a_full_disk_is_forced_later(tmp_path, monkeypatch):
    now, forced = [0.0], []
    journal = Journal(tmp_path, clock=lambda: now[0])
    monkeypatch.setattr("clif.control.durability.journal.os.fsync", failing(1, forced.append))
    journal.write(RoundBegan(round_id=1))
    for _ in range(3):
        now[0] += 1.0
        journal.maybe_sync()
        if journal._sync is not None:
            journal._sync.exception()
    assert forced, "tried again"
    journal.close()


@pytest.mark.parametrize("step", ["write_synced", "write_atomic"])
def test_a_round_is_committed_once_there_is_room_for_its_adapter(tmp_path, monkeypatch, step):
    monkeypatch.setattr(f"clif.adapters.store.{step}", failing(2, getattr(clif.storage.files, step)))
    store = AdapterStore(tmp_path, patient(tmp_path))
    version = AdapterVersion(number=1, round_id=7, heldout_loss=1.0)
    store.write(version, "{}", b"weights")
    assert store.current() == version and store.weights(1) == b"weights"
    assert sorted(path.name for path in store.folder.iterdir()) == ["current.json", "v0001"]


def write_step(writer: TableWriter, number: int) -> None:
    writer.row("ticks", step=number, seconds=0.1, decode_rows=1, prefill_tokens=0, running=1, waiting=0, kv_used=16)


def ticks(path: Path) -> list[int]:
    with h5py.File(path) as file:
        return file["ticks"]["step"].tolist()


def test_rows_wait_in_memory_while_the_disk_is_full(tmp_path, monkeypatch):
    writer = TableWriter(tmp_path / "rank-00000.h5", RANK_TABLES, {})
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "free_bytes", lambda _: 100)
        for number in range(3):
            write_step(writer, number)
            assert not writer.flush()
    assert writer.flush()
    writer.close()
    assert ticks(writer.path) == [0, 1, 2]


def test_a_disk_that_is_full_too_long_ends_the_writer_with_a_sentence(tmp_path, monkeypatch):
    time = Time()
    writer = TableWriter(tmp_path / "rank-00000.h5", RANK_TABLES, {}, time.clock)
    write_step(writer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "free_bytes", lambda _: 100)
        assert not writer.flush()
        time.now = 1000.0
        with pytest.raises(OSError, match=r"No space left .*rank-00000\.h5"):
            writer.flush()
        with pytest.raises(OSError, match=r"No space left .*rank-00001\.h5"):
            TableWriter(tmp_path / "rank-00001.h5", RANK_TABLES, {}, time.clock)
    writer.close()


def test_a_run_on_a_disk_that_is_full_for_a_moment_pauses_and_answers_every_request(tmp_path, monkeypatch, caplog):
    run, write, calls = Run(make_config(tmp_path), files=True), os.write, [0]

    def crowded(file: int, data: bytes) -> int:
        calls[0] += file == run.journal._file
        if file == run.journal._file and 10 <= calls[0] < 13:
            raise FULL
        return write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", crowded)
        run.go()
    run.assert_promise_1()
    assert {row["finish"] for row in run.table("requests")} == {"stop"}
    assert "is full: waiting" in caplog.text and "has room again" in caplog.text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all that is free."""
    path = disk / "fill"
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"x" * 4096)
    return path


def test_a_real_disk_that_fills_up_and_is_cleared_loses_no_row_and_no_line(small_disk):
    journal = Journal(small_disk, room=patient(small_disk))
    writer = TableWriter(small_disk / "rank-00000.h5", RANK_TABLES, {})
    write_step(writer, 0)
    assert writer.flush()
    in_the_way = fill(small_disk)
    for number in range(1, 1000):
        write_step(writer, number)
    assert not writer.flush()
    with pytest.raises(OSError, match="No space left"):
        for number in range(200):
            journal.write(RoundBegan(round_id=number))
    in_the_way.unlink()
    journal.write(RoundBegan(round_id=1000))
    assert writer.flush()
    writer.close()
    journal.close()
    assert ticks(writer.path) == np.arange(1000).tolist()
    again = Journal(small_disk)
    again.close()
    numbers = [line.round_id for line in again.past]
    assert numbers == [*range(len(numbers) - 1), 1000], "whole lines, and none of the one that did not fit"
