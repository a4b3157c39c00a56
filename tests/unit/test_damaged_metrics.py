"""Whatever a damaged metrics file makes of HDF5's library: it is named, the others are merged, nothing hangs."""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
from mutations import BINARY, damaged
from rich.console import Console

from clif.config import config_from_tree
from clif.metrics import isolated, sources
from clif.metrics.collect import CollectError, collect
from clif.metrics.provenance import provenance
from clif.metrics.schema import CONTROL_TABLES, RANK_TABLES
from clif.metrics.sources import Problem, Rows, Source, earlier_rows, read
from clif.metrics.summary import summarize, write_summary
from clif.metrics.summary_print import print_summary
from clif.metrics.writer import TableWriter

SETTINGS = config_from_tree({"model": {"path": "m"}, "train": {"enabled": False}})
REQUEST = {
    "purpose": "user", "replica": 0, "version": 0, "prompt_tokens": 3, "output_tokens": 2, "arrival_s": 1.0,
    "finished_s": 2.0, "ttft_s": 0.1, "tpot_s": 0.1, "e2e_s": 1.0, "slo_met": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every file is as it was written."""
    folder = tmp_path_factory.mktemp("whole")
    attributes = provenance(SETTINGS) | {"host": "here"}
    with TableWriter(folder / "control.h5", CONTROL_TABLES, attributes) as writer:
        for n in range(20):
            writer.row("load", request=n, at_s=float(n), prompt_tokens=3, max_tokens=8)
            writer.row("requests", id=n, finish="stop", **REQUEST)
            writer.row("gaps", request=n, itl_s=0.1)
            state = "failed" if n % 3 else "serving"
            writer.row("transitions", replica=n % 2, from_state="serving", to_state=state, reason="whole")
            values = {"members": "0,1", "version": n, "started_s": 1.0, "ended_s": 2.0, "reason": "r"}
            writer.row("rounds", round_id=n, state="committed", **values)
            writer.row("quality", phase="before", heldout_loss=2.0)
    with TableWriter(folder / "rank-00000.h5", RANK_TABLES, attributes) as writer:
        for n in range(20):
            writer.row("train_steps", step=n, round_id=1, samples=4, tokens=50, loss=1.0, lr=1e-3, seconds=0.1)
    return folder


@pytest.fixture
def run_dir(whole: Path, tmp_path: Path) -> Path:
    for file in whole.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path


def problems(run_h5: Path) -> list[str]:
    with h5py.File(run_h5) as run:
        return list(run.attrs["unreadable"])


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What hangs is found after seconds, not after a minute."""
    monkeypatch.setattr(sources, "isolated", partial(isolated.isolated, limit_s=3.0))
    caplog.set_level(logging.CRITICAL)


def damage(run_dir: Path, whole: Path, seed: int) -> Path:
    """The file that was damaged."""
    file = run_dir / ("control.h5", "rank-00000.h5")[seed % 2]
    file.write_bytes(damaged((whole / file.name).read_bytes(), seed, BINARY))
    return file


def test_what_is_read_of_a_damaged_file_can_be_relied_on(run_dir, whole, impatient):
    for seed in range(100):
        file = damage(run_dir, whole, seed)
        for part in read(Source(file, -1, 0)):
            if isinstance(part, Problem):
                assert part.text.isprintable()
            elif isinstance(part, Rows):
                texts = [name for name in part.rows.dtype.names if part.rows.dtype[name].kind == "S"]
                assert all(text.decode() is not None for name in texts for text in part.rows[name].tolist())


def check_report(run_dir: Path, whole: Path, seed: int) -> None:
    file = damage(run_dir, whole, seed)
    print_summary(summarize(collect(run_dir)), Console(file=io.StringIO()))
    shutil.copy(whole / file.name, run_dir)


def test_a_damaged_metrics_file_never_ends_the_report(run_dir, whole, impatient):
    for seed in range(200, 210):
        check_report(run_dir, whole, seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_metrics_file_damaged_in_any_of_many_ways_never_ends_the_report(run_dir, whole, impatient):
    for seed in range(1000, 3000):
        check_report(run_dir, whole, seed)


def overwrite(path: Path, old: bytes, new: bytes, count: int = -1) -> None:
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new, count))


def rewrite(path: Path, table: str, column: str, rows: list[int], value: bytes) -> None:
    """With a checksum that fits, as in a file that was written so, or that a kill left without."""
    with h5py.File(path, "a") as file:
        data = file[table][:]
        data[column][rows] = value
        file[table][:] = data


def test_a_byte_flipped_in_a_text_attribute_is_named_and_the_others_are_merged(run_dir):
    overwrite(run_dir / "rank-00000.h5", b"here", b"h\xf2re", 1)
    run_h5 = collect(run_dir)
    (problem,) = problems(run_h5)
    assert problem.startswith("rank-00000.h5: attribute host: 'utf-8' codec can't encode")
    summary = summarize(run_h5)
    assert summary["requests"]["submitted"] == 20 and summary["training"]["optimizer_steps"] == 20


def test_a_byte_flipped_in_a_column_of_text_is_named_and_its_rows_are_merged(run_dir):
    rewrite(run_dir / "control.h5", "transitions", "reason", [1, 2, 3], b"wh\xf2le")
    run_h5 = collect(run_dir)
    assert problems(run_h5) == ["control.h5: table transitions: damaged text in column reason in 3 rows"]
    assert len(summarize(run_h5)["failures"]) == 13


