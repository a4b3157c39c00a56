"""The co-serving comparison as a whole, on a random model: its figures mean nothing here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.timeout(240)
def test_the_gpu_benchmark_runs_dry_on_a_cpu(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (report,) = tmp_path.glob("gpu-dry-*.md")
    text = report.read_text()
    for what in ("decode step", "mixed: efficiency", "turns: efficiency", "PEFT + AdamW", "transformers.generate"):
        assert what in text, what
