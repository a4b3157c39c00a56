"""What ranks do in the tests of discarded rounds. Importable by name, as processes of their own need it."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from bodies import Driver

from clif.control.round_groups import GroupNumbers
from clif.distributed.topology import Topology
from clif.engine.jobs import WAIT, Slices
from clif.wire import messages as m

EVERYBODY = (0, 1)
MEMBERS = (EVERYBODY, (0, 0))


def held() -> tuple[int, int]:
    """Descriptors and threads of this process, as the system counts them."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


class Discards:
    """Rounds of replicas 0 and 1 that all come to nothing, in each of the ways in which they may."""

    def __init__(self, topology: Topology, model: str, data: str, run_dir: str) -> None:
        small = {"train": {"micro_batch": 1, "warmup_steps": 0}}
        self.driver = Driver(topology, model, data, run_dir, **small)
        self.groups, self.topology = GroupNumbers(2), topology
        self.last = 0

    def begin(self) -> None:
        self.last += 1
        self.driver.said.clear()
        self.driver.begin(EVERYBODY, 1, self.last, self.groups.of(MEMBERS, self.last))

    def wait_for(self, kind: type) -> None:
        """As a rank does: it sleeps while its replica waits for others, who need the core."""
        while self.driver.last(kind) is None:
            time.sleep(self.driver.replica.wait_s())
            self.driver.step()

    def settle(self) -> None:
        self.driver.step(m.Settle(round_id=self.last, commit=False, version=0))
        self.wait_for(m.Settled)

    def worse(self) -> None:
        """The average is judged, and not better."""
        self.begin()
        self.wait_for(m.StepsDone)
        self.driver.step(m.Aggregate(round_id=self.last))
        self.wait_for(m.Voted)
        self.settle()

    def called_off(self) -> None:
        """While the members train: a drain, say."""
        self.begin()
        self.settle()

    def given_up(self) -> None:
        """Replica 0 waits in an all-reduce that replica 1 does not join."""
        self.begin()
        self.wait_for(m.StepsDone)
        self.topology.combined_group(MEMBERS, self.groups.of(MEMBERS, self.last)).result()
        if self.topology.replica == 0:
            self.driver.step(m.Aggregate(round_id=self.last))
            self.driver.step()
        self.settle()
        self.groups.spoil(MEMBERS)


def half_step_round(topology: Topology, model: str, data: str, run_dir: str, half: float) -> dict[str, Any]:
    """An average that is no better than the base, on both members; the middle between them has the loss `half`."""
    driver = Driver(topology, model, data, run_dir)
    member = driver.replica.member
    bank, losses = member.trainer.bank, iter([2.0, 3.0, half])
    base, judged = bank.shadow.detach().clone(), list[torch.Tensor]()

    def loss(slot: int | None) -> Slices[float]:
        judged.append(bank.shadow.detach().clone())
        yield WAIT
        return next(losses)

    member.job_switch.own.gate.loss = loss  # type: ignore[method-assign]
    driver.begin(EVERYBODY, steps=2)
    driver.wait_for(m.StepsDone)
    driver.step(m.Aggregate(round_id=1))
    vote = driver.wait_for(m.Voted).vote
    driver.step(m.Settle(round_id=1, commit=True, version=1))
    driver.wait_for(m.Settled)
    return {"vote": vote, "base": base, "average": judged[1], "half": judged[2], "after": member.masters[1].clone()}


def discarded_rounds(topology: Topology, model: str, data: str, run_dir: str, rounds: int) -> dict[str, object]:
    """Every tenth round is given up in its all-reduce, every tenth called off; what the process holds after each."""
    discards = Discards(topology, model, data, run_dir)
    ways = {3: discards.called_off, 7: discards.given_up}
    counts = []
    for n in range(rounds):
        ways.get(n % 10, discards.worse)()
        counts.append(held())
    # A group is closed in a thread of its own: it is through as soon as the other rank has closed its end.
    first, end = counts[9], time.monotonic() + 10
    while time.monotonic() < end and (held()[0] > first[0] or held()[1] > first[1]):
        time.sleep(0.05)
    return {"first": first, "most": tuple(map(max, zip(*counts, strict=True))), "last": held()}
