"""Promise 6: HDF5 files of a killed run open and hold all rows up to the last flush; nothing of a run is lost."""

from __future__ import annotations

import errno
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pynvml
import pytest

from clif.metrics.checked import Checked
from clif.metrics.collect import CollectError, collect
from clif.metrics.device import DeviceMonitor
from clif.metrics.provenance import provenance
from clif.metrics.schema import CONTROL_TABLES, RANK_TABLES, TABLES
from clif.metrics.writer import MetricsError, TableWriter, next_path

# Flushes all the time, so that most kills land inside a flush; tells after each how many rows are safe.
VICTIM = """
import sys
from pathlib import Path
from clif.metrics.schema import RANK_TABLES
from clif.metrics.writer import TableWriter
writer = TableWriter(Path(sys.argv[1]), RANK_TABLES, {"host": "here"})
n = 0
while True:
    for _ in range(37):
        writer.row("ticks", step=n, seconds=0.1, decode_rows=1, prefill_tokens=0, running=1, waiting=0, kv_used=16,
                   train_kind="forward", train_s=0.01)
        writer.row("device", rss_bytes=float(n))
        n += 1
    writer.flush()
    writer.row("versions", version=99, round_id=1, step=n, slot=0)  # Never flushed on its own.
    print(n, flush=True)
"""


def write_step(writer: TableWriter, number: int) -> None:
    writer.row("ticks", step=number, seconds=0.1, decode_rows=1, prefill_tokens=0, running=1, waiting=0, kv_used=16)


def killed(path: Path, after_s: float) -> int:
    """Number of rows that the process had flushed for sure when SIGKILL hit it."""
    process = subprocess.Popen([sys.executable, "-c", VICTIM, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said, "the writer died by itself"
    time.sleep(after_s)
    process.kill()
    said += process.stdout.read()
    process.wait()
    return int(said.split("\n")[-2])


def test_promise_6_file_of_a_killed_process_opens_and_holds_all_rows_up_to_the_last_flush(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for rank in range(8):
        path = tmp_path / f"rank-{rank:05d}.h5"
        flushed = killed(path, float(rng.uniform(0, 0.1)))
        with h5py.File(path) as file:
            assert set(file) == set(RANK_TABLES)
            assert len(file["ticks"]) >= flushed
            # A kill amid a write may leave a wrong checksum in the last chunk, whose earlier rows are intact.
            ticks, device = (Checked(file[name], closed=False)[:flushed] for name in ("ticks", "device"))
            assert np.array_equal(ticks["step"], np.arange(flushed))
            assert set(ticks["train_kind"].tolist()) == {b"forward"}
            assert np.array_equal(device["rss_bytes"], np.arange(flushed))
    with h5py.File(collect(tmp_path)) as run:
        assert len(run.attrs["unreadable"]) == 0
        assert set(run["ticks"]["rank"].tolist()) == set(range(8))
        assert not np.isnan(run["ticks"]["t"]).any()


def test_promise_6_every_data_set_exists_from_the_start(tmp_path: Path) -> None:
    with TableWriter(tmp_path / "control.h5", CONTROL_TABLES, {}):
        copy = tmp_path / "copy"
        copy.write_bytes((tmp_path / "control.h5").read_bytes())
        with h5py.File(copy) as file:
            assert set(file) == set(CONTROL_TABLES)
            assert file["requests"].attrs["unit.ttft_s"] == "s"
            assert file["requests"].dtype.names == tuple(c.name for c in TABLES["requests"].columns)


def test_flush_comes_by_time_and_by_rows(tmp_path: Path) -> None:
    now = [100.0]
    with TableWriter(tmp_path / "a.h5", RANK_TABLES, {}, lambda: now[0], flush_s=1.0, flush_rows=3) as writer:
        write_step(writer, 0)
        assert not writer.maybe_flush()
        now[0] = 101.0
        assert writer.maybe_flush()
        for number in (1, 2, 3):
            write_step(writer, number)
        assert writer.maybe_flush()
        assert writer.since_start(101.0) == 1.0
        writer.row("device", cpu_percent=None)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["ticks"]["t"].tolist() == [0.0, 1.0, 1.0, 1.0]
        assert np.isnan(file["device"]["cpu_percent"][0])
        assert file.attrs["end_s"] == 1.0


def test_collect_merges_ranks_and_restarts_row_for_row(tmp_path: Path) -> None:
    for stem, numbers in (("rank-00001", [5, 6]), ("rank-00000", [1, 2, 3]), ("rank-00000", [7])):
        path = next_path(tmp_path, stem)
        with TableWriter(path, RANK_TABLES, {"host": path.stem}) as writer:
            for number in numbers:
                write_step(writer, number)
    with TableWriter(next_path(tmp_path, "control"), CONTROL_TABLES, provenance()) as writer:
        writer.row("transitions", replica=0, from_state="serving", to_state="serving", reason="é" * 300)
    with h5py.File(collect(tmp_path)) as run:
        ticks = run["ticks"][:]
        assert ticks["step"].tolist() == [1, 2, 3, 7, 5, 6]
        assert ticks["rank"].tolist() == [0, 0, 0, 0, 1, 1]
        assert ticks["source"].tolist() == [b"rank-00000"] * 3 + [b"rank-00000.r1"] + [b"rank-00001"] * 2
        assert run["transitions"]["rank"].tolist() == [-1]
        assert run["transitions"]["reason"][0].decode() == "é" * 118 + "..."
        assert run["sources"]["rank-00000.r1"].attrs["host"] == "rank-00000.r1"
        assert run["sources"]["control"].attrs["version.h5py"] == h5py.__version__
    assert [p.name for p in tmp_path.glob("*.tmp")] == [] and not list(tmp_path.glob(".collect-*"))


def test_collect_reads_a_run_that_goes_on(tmp_path: Path) -> None:
    with TableWriter(tmp_path / "rank-00000.h5", RANK_TABLES, {}) as writer:
        write_step(writer, 1)
        writer.flush()
        with h5py.File(collect(tmp_path)) as run:
            assert run["ticks"]["step"].tolist() == [1]


def test_unreadable_file_is_named_and_the_others_are_merged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rank-00000.h5").write_bytes(b"not HDF5")
    with TableWriter(tmp_path / "rank-00001.h5", RANK_TABLES, {}) as writer:
        write_step(writer, 1)
    with h5py.File(collect(tmp_path)) as run:
        (problem,) = run.attrs["unreadable"]
        assert "rank-00000.h5" in problem
        assert run["ticks"]["rank"].tolist() == [1]
    assert "rank-00000.h5" in caplog.text


def test_rows_that_a_kill_left_unwritten_are_cut(tmp_path: Path) -> None:
    with TableWriter(tmp_path / "rank-00000.h5", RANK_TABLES, {}) as writer:
        write_step(writer, 1)
    with h5py.File(tmp_path / "rank-00000.h5", "a") as file:
        file["ticks"].resize((900,))
    with h5py.File(collect(tmp_path)) as run:
        assert run["ticks"]["step"].tolist() == [1]


def test_column_of_an_older_file_that_is_missing_is_filled(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "rank-00000.h5", "w") as file:
        file["ticks"] = np.array([(1.0, 4, 2)], dtype=[("t", "f8"), ("step", "i8"), ("gone", "i8")])
    with h5py.File(collect(tmp_path)) as run:
        assert run["ticks"]["step"].tolist() == [4] and run["ticks"]["running"].tolist() == [-1]
        assert "gone" in run.attrs["unreadable"][0]


def test_nothing_to_collect_is_an_error_that_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CollectError, match=r"control\.h5"):
        collect(tmp_path)
    (tmp_path / "control.h5").write_bytes(b"broken")
    with pytest.raises(CollectError, match="none of the metrics files"):
        collect(tmp_path)
    assert not (tmp_path / "run.h5").exists() and not (tmp_path / "run.h5.tmp").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"itl_s": 0.1}, "missing column request"),
        ({"request": 1, "itl_s": 0.1, "colour": 3}, "unknown column colour"),
        ({"request": 1.5, "itl_s": 0.1}, "request=1.5 is no i8"),
        ({"request": 2**70, "itl_s": 0.1}, "is no i8"),
        ({"request": 1, "itl_s": "fast"}, "itl_s='fast' is no f8"),
    ],
)
def test_writer_refuses_rows_that_do_not_fit(tmp_path: Path, values: dict[str, object], message: str) -> None:
    with TableWriter(tmp_path / "control.h5", CONTROL_TABLES, {}) as writer:
        with pytest.raises(MetricsError, match=message):
            writer.row("gaps", **values)
        writer.row("gaps", request=1, itl_s=0.5)
    with h5py.File(tmp_path / "control.h5") as file:
        assert file["gaps"]["itl_s"].tolist() == [0.5]


