"""The stages of make gpu, with commands that need no GPU: what was found is on disk, whatever becomes of the next."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_coserving
import gpu_stages
import gpu_training
import kernel_goals
import psutil
import pytest
from gpu_figures import NAMES
from gpu_stages import STAGES, Session, Stage, chosen


def stage(name: str, code: str, limit_s: float = 20) -> Stage:
    return Stage(name, "a question", limit_s, (sys.executable, "-c", code))


@pytest.fixture
def session(tmp_path: Path) -> Session:
    (tmp_path / "logs").mkdir()
    return Session(tmp_path, dict(os.environ), time.monotonic() + 60, dry=False, about="# About")


def test_a_stage_that_hangs_is_ended_with_all_that_it_started_and_keeps_what_it_said(session, tmp_path):
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "print('### found', flush=True); time.sleep(60)"
    )
    assert not session.run(1, stage("hangs", code, limit_s=1.5))
    text = session.result(1, stage("hangs", code)).read_text()
    assert "* outcome: ended after 2 s" in text and "### found" in text
    child, end = int((tmp_path / "child").read_text()), time.monotonic() + 20
    while is_running(child):
        assert time.monotonic() < end, "what a stage has started goes on"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """A process that has ended may still wait for whoever adopted it to ask for its exit code."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_each_result_is_on_disk_before_the_next_stage_begins(session, tmp_path):
    session.run(1, stage("first", "print('### 42 tokens/s')"))
    looks = f"text = open({str(tmp_path / 'gpu.md')!r}).read(); assert '42 tokens/s' in text and '# About' in text"
    assert session.run(2, stage("second", looks))


def test_a_second_call_repeats_what_failed_and_skips_what_passed(session):
    good, bad = stage("good", "print('fine')"), stage("bad", "raise SystemExit(3)")
    assert session.run(1, good) and not session.run(2, bad)
    assert session.passed(1, good) and not session.passed(2, bad)
    assert "failed with code 3" in session.result(2, bad).read_text()


def test_a_stage_without_a_table_shows_the_end_of_its_log(session):
    session.run(1, stage("trace", "1 / 0"))
    assert "ZeroDivisionError" in (session.folder / "gpu.md").read_text()


def test_a_stage_that_is_ended_keeps_the_figures_that_it_had(session, tmp_path):
    code = "import time; print('FIGURE train-512 4.5 a note', flush=True); time.sleep(60)"
    assert not session.run(1, stage("hangs", code, limit_s=1.5))
    session.run(2, stage("next", "print('FIGURE kept-70 0.5')"))
    text = (tmp_path / "gpu.md").read_text()
    assert "| the same, 512 tokens | 1.26x | >= 4x | 4.5x | yes |" in text and "* train-512: a note" in text
    assert (
        "| 50% at 70 % load, not measured lost, not measured at 100 %, not measured lost | no |" in text
        and text.count("## Figures") == 1
    )


def test_stages_are_chosen_by_name_and_an_unknown_name_is_refused():
    assert [(n, s.name) for n, s in chosen("run,faults")] == [(1, "faults"), (8, "run")]
    assert len(chosen("")) == len(STAGES)
    with pytest.raises(ValueError, match="no stage decoding: choose from faults, decode"):
        chosen("decoding")


def test_the_first_four_stages_fit_in_four_minutes_and_come_first():
    assert [s.name for s in STAGES[:4]] == ["faults", "decode", "training", "coserving"]
    assert sum(s.limit_s for s in STAGES[:4]) <= 240


def test_every_figure_of_the_final_table_is_said_by_a_stage_that_comes_first_or_by_the_kernels():
    names = {word for stage in STAGES[:5] for word in stage.command if word.startswith("benchmarks/")}
    code = "\n".join((gpu_stages.REPO / name).read_text() for name in names)
    said = {f"{figure}-{name}" for figure in ("kept", "lost", "gap") for name in gpu_coserving.NAMED.values()}
    said |= {f"decode-{name}" for name in ("1b", "8b")} | set(gpu_training.FIGURES)
    said |= {name for name in NAMES if f'say("{name}"' in code} | set(kernel_goals.QUESTIONS)
    assert said == NAMES


