"""A model of any family computes the same on several ranks as on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bodies_tp
import pytest
from bodies_tp import assert_equal
from families import BOTH, FAMILIES
from ranks import run_ranks

BY_NAME = {family.name: family for family in FAMILIES}
ALONE = [(family.name, size) for family in FAMILIES for size in family.tp if family.tp != BOTH]
"""Those whose weights are cut in other ways than Llama's."""
SHARED = [family.name for family in FAMILIES if family.tp == BOTH and family.name != "llama"]
"""What differs in what lies between the shared layers, and in their heads; Llama has a test of its own."""


@pytest.mark.slow  # Each case starts ranks twice.
@pytest.mark.parametrize(("name", "size"), ALONE)
def test_several_ranks_compute_what_one_computes(tmp_path, name, size):
    """Tokens, gradients, steps and whole adapters, also where query, key and value lie in one weight."""
    (tmp_path / "config.json").write_text(json.dumps(BY_NAME[name].config))
    model = f"random:{tmp_path}"
    (alone,) = run_ranks(1, bodies_tp.serve_and_train, model, "fused")
    for found in run_ranks(size, bodies_tp.serve_and_train, model, "fused", layout={"tp_size": size}):
        assert_equal(found, alone)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    base = tmp_path_factory.mktemp("families")
    for name in SHARED:
        (base / name).mkdir()
        shape = {**BY_NAME[name].config, "num_hidden_layers": 2}
        if "layer_types" in shape:
            shape["layer_types"] = shape["layer_types"][-2:]
        (base / name / "config.json").write_text(json.dumps(shape))
    return [str(base / name) for name in SHARED]


@pytest.fixture(scope="module")
def alone(folders: list[str]) -> dict[str, Any]:
    return run_ranks(1, bodies_tp.families, folders, limit_s=200)[0]


@pytest.mark.slow  # Seven models, each served and trained: half a minute.
@pytest.mark.parametrize("size", [2, 4])
def test_tokens_and_gradients_of_every_other_family_are_those_of_one_rank(folders, alone, size):
    for found in run_ranks(size, bodies_tp.families, folders, layout={"tp_size": size}, limit_s=200):
        for folder in folders:
            try:
                assert_equal(found[folder], alone[folder])
            except AssertionError as error:
                raise AssertionError(Path(folder).name) from error
