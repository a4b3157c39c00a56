"""A model that was kept for a restart is the same model."""

from __future__ import annotations

import pytest
import torch

from clif.config import config_from_tree
from clif.models.kept import drop, keep, load_kept, worth_keeping
from clif.models.loading import load_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kept_model_computes_the_same_in_the_same_dtype(tiny_config, tmp_path, dtype):
    tree = {"model": {"path": f"random:{tiny_config}", "dtype": dtype, "max_context": 256}, "train": {"enabled": False}}
    loaded = load_model(config_from_tree(tree).model, CPU, seed=3)
    assert load_kept(tmp_path, CPU) is None
    loaded.tokenizer.save(tmp_path / "tokenizer")
    keep(loaded, tmp_path)
    keep(loaded, tmp_path)
    kept = load_kept(tmp_path, CPU)
    assert kept is not None and kept.dtype == loaded.dtype and kept.tokenizer.eos_ids == loaded.tokenizer.eos_ids
    assert kept.tokenizer.decode([104, 105]) == loaded.tokenizer.decode([104, 105])
    ids = torch.tensor([[5, 9, 33]])
    assert torch.equal(kept.model(ids).logits, loaded.model(ids).logits)
    assert not any(p.requires_grad for p in kept.model.parameters()) and not kept.model.training
    drop(tmp_path)
    assert load_kept(tmp_path, CPU) is None


def test_only_slow_formats_are_kept():
    assert worth_keeping("assets/model.gguf") and not worth_keeping("org/model") and not worth_keeping("random:x.json")
