"""Whole runs by the real launcher: torchrun, two ranks on gloo, a random model, byte tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import warm
from launched import PROMISED, Launched

from clif.metrics.collect import collect

REPO = Path(__file__).resolve().parents[2]


def command(run_dir: Path, *overrides: str) -> list[str]:
    """torchrun's arguments."""
    place = [f"run.out_dir={run_dir.parent}", f"run.name={run_dir.name}", "run.status=plain"]
    ranks = ["--standalone", "--nproc-per-node", "2"]
    return [*ranks, "launch/run.py", "--config", "configs/smoke.yaml", *place, *overrides]


def ends(run_dir: Path) -> dict[int, tuple[str, str]]:
    """Terminal event of every request in the collected records; fails if one has two."""
    with h5py.File(collect(run_dir)) as file:
        rows = [(int(r["id"]), r["finish"].decode(), r["detail"].decode()) for r in file["requests"][:]]
        submitted = {int(i) for i in file["load"][:]["request"]}
    assert len({id for id, *_ in rows}) == len(rows), "a request ended twice"
    found = {id: (finish, detail) for id, finish, detail in rows}
    assert submitted <= found.keys(), "an accepted request never ended"
    return found


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("e2e") / "smoke"
    # For real, without a server that has imported everything.
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", *command(run_dir, *PROMISED)]
    done = subprocess.run(torchrun, cwd=REPO, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir


def test_all_of_a_run_is_its_owners_alone(finished_run):
    """Before the other tests collect its files once more, in a process that is not so private."""
    modes = {path: (path.is_dir(), path.stat().st_mode & 0o777) for path in (finished_run, *finished_run.rglob("*"))}
    assert len(modes) > 12 and set(modes.values()) == {(True, 0o700), (False, 0o600)}, modes


def test_run_ends_by_itself_and_every_request_has_one_terminal_event(finished_run):
    """Promise 1; in tests/e2e/test_restart.py also of runs in which something dies."""
    summary = json.loads((finished_run / "summary.json").read_text())
    assert summary["requests"]["submitted"] == summary["requests"]["finished"]["length"] > 0
    assert summary["requests"]["unfinished"] == 0
    assert {finish for finish, _ in ends(finished_run).values()} <= {"length", "stop"}


def test_rounds_are_committed_and_the_adapter_gets_better(finished_run):
    summary = json.loads((finished_run / "summary.json").read_text())
    assert summary["training"]["rounds_completed"] >= 2
    assert summary["quality"]["heldout_loss_after"] < summary["quality"]["heldout_loss_before"]
    versions = {int(v) for v in summary["adapters"]["versions_served"]}
    assert len(versions) >= 2, "requests were answered before and after a promotion"


def test_promoted_adapters_are_peft_folders(finished_run):
    current = json.loads((finished_run / "adapters" / "current.json").read_text())
    folder = finished_run / "adapters" / f"v{current['version']:04d}"
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert (folder / "adapter_model.safetensors").stat().st_size > 0


def test_run_resumes_from_its_last_committed_round(finished_run):
    """Promise 6."""
    before = json.loads((finished_run / "adapters" / "current.json").read_text())["version"]
    overrides = ("run.resume=true", "federation.rounds=1", "load.duration_s=2", "quality.exact_match_rows=0")
    done = warm.run([warm.TORCHRUN, *command(finished_run, *PROMISED, *overrides)], timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    after = json.loads((finished_run / "adapters" / "current.json").read_text())["version"]
    assert after == before + 1
    with h5py.File(finished_run / "run.h5") as file:
        assert sorted(file["adapters"][:]["version"].tolist()) == list(range(1, after + 1))
        resumed = [r for r in file["requests"][:] if r["source"] == b"control.r1"]
    assert resumed and all(r["version"] >= before for r in resumed), "nobody is answered by an older adapter again"


def test_run_ends_when_the_control_process_dies(tmp_path):
    run = Launched(tmp_path, "load.duration_s=60", restarts=0)
    run.wait_until("open:")
    run.control().kill()
    assert run.end(60) != 0
    assert "the control process was killed by signal 9" in run.log.read_text()
    assert collect(run.run_dir).is_file(), "what was flushed is there"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.path=/nowhere/model.gguf", "does not exist"),
        ("layout.tp_size=3", "does not divide the 2 ranks"),
    ],
)
def test_bad_configuration_ends_at_once_with_what_to_change(tmp_path, override, sentence):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = warm.run([warm.TORCHRUN, *command(tmp_path / "bad", override)], environment, timeout=100)
    assert done.returncode != 0
    assert sentence in done.stderr, done.stderr[-2000:]
