"""Promise 6: a crash at any moment leaves the former or the new checkpoint, whole."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

from clif.replica.checkpoint import Checkpoint, CheckpointWriter, load_checkpoint

CPU = torch.device("cpu")


def checkpoint(version: int) -> Checkpoint:
    shadow = torch.full((50_000,), float(version))
    moments = {"exp_avg": shadow + 1, "exp_avg_sq": shadow + 2, "step": torch.tensor(float(version))}
    trainer = {"shadow": shadow, "moments": moments, "steps": version}
    return Checkpoint(version, 7, trainer, {"n": 3, "released": [1]})


def assert_whole(found: Checkpoint) -> None:
    expected = checkpoint(found.version)
    assert found.cursor == expected.cursor and found.trainer["steps"] == found.version
    assert torch.equal(found.trainer["shadow"], expected.trainer["shadow"])
    assert all(torch.equal(found.trainer["moments"][k], v) for k, v in expected.trainer["moments"].items())


def test_what_is_saved_comes_back(tmp_path):
    writer = CheckpointWriter(tmp_path, 3)
    writer.save(checkpoint(1))
    writer.save(checkpoint(2))
    writer.wait()
    found = load_checkpoint(tmp_path / "rank-00003.safetensors", CPU)
    assert found.version == 2
    assert_whole(found)


def test_a_failed_write_keeps_the_former_checkpoint_and_is_reported(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, 0)
    writer.save(checkpoint(1))
    writer.wait()

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    writer.save(checkpoint(2))
    with pytest.raises(OSError, match="disk full"):
        writer.wait()
    assert_whole(load_checkpoint(writer.path, CPU))


SAVER = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_checkpoint import CheckpointWriter, checkpoint
writer = CheckpointWriter(Path(sys.argv[1]), 0)
version = 0
while True:
    version += 1
    writer.save(checkpoint(version))
    writer.wait()
"""


def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path):
    place = str(__import__("pathlib").Path(__file__).parent)
    for delay in (0.0, 0.013, 0.031):
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path), place])
        path = tmp_path / "rank-00000.safetensors"
        path.unlink(missing_ok=True)
        end = time.monotonic() + 60
        while not path.exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.wait()
        assert_whole(load_checkpoint(path, CPU))
