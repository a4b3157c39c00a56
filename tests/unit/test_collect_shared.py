"""Promise 6 on a cluster: processes that share the files of a run write the same run.h5 as one process, or nothing.

Here MPI is played by threads; tests/unit/test_collect_mpi.py starts the real one.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_files import contents, left_over, write_run

from clif.metrics import collect as collect_module
from clif.metrics import share, sources
from clif.metrics.collect import CollectError, collect
from clif.metrics.share import ShareError, collect_shared, shares
from clif.metrics.sources import Problem, Rows, Source, read
from clif.metrics.world import Termination


class Transfer:
    def __init__(self, done: Any) -> None:
        self.Test = done


class Post:
    """What all communicators of a world share. The largest buffer, in bytes, and the code of an Abort are kept."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.messages: list[tuple[int, int, int, Any]] = []
        self.largest, self.aborted = 0, None


class ThreadComm:
    """One process of a world of threads. Buffers move when the receiver looks, as with a large message of MPI."""

    def __init__(self, rank: int, size: int, post: Post) -> None:
        self.rank, self.size, self.post = rank, size, post

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.size

    def _find(self, source: int | None, tag: int) -> tuple[int, int, int, Any] | None:
        if self.post.aborted is not None:
            raise SystemExit(143)  # The launcher ends all others.
        fits = (m for m in self.post.messages if m[1:3] == (self.rank, tag) and source in (None, m[0]))
        return next(fits, None)

    def iprobe(self, *, source: int | None = None, tag: int) -> bool:
        with self.post.lock:
            return self._find(source, tag) is not None

    def send(self, obj: Any, dest: int, tag: int) -> None:
        with self.post.lock:
            self.post.messages.append((self.rank, dest, tag, pickle.dumps(obj)))

    def recv(self, *, source: int | None = None, tag: int) -> Any:
        with self.post.lock:
            message = self._find(source, tag)
            assert message is not None, "would block"
            self.post.messages.remove(message)
            return pickle.loads(message[3])

    def Isend(self, buf: np.ndarray[Any, Any], dest: int, tag: int) -> Transfer:
        assert buf.dtype == np.uint8
        taken = threading.Event()
        with self.post.lock:
            self.post.largest = max(self.post.largest, buf.nbytes)
            self.post.messages.append((self.rank, dest, tag, (buf, taken)))

        def done() -> bool:
            with self.post.lock:
                self._find(None, tag)
            return taken.is_set()

        return Transfer(done)

    def Irecv(self, buf: np.ndarray[Any, Any], source: int, tag: int) -> Transfer:
        def done() -> bool:
            with self.post.lock:
                message = self._find(source, tag)
                if message is None:
                    return False
                index = next(i for i, m in enumerate(self.post.messages) if m is message)
                del self.post.messages[index]
            data, taken = message[3]
            buf[:] = data
            taken.set()
            return True

        return Transfer(done)

    def Abort(self, errorcode: int = 0) -> None:
        self.post.aborted = errorcode


