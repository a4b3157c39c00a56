"""Sampling filters are those of transformers, in its order; a draw depends on its row, its seed and its position."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import chunks_of, draws_of, request
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from clif.distributed.collectives import TpGroup
from clif.engine.draws import Draws, DrawTable, uniform
from clif.engine.sampling import draw_, sample, weigh
from clif.models.head import or_none, top
from clif.types import NO_TOKEN, Constraint, Request, Sampling

FILTERS: list[dict[str, Any]] = [{}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.9}, {"top_k": 1}]
FILTERS += [{"min_p": 0.05}]


def random_logits(rows: int = 1, vocabulary: int = 300) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1)) * 3


def drawn(logits: torch.Tensor, *params: Any, position: int = 0, first: int = 0) -> list[int]:
    """Tokens of rows with these parameters; the ids of the requests, which are their seeds, begin with `first`."""
    whole = WholeHead()
    draws = draws_of(asked(*params, first=first), logits.shape[1], position)
    tokens = or_none(*top(logits))
    chosen = tokens if draws is None else draw_(whole, tokens, logits, draws)  # type: ignore[arg-type]
    return [int(token) for token in chosen.tolist()]


class WholeHead:
    """Stands in for a head of one rank, by the two names that draw_() uses."""

    tp_group = TpGroup()

    def whole(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


def asked(*params: Any, first: int = 0) -> list[Request]:
    return [Request(id=first + i, prompt=(1,), sampling=p) for i, p in enumerate(params)]


def draws(*params: Any, vocabulary: int, position: int = 0) -> Draws:
    found = draws_of(asked(*params), vocabulary, position)
    assert found is not None
    return found


def probabilities(logits: torch.Tensor, params: Any) -> torch.Tensor:
    """Of one row [vocabulary]: what it is drawn from."""
    weights, _ = weigh(logits[None], draws(params, vocabulary=len(logits)))
    return (weights / weights.sum())[0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 20])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_probabilities_equal_transformers(temperature, top_k, top_p):
    logits = random_logits(5)
    steps = [TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = LogitsProcessorList(steps)(None, logits.clone()).softmax(-1)
    params = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    for row, want in zip(logits, expected, strict=True):
        assert torch.allclose(probabilities(row, params), want, atol=1e-6)


@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("others", FILTERS[:5])
def test_min_p_comes_last_and_is_that_of_transformers_and_of_numbers_in_float64(min_p, others):
    for row in random_logits(5):
        params = Sampling(temperature=1.3, min_p=min_p, **others)
        steps = [TemperatureLogitsWarper(1.3), *([TopKLogitsWarper(params.top_k)] if params.top_k else [])]
        steps += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
        steps += [MinPLogitsWarper(min_p)] if min_p else []
        found = probabilities(row, params)
        assert torch.allclose(found, LogitsProcessorList(steps)(None, row[None].clone())[0].softmax(-1), atol=1e-6)
        assert torch.allclose(found.double(), by_hand(row.double(), params), atol=1e-9)


def by_hand(logits: torch.Tensor, params: Sampling) -> torch.Tensor:
    """One filter after the other, token by token."""
    kept = {i: math.exp((float(logit) - float(logits.max())) / params.temperature) for i, logit in enumerate(logits)}
    kept = dict(sorted(kept.items(), key=lambda item: -item[1])[: params.top_k or None])
    below, total = 0.0, sum(kept.values())
    for token, share in [*kept.items()]:
        if below >= params.top_p * total:
            del kept[token]
        below += share
    kept = {token: share for token, share in kept.items() if share >= params.min_p * max(kept.values())}
    return torch.tensor([kept.get(i, 0.0) / sum(kept.values()) for i in range(len(logits))], dtype=torch.float64)


def test_tokens_as_likely_as_the_k_th_stay_and_of_those_at_the_line_of_top_p_the_first():
    logits = torch.tensor([1.0, 2.0, 1.0, 1.0, -5.0])
    assert probabilities(logits, Sampling(temperature=1.0, top_k=2)).gt(0).tolist() == [True] * 4 + [False]
    assert probabilities(logits, Sampling(temperature=1.0, top_p=0.6)).gt(0).tolist() == [True, True] + [False] * 3


@pytest.mark.parametrize("params", FILTERS)
def test_tokens_are_drawn_as_often_as_they_are_likely(params):
    """Chi-square over 4,000 positions; nothing outside of the filters is ever drawn. No chance is in it: it is of a
    seed's numbers."""
    sampling = Sampling(temperature=1.2, seed=3, **params)
    logits, count = random_logits(1, 40), 4000
    batch = draws(*[sampling] * count, vocabulary=40)
    batch.uniform.copy_(torch.tensor([uniform(request(0, [1], seed=3), i) for i in range(count)]))
    seen = sample(logits.expand(count, -1), batch).bincount(minlength=40).double()
    expected = probabilities(logits[0], sampling).double() * count
    assert not seen[expected == 0].any()
    likely = expected > 5
    rest = (seen[~likely].sum() - expected[~likely].sum()).abs() / max(1.0, expected[~likely].sum().sqrt())
    squares = ((seen - expected) ** 2 / expected)[likely].sum()
    freedom = max(1, int(likely.sum()) - 1)
    assert squares < freedom + 4 * math.sqrt(2 * freedom) and rest < 4


