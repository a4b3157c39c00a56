"""Promise 6: a crash at any moment leaves the former or the new checkpoint, whole."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from clif.errors import InputError
from clif.training.checkpoint import Checkpoint, CheckpointWriter, find_checkpoint, load_checkpoint

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
    writer.prepare(checkpoint(1))
    writer.prepare(checkpoint(2))
    writer.wait()
    found = load_checkpoint(tmp_path / "rank-00003.prepared.safetensors", CPU)
    assert found.version == 2
    assert_whole(found)


def test_a_failed_write_keeps_the_former_checkpoint_and_is_reported_once_by_whatever_comes_next(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, 0)
    writer.prepare(checkpoint(1))
    writer.wait()

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    for comes_next in (writer.wait, lambda: writer.prepare(checkpoint(3))):
        with monkeypatch.context() as disk:
            disk.setattr(safetensors.torch, "save_file", half)
            writer.prepare(checkpoint(2))
            with pytest.raises(OSError, match="disk full"):
                comes_next()
        assert load_checkpoint(writer.prepared, CPU).version == 1
        assert_whole(load_checkpoint(writer.prepared, CPU))
    writer.prepare(checkpoint(4))
    writer.wait()
    assert load_checkpoint(writer.prepared, CPU).version == 4


def test_an_error_of_safetensors_itself_is_reported(tmp_path):
    """A folder that vanished: it raises SafetensorError, which is no OSError."""
    writer = CheckpointWriter(tmp_path / "checkpoints", 0)
    (tmp_path / "checkpoints").rmdir()
    writer.prepare(checkpoint(2))
    with pytest.raises(safetensors.SafetensorError, match="No such file"):
        writer.wait()


def test_a_checkpoint_that_cannot_be_written_for_any_reason_is_reported(tmp_path):
    writer = CheckpointWriter(tmp_path, 0)
    writer.prepare(replace(checkpoint(1), cursor={"not json": object()}))
    with pytest.raises(TypeError, match="not JSON serializable"):
        writer.wait()


SAVER = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_checkpoint import CheckpointWriter, checkpoint
writer = CheckpointWriter(Path(sys.argv[1]), 0)
version = 0
while True:
    version += 1
    writer.prepare(checkpoint(version))
    writer.wait()
"""


def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path):
    place = str(__import__("pathlib").Path(__file__).parent)
    for delay in (0.0, 0.013, 0.031):
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path), place])
        path = tmp_path / "rank-00000.prepared.safetensors"
        path.unlink(missing_ok=True)
        end = time.monotonic() + 60
        while not path.exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.wait()
        assert_whole(load_checkpoint(path, CPU))


def of_round(round_id: int) -> Checkpoint:
    return replace(checkpoint(round_id), round_id=round_id)


def rounds_found(folder, rounds) -> int | None:
    found = find_checkpoint(CheckpointWriter(folder, 0), rounds, CPU)
    return None if found is None else found.round_id


def write(writer: CheckpointWriter, round_id: int, commit: bool) -> None:
    writer.prepare(of_round(round_id))
    writer.wait()
    if commit:
        writer.committed()


def test_a_prepared_checkpoint_counts_only_if_its_round_was_committed(tmp_path):
    writer = CheckpointWriter(tmp_path, 0)
    write(writer, 1, commit=False)
    assert rounds_found(tmp_path, frozenset()) is None
    assert rounds_found(tmp_path, {1}) == 1


def test_the_last_committed_state_is_there_whichever_side_of_the_next_commit_the_crash_was(tmp_path):
    """The member was told to commit round 2; whether its adapter was stored, only the control process knows."""
    writer = CheckpointWriter(tmp_path, 0)
    write(writer, 1, commit=True)
    write(writer, 2, commit=True)
    assert rounds_found(tmp_path, {1}) == 1
    assert rounds_found(tmp_path, {1, 2}) == 2


