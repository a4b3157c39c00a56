"""Promise 6 with a real MPI, as on a cluster. What needs one is skipped, with the reason, where none is installed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import h5py
import pytest
from run_files import contents, left_over, write_run

from clif.cli import main
from clif.errors import InputError
from clif.metrics.collect import collect
from clif.metrics.schema import CONTROL_TABLES
from clif.metrics.summary import write_summary
from clif.metrics.world import announced, world
from clif.metrics.writer import TableWriter

COLLECT = ["-m", "clif.cli", "collect"]
# For Open MPI 4 and 5: as root, and with more processes than cores. Other MPIs do not look at them.
ALLOW = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMP_NUM_THREADS": "1",
}
# In one write: what print writes in two may mix with that of another process.
WORLD = "import os; from mpi4py import MPI; os.write(1, b'world of %d\\n' % MPI.COMM_WORLD.Get_size())"
# Two rows are flushed, the third is not.
VICTIM = """
import sys
from pathlib import Path
from clif.metrics.schema import RANK_TABLES
from clif.metrics.writer import TableWriter
now = [50.0]
writer = TableWriter(Path(sys.argv[1]), RANK_TABLES, {"host": "node7"}, clock=lambda: now[0])
for number, now[0] in enumerate((60.0, 3775.0)):
    writer.row("versions", version=number, step=number, slot=0)