def test_every_test_for_a_gpu_belongs_to_a_stage():
    named = {word for stage in STAGES for word in stage.command if word.startswith("tests/gpu/")}
    assert named == {f"tests/gpu/{file.name}" for file in (gpu_stages.REPO / "tests" / "gpu").glob("test_*.py")}


def test_stages_at_once_wait_for_each_other_and_each_keeps_its_result(session, tmp_path):
    """The first one ends only when the last one has begun."""
    code = f"import pathlib, time\nat = pathlib.Path({str(tmp_path)!r}) / 'begun'\n"
    first = stage("first", code + "while not at.exists(): time.sleep(0.01)\nprint('### one')")
    last, bad = stage("last", code + "at.touch(); print('### two')"), stage("bad", "1 / 0")
    assert gpu_stages.take_all(session, [(1, first), (2, bad), (3, last)], again=False, at_once=True) == ["bad"]
    text = (tmp_path / "gpu.md").read_text()
    assert "### one" in text and "### two" in text and "ZeroDivisionError" in text


def test_tests_that_are_ended_have_said_what_failed(tmp_path):
    (tmp_path / "test_it.py").write_text("import os\ndef test_a(): assert 1 == 2\ndef test_b(): os._exit(7)\n")
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "said_at_once", str(tmp_path / "test_it.py")],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}, cwd=tmp_path,
    )  # fmt: skip
    assert found.returncode == 7 and "FAILED test_it.py::test_a" in found.stdout and "assert 1 == 2" in found.stdout


def test_no_stage_is_begun_when_time_is_up(session):
    session.end_s = time.monotonic() + 1
    good = stage("good", "print('fine')")
    assert not session.take(1, good, again=False) and not session.result(1, good).exists()
    session.end_s += 60
    assert session.take(1, good, again=False)


def test_compiling_ahead_is_ended_with_the_stages(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(gpu_stages, "script", lambda name: (sys.executable, "-c", "import time; time.sleep(60)"))
    with gpu_stages.compiling_ahead(tmp_path, dict(os.environ)):
        pass
    assert (tmp_path / "logs" / "ahead.log").read_bytes() == b""


@pytest.mark.slow
def test_every_job_that_compiles_ahead_reaches_its_kernel():
    command = [sys.executable, "benchmarks/gpu_ahead.py", "--dry"]
    done = subprocess.run(command, cwd=gpu_stages.REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "6 of 6 compiled" in done.stdout, done.stdout + done.stderr


LACKS = """
import sys
class Lacks:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in {packages!r} else self.finder.find_spec(name, *rest)
sys.meta_path[:] = [Lacks(finder) for finder in sys.meta_path]
"""


def without(tmp_path: Path, *packages: str) -> dict[str, str]:
    """An environment of the stages in which some packages cannot be found."""
    env = gpu_stages.environment(tmp_path / "out", None)
    (tmp_path / "out" / "site" / "sitecustomize.py").write_text(LACKS.format(packages=packages))
    return env


@pytest.mark.slow
def test_a_machine_without_what_only_other_models_and_launchers_need_runs_all_stages(tmp_path):
    about = gpu_stages.provenance(without(tmp_path, "gguf", "deepspeed", "mpi4py", "peft"), dry=True)
    assert "machine: " in about


def test_a_package_that_is_missing_is_named_before_any_stage_begins(tmp_path):
    with pytest.raises(ValueError, match=r"this machine lacks msgspec: put wheels .* make gpu WHEELS="):
        gpu_stages.provenance(without(tmp_path, "msgspec"), dry=True)


def test_the_checkout_is_importable_without_having_been_installed(tmp_path):
    env = {**gpu_stages.environment(tmp_path, None), "PYTHONSAFEPATH": "1"}
    code = "import clif.control.server, clif.kernels.tiles, clif.launch.run; print(clif.__path__[0])"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "site" / "clif")
