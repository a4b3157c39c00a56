"""A run under torchrun that trains jobs while a rank is killed: no sample is lost or counted twice."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch
from launched import Launched, accepted_ids

from clif.adapters.store import AdapterStore
from clif.jobs.model import Hyperparameters, Job, JobFile, JobStatus
from clif.jobs.samples import samples_path, write_samples
from clif.jobs.store import JobStore
from clif.training.checkpoint import CheckpointWriter, find_checkpoint
from clif.types import TrainSample

SHORT = ("load.duration_s=1", "load.rate_rps=4", "load.max_tokens=8")


def add_jobs(run_dir: Path) -> None:
    """Two that go on for longer than the run: one trains adapter clif, one its own."""
    path = samples_path(run_dir, "file-a")
    path.parent.mkdir()
    write_samples(path, [TrainSample(id=i, ids=(i + 3, 5, 7, i + 4, 9, 11), target_start=3) for i in range(60)])
    store = JobStore(run_dir)
    store.register_file(JobFile(id="file-a", filename="a", bytes=1, rows=60, tokens=1, longest=6, created_s=0.0))
    for name, suffix in (("ftjob-a", ""), ("ftjob-b", "support")):
        wanted = Hyperparameters(n_epochs=10_000)
        given = {"training_file": "file-a", "suffix": suffix, "adapter": suffix or "clif", "hyperparameters": wanted}
        store.create_job(Job(id=name, created_s=0.0, **given))
    store.close()


def committed_samples(run_dir: Path, job: str) -> int:
    """As the ranks' checkpoints have it."""
    rounds, cpu = AdapterStore(run_dir).rounds(), torch.device("cpu")
    found = [find_checkpoint(CheckpointWriter(run_dir / "checkpoints", rank, job), rounds, cpu) for rank in (0, 1)]
    return sum(one.cursor["committed"] for one in found if one is not None)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank 1", "control"])
def test_a_kill_in_the_middle_of_a_jobs_round_loses_no_sample_and_counts_none_twice(tmp_path, victim):
    """About 40 s: three starts of two ranks."""
    first = Launched(tmp_path, *SHORT, "federation.rounds=1")
    assert first.end() == 0, first.say()
    add_jobs(first.run_dir)
    run = Launched(
        tmp_path, *SHORT, "federation.rounds=3", "run.linger_s=15", "run.resume=true", "adapter.serving_slots=5"
    )
    run.wait_until("(job ftjob-b", times=2)
    time.sleep(0.2)
    process = run.control() if victim == "control" else run.rank(1)
    process.send_signal(signal.SIGKILL)
    run.wait_until("(job ftjob-b", times=4)
    assert run.end() == 0, run.say()
    assert len(set(accepted_ids(run.run_dir))) == len(accepted_ids(run.run_dir))
    store = JobStore(run.run_dir)
    versions = AdapterStore(run.run_dir).committed()
    for name, adapter in (("ftjob-a", "clif"), ("ftjob-b", "support")):
        job, rounds = store.get_job(name), store.checkpoints(name)
        assert [r.round_id for r in rounds] == [v.round_id for v in versions if v.job == name]
        assert {v.adapter for v in versions if v.job == name} == {adapter}
        assert job.counted == sum(r.samples for r in rounds) == committed_samples(run.run_dir, name) > 0
        assert job.status is JobStatus.RUNNING
