"""Sampling filters are those of transformers, in its order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import request
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from clif.engine.sampling import distribution, make_rng, sample
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
    draws = [sample(logits, params, [None, rng]).tolist() for _ in range(60)]
    assert {d[0] for d in draws} == {1} and {d[1] for d in draws} == {0, 1, 2}


def test_rows_that_are_not_finite_give_no_token_and_their_neighbours_do():
    logits = torch.tensor([[0.0, 9.0, float("nan")], [0.0, 1.0, 5.0], [float("inf"), 2.0, 2.0], [0.0, 1.0, 2.0]])
    rngs = [torch.Generator().manual_seed(3), torch.Generator().manual_seed(3), None, None]
    params = [Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=1), Sampling(), Sampling()]
    assert sample(logits, params, rngs).tolist() == [NO_TOKEN, 2, NO_TOKEN, 2]


EXTREME = [1e-300, 1e-38, 1e-8, 1.0, 1e30, 1e300]


@given(
    arrays("float32", st.tuples(st.just(2), st.integers(1, 40)), elements=st.floats(width=32, allow_nan=False)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(EXTREME),
    st.sampled_from([5e-324, 1e-300, 0.5, 1.0]),
    st.sampled_from([0, 1, 7, 2**70]),
)
def test_no_request_makes_probabilities_that_cannot_be_drawn_from(numbers, kind, temperature, top_p, top_k):
    """Were it not so, one request would end every replica in turn."""
    logits = torch.from_numpy(numbers).to(kind)
    # Not by its constructor, which refuses most of this: what is drawn from must not depend on who was asked before.
    params = SimpleNamespace(temperature=temperature, top_p=top_p, top_k=top_k)
    rngs = [torch.Generator().manual_seed(1) for _ in logits]
    for token, row in zip(sample(logits, [params] * len(logits), rngs).tolist(), logits, strict=True):
        largest = row.float().max()
        assert (token == NO_TOKEN) == (not largest.isfinite())
        if token != NO_TOKEN:
            assert row[token] > float("-inf")
            assert distribution(row.float(), params).sum().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("params", [{"temperature": 1e-300}, {"temperature": 1.0, "top_p": 1e-300}])
def test_a_temperature_or_top_p_of_almost_nothing_is_greedy(params):
    logits = torch.tensor([0.0, 9.0, 8.9, float("-inf")])
    assert distribution(logits, SimpleNamespace(**{"top_p": 1.0, "top_k": 0, **params})).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"temperature": 1e-300},
        {"temperature": 1e300},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def random_logits() -> torch.Tensor:
    return torch.randn(1, 300, generator=torch.Generator().manual_seed(0))


def test_a_seed_reproduces_the_draws_and_the_id_stands_in_for_a_seed():
    def drawn(id: int, **sampling: object) -> list[int]:
        asked = request(id, [1], temperature=1.0, **sampling)
        rng = make_rng(asked, torch.device("cpu"))
        return [sample(random_logits(), [asked.sampling], [rng]).tolist()[0] for _ in range(20)]

    assert drawn(1, seed=5) == drawn(2, seed=5) != drawn(1, seed=6)
    assert drawn(1) == drawn(1) != drawn(2)
    assert make_rng(request(1, [1]), torch.device("cpu")) is None, "a greedy request draws nothing"


@pytest.mark.parametrize("temperature", [1e-6, 1e-8])
def test_tiny_temperatures_are_nearly_greedy(temperature):
    logits = random_logits() * 10
    drawn = sample(logits, [Sampling(temperature=temperature)], [torch.Generator().manual_seed(0)]).tolist()
    assert drawn == [int(logits.argmax())]
