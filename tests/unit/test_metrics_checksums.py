"""A damaged metrics file is named; what a kill leaves is not taken for damage."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from clif.errors import InputError
from clif.metrics.checked import Checked
from clif.metrics.collect import collect
from clif.metrics.schema import RANK_TABLES
from clif.metrics.sources import earlier_rows
from clif.metrics.summary import write_summary
from clif.metrics.writer import TableWriter


def write_step(writer: TableWriter, number: int) -> None:
    writer.row("ticks", step=number, seconds=0.1, decode_rows=1, prefill_tokens=0, running=1, waiting=0, kv_used=16)


def write(path: Path, rows: int, close: bool = True) -> Path:
    """A file of ticks numbered from 0; not closed: as a kill leaves it."""
    writer = TableWriter(path, RANK_TABLES, {})
    for number in range(rows):
        write_step(writer, number)
    writer.flush()
    if not close:
        content = path.read_bytes()
        writer.close()
        path.write_bytes(content)
    writer.close()
    return path


def chunks_of(path: Path, table: str = "ticks") -> list[tuple[int, int]]:
    """Where each chunk of a table lies in its file, and its length in bytes."""
    with h5py.File(path) as file:
        data = file[table].id
        found = [data.get_chunk_info(i) for i in range(data.get_num_chunks())]
    return [(chunk.byte_offset, chunk.size) for chunk in found]


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def test_a_byte_that_changed_anywhere_in_the_rows_of_a_closed_file_names_file_and_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    intact = write(tmp_path / "rank-00000.h5", 700).read_bytes()
    chunks = chunks_of(tmp_path / "rank-00000.h5")
    assert len(chunks) > 2
    write(tmp_path / "rank-00001.h5", 3)
    for offset, size in chunks:
        (tmp_path / "rank-00000.h5").write_bytes(intact)
        flip(tmp_path / "rank-00000.h5", offset + int(rng.integers(size)))
        with h5py.File(collect(tmp_path)) as run:
            (problem,) = run.attrs["unreadable"]
            assert problem.startswith("rank-00000.h5: table ticks: ")
            assert run["ticks"]["step"].tolist() == [0, 1, 2], "the others are merged"


def test_rows_of_before_are_kept_when_a_kill_tears_the_chunks_at_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "rank-00000.h5", 700, close=False)
    offset, size = chunks_of(path)[-1]
    # The checksum is that of rows which did not get to the disk.
    flip(path, offset + size - 1)
    with h5py.File(path) as file:
        with pytest.raises(OSError, match=r"read|filter"):
            file["ticks"][:]
        assert Checked(file["ticks"], closed=False)[:]["step"].tolist() == list(range(700))
        assert Checked(file["ticks"], closed=False)[690:695]["step"].tolist() == list(range(690, 695))
    with h5py.File(collect(tmp_path)) as run:
        assert len(run.attrs["unreadable"]) == 0 and run["ticks"]["step"].tolist() == list(range(700))


def test_a_chunk_before_the_end_is_damaged_and_not_torn(tmp_path: Path) -> None:
    path = write(tmp_path / "rank-00000.h5", 700, close=False)
    flip(path, chunks_of(path)[0][0] + 5)
    with h5py.File(collect(write(tmp_path / "rank-00001.h5", 3).parent)) as run:
        (problem,) = run.attrs["unreadable"]
    assert problem.startswith("rank-00000.h5: table ticks: ")


def test_what_a_restart_goes_on_from_is_not_read_from_damaged_rows(tmp_path: Path, caplog) -> None:
    with TableWriter(tmp_path / "control.h5", ("load",), {}) as writer:
        for number in range(3):
            writer.row("load", request=number, at_s=0.0, prompt_tokens=1, max_tokens=1)
    assert earlier_rows(tmp_path, "load")["request"].tolist() == [0, 1, 2]
    flip(tmp_path / "control.h5", chunks_of(tmp_path / "control.h5", "load")[0][0] + 9)
    assert len(earlier_rows(tmp_path, "load")) == 0 and "control.h5: table load: " in caplog.text


def test_a_damaged_run_h5_is_named_with_what_can_be_done(tmp_path: Path) -> None:
    write(tmp_path / "rank-00000.h5", 700)
    run_h5 = collect(tmp_path)
    flip(run_h5, chunks_of(run_h5)[0][0] + 5)
    with pytest.raises(InputError, match=r"run\.h5 is damaged .*: remove it; it is made anew"):
        write_summary(tmp_path)
    run_h5.unlink()
    assert write_summary(tmp_path)["run"]["unreadable"] == []
