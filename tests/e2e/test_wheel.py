"""A wheel in a fresh environment and an empty folder: the library, and runs by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from wheel_tree import REPO, copy_sources

pytestmark = pytest.mark.slow
TEN_LINES = """
from clif import LLM, Sampling
with LLM("random:configs/models/tiny-llama.json") as llm:
    answers = llm.generate(["Once upon a time", [5, 6, 7]], Sampling(max_tokens=8, ignore_eos=True))
    print(len(answers), [len(a.token_ids) for a in answers])
import clif
print(clif.__file__)
"""
SHORT = ("run.linger_s=2", "load.duration_s=3", "federation.rounds=1", "quality.exact_match_rows=2")


def shell(*command: str, cwd: Path, **extra: str) -> str:
    """Output of a command; an error fails the test with what it said. It knows nothing of this checkout."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TORCHELASTIC"))}
    done = subprocess.run(command, cwd=cwd, env={**inherited, **extra}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def bin(tmp_path_factory) -> Path:
    """bin/ of an environment with CLIF from its wheel; the large packages are those of the one that tests."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    shell(*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(copy_sources(folder / "tree")), cwd=folder)
    (wheel,) = folder.glob("clif-*.whl")
    venv.create(folder / "env", with_pip=False)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "shared.pth").write_text(str(Path(torch.__file__).parents[1]))
    python = str(folder / "env" / "bin" / "python")
    shell(*pip, "--python", python, "install", "--no-deps", "--no-index", str(wheel), cwd=folder)
    return folder / "env" / "bin"


def test_the_library_runs_from_a_wheel_in_an_empty_folder(bin, tmp_path):
    said = shell(str(bin / "python"), "-c", TEN_LINES, cwd=tmp_path).splitlines()
    assert said[-2] == "2 [8, 8]" and str(bin.parent) in said[-1]
    assert shell(str(bin / "clif"), "--version", cwd=tmp_path).startswith("clif ")


@pytest.mark.parametrize("way", ["clif run", "torchrun clif", "torchrun module"])
def test_a_run_by_name_from_a_wheel_in_an_empty_folder(bin, tmp_path, way):
    python, clif = str(bin / "python"), str(bin / "clif")
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    start = {
        "clif run": [clif, "run", "smoke", "--ranks", "2"],
        "torchrun clif": [*torchrun, "--no-python", clif, "run", "smoke"],
        "torchrun module": [*torchrun, "-m", "clif.run", "--config", "smoke"],
    }[way]
    shell(*start, *SHORT, cwd=tmp_path, OMP_NUM_THREADS="1")
    summary = json.loads((tmp_path / "runs" / "smoke" / "summary.json").read_text())
    assert summary["requests"]["unfinished"] == 0 and summary["training"]["rounds_completed"] == 1


def test_the_demo_runs_from_a_wheel_where_its_assets_are_in_the_working_folder(bin, tmp_path):
    assets = REPO / "assets"
    if not (assets / "smart_home.jsonl").is_file():
        pytest.skip("the demo's model and data are not here: run clif fetch")
    (tmp_path / "assets").symlink_to(assets)
    short = (
        "load.duration_s=10",
        "run.linger_s=1",
        "federation.local_steps=2",
        "data.heldout_rows=8",
        "quality.exact_match_rows=2",
    )
    shell(str(bin / "clif"), "run", "demo", "federation.rounds=null", *short, cwd=tmp_path, OMP_NUM_THREADS="1")
    summary = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())
    assert summary["requests"]["submitted"] > 0 and summary["requests"]["unfinished"] == 0
