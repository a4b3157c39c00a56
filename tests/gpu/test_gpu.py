"""What is promised on CPU holds on a GPU: the same bodies on NCCL, the same tokens, the same gradients."""

from __future__ import annotations

import json

import bodies
import numpy as np
import pytest
import torch
from helpers import answer, draws_of, finish, make_rig, random_state, request
from ranks import run_ranks

from clif.config import TrainConfig
from clif.engine.jobs import Job
from clif.engine.sampling import sample
from clif.kernels.staging import send_ints
from clif.training.trainer import ShadowTrainer
from clif.types import Constraint, TrainSample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
GPUS = torch.cuda.device_count()


def test_both_devices_hold_the_same_weights(model):
    cpu, gpu = (make_rig(model, device=device).runner.stack for device in ("cpu", "cuda"))
    assert len(cpu.linears) == len(gpu.linears) > 0
    pairs = [*zip(cpu.linears, gpu.linears, strict=True), (cpu.head, gpu.head)]
    assert all(torch.equal(a.base.tensors[0], b.base.tensors[0].cpu()) for a, b in pairs)


@pytest.mark.parametrize(
    "values", [[3, 1, 2], np.array([3, 1, 2], np.int32), np.array([3, 1, 2])], ids=["list", "int32", "int64"]
)
def test_whole_numbers_are_sent_from_lists_and_arrays(values):
    assert send_ints(values, torch.device("cuda")).tolist() == [3, 1, 2]


def test_average_on_nccl_with_one_rank():
    assert run_ranks(1, bodies.mean_over_members, (0,), None, device="cuda") == [pytest.approx([1.0] * 6)]


@pytest.mark.skipif(GPUS < 4, reason="needs 4 GPUs")
def test_average_on_nccl_is_over_exactly_the_combined_replicas():
    results = run_ranks(4, bodies.mean_over_members, (0, 2, 3), None, device="cuda")
    assert results[1] is None
    assert results[0] == results[2] == results[3] == pytest.approx([26 / 8] * 5 + [8.0])


def test_tokens_on_the_gpu_are_those_of_the_cpu(model):
    rigs = [make_rig(model, device=device) for device in ("cpu", "cuda")]
    answers = []
    for rig in rigs:
        rig.fill(1, seed=4)
        requests = [request(i, [3 + i, 9, 20 + i], max_tokens=20, ignore_eos=True) for i in range(5)]
        events = rig.run(requests, arrive={i: 2 * i for i in range(5)})
        answers.append([answer(events[i]) for i in range(5)])
    assert answers[0] == answers[1]


def test_overlapped_steps_answer_as_normal_ones(model):
    """Greedy and drawn, with preemptions and across a promotion: tokens that the host reads late are the same ones."""
    answers = []
    for overlap in (False, True):
        rig = make_rig(model, engine={"overlap": overlap, "kv_tokens": 256}, device="cuda")
        rig.fill(1, seed=4)
        drawn = {"temperature": 0.9, "top_p": 0.9, "top_k": 50}
        requests = [
            request(i, [*range(20), 99 + i], max_tokens=60, seed=i, **(drawn if i % 2 else {})) for i in range(6)
        ]
        events = rig.run(requests, arrive={i: 2 * i for i in range(6)})
        assert rig.engine.scheduler.preemptions > 0 and rig.engine.scheduler.pool.used_tokens == 0
        answers.append([answer(events[i]) for i in range(6)])
    assert answers[0] == answers[1]


def test_equal_logits_draw_the_same_tokens_as_on_a_cpu():
    """A step of 40 rows with all filters: random numbers and sums are exact, and exponentials almost."""
    logits = torch.randn(40, 5003, generator=torch.Generator().manual_seed(1)) * 3
    filters = [{}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 50, "top_p": 0.9}]
    requests = [request(i, [1], temperature=1.0, **filters[i % 4]) for i in range(len(logits))]
    for position in range(5):
        tokens = []
        for device in ("cpu", "cuda"):
            draws = draws_of(requests, 5003, position, device)
            assert draws is not None
            tokens.append(sample(logits.to(device)[draws.rows], draws).tolist())
        assert tokens[0] == tokens[1]


