"""`make` gives .venv the torch that the machine has, or says why not."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / ".ci" / "make_venv.py"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("make_venv", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put_torch(folder: Path, version: str) -> None:
    """What an installed torch looks like to Python and pip."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    about = folder / f"torch-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")


def environment(path: Path, torch: str | None) -> Path:
    """A virtual environment, as a user has it active; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
    if torch is not None:
        put_torch(script().site_packages(path), torch)
    return path / "bin" / "python"


def make(python: Path, venv: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys, pathlib; sys.path.insert(0, {str(SCRIPT.parent)!r}); import make_venv\n"
    code += f"make_venv.make(pathlib.Path({str(venv)!r}), pip=False)"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True)


def ask(venv: Path, code: str) -> str:
    done = subprocess.run([str(venv / "bin" / "python"), "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_torch_of_an_active_environment_is_seen_by_the_one_that_is_made(tmp_path):
    python, venv = environment(tmp_path / "active", "2.11.0+cu128"), tmp_path / ".venv"
    for _ in range(2):  # Again, as when setup.py has changed.
        done = make(python, venv)
        assert done.returncode == 0 and "using torch 2.11.0+cu128 of" in done.stdout, done.stderr
    assert ask(venv, "import torch; print(torch.__version__)") == "2.11.0+cu128"
    assert ask(venv, "from importlib.metadata import version; print(version('torch'))") == "2.11.0+cu128"


def test_what_is_installed_into_the_made_environment_comes_before_the_machines(tmp_path):
    python, venv = environment(tmp_path / "active", "2.11.0"), tmp_path / ".venv"
    make(python, venv)
    put_torch(script().site_packages(venv), "2.13.0")
    assert ask(venv, "import torch; print(torch.__version__)") == "2.13.0"


def test_an_environment_made_by_its_own_python_does_not_point_to_itself(tmp_path):
    venv = tmp_path / ".venv"
    python = environment(venv, "2.13.0")
    assert make(python, venv).returncode == 0
    assert not (script().site_packages(venv) / script().LINK).exists()


@pytest.mark.parametrize("version", ["2.8.1", "1.13.0+cu117", "2.0"])
def test_a_torch_that_is_too_old_is_named_and_not_hidden_behind_another(tmp_path, version):
    done = make(environment(tmp_path / "active", version), tmp_path / ".venv")
    assert done.returncode == 1 and not (tmp_path / ".venv").exists()
    assert f"has torch {version}, and CLIF needs 2.9 or newer: upgrade it there" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("version", ["2.9.0", "2.10.1", "2.13.0+cpu", "3.0.0a0+git1234"])
def test_a_torch_that_is_new_enough_is_taken(version):
    assert not script().too_old(version)


@pytest.mark.parametrize(("reachable", "calls"), [(True, 1), (False, 2)])
def test_a_bare_machine_gets_the_cpu_build_and_pips_own_choice_where_pytorchs_index_is_out_of_reach(
    tmp_path, monkeypatch, capsys, reachable, calls
):
    module, asked = script(), []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, int("--index-url" in command and not reachable))

    monkeypatch.setattr(module, "torch_here", lambda: None)
    monkeypatch.setattr(module.subprocess, "run", run)
    module.make(tmp_path / ".venv")
    made, *pips = asked
    assert made[1:3] == ["-m", "venv"] and len(pips) == calls
    assert pips[0][-2:] == ["https://download.pytorch.org/whl/cpu", module.CPU_TORCH]
    assert all(p[-1] == "torch==2.13.0" and p[0] == str(tmp_path / ".venv" / "bin" / "python") for p in pips)
    assert ("does not answer" in capsys.readouterr().out) is not reachable
    assert reachable or "--index-url" not in pips[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("given", "expected"), [([], ""), (["TORCH=cpu"], " --cpu-torch")])
def test_make_asks_the_python_that_it_is_given(tmp_path, given, expected):
    command = ["make", "-n", "-B", "-C", str(REPO), "PYTHON=some-python", *given, ".venv/.ready"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert f"some-python .ci/make_venv.py .venv{expected}" in [line.rstrip() for line in lines]


def test_the_oldest_torch_is_that_of_setup_py():
    oldest = ".".join(map(str, script().OLDEST))
    assert f'"torch>={oldest}"' in (REPO / "setup.py").read_text()
