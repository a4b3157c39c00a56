"""Sampling filters are those of transformers, in its order."""

from __future__ import annotations

import pytest
import torch
from helpers import request
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from clif.replica.sampling import distribution, make_rng, sample
from clif.types import NO_TOKEN, Sampling


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 20])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_probabilities_equal_transformers(temperature, top_k, top_p):
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)) * 3
    steps = [TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = LogitsProcessorList(steps)(None, logits.clone()).softmax(-1)
    params = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    for row, want in zip(logits, expected, strict=True):
        assert torch.allclose(distribution(row, params), want, atol=1e-6)


def test_greedy_and_sampled_rows_share_a_batch():
    logits = torch.tensor([[0.0, 9.0, 1.0], [2.0, 2.0, 2.0]])
    rng = torch.Generator().manual_seed(3)
    params = [Sampling(), Sampling(temperature=1.0)]
    draws = [sample(logits, params, [None, rng]) for _ in range(60)]
    assert {d[0] for d in draws} == {1} and {d[1] for d in draws} == {0, 1, 2}


def test_rows_that_are_not_finite_give_no_token_and_their_neighbours_do():
    logits = torch.tensor([[0.0, 9.0, float("nan")], [0.0, 1.0, 5.0], [float("inf"), 2.0, 2.0], [0.0, 1.0, 2.0]])
    rngs = [torch.Generator().manual_seed(3), torch.Generator().manual_seed(3), None, None]
    params = [Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=1), Sampling(), Sampling()]
    assert sample(logits, params, rngs) == [NO_TOKEN, 2, NO_TOKEN, 2]


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}])
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def random_logits() -> torch.Tensor:
    return torch.randn(1, 300, generator=torch.Generator().manual_seed(0))


def test_a_seed_reproduces_the_draws_and_the_id_stands_in_for_a_seed():
    def drawn(id: int, **sampling: object) -> list[int]:
        asked = request(id, [1], temperature=1.0, **sampling)
        rng = make_rng(asked, torch.device("cpu"))
        return [sample(random_logits(), [asked.sampling], [rng])[0] for _ in range(20)]

    assert drawn(1, seed=5) == drawn(2, seed=5) != drawn(1, seed=6)
    assert drawn(1) == drawn(1) != drawn(2)
    assert make_rng(request(1, [1]), torch.device("cpu")) is None, "a greedy request draws nothing"


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-40])
def test_tiny_temperatures_are_nearly_greedy(temperature):
    logits = random_logits() * 10
    drawn = sample(logits, [Sampling(temperature=temperature)], [torch.Generator().manual_seed(0)])
    assert drawn == [int(logits.argmax())]
