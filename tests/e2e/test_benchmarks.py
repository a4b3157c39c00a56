"""Benchmarks as a whole, on random models: their figures mean nothing here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import warm

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_comparison_runs_in_every_mode_and_reports(tmp_path):
    command = [sys.executable, "benchmarks/coserving.py", "--smoke", "--load-s", "3"]
    command += ["--out", str(tmp_path), "--runs", str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (report,) = tmp_path.glob("coserving-smoke-*.md")
    lines = report.read_text().splitlines()
    for mode in ("clif", "serve_only", "time_slice", "split"):
        assert any(line.startswith(f"| {mode} | 70% |") for line in lines), mode
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.slow
def test_the_engine_s_comparison_runs_dry_with_all_contenders(tmp_path):
    command = [sys.executable, "benchmarks/engine.py", "--dry", "--dtype", "float32", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (report,) = tmp_path.glob("engine-float32-dry-*.md")
    lines = report.read_text().splitlines()
    for name in ("CLIF", "transformers.generate, static batch", "transformers generate_batch"):
        assert any(line.startswith(f"| {name} |") and "4 of 4 answers begin alike" in line for line in lines), name
    assert sum("| loss 6." in line for line in lines) == 2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        pytest.param("gpu_faults", [": 0 of 12 fail"], marks=pytest.mark.slow),
        pytest.param("gpu_prompts", [": 0 of 4 fail", "FIGURE prompt-1b"], marks=pytest.mark.slow),
        pytest.param("gpu_regressions", [": 0 of 8 fail"], marks=pytest.mark.slow),
        pytest.param("gpu_decode", ["FIGURE decode-1b", "FIGURE generate-1b"], marks=pytest.mark.slow),
        ("gpu_training", ["FIGURE train-16384", "FIGURE train-512"]),
        pytest.param(
            "gpu_coserving",
            ["FIGURE efficiency", "FIGURE kept-70", "FIGURE kept-100", "FIGURE gap-100"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_first_stages_of_make_gpu_run_dry_on_a_cpu(name, says):
    done = warm.run([f"benchmarks/{name}.py", "--dry"], timeout=230)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert all(what in done.stdout for what in says), done.stdout


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_gpu_stages_run_dry_on_a_cpu(tmp_path):
    command = [sys.executable, "benchmarks/gpu_stages.py", "--dry", "--out", str(tmp_path)]
    command += ["--only", "faults,decode,training,coserving"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=230)
    text = (tmp_path / "gpu.md").read_text()
    assert done.returncode == 0, done.stdout[-2000:] + text[-4000:]
    assert text.count("* outcome: passed") == 4 and "| dry run |" in text
