"""Families whose weights are cut in other ways than Llama's are shared by several ranks as one rank computes them."""

from __future__ import annotations

import json

import bodies_tp
import pytest
from bodies_tp import assert_equal
from families import FAMILIES
from ranks import run_ranks

BY_NAME = {family.name: family for family in FAMILIES}


@pytest.mark.slow  # Each case starts ranks twice.
@pytest.mark.parametrize(
    ("name", "size"), [("phi3", 2), ("phi3-partial", 2), ("granite", 2), ("mixtral", 2), ("qwen3_moe", 4)]
)
def test_several_ranks_compute_what_one_computes(tmp_path, name, size):
    """Tokens, gradients, steps and whole adapters, also where query, key and value lie in one weight."""
    (tmp_path / "config.json").write_text(json.dumps(BY_NAME[name].config))
    model = f"random:{tmp_path}"
    (alone,) = run_ranks(1, bodies_tp.serve_and_train, model, "fused")
    for found in run_ranks(size, bodies_tp.serve_and_train, model, "fused", layout={"tp_size": size}):
        assert_equal(found, alone)
