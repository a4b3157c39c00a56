"""Sampling filters are those of transformers, in its order."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from clif.replica.sampling import distribution, sample
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
