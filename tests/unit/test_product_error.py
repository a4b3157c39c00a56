"""The recorded error of averaging A and B apart is the one that full products show, whatever the weights."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import make_rig, random_state, true_product_error

from clif.control.records import product_error
from clif.training.product_error import ErrorShare, deal, deviation_
from clif.types import Vote


@pytest.mark.parametrize(
    ("sizes", "members"), [([5, 5, 5, 5], 2), ([8, 1, 1, 8, 1, 1], 3), ([3, 3], 5), ([7], 1), ([9, 1, 1, 1], 4)]
)
def test_each_layer_falls_to_one_member_and_all_peers_deal_alike(sizes, members):
    shares = deal(sizes, members)
    assert len(shares) == members
    assert [layer for share in shares for layer in share] == list(range(len(sizes)))


def test_layers_are_dealt_about_equally():
    sizes = [3, 5, 2, 7, 4, 6, 1, 8] * 8
    loads = [sum(sizes[i] for i in share) for share in deal(sizes, 4)]
    assert max(loads) - min(loads) <= 2 * max(sizes)


@pytest.mark.parametrize("samples", [(8, 8), (24, 8, 4), (5, 0, 7), (1, 2, 3, 4, 5)])
def test_error_of_averaging_factors_is_that_of_the_products_for_any_weights(tiny_config, samples):
    bank = make_rig(f"random:{tiny_config}").bank
    flats = []
    for seed, _ in enumerate(samples):
        bank.set_shadow(random_state(bank, seed + 1))
        flats.append(bank.shadow.detach().clone())
    weights = [n / sum(samples) for n in samples]
    mean = sum(w * flat for w, flat in zip(weights, flats, strict=True))
    expected = true_product_error(bank, flats, weights)
    flats = [flat.fill_(math.nan) if w == 0 else flat for w, flat in zip(weights, flats, strict=True)]
    deviations = [deviation_(flat, mean, w) for w, flat in zip(weights, flats, strict=True)]
    votes = []
    for replica, layers in enumerate(deal(bank.sizes(), len(samples))):
        share = ErrorShare(bank, mean, torch.stack([bank.part(d, layers) for d in deviations]), layers)
        while share.modules:
            share.add(1)
        error2, product2 = share.result()
        votes.append(vote(replica, error2, product2))
    assert product_error(votes) == pytest.approx(expected, rel=1e-4)


def test_a_product_error_with_a_share_missing_is_unknown():
    assert product_error([vote(0, 1.0, 4.0), vote(1, 8.0, 0.0)]) == pytest.approx(1.5)
    assert product_error([vote(0, 1.0, 4.0), vote(1, None, None)]) is None
    assert product_error([vote(0, 0.0, 0.0)]) is None, "before the first step B is zero"
    assert product_error([]) is None
    for error2, product2 in ((-1.0, 4.0), (math.nan, 4.0), (1.0, math.nan), (1.0, -4.0)):
        assert product_error([vote(0, error2, product2)]) is None, "no claim of a member ends the control process"


def vote(replica: int, error2: float | None, product2: float | None) -> Vote:
    losses = {"candidate_loss": 1.0, "active_loss": 1.0, "tokens": 1}
    return Vote(round_id=1, replica=replica, finite=True, error2=error2, product2=product2, **losses)