def test_writer_refuses_unknown_tables_and_existing_files(tmp_path: Path) -> None:
    with pytest.raises(MetricsError, match="unknown table colours"):
        TableWriter(tmp_path / "a.h5", ("colours",), {})
    with TableWriter(tmp_path / "a.h5", RANK_TABLES, {}) as writer, pytest.raises(MetricsError, match="no table gaps"):
        writer.row("gaps", request=1, itl_s=0.5)
    with pytest.raises(MetricsError, match="next_path"):
        TableWriter(tmp_path / "a.h5", RANK_TABLES, {})


def test_device_monitor_without_gpu_gives_nan_and_says_why(tmp_path: Path) -> None:
    for gpu in (None, "no-such-gpu"):
        monitor = DeviceMonitor(gpu)
        sample = monitor.sample()
        assert monitor.note
        assert sample["rss_bytes"] > 0 and np.isnan(sample["gpu_util"]) and np.isnan(sample["gpu_power_w"])
        with TableWriter(next_path(tmp_path, "rank-00000"), RANK_TABLES, {}) as writer:
            writer.row("device", **sample)
        monitor.close()


def test_device_monitor_reports_bytes_and_watts_and_nan_for_what_a_gpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(handle: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    for name, answer in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetUtilizationRates": lacks,
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=2**30 if handle == "GPU-abc" else 0),
        "nvmlDeviceGetPowerUsage": lambda handle: 250_000,
    }.items():
        monkeypatch.setattr(pynvml, name, answer)
    monitor = DeviceMonitor("abc")
    sample = monitor.sample()
    assert monitor.note == "" and sample["gpu_mem_bytes"] == 2**30 and sample["gpu_power_w"] == 250.0
    assert np.isnan(sample["gpu_util"])
    monitor.close()
    assert np.isnan(monitor.sample()["gpu_power_w"])


def test_a_sample_that_cannot_be_taken_ends_nothing_and_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that has no descriptor left cannot open a file of /proc."""
    monitor = DeviceMonitor(None)

    def no_descriptor() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(monitor._process, "cpu_percent", no_descriptor)
    first, second = monitor.sample(), monitor.sample()
    assert math.isnan(first["cpu_percent"]) and math.isnan(second["cpu_percent"])
    assert first["rss_bytes"] > 0, "the other figures are still taken"
    assert [r.message for r in caplog.records if "Too many open files" in r.message] == [
        "a device sample is missing (cpu_percent; said once): [Errno 24] Too many open files"
    ]