def test_a_step_is_launched_without_a_wait_for_the_gpu(model):
    rig = make_rig(model, engine={"overlap": True}, device="cuda")
    for i in range(4):
        rig.engine.scheduler.add(request(i, [3 + i, 9], max_tokens=30, temperature=0.9 * (i % 2), top_p=0.9), 0.0)
    for _ in range(3):
        rig.engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = rig.runner.fill(rig.engine.scheduler.schedule())
        sampled = rig.runner.forward(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(sampled.read()) == 4 and sampled.seconds() > 0


GUIDED = [
    {"logit_bias": ((7, 3.0), (8, -100.0)), "logprobs": 2},
    {},
    {"temperature": 0.9, "min_p": 0.05, "logprobs": 0},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
]


def test_biases_penalties_and_log_probabilities_are_those_of_the_cpu_in_either_order_of_steps(model):
    found, values = [], []
    for device, overlap in (("cpu", False), ("cuda", False), ("cuda", True)):
        rig = make_rig(model, engine={"overlap": overlap}, device=device)
        requests = [request(i, [3 + i, 9], max_tokens=20, ignore_eos=True, seed=i, **GUIDED[i % 4]) for i in range(8)]
        events = rig.run(requests, arrive={i: i for i in range(8)})
        found.append([answer(events[i]) for i in range(8)])
        values.append([report.logprob for i in range(8) for event in events[i] for report in event.logprobs])
    assert found[0] == found[1] == found[2]
    assert values[0] == pytest.approx(values[1], abs=1e-3) and len(values[0]) == 80


def test_answers_that_must_be_json_are_json_on_the_gpu(model):
    pytest.importorskip("llguidance", reason="structured output: pip install llguidance")
    schema = Constraint("json_schema", '{"enum": [{"a": 1}, [2, 3], "yes"]}')
    for overlap in (False, True):
        rig = make_rig(model, engine={"overlap": overlap}, device="cuda")
        asked = {"constraint": schema, "temperature": 2.0, "max_tokens": 60}
        # No white space, which a random model would write for long.
        none = tuple((i, -100.0) for i in (188, 197, 198, 201, 220))
        events = rig.run([request(i, [3 + i], seed=i, logit_bias=none, **asked) for i in range(6)])
        texts = [rig.loaded.tokenizer.decode(answer(events[i])) for i in range(6)]
        assert all(json.loads(text) in ({"a": 1}, [2, 3], "yes") for text in texts)


def test_a_step_with_biases_and_log_probabilities_is_launched_without_a_wait_for_the_gpu(model):
    rig = make_rig(model, engine={"overlap": True}, device="cuda")
    for i in range(4):
        rig.engine.scheduler.add(request(i, [3 + i, 9], max_tokens=30, ignore_eos=True, **GUIDED[i % 3]), 0.0)
    for _ in range(3):
        rig.engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = rig.runner.fill(rig.engine.scheduler.schedule())
        sampled = rig.runner.forward(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not batch.late and len(sampled.read()) == 4 and len(sampled.logprobs()) == 3


def test_gradients_on_the_gpu_are_those_of_the_cpu(model):
    samples = [TrainSample(id=i, ids=tuple(range(5 + i, 40 + 2 * i)), target_start=12) for i in range(3)]
    gradients = []
    for device in ("cpu", "cuda"):
        rig = make_rig(model, device=device)
        rig.bank.set_shadow(random_state(rig.bank, 5))
        trainer = ShadowTrainer(rig.train_runner, rig.bank, samples, TrainConfig(clip_norm=1e9))
        finish(trainer.step(3, 1))
        gradients.append(rig.bank.gradient.cpu())
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[0].norm()


def test_forwards_that_are_fused_with_serving_change_neither_side(model):
    samples = [TrainSample(id=i, ids=tuple(range(5 + i, 40 + 2 * i)), target_start=12) for i in range(3)]
    outcomes = []
    for way in ("interleaved", "fused"):
        rig = make_rig(model, engine={"coserving": way}, device="cuda")
        # A clock that stands still: every promise has all its time left.
        rig.engine.clock = lambda: 0.0
        rig.fill(1, seed=4)
        rig.bank.set_shadow(random_state(rig.bank, 5))
        trainer = ShadowTrainer(rig.train_runner, rig.bank, samples, TrainConfig(clip_norm=1e9))
        rig.engine.jobs.append(Job("step", trainer.step(3, 1)))
        for i in range(5):
            rig.engine.scheduler.add(request(i, [3 + i, 9, 20 + i], max_tokens=20, ignore_eos=True), 0.0)
        tokens: dict[int, list[int]] = {}
        while rig.engine.serving or rig.engine.jobs:
            for event in rig.engine.step():
                tokens.setdefault(event.request_id, []).extend(event.tokens)
        outcomes.append((tokens, rig.bank.gradient.cpu()))
    assert outcomes[0][0] == outcomes[1][0]
    assert (outcomes[0][1] - outcomes[1][1]).norm() <= 1e-4 * outcomes[0][1].norm()