def test_random_numbers_of_seeds_and_positions_are_even_and_independent():
    """Of neighbours too: seeds are often 0, 1, 2."""
    table = torch.tensor(
        [[uniform(request(0, [1], seed=s), i) for i in range(100)] for s in range(100)], dtype=torch.float64
    )
    assert table.min() >= 0 and table.max() < 1 and len(table.unique()) == table.numel()
    assert (table * 16).long().flatten().bincount(minlength=16).sub(625).abs().max() < 4 * 25
    for beside in (table[1:, :], table[:, 1:], table[1:, 1:]):
        one = table[: beside.shape[0], : beside.shape[1]]
        correlation = torch.corrcoef(torch.stack((one.flatten(), beside.flatten())))[0, 1]
        assert abs(correlation) < 0.04
    assert uniform(request(7, [1]), 3) == uniform(request(8, [1, 2], seed=7), 3) != uniform(request(8, [1]), 3)
    assert uniform(request(1, [1], seed=2**63 - 1), 2**31) == 0.9370631734252128, "the same on every machine"


MIXED = [
    Sampling(),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.7, top_p=0.9, seed=2),
    Sampling(temperature=1.3, top_k=17, seed=3),
    Sampling(temperature=1.0, top_k=50, top_p=0.5, seed=4),
    Sampling(temperature=900.0, top_p=0.99, seed=5),
    Sampling(temperature=1.0, min_p=0.1, seed=6),
    Sampling(temperature=2.0, top_k=40, min_p=0.05, seed=7),
]


@pytest.mark.parametrize("vocabulary", [7, 301, 33_001])
def test_a_row_gets_the_same_token_and_the_same_weights_in_any_batch(vocabulary):
    """Bit for bit, wherever its numbers lie in memory: alone, first, last, beside other filters."""
    logits = random_logits(len(MIXED), vocabulary)
    for position in range(4):
        together = drawn(logits, *MIXED, position=position)
        assert drawn(logits.flip(0), *MIXED[::-1], position=position) == together[::-1]
        for i, params in enumerate(MIXED):
            assert drawn(logits[i : i + 1], params, position=position) == [together[i]]
    batch = draws(*MIXED, vocabulary=vocabulary)
    weights, _ = weigh(logits[batch.rows], batch)
    for row, found in zip(batch.rows.tolist(), weights, strict=True):
        (alone,) = weigh(logits[row : row + 1], draws(MIXED[row], vocabulary=vocabulary))[0]
        assert torch.equal(found, alone)


def test_a_table_that_is_filled_step_after_step_holds_what_a_new_one_would():
    """Requests come, go and change their rows; between that, only their positions move on."""
    requests = asked(*MIXED)
    table = DrawTable(len(requests), 301, torch.device("cpu"))
    for position, rows in enumerate(
        [(0, 1, 2, 3), (0, 1, 2, 3), (1, 2, 3), (3, 2, 1), (0,), (5, 4, 1, 0), (5, 4, 1, 0), (6, 0, 7)]
    ):
        step = [requests[row] for row in rows]
        found = table.fill(chunks_of(step, position))
        expected = draws_of(step, 301, position)
        assert (found is None) == (expected is None)
        for name, value in vars(expected).items() if expected else ():
            same = getattr(found, name)
            assert torch.equal(same, value) if isinstance(value, torch.Tensor) else same == value, name


def test_greedy_and_sampled_rows_share_a_batch():
    logits = torch.tensor([[0.0, 9.0, 1.0], [2.0, 2.0, 2.0]])
    found = [drawn(logits, Sampling(), Sampling(temperature=1.0), position=i) for i in range(60)]
    assert {d[0] for d in found} == {1} and {d[1] for d in found} == {0, 1, 2}