def test_discarded_rounds_never_push_out_the_committed_state(tmp_path):
    writer = CheckpointWriter(tmp_path, 0)
    write(writer, 1, commit=True)
    for round_id in (2, 3, 4):
        write(writer, round_id, commit=False)
    assert rounds_found(tmp_path, {1}) == 1
    # Also when the process that knew that round 1 was committed is gone.
    again = CheckpointWriter(tmp_path, 0)
    assert find_checkpoint(again, {1}, CPU).round_id == 1
    write(again, 5, commit=False)
    assert rounds_found(tmp_path, {1}) == 1


def test_a_resumed_writer_keeps_the_prepared_checkpoint_that_it_went_on_from(tmp_path):
    write(CheckpointWriter(tmp_path, 0), 1, commit=True)
    again = CheckpointWriter(tmp_path, 0)
    assert find_checkpoint(again, {1}, CPU).round_id == 1
    write(again, 2, commit=False)
    assert rounds_found(tmp_path, {1}) == 1


def test_a_replica_outside_the_round_keeps_its_own_state(tmp_path):
    writer = CheckpointWriter(tmp_path, 0)
    write(writer, 1, commit=True)
    writer.installed(of_round(2))
    writer.wait()
    assert rounds_found(tmp_path, {1, 2}) == 2
    write(writer, 3, commit=False)
    assert rounds_found(tmp_path, {1, 2}) == 2


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_checkpoint_is_named_with_what_can_be_done(tmp_path, share):
    writer = CheckpointWriter(tmp_path, 0)
    write(writer, 1, commit=True)
    content = writer.prepared.read_bytes()
    writer.prepared.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=r"rank-00000\.prepared\.safetensors is damaged .*: restore it or delete it"):
        find_checkpoint(writer, {1}, CPU)


def test_a_checkpoint_that_lacks_what_every_one_has_is_damaged(tmp_path):
    path = tmp_path / "rank-00000.safetensors"
    for metadata in ({}, {"version": "1", "round_id": "x", "steps": "1", "cursor": "{}"}, None):
        safetensors.torch.save_file({"shadow": torch.zeros(2)}, path, metadata)
        with pytest.raises(InputError, match="is damaged"):
            load_checkpoint(path, CPU)


def test_a_disk_that_is_full_for_a_moment_delays_a_checkpoint(tmp_path, monkeypatch):
    refusals, save = iter(range(3)), safetensors.torch.save_file

    def full(*args):
        if next(refusals, None) is not None:
            raise safetensors.SafetensorError("Error while serializing: I/O error: No space left (os error 28)")
        save(*args)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    monkeypatch.setattr("clif.storage.disk_space.POLL_S", 0.0)
    writer = CheckpointWriter(tmp_path, 0)
    writer.prepare(checkpoint(1))
    writer.wait()
    assert_whole(load_checkpoint(writer.prepared, CPU))


def test_a_job_that_is_over_leaves_no_checkpoint_and_its_removal_does_not_wait_for_a_full_disk(tmp_path, monkeypatch):
    full, refused = errno.ENOSPC, threading.Event()

    def no_room(tensors, path, metadata):
        path.write_bytes(b"half")
        refused.set()
        raise OSError(full, "no space left on device")

    writer = CheckpointWriter(tmp_path, 0, "a")
    writer.prepare(checkpoint(1))
    writer.wait()
    writer.committed()
    with monkeypatch.context() as disk:
        disk.setattr(safetensors.torch, "save_file", no_room)
        writer.prepare(checkpoint(2))
        assert refused.wait(20)
        writer.remove()
        assert not writer.done(), "it does not wait"
        writer.wait()
    assert not list(tmp_path.iterdir())
    # A round of the job that was averaging goes on.
    writer.prepare(checkpoint(3))
    writer.wait()
    assert not list(tmp_path.iterdir()) and torch.equal(writer.shadow, checkpoint(3).trainer["shadow"])
