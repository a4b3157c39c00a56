"""Captured steps on a GPU, with prompts and without: real graphs give the tokens of steps launched kernel by kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Rig, make_rig, request
from scenarios import SCENARIOS, Scenario, outcome

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]


@pytest.fixture(scope="module")
def model(tiny_config: Path) -> str:
    return f"random:{tiny_config}"


class OnGpu(Scenario):
    def make(self, model: str, engine: dict[str, Any]) -> Rig:
        self.rig = make_rig(model, engine=engine, device="cuda")
        return self.rig


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "cancellation"])
def test_replays_answer_token_for_token_as_eager_steps(model, name):
    """With promotions, preemption, freed and reused blocks and draws, and with every step launched ahead."""
    answers = []
    for graphs, overlap in (("off", False), ("auto", False), ("auto", True)):
        scenario = OnGpu(**vars(SCENARIOS[name]))
        answers.append(outcome(scenario.run(model, graphs=graphs, overlap=overlap)))
        runner = scenario.rig.runner
        assert (runner.graphs is not None) == (runner.prompt_graphs is not None) == (graphs == "auto")
    assert answers[0] == answers[1] == answers[2]


def test_every_size_is_captured_and_a_replay_launches_without_a_wait(model):
    rig = make_rig(model, engine={"max_batch": 20, "kv_tokens": 2048, "overlap": True}, device="cuda")
    assert rig.runner.graphs is not None and rig.runner.graphs.sizes == [1, 2, 4, 8, 16, 20]
    for i in range(20):
        rig.engine.scheduler.add(request(i, [3 + i, 9], max_tokens=5 + i, ignore_eos=True), 0.0)
    while rig.engine.scheduler.waiting or any(s.num_uncomputed_tokens > 1 for s in rig.engine.scheduler.running):
        rig.engine.step()
    chunks = rig.engine.scheduler.schedule()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = rig.runner.fill(chunks)
        sampled = rig.runner.forward(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert batch.captured is not None and len(sampled.read()) == len(chunks)


def test_a_step_with_prompts_is_replayed_without_a_wait(model):
    rig = make_rig(model, engine={"max_prefill_tokens": 100, "kv_tokens": 2048, "overlap": True}, device="cuda")
    assert rig.runner.prompt_graphs is not None and rig.runner.prompt_graphs.sizes == [64, 112]
    rig.engine.scheduler.add(request(0, [3, 9, 4], max_tokens=9, ignore_eos=True), 0.0)
    rig.engine.step()
    for i in range(1, 4):
        rig.engine.scheduler.add(request(i, [*range(30 * i)], max_tokens=5, ignore_eos=True), 0.0)
    while rig.engine.scheduler.waiting or any(s.num_uncomputed_tokens > 1 for s in rig.engine.scheduler.running):
        chunks = rig.engine.scheduler.schedule()
        torch.cuda.set_sync_debug_mode("error")
        try:
            batch = rig.runner.fill(chunks)
            sampled = rig.runner.forward(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert batch.captured is not None
        rig.engine.scheduler.settle(chunks, sampled.read(), 0.0)


def test_a_nan_in_one_version_fails_its_requests_and_changes_no_other_token(model):
    found = []
    for ill in (False, True):
        rig = make_rig(model, device="cuda")
        rig.fill(1, seed=1)
        rig.engine.scheduler.add(request(0, [5, 6, 7], max_tokens=12, ignore_eos=True), 0.0)
        rig.engine.serve()
        rig.fill(2, seed=2)
        rig.engine.scheduler.add(request(1, [8, 9], max_tokens=12, ignore_eos=True), 0.0)
        events = [event for _ in range(3) for event in rig.engine.serve()]
        for layer in rig.bank.layers if ill else ():
            layer.b[rig.slots.slot_of(2) or 0].fill_(torch.nan)
        while rig.engine.serving:
            events += rig.engine.serve()
        ends = [e.finish for e in events if e.request_id == 1 and e.finish]
        assert ends == ["failed" if ill else "length"]
        found.append([t for e in events if e.request_id == 0 for t in e.tokens])
    assert found[0] == found[1]


def test_thousands_of_replays_with_changing_batches_stay_right(model):
    """Requests of any length come and go: every answer is that of the request alone."""
    rig = make_rig(model, engine={"kv_tokens": 512, "max_batch": 8, "graphs": "auto"}, device="cuda")
    rng = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 60, (150,), generator=rng).tolist()
    requests = [request(i, [3 + i % 90, 9, i % 7], max_tokens=n, ignore_eos=True) for i, n in enumerate(lengths)]
    together = outcome(rig.run(requests, arrive={i: 2 * i for i in range(150)}, steps=20000))
    alone = make_rig(model, engine={"graphs": "off"}, device="cuda")
    for asked in requests[::10]:
        assert outcome(alone.run([asked]))[str(asked.id)] == together[str(asked.id)]