def test_a_state_that_does_not_exist_is_named_and_its_row_left_out(run_dir):
    rewrite(run_dir / "control.h5", "transitions", "to_state", [1, 2], b"faile`")
    run_h5 = collect(run_dir)
    assert problems(run_h5) == ["control.h5: table transitions: a damaged word in column to_state, left out in 2 rows"]
    assert len(summarize(run_h5)["failures"]) == 11


def test_a_column_whose_name_or_type_is_damaged_costs_its_table_only(run_dir):
    overwrite(run_dir / "rank-00000.h5", b"grad_norm\0", b"grad_n\xf2rm\0")
    with h5py.File(run_dir / "control.h5", "a") as file:
        del file["gaps"], file["load"]
        file["gaps"] = np.array([(1.0, b"fast")], dtype=[("t", "f8"), ("itl_s", "S8")])
        file["load"] = np.zeros(3)
    run_h5 = collect(run_dir)
    first, second, third = problems(run_h5)
    assert first == "control.h5: table gaps: column itl_s holds |S8, not float64"
    assert second == "control.h5: table load: is no table"
    assert third.startswith("rank-00000.h5: table train_steps: 'utf-8' codec can't decode")
    assert summarize(run_h5)["requests"]["finished"]["stop"] == 20


def test_a_number_of_rows_that_no_disk_holds_is_named_and_not_read(run_dir):
    with h5py.File(run_dir / "rank-00000.h5", "a") as file:
        file["train_steps"].resize((2**50,))
    (problem,) = problems(collect(run_dir))
    assert problem.startswith("rank-00000.h5: table train_steps: claims 1125899906842624 rows and holds")


@pytest.mark.parametrize(("name", "value"), [("end_s", "later"), ("start_unix", 1e300), ("start_unix", float("nan"))])
def test_a_time_that_is_not_possible_is_named(run_dir, name, value):
    with h5py.File(run_dir / "control.h5", "a") as file:
        file.attrs[name] = value
    run_h5 = collect(run_dir)
    assert problems(run_h5) == [f"control.h5: attribute {name}: {file_value(value)} is not possible"]
    summarize(run_h5)


def file_value(value: object) -> str:
    return repr(value) if isinstance(value, str) else f"np.float64({value!r})"


def test_a_file_in_which_hdf5_does_not_come_to_an_end_is_named(run_dir, impatient, monkeypatch):
    """HDF5 2.0 runs in circles in a damaged heap of texts; here by hand, as its makers may mend that."""
    real = sources.checked_attributes

    def circles(file: h5py.File) -> object:
        while file.filename.endswith("rank-00000.h5"):
            pass
        return real(file)

    monkeypatch.setattr(sources, "checked_attributes", circles)
    assert problems(collect(run_dir)) == ["rank-00000.h5: damaged: HDF5 does not get through it in 3 s"]


@pytest.mark.parametrize(
    ("crash", "said"), [("os.abort()", "crashed on it (SIGABRT)"), ("os._exit(3)", "ended with code 3")]
)
def test_a_file_on_which_hdf5_crashes_is_named(run_dir, monkeypatch, crash, said):
    monkeypatch.setattr(sources, "checked_attributes", lambda file: eval(crash, {"os": os}))
    with pytest.raises(CollectError, match=re.escape(said)):
        collect(run_dir)


def test_earlier_rows_are_those_that_can_be_relied_on(run_dir, caplog):
    assert earlier_rows(run_dir, "requests")["id"].tolist() == list(range(20))
    rewrite(run_dir / "control.h5", "requests", "finish", [0, 1], b"st\xf2p")
    assert earlier_rows(run_dir, "requests")["id"].tolist() == list(range(2, 20))
    assert "control.h5: table requests: a damaged word in column finish" in caplog.text


def test_a_damaged_run_h5_is_named_with_what_to_do(run_dir):
    run_h5 = collect(run_dir)
    content = run_h5.read_bytes()
    run_h5.write_bytes(content[: len(content) // 2])
    with pytest.raises(CollectError, match=r"run\.h5 is damaged .*: remove it; it is made anew"):
        write_summary(run_dir)
    run_h5.unlink()
    assert write_summary(run_dir)["requests"]["submitted"] == 20


def test_a_run_h5_of_an_older_clif_is_summarised_as_far_as_it_goes(run_dir):
    run_h5 = collect(run_dir)
    with h5py.File(run_h5, "a") as run:
        rows = run["rounds"][:]
        del run["rounds"], run["pressure"]
        run["rounds"] = rows[["t", "round_id", "state", "source"]]
    assert summarize(run_h5)["training"]["rounds_completed"] == 20


def test_a_bug_in_isolated_work_is_told_with_where_it_was():
    def work(alive):
        yield 1
        raise ZeroDivisionError("a bug")

    parts = isolated.isolated(work)
    assert next(parts) == 1
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        next(parts)
    assert "in work" in caught.value.__notes__[0]


def test_isolated_work_takes_no_more_memory_than_it_is_given():
    def work(alive):
        yield len(np.ones(1 << 30, dtype=np.uint8))

    with pytest.raises(MemoryError, match="Unable to allocate"):
        list(isolated.isolated(work, memory_bytes=1 << 28))
