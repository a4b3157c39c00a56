"""What a rank does in the tests of training jobs. Importable by name, as processes of their own need it."""

from __future__ import annotations

from typing import Any

import torch
from bodies import Driver, serve_alone
from helpers import finish

from clif.distributed.topology import Topology
from clif.types import CLIF, RoundPlan, TrainSample
from clif.wire import messages as m

ADAPTERS = {"": CLIF, "on-clif": CLIF, "a": "one", "b": "two"}
OPTIONS = {"adapter": {"serving_slots": 5}, "train": {"lr": 0.02, "micro_batch": 2, "warmup_steps": 3}}


class Jobs:
    """A replica that trains jobs, of different samples, in any order. base: the active version of each adapter."""

    def __init__(self, topology: Topology, model: str, data: str | None, run_dir: str, **sections: Any) -> None:
        self.driver = Driver(topology, model, data, run_dir, **OPTIONS, **sections)
        self.base: dict[str, int] = {}
        self.rounds: dict[str, list[int]] = {}
        self.losses: dict[str, list[float]] = {}
        self.last = 0

    def bring(self, *jobs: str, rounds: tuple[int, ...] = ()) -> None:
        rows = self.driver._rows
        for i, job in enumerate(jobs):
            train, gate = rows.train[5 * i : 5 * i + 7], rows.gate[i : i + 2]
            self.driver.step(m.JobData(job=job, train=tuple(train[:3]), gate=tuple(gate)))
            last = m.JobData(job=job, train=tuple(train[3:]), seed=i + 7, rounds=rounds, complete=True)
            self.driver.step(last)

    def round(self, job: str, commit: bool = True) -> m.Voted:
        self.last, adapter = self.last + 1, ADAPTERS[job]
        self.driver.said.clear()
        plan = RoundPlan(
            round_id=self.last, members=(0,), incarnations=(0,), local_steps=3, micro_batch=2, accumulation=1,
            base_version=self.base.get(adapter, 0), job=job, adapter=adapter,
        )  # fmt: skip
        self.driver.step(m.BeginRound(plan=plan, group=1))
        result = self.driver.wait_for(m.StepsDone).result
        self.losses.setdefault(job, []).append(result.loss)
        self.driver.step(m.Aggregate(round_id=self.last))
        vote = self.driver.wait_for(m.Voted)
        version = self.last if commit else plan.base_version
        self.driver.step(m.Settle(round_id=self.last, commit=commit, version=version))
        self.driver.wait_for(m.Settled)
        if commit:
            self.base[adapter] = self.last
            self.rounds.setdefault(job, []).append(self.last)
        self.driver.step(m.Keep(versions=tuple(v for name, v in self.base.items() if name != CLIF)))
        return vote

    def state(self, job: str) -> dict[str, Any]:
        """All that the next round of a job begins with."""
        member = self.driver.replica.member
        finish(member.job_switch.switch(job))
        member.masters.begin_from(self.base.get(ADAPTERS[job], 0))
        return {**member.trainer.snapshot(), "cursor": member.trainer.cursor_state(), "losses": self.losses.get(job)}


def jobs_in_turn(
    topology: Topology, model: str, data: str, run_dir: str, order: list[tuple[str, bool]]
) -> dict[str, dict[str, Any]]:
    """order: (job, whether its round is committed). Returns the state of each job at the end."""
    jobs = Jobs(topology, model, data, run_dir)
    jobs.bring("a", "b")
    for job, commit in order:
        jobs.round(job, commit)
    return {job: jobs.state(job) for job in dict(order)}


def a_job_with_its_own_adapter(topology: Topology, model: str, data: str, run_dir: str) -> dict[str, Any]:
    """Answers of adapter clif before and after rounds of another one, and of that one."""
    jobs = Jobs(topology, model, data, run_dir)
    jobs.bring("a")
    jobs.round("")
    before = serve_alone(jobs.driver, 1)
    votes = [jobs.round("a").vote for _ in range(3)]
    member = jobs.driver.replica.member
    return {
        "before": before, "after": serve_alone(jobs.driver, 2), "active": member.slots.active,
        "held": member.slots.held, "votes": votes,
    }  # fmt: skip


def jobs_of_an_adapter(topology: Topology, model: str, data: str, run_dir: str) -> dict[str, Any]:
    """A job and the run's own data train adapter clif in turn: each goes on from what the other has made."""
    jobs = Jobs(topology, model, data, run_dir)
    jobs.bring("on-clif")
    votes = [jobs.round(job).vote for job in ("", "on-clif", "")]
    member = jobs.driver.replica.member
    return {"active": member.slots.active, "votes": votes, "shadow": member.masters.shadow}


def resumed_job(topology: Topology, model: str, data: str, run_dir: str) -> dict[str, Any]:
    """A job before and after its rank starts again; its third round was not committed."""
    jobs = Jobs(topology, model, data, run_dir)
    jobs.bring("a", "b")
    jobs.round("a")
    jobs.round("b")
    jobs.round("a")
    before = jobs.state("a")
    jobs.round("a", commit=False)
    jobs.driver.replica.close()
    jobs.driver.start()
    jobs.bring("a", rounds=tuple(jobs.rounds["a"]))
    trainer = jobs.driver.replica.member.trainer
    finish(jobs.driver.replica.member.job_switch.switch("a"))
    after = {**trainer.snapshot(), "cursor": trainer.cursor_state()}
    jobs.driver.step(m.JobOver(job="a"))
    left = sorted(path.name for path in (jobs.driver.folder / "checkpoints").glob("*"))
    return {"before": before, "after": after, "left": left}


def samples_that_are_not_there(topology: Topology, model: str, data: str, run_dir: str) -> dict[str, Any]:
    """A round of a job whose samples have not come, and one whose samples are too long for the memory of training."""
    jobs = Jobs(topology, model, data, run_dir)
    jobs.bring("b")
    plan = RoundPlan(
        round_id=1, members=(0,), incarnations=(0,), local_steps=1, micro_batch=1, accumulation=1, base_version=0,
        job="a", adapter="one",
    )  # fmt: skip
    jobs.driver.step(m.BeginRound(plan=plan, group=1))
    failed = jobs.driver.wait_for(m.RoundFailed)
    jobs.driver.step(m.Settle(round_id=1, commit=False, version=0))
    jobs.last = 1
    return {"error": failed.error, "vote": jobs.round("b").vote}


def without_own_data(topology: Topology, model: str, run_dir: str) -> dict[str, Any]:
    """A replica to which clients bring all data."""
    jobs = Jobs(topology, model, None, run_dir, serve={"http": {"port": 0}})
    samples = tuple(TrainSample(id=i, ids=(i + 3, 5, 7, i + 4), target_start=2) for i in range(8))
    jobs.driver.step(m.Evaluate())
    jobs.driver.wait_for(m.Evaluated)
    jobs.driver.step(m.JobData(job="on-clif", train=samples, gate=samples[:2], own_gate=True, complete=True))
    votes = [jobs.round("on-clif").vote for _ in range(2)]
    switch = jobs.driver.replica.member.job_switch
    steps = [switch.steps]
    jobs.driver.step(m.JobOver(job="on-clif"))
    finish(switch.switch(""))
    return {"votes": votes, "active": jobs.driver.replica.member.slots.active, "steps": [*steps, switch.steps]}


def equal(left: Any, right: Any) -> bool:
    """Bit for bit, within dicts too."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
