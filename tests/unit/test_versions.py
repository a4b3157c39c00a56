"""Which versions are kept, and the share of a canary: pure functions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clif.config import Config, config_from_tree
from clif.control.policy.versions import VersionsView, kept_versions
from clif.control.versions import in_canary, version_name
from clif.types import AdapterVersion


def make_config(slots: int) -> Config:
    tree: dict[str, Any] = {"model": {"path": "m"}, "data": {"path": __file__}, "adapter": {"serving_slots": slots}}
    return config_from_tree(tree)


numbers = st.integers(0, 12)


@settings(max_examples=300, deadline=None)
@given(
    st.frozensets(st.integers(1, 12)), st.lists(numbers, max_size=4), st.lists(numbers, max_size=4), numbers,
    st.integers(2, 10), st.lists(numbers, max_size=4),
)  # fmt: skip
def test_a_promotion_always_finds_a_slot_and_what_must_be_kept_comes_first(
    stored, active, pinned, canary, slots, waiting
):
    view = VersionsView(tuple(sorted(stored)), tuple(active), tuple(pinned), canary, tuple(waiting))
    kept, reason = kept_versions(0.0, view, make_config(slots))
    assert list(kept) == sorted(set(kept)) and set(kept) <= stored and reason
    assert len(kept) <= slots - 1
    needed = {v for v in (*active, canary, *pinned) if v in stored}
    if len(needed) <= slots - 1:
        assert needed <= set(kept)
    elif active and active[0] in stored:
        assert active[0] in kept, "the version that answers by default goes last"
    waited = {v for v in waiting if v in stored}
    if len(needed | waited) <= slots - 1:
        assert waited <= set(kept)
    besides = set(kept) - needed - waited
    assert len(kept) <= max(len(needed | waited), slots - 2), "one more slot is left if it is up to us"
    assert not besides or min(besides) > max(stored - set(kept) - waited, default=0), "the newest"


def test_with_the_default_slots_only_the_active_version_is_kept():
    view = VersionsView(stored=(1, 2, 3), active=(3,))
    assert kept_versions(0.0, view, make_config(3))[0] == (3,)
    assert kept_versions(0.0, view, make_config(4))[0] == (2, 3)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 1 / 3, 0.9, 1.0])
@pytest.mark.parametrize(("first", "step"), [(0, 1), (4096 << 40, 1), (7, 2), (3, 10)])
def test_canary_share_is_exact_over_many_ids(share, first, step):
    """Of any run of ids, also of every second or tenth, the share is right to a few requests."""
    count = 20_000
    chosen = [in_canary(first + step * i, share) for i in range(count)]
    assert abs(sum(chosen) - share * count) <= 8
    for part in range(0, count, 1000):
        assert abs(sum(chosen[part : part + 1000]) - share * 1000) <= 8


def test_a_request_is_in_a_larger_share_if_it_is_in_a_smaller_one():
    for i in range(1000):
        assert in_canary(i, 0.5) or not in_canary(i, 0.2)
    assert not any(in_canary(i, 0.0) for i in range(1000))


def test_names_of_versions():
    assert version_name(None) == "base"
    assert version_name(AdapterVersion(number=7, round_id=1, heldout_loss=1.0)) == "clif@v0007"
    assert version_name(AdapterVersion(number=12345, round_id=0, heldout_loss=None, adapter="x")) == "x@v12345"
