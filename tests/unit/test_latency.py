"""The online latency model: recovers what is there, stays non-negative, and believes little data little."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clif.latency import Fit, LatencyModel

TRUE = Fit(a=0.004, b=0.02, c=0.03)


def samples(count: int, noise: float = 0.0, seed: int = 0) -> list[tuple[float, float, float]]:
    rng = np.random.default_rng(seed)
    own, other = rng.integers(1, 17, count), rng.integers(0, 9, count)
    seconds = TRUE.a * own + TRUE.b * other + TRUE.c
    seconds = seconds * (1 + noise * rng.standard_normal(count))
    return [(float(x), float(y), float(t)) for x, y, t in zip(own, other, seconds, strict=True)]


def close(fit: Fit, tolerance: float) -> bool:
    pairs = ((fit.a, TRUE.a), (fit.b, TRUE.b), (fit.c, TRUE.c))
    return all(abs(found - true) <= tolerance * true for found, true in pairs)


def test_known_coefficients_are_recovered() -> None:
    model = LatencyModel()
    model.observe_all(samples(200))
    assert close(model.refit(), 0.05)
    assert model.fit.confidence > 0.85


def test_outliers_do_not_move_the_fit() -> None:
    model = LatencyModel()
    data = samples(200, noise=0.02)
    for place in range(0, 200, 10):
        data[place] = (*data[place][:2], 5.0)
    model.observe_all(data)
    assert close(model.refit(), 0.15)


def test_without_data_the_prior_speaks_and_confidence_is_zero() -> None:
    model = LatencyModel(Fit(0.1, 0.2, 0.3))
    assert model.predict(2, 1) == pytest.approx(0.7)
    assert model.fit.confidence == 0.0


def test_one_sample_is_believed_little() -> None:
    model = LatencyModel()
    model.observe(4, 0, 0.5)
    assert 0 < model.fit.confidence < 0.2
    assert model.predict(4, 0) <= 0.5


def test_what_the_data_leave_open_stays_at_the_prior() -> None:
    model = LatencyModel(Fit(0.001, 0.015, 0.01))
    model.observe_all([(x, 0.0, TRUE.a * x + TRUE.c) for x, _, _ in samples(100)])
    assert model.refit().b == pytest.approx(0.015)


def test_the_model_follows_a_change() -> None:
    model = LatencyModel(half_life=16)
    model.observe_all(samples(200))
    model.observe_all([(x, y, 3 * t) for x, y, t in samples(200, seed=1)])
    model.refit()
    assert model.predict(8, 4) == pytest.approx(3 * TRUE.predict(8, 4), rel=0.1)


def test_broken_measurements_are_no_data() -> None:
    model = LatencyModel()
    model.observe_all([(1, 0, float("nan")), (1, 0, float("inf")), (1, 0, -1.0), (-1, 0, 1.0)])
    assert model.refit() == Fit(model.prior.a, model.prior.b, model.prior.c)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 64, allow_nan=False), st.floats(0, 16, allow_nan=False), st.floats(0, 100, allow_nan=False)
        ),
        max_size=40,
    )
)
def test_coefficients_are_never_negative_and_always_finite(data: list[tuple[float, float, float]]) -> None:
    model = LatencyModel()
    model.observe_all(data)
    fit = model.refit()
    values = np.array([fit.a, fit.b, fit.c, fit.confidence])
    assert np.isfinite(values).all() and (values >= 0).all() and fit.confidence <= 1
