"""Replicas of several ranks on GPUs: the bodies of the CPU tests, on NCCL and, where ranks share a GPU, on gloo."""

from __future__ import annotations

import json
from typing import Any

import bodies_head
import bodies_supervisor
import bodies_tp
import pytest
import torch
from conftest import TINY
from ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
GPUS = torch.cuda.device_count()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("tp") / "config.json"
    file.write_text(json.dumps({**TINY, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}))
    return f"random:{file}"


@pytest.fixture(scope="module")
def alone(model: str) -> dict[str, Any]:
    return run_ranks(1, bodies_tp.serve_and_train, model, "interleaved", device="cuda")[0]


def assert_equal(found: dict[str, Any], alone: dict[str, Any]) -> None:
    assert found["answers"] == alone["answers"] and found["versions"] == alone["versions"]
    for what, allowed in (("gradient", 1e-4), ("shadow", 1e-3)):
        for name, expected in alone[what].items():
            assert (found[what][name] - expected).norm() <= allowed * expected.norm() + 1e-9, f"{what} of {name}"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_ranks_that_share_one_gpu_compute_what_one_rank_does(model, alone, size, kernel):
    if kernel == "triton":
        pytest.importorskip("triton")
    results = run_ranks(
        size, bodies_tp.serve_and_train, model, "fused", kernel,
        layout={"tp_size": size}, device="cuda", ranks_per_gpu=size,
    )  # fmt: skip
    for found in results:
        assert_equal(found, alone)


@pytest.mark.parametrize("size", [2, 3])
def test_vocabulary_parallel_head_on_one_gpu_samples_the_same_tokens_and_finds_the_same_loss(size):
    assert_same_head(size, size)


@pytest.mark.skipif(GPUS < 2, reason="needs 2 GPUs")
def test_vocabulary_parallel_head_on_nccl_samples_the_same_tokens_and_finds_the_same_loss():
    assert_same_head(2, 1)


def assert_same_head(size: int, ranks_per_gpu: int) -> None:
    where = {"layout": {"tp_size": size}, "device": "cuda", "ranks_per_gpu": ranks_per_gpu}
    (alone,) = run_ranks(1, bodies_head.choices, device="cuda")
    for found in run_ranks(size, bodies_head.choices, **where):
        for what, expected in alone.items():
            same = torch.equal(found[what], expected) if isinstance(expected, torch.Tensor) else found[what] == expected
            assert same, what
    (alone,) = run_ranks(1, bodies_head.losses, False, device="cuda")
    for found in run_ranks(size, bodies_head.losses, False, **where):
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert (found["gradient"] - alone["gradient"]).norm() <= 1e-5 * alone["gradient"].norm()


def test_two_replicas_of_two_ranks_share_one_gpu_and_agree_within_each():
    results = run_ranks(4, bodies_tp.agreements, layout={"tp_size": 2}, device="cuda", ranks_per_gpu=4)
    assert [found["sum"] for found in results] == [[3.0]] * 4
    assert [found["gather"] for found in results] == [[[0], [1]]] * 4


@pytest.mark.skipif(GPUS < 2, reason="needs 2 GPUs")
def test_ranks_on_nccl_compute_what_one_rank_does(model, alone):
    for found in run_ranks(2, bodies_tp.serve_and_train, model, "fused", layout={"tp_size": 2}, device="cuda"):
        assert_equal(found, alone)


@pytest.mark.skipif(GPUS < 4, reason="needs 4 GPUs")
@pytest.mark.parametrize("size", [2, 4])
def test_replicas_on_nccl_compute_what_one_rank_does(model, alone, size):
    for found in run_ranks(4, bodies_tp.serve_and_train, model, "fused", layout={"tp_size": size}, device="cuda"):
        assert_equal(found, alone)


def test_a_replica_on_a_gpu_is_rebuilt_in_place(model, data, tmp_path):
    (result,) = run_ranks(1, bodies_supervisor.fail_in_a_round, model, data, str(tmp_path), device="cuda")
    assert result["built"] == [0, 1] and result["same"] and result["freed"] and result["version"] == 2
    assert result["answers"][0] == result["answers"][1]


def test_when_one_of_two_ranks_on_a_gpu_fails_both_are_rebuilt(model, data, tmp_path):
    leader, peer = run_ranks(
        2, bodies_supervisor.one_of_two_ranks_fails, model, data, str(tmp_path / "run"),
        layout={"tp_size": 2}, device="cuda", ranks_per_gpu=2, timeout_s=300,
    )  # fmt: skip
    assert leader["built"] == peer["built"] == [0, 1] and leader["known"] == leader["again"]
