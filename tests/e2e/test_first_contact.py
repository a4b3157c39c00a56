"""What a person sees of a start that goes wrong: the cause, in a sentence, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import warm

from clif.distributed.addresses import free_port


def start(folder: Path, *overrides: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    """One rank without torchrun, whose own traceback would hide ours. fault: of rank 0, see faulty_run.py."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **alone, "MASTER_PORT": str(free_port()), "CLIF_FAULTS": fault}
    command = ["tests/faulty_run.py", "--config", "configs/smoke.yaml", f"run.out_dir={folder}", "run.status=plain"]
    return warm.run([*command, *overrides], environment, timeout=100)


@pytest.mark.parametrize(
    ("override", "fault", "says", "code"),
    [
        ("run.seed=1", "0:check_samples:1", "error: injected into call 1 of check_samples: lower engine.kv_tokens", 2),
        ("dist.control_host=203.0.113.7", "", "set dist.control_host to an own address", 1),
    ],
    ids=["in a rank", "in the control process"],
)
def test_a_late_error_is_told_as_what_it_is_and_leaves_no_folder(tmp_path, override, fault, says, code):
    done = start(tmp_path, override, fault=fault)
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    (cause,) = [number for number, line in enumerate(lines) if says in line]
    assert not any("got SIG" in line for line in lines[:cause]), "the cause comes first"
    assert "Traceback" not in done.stderr and "run.resume=true" not in done.stderr
    assert not list(tmp_path.iterdir()) and lines[-1] == f"nothing ran: {tmp_path}/smoke is removed"


def test_a_place_that_cannot_hold_a_run_is_told_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    done = start(tmp_path / "file")
    assert done.returncode == 2 and "error: the run's folder cannot be used: " in done.stderr
    assert "Traceback" not in done.stderr and "rank 0: random" not in done.stderr