writer.flush()
writer.row("versions", version=99, step=99, slot=0)
print("flushed", flush=True)
sys.stdin.read()
"""
# One process of several breaks at its second file; MODE says how.
BROKEN = """
import os, signal, sys, time
import clif.metrics.share as share
from clif.cli import main
read = share.read
def broken(source):
    if source.name == "rank-00001" and MODE == "raise":
        raise ZeroDivisionError("cosmic ray")
    if source.name == "rank-00001" and MODE == "die":
        while not list(source.path.parent.glob(".collect-*/run.h5")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    if source.name == "rank-00001" and MODE == "wait":
        time.sleep(60)
    yield from read(source)
share.read = broken
sys.argv[0] = "clif"
main()
"""


def mpirun(size: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = ["mpirun", "-n", str(size), sys.executable, *arguments]
    return subprocess.run(command, env={**os.environ, **ALLOW}, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def mpi() -> None:
    """Skips where mpirun cannot start a world that mpi4py sees."""
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun: install an MPI, e.g. Debian's openmpi-bin")
    done = mpirun(2, ["-c", WORLD])
    if done.stdout.count("world of 2\n") != 2:
        pytest.skip(f"mpirun and mpi4py do not fit together: {done.stdout} {done.stderr[-500:]}")


def ends_politely() -> bool:
    """Open MPI sends SIGTERM before SIGKILL; MPICH does not, and then nobody can tidy up."""
    return "Open MPI" in subprocess.run(["mpirun", "--version"], capture_output=True, text=True, timeout=60).stdout


def kill_between_flushes(path: Path) -> None:
    command = [sys.executable, "-c", VICTIM, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "flushed\n"
        process.kill()
        assert process.wait() == -signal.SIGKILL


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Restarts, a file of a killed rank, one that is no HDF5, and a table that takes several pieces of 4 MiB."""
    write_run(tmp_path, [50, 7, 30_000, 0])
    with TableWriter(tmp_path / "control.r1.h5", CONTROL_TABLES, {"host": "a"}) as writer:
        for number in range(2000):
            writer.row("rounds", round_id=number, state="committed", members="0,1", version=1, started_s=0.0,
                       ended_s=1.0, reason="test")  # fmt: skip
    kill_between_flushes(tmp_path / "rank-00003.h5")
    (tmp_path / "rank-00004.h5").write_bytes(b"not HDF5")
    return tmp_path


def test_promise_6_file_of_a_killed_rank_is_taken_up_to_its_last_flush_and_the_report_says_so(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with h5py.File(collect(run_dir)) as run:
        assert run["versions"]["version"].tolist() == [0, 1]
        assert run.attrs["unclosed"].tolist() == ["rank-00003"]
        killed, closed = run["sources/rank-00003"].attrs, run["sources/rank-00001"].attrs
        assert not killed["closed"] and killed["last_row_s"] == 3725.0
        assert closed["closed"] and 0 <= closed["last_row_s"] <= closed["end_s"]
    assert "rank-00003" in caplog.text
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["clif", "report", str(run_dir)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    expected = (
        "rank-00003 (node7) ended without closing, or still runs: rows up to its last flush, 01:02:05 after its start"
    )
    assert expected in capsys.readouterr().out
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["run"]["unclosed"] == [{"source": "rank-00003", "host": "node7", "last_row_s": 3725.0}]


def test_file_that_was_never_flushed_has_no_last_row(tmp_path: Path) -> None:
    with TableWriter(tmp_path / "control.h5", CONTROL_TABLES, {}):
        (entry,) = write_summary(tmp_path)["run"]["unclosed"]
    assert entry == {"source": "control", "host": "", "last_row_s": None}
    assert write_summary(tmp_path)["run"]["unclosed"] == [], "closed in the meantime"


@pytest.mark.usefixtures("mpi")
@pytest.mark.parametrize("size", [1, 2, 5, pytest.param(10, marks=pytest.mark.slow, id="more-processes-than-files")])
def test_promise_6_mpirun_gives_the_same_file_row_for_row(run_dir: Path, size: int) -> None:
    alone = contents(collect(run_dir))
    (run_dir / "run.h5").unlink()
    done = mpirun(size, [*COLLECT, str(run_dir)])
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run_dir / 'run.h5'}\n" and done.stderr.count("not merged: rank-00004.h5") == 1
    assert contents(run_dir / "run.h5") == alone and left_over(run_dir) == []


@pytest.mark.usefixtures("mpi")
@pytest.mark.parametrize(("mode", "expected"), [("raise", "cosmic ray"), ("die", "signal 9")])
def test_broken_process_ends_all_of_them_and_leaves_nothing(run_dir: Path, mode: str, expected: str) -> None:
    done = mpirun(3, ["-c", f"MODE = {mode!r}\n{BROKEN}", "collect", str(run_dir)])
    assert done.returncode != 0 and expected in done.stdout + done.stderr
    assert not (run_dir / "run.h5").exists()
    assert left_over(run_dir) == [] or (mode == "die" and not ends_politely())


@pytest.mark.usefixtures("mpi")
def test_collecting_that_is_ended_from_outside_leaves_nothing(run_dir: Path) -> None:
    command = ["mpirun", "-n", "3", sys.executable, "-c", f"MODE = 'wait'\n{BROKEN}", "collect", str(run_dir)]
    with subprocess.Popen(command, env={**os.environ, **ALLOW}, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 30
        while not list(run_dir.glob(".collect-*/run.h5")):
            assert time.monotonic() < until
            time.sleep(0.01)
        process.terminate()
        assert process.wait(30) != 0
    assert not (run_dir / "run.h5").exists()
    assert left_over(run_dir) == [] or not ends_politely()


@pytest.mark.usefixtures("mpi")
def test_nothing_to_collect_is_one_line_and_not_a_hang(tmp_path: Path) -> None:
    done = mpirun(3, [*COLLECT, str(tmp_path)])
    assert done.returncode == 2 and done.stderr.count("error: no metrics in") == 1 and "Traceback" not in done.stderr


@pytest.mark.usefixtures("mpi")
def test_processes_that_mpi_does_not_see_as_one_world_are_refused(run_dir: Path) -> None:
    environment = {**os.environ, **ALLOW, "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    command = [sys.executable, *COLLECT, str(run_dir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not (run_dir / "run.h5").exists()
    assert "2 processes were started (WORLD_SIZE=2), but MPI sees a world of 1" in done.stderr


@pytest.mark.usefixtures("mpi")
def test_report_is_done_by_one_process(run_dir: Path) -> None:
    done = mpirun(2, ["-m", "clif.cli", "report", str(run_dir)])
    assert done.returncode == 2 and "clif report is done by one process" in done.stderr


def test_one_process_never_imports_mpi4py(run_dir: Path) -> None:
    code = "import sys; sys.modules['mpi4py'] = None; from clif.cli import main; main()"
    environment = {**os.environ, "SLURM_NTASKS": "8", "WORLD_SIZE": "8"}  # As in a job script.
    command = [sys.executable, "-c", code, "collect", str(run_dir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == f"{run_dir / 'run.h5'}\n", done.stderr


@pytest.mark.parametrize(
    ("environ", "size"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, 4),
        ({"PMI_SIZE": "3", "PMI_RANK": "0"}, 3),
        ({"MV2_COMM_WORLD_SIZE": "3"}, 3),
        ({"SLURM_STEP_NUM_TASKS": "5", "SLURM_NTASKS": "9"}, 5),
        ({"SLURM_NTASKS": "9", "SLURM_PROCID": "0"}, None),
        ({"WORLD_SIZE": "8"}, None),
        ({"WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "x"}, 8),
        ({"PMI_SIZE": ""}, None),
    ],
)
def test_launchers_are_known_by_what_they_announce(environ: dict[str, str], size: int | None) -> None:
    assert announced(environ) == size


def fake_mpi(monkeypatch: pytest.MonkeyPatch, size: int) -> Any:
    comm = types.SimpleNamespace(Get_size=lambda: size)
    module = types.SimpleNamespace(MPI=types.SimpleNamespace(COMM_WORLD=comm))
    monkeypatch.setitem(sys.modules, "mpi4py", module)
    return comm


def test_world_is_what_launcher_and_mpi_agree_on(monkeypatch: pytest.MonkeyPatch) -> None:
    comm = fake_mpi(monkeypatch, 4)
    assert world({"OMPI_COMM_WORLD_SIZE": "4"}) is comm and world({"PMIX_RANK": "0"}) is comm
    assert world({}) is None and world({"PMI_SIZE": "1"}) is None
    with pytest.raises(InputError, match=r"2 processes were started \(PMI_SIZE=2\), but MPI sees a world of 4"):
        world({"PMI_SIZE": "2"})


def test_worlds_of_one_process_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_mpi(monkeypatch, 1)
    for environ in ({"OMPI_COMM_WORLD_SIZE": "3"}, {"SLURM_STEP_NUM_TASKS": "3"}, {"PMIX_RANK": "2"}):
        with pytest.raises(InputError, match=r"3 processes were started .* start one process without a launcher"):
            world(environ)
    assert world({"PMIX_RANK": "0"}) is None, "one process alone, or the one of many that does the work"


def test_missing_mpi_is_an_error_that_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise (
                RuntimeError("cannot load MPI library\nlibmpi.so.40: cannot open") if name == "MPI" else AttributeError
            )

    monkeypatch.setitem(sys.modules, "mpi4py", Module("mpi4py"))
    with pytest.raises(InputError, match=r"cannot load MPI library libmpi.* install an MPI .*or start one process"):
        world({"PMI_SIZE": "2"})
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(InputError, match="install an MPI"):
        world({"PMI_SIZE": "2"})