def together(run_dir: Path, size: int, check: Callable[[], None] = lambda: None) -> tuple[list[Any], Post]:
    """What each of size processes returned or raised. Fails if one of them hangs. check: of process 0."""
    post, results = Post(), [None] * size

    def process(rank: int) -> None:
        try:
            comm = ThreadComm(rank, size, post)
            results[rank] = collect_shared(run_dir, comm, check) if rank == 0 else collect_shared(run_dir, comm)
        except BaseException as error:  # noqa: BLE001 - SystemExit, too, is a result
            results[rank] = error

    threads = [threading.Thread(target=process, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a process hangs"
    return results, post


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five files and pieces of a few rows, so that every table takes several."""
    monkeypatch.setattr(sources, "PIECE_BYTES", 2000)
    write_run(tmp_path, [30, 7, 100, 0])
    return tmp_path


@pytest.mark.parametrize("size", [2, 3, 5, 9])
def test_promise_6_shared_work_gives_the_same_file_row_for_row(run_dir: Path, size: int) -> None:
    alone = contents(collect(run_dir))
    (run_dir / "run.h5").unlink()
    results, post = together(run_dir, size)
    assert results == [run_dir / "run.h5"] + [None] * (size - 1) and post.aborted is None
    assert contents(run_dir / "run.h5") == alone
    assert left_over(run_dir) == [] and post.messages == []


def test_no_message_is_larger_than_a_piece(run_dir: Path) -> None:
    _, post = together(run_dir, 2)
    assert 1000 < post.largest <= 2000


def test_pieces_of_a_file_are_bounded_and_in_order(run_dir: Path) -> None:
    pieces = [part for part in read(Source(run_dir / "rank-00001.h5", 1, 0)) if isinstance(part, Rows)]
    assert max(part.rows.nbytes for part in pieces) <= 2000
    ticks = np.concatenate([part.rows for part in pieces if part.table == "ticks"])
    assert ticks["step"].tolist() == list(range(100))


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(st.integers(0, 40), max_size=6),
    size=st.integers(2, 8),
    piece=st.sampled_from([1, 500, 5000]),
    broken=st.sets(st.integers(0, 6)),
)
def test_promise_6_holds_for_any_files_processes_and_pieces(
    rows: list[int], size: int, piece: int, broken: set[int]
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        run_dir = Path(folder)
        write_run(run_dir, rows)
        for number, path in enumerate(sorted(run_dir.glob("rank-*.h5"))):
            if number in broken:
                path.write_bytes(b"not HDF5")
        alone = contents(collect(run_dir))
        patch.setattr(sources, "PIECE_BYTES", piece)
        assert together(run_dir, size)[0][0] == run_dir / "run.h5"
        assert contents(run_dir / "run.h5") == alone and left_over(run_dir) == []


@given(sizes=st.lists(st.integers(0, 1000), max_size=30), readers=st.integers(1, 8))
def test_work_is_shared_evenly(sizes: list[int], readers: int) -> None:
    owners = shares(sizes, readers)
    assert len(owners) == len(sizes) and set(owners) <= set(range(readers))
    loads = [
        sum(size for size, owner in zip(sizes, owners, strict=True) if owner == reader) for reader in range(readers)
    ]
    assert max(loads) <= sum(sizes) / readers + max(sizes, default=0)


def test_unreadable_file_is_named_and_the_others_are_merged(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run_dir / "rank-00000.h5").write_bytes(b"not HDF5")
    results, post = together(run_dir, 3)
    assert results[0] == run_dir / "run.h5" and post.aborted is None
    with h5py.File(run_dir / "run.h5") as run:
        (problem,) = run.attrs["unreadable"]
        assert "rank-00000.h5" in problem and set(run["ticks"]["rank"].tolist()) == {0, 1}
    assert "rank-00000.h5" in caplog.text


def test_rows_left_unwritten_are_cut_at_the_end_only_also_over_many_pieces(run_dir: Path) -> None:
    path = run_dir / "rank-00001.h5"
    with h5py.File(path, "a") as file:
        data = file["ticks"]
        data.resize((900,))
        data[20:60] = np.full(40, data.fillvalue, data.dtype)
        data[500] = data[99]
    parts = read(Source(path, 1, 0))
    ticks = np.concatenate([part.rows for part in parts if isinstance(part, Rows) and part.table == "ticks"])
    assert len(ticks) == 501 and np.isnan(ticks["t"]).sum() == 40 + 400 and ticks["step"][500] == 99


def test_table_damaged_behind_its_first_piece_gives_no_rows(run_dir: Path) -> None:
    path = run_dir / "rank-00009.h5"
    rows = np.array([(float(n), n) for n in range(5000)], dtype=[("t", "f8"), ("step", "i8")])
    with h5py.File(path, "w") as file:
        data = file.create_dataset("ticks", data=rows, chunks=(100,), fletcher32=True)
        offset = data.id.get_chunk_info(40).byte_offset
    with path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(b"\xff" * 64)
    parts = list(read(Source(path, 9, 0)))
    assert not any(isinstance(part, Rows) for part in parts)
    assert any(isinstance(part, Problem) and part.text.startswith("table ticks") for part in parts)


def test_nothing_to_collect_ends_all_processes_in_order(tmp_path: Path) -> None:
    for content in (None, b"broken"):
        if content is not None:
            (tmp_path / "control.h5").write_bytes(content)
        results, post = together(tmp_path, 3)
        assert isinstance(results[0], CollectError) and results[1:] == [None, None] and post.aborted is None
        assert not (tmp_path / "run.h5").exists() and left_over(tmp_path) == []


def broken_read(source: Source) -> Iterator[Any]:
    parts = read(source)
    yield next(parts)
    if source.name == "rank-00001":
        raise ZeroDivisionError("cosmic ray")
    yield from parts


def test_exception_in_a_reader_aborts_all_with_its_message(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(collect(run_dir))
    monkeypatch.setattr(share, "read", broken_read)
    results, post = together(run_dir, 4)
    assert post.aborted == 1 and isinstance(results[0], ShareError)
    assert "cosmic ray" in caplog.text and "process " in caplog.text
    assert contents(run_dir / "run.h5") == before, "the older file stays"
    assert left_over(run_dir) == []


def test_failure_of_one_reader_is_noticed_while_another_is_waited_for(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader of the file that is written first goes on only when process 0 has ended the others."""
    ended, abort, went_on = threading.Event(), ThreadComm.Abort, []

    def noted(comm: ThreadComm, errorcode: int = 0) -> None:
        abort(comm, errorcode)
        ended.set()

    def slow_or_broken(source: Source) -> Iterator[Any]:
        if source.name == "control":
            went_on.append(ended.wait(10))
            yield from ()
        raise ZeroDivisionError

    monkeypatch.setattr(ThreadComm, "Abort", noted)
    monkeypatch.setattr(share, "read", slow_or_broken)
    results, post = together(run_dir, 6)
    assert post.aborted == 1 and isinstance(results[0], ShareError)
    assert went_on == [True], "process 0 waited for this reader alone"


def test_exception_while_writing_aborts_all(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(part: Rows, target: h5py.Dataset) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(collect_module, "_append", full)
    results, post = together(run_dir, 3)
    assert post.aborted == 1 and isinstance(results[0], OSError) and "No space left" in caplog.text
    assert not (run_dir / "run.h5").exists() and left_over(run_dir) == []


def test_reader_that_does_not_see_the_files_says_what_to_change(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(share, "find", lambda folder: [Source(folder / "elsewhere" / "control.h5", -1, 0)])
    _, post = together(run_dir, 2)
    assert post.aborted == 1
    (record,) = [r for r in caplog.records if r.levelno == logging.CRITICAL]
    assert "put the run where all hosts see it" in record.getMessage() and "Traceback" not in record.getMessage()


def test_signal_that_python_dropped_is_heard_while_waiting(run_dir: Path) -> None:
    termination, calls = Termination(), []

    def check() -> None:
        calls.append(1)
        if len(calls) == 10:
            with contextlib.suppress(SystemExit):  # As Python does while it runs a callback of its memory management.
                termination._end(signal.SIGTERM, None)
        termination.check()

    results, post = together(run_dir, 3, check)
    assert isinstance(results[0], SystemExit) and results[0].code == 143 and post.aborted == 1 and len(calls) == 10
    assert not (run_dir / "run.h5").exists() and left_over(run_dir) == []