@pytest.mark.parametrize("params", [{}, {"top_k": 1}, {"top_p": 0.5}, {"top_k": 2, "top_p": 0.5}])
def test_rows_that_are_not_finite_give_no_token_and_their_neighbours_do(params):
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [[0.0, 9.0, nan], [0.0, 1.0, 99.0], [inf, 2.0, 2.0], [nan] * 3, [-inf, 5.0, -inf], [-inf] * 3]
    )
    sampling = Sampling(temperature=1.0, **params)
    assert drawn(logits, *[sampling] * 6) == [NO_TOKEN, 2, NO_TOKEN, NO_TOKEN, 1, NO_TOKEN]
    assert drawn(logits, sampling, sampling, *[Sampling()] * 4) == [NO_TOKEN, 2, NO_TOKEN, NO_TOKEN, 1, NO_TOKEN]


class Launches(TorchDispatchMode):
    """Counts operators, and refuses those for which the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_as_many_operators_draw_for_one_row_as_for_many():
    counts = []
    for rows in (1, 3, 40):
        batch = draws(*[Sampling(temperature=1.0, top_k=20, top_p=0.9)] * rows, vocabulary=300)
        with Launches() as launches:
            sample(random_logits(rows), batch)
        counts.append(launches.count)
    assert counts[0] == counts[1] == counts[2] < 60


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("params", FILTERS)
def test_the_least_and_the_largest_random_number_draw_a_token_that_is_possible(params, number):
    logits = random_logits(3, 301)
    logits[:, [0, 300]] = float("-inf")
    batch = draws(*[Sampling(temperature=1.0, **params)] * 3, vocabulary=301)
    batch.uniform.fill_(number)
    weights, _ = weigh(logits, batch)
    possible = [row.nonzero()[-1 if number else 0].item() for row in weights]
    assert sample(logits, batch).tolist() == possible


ASKS_NO_MORE: dict[str, Any] = dict(
    min_p=0.0, seed=1, max_tokens=1, guided=False, logprobs=None, prompt_logprobs=False, ignore_eos=True, stop=()
)
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
    params = SimpleNamespace(temperature=temperature, top_p=top_p, top_k=top_k, **ASKS_NO_MORE)
    for token, row in zip(drawn(logits, *[params] * len(logits)), logits, strict=True):
        largest = row.float().max()
        assert (token == NO_TOKEN) == (not largest.isfinite())
        if token != NO_TOKEN:
            assert row[token] > float("-inf")
            assert probabilities(row, params).sum().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("params", [{"temperature": 1e-300}, {"temperature": 1.0, "top_p": 1e-300}])
def test_a_temperature_or_top_p_of_almost_nothing_is_greedy(params):
    logits = torch.tensor([0.0, 9.0, 8.9, float("-inf")])
    params = SimpleNamespace(**{"top_p": 1.0, "top_k": 0, **ASKS_NO_MORE, **params})
    assert probabilities(logits, params).tolist() == [0, 1, 0, 0]


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
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": float("nan")},
        {"frequency_penalty": 2.1},
        {"presence_penalty": float("nan")},
        {"logprobs": -1},
        {"logprobs": 21},
        {"logit_bias": {5: 1.0}},
        {"logit_bias": ((5, 101.0),)},
        {"logit_bias": ((5, float("nan")),)},
        {"logit_bias": ((5, 1.0), (5, 2.0))},
        {"logit_bias": tuple((i, 1.0) for i in range(1025))},
    ],
)
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_a_constraint_and_ignore_eos_exclude_each_other():
    with pytest.raises(ValueError, match="give one of them"):
        Sampling(constraint=Constraint("json_object"), ignore_eos=True)


def test_a_seed_reproduces_the_draws_and_the_id_stands_in_for_a_seed():
    def answer(id: int, **seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, **seed)
        return [drawn(random_logits(), sampling, position=i, first=id)[0] for i in range(20)]

    assert answer(1, seed=5) == answer(2, seed=5) != answer(1, seed=6)
    assert answer(1) == answer(1) != answer(2)
    assert draws_of([request(1, [1])], 300) is None, "a greedy request draws nothing"


@pytest.mark.parametrize("temperature", [1e-6, 1e-8])
def test_tiny_temperatures_are_nearly_greedy(temperature):
    logits = random_logits() * 10
    assert drawn(logits, Sampling(temperature=temperature)) == [int(logits.argmax())]


def test_a_temperature_of_a_thousand_makes_all_tokens_almost_equally_likely():
    found = probabilities(random_logits()[0], Sampling(temperature=1000.0))
    assert (found * 300).sub(1).abs().max() < 0.02
