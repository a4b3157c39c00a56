"""Earlier samples beside those of a new task: as many as asked, each once, and the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import make_rig

from clif.config import TrainConfig
from clif.data.replay import with_replay
from clif.training.checkpoint import CheckpointWriter
from clif.training.heldout import Heldout
from clif.training.job_switch import JobState, JobSwitch
from clif.training.trainer import ShadowTrainer
from clif.types import TrainSample
from clif.wire.messages import JobData


def samples(count: int, first: int = 0) -> list[TrainSample]:
    return [TrainSample(id=i, ids=(1, 2, i), target_start=1) for i in range(first, first + count)]


NEW, EARLIER = samples(90, 1000), samples(200)


@pytest.mark.parametrize(("share", "replayed"), [(0.0, 0), (0.1, 10), (0.5, 90), (0.9, 200)])
def test_earlier_samples_make_up_their_share_as_far_as_they_go(share: float, replayed: int) -> None:
    mixed = with_replay(NEW, EARLIER, share, seed=1)
    assert mixed[: len(NEW)] == NEW
    drawn = mixed[len(NEW) :]
    assert len(drawn) == replayed == len({sample.id for sample in drawn})
    assert all(sample in EARLIER for sample in drawn)


def test_which_samples_are_replayed_depends_on_the_seed_alone() -> None:
    assert with_replay(NEW, EARLIER, 0.1, seed=1) == with_replay(NEW, EARLIER, 0.1, seed=1)
    assert with_replay(NEW, EARLIER, 0.1, seed=1) != with_replay(NEW, EARLIER, 0.1, seed=2)


def test_without_earlier_samples_nothing_is_mixed_in() -> None:
    assert with_replay(NEW, [], 0.1, seed=1) == NEW


@pytest.mark.parametrize(("own_gate", "replayed"), [(True, 5), (False, 0)])
def test_a_job_of_clif_trains_on_the_runs_own_rows_as_well(
    tiny_config: Path, tmp_path: Path, own_gate: bool, replayed: int
) -> None:
    rig = make_rig(f"random:{tiny_config}")
    own, new = samples(20), samples(5, 1000)
    trainer = ShadowTrainer(rig.train_runner, rig.bank, own, TrainConfig(replay=0.5))
    gate = JobState(Heldout(rig.train_runner, own[:1], 64), CheckpointWriter(tmp_path, 0))
    switch = JobSwitch(trainer, gate, own[:1], tmp_path, 0, 64)
    switch.take(JobData(job="job", train=tuple(new), gate=(new[0],), own_gate=own_gate, complete=True))
    list(switch.switch("job"))
    assert trainer.samples[: len(new)] == new
    assert len(trainer.samples) == len(new) + replayed and all(sample in own for sample in trainer.samples[len(new) :])
