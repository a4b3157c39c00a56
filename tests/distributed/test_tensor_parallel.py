"""A replica of several ranks computes what one rank computes: tokens, gradients, steps, adapters, rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bodies
import bodies_tp
import pytest
import torch
from bodies_tp import assert_equal
from conftest import TINY
from ranks import run_ranks
from safetensors.torch import load, save_file

from clif.config import ModelConfig
from clif.models.shard import Shard, even_shard, unit_shard
from clif.models.weights.loading import load_model

SHAPE = {**TINY, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """4 heads, 2 KV heads, biases: with four ranks two share a KV head."""
    file = tmp_path_factory.mktemp("tp") / "config.json"
    file.write_text(json.dumps(SHAPE))
    return f"random:{file}"


@pytest.fixture(scope="module")
def alone(model: str) -> dict[str, Any]:
    return run_ranks(1, bodies_tp.serve_and_train, model, "interleaved")[0]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("coserving", ["interleaved", "fused"])
def test_tokens_gradients_and_steps_are_those_of_one_rank(model, alone, size, coserving):
    """Each way of co-serving with normal and with overlapped steps, on two ranks or on four."""
    overlap = (coserving == "fused") == (size == 2)
    results = run_ranks(
        size, bodies_tp.serve_and_train, model, coserving, "torch", 9, overlap, layout={"tp_size": size}
    )
    for found in results:
        assert_equal(found, alone)
        assert found["steps"] == results[0]["steps"], "clocks differ, steps do not"
        for name, factor in results[0]["shadow"].items():
            assert torch.equal(found["shadow"][name], factor), "peers hold one adapter"


@pytest.mark.parametrize("coserving", ["interleaved", "fused"])
def test_a_step_costs_one_control_message_and_the_collectives_of_what_it_computes(model, coserving):
    """Whatever the leader decides, and whether it trains or not."""
    for found in run_ranks(2, bodies_tp.collectives_of_steps, model, coserving, layout={"tp_size": 2}):
        assert all(calls["control"] == 1 for *_, calls in found["steps"])
        # Of the head: the best of each rank; where rows are drawn also these as a whole, and what was drawn.
        for drawn, kind, _, calls in found["steps"]:
            if not kind:
                assert calls["model"] == 2 * found["layers"] + 1 + 2 * drawn
        kinds = {kind for _, kind, *_ in found["steps"]}
        assert kinds >= {"", "forward", "head", "backward"}, "it must have trained, or the test says nothing"


@pytest.mark.slow
def test_so_they_are_with_the_triton_kernels(tmp_path: Path) -> None:
    """One layer, and answers as short as can be: the interpreter takes its time for each launch."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": 1}))
    model = f"random:{tmp_path}/config.json"
    (alone,) = run_ranks(1, bodies_tp.serve_and_train, model, "interleaved", "torch", 4)
    for found in run_ranks(
        2, bodies_tp.serve_and_train, model, "interleaved", "triton", 4, layout={"tp_size": 2}, limit_s=240
    ):
        assert_equal(found, alone)


def test_two_replicas_of_two_ranks_are_no_different(model, alone):
    for found in run_ranks(4, bodies_tp.serve_and_train, model, "interleaved", layout={"tp_size": 2}):
        assert_equal(found, alone)


@pytest.fixture(scope="module")
def folder(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a folder of safetensors, in several files."""
    place = tmp_path_factory.mktemp("folder")
    loaded = load_model(ModelConfig(path=model, dtype="float32", max_context=200), torch.device("cpu"), seed=3)
    bodies_tp.add_biases(loaded.model)
    loaded.model.save_pretrained(place, max_shard_size="100KB")
    loaded.tokenizer.save(place)
    assert len(list(place.glob("*.safetensors"))) > 1
    return place


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_reads_only_its_own_slices_and_computes_the_same(folder, alone, size):
    whole = sum(p.numel() for p in load_file_names(folder) if p is not None)
    for found in run_ranks(size, bodies_tp.sliced_loading, str(folder), layout={"tp_size": size}):
        assert_equal(found, alone)
        # Biases of outputs that are summed are read whole; with four ranks a KV head is held twice.
        assert found["read"][0] <= whole / size * (1.02 if size == 2 else 1.2)


def test_a_model_named_by_the_hub_is_read_in_parts_as_well(folder, alone, tmp_path):
    for file in folder.iterdir():
        (bodies_tp.hub_cache(tmp_path, "org/tiny") / file.name).write_bytes(file.read_bytes())
    whole = sum(p.numel() for p in load_file_names(folder))
    for found in run_ranks(2, bodies_tp.hub_loading, str(tmp_path), "org/tiny", layout={"tp_size": 2}):
        assert_equal(found, alone)
        assert found["read"][0] <= whole / 2 * 1.02


def load_file_names(folder: Path) -> list[torch.Tensor]:
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load(file.read_bytes()).items()}
    return [tensor for name, tensor in tensors.items() if "_proj" in name]


def test_a_folder_that_lacks_a_tensor_is_refused_with_its_name(folder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    file = broken / index["weight_map"][name]
    tensors = load(file.read_bytes())
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AssertionError, match=f"lacks the tensor {name}"):
        run_ranks(2, bodies_tp.sliced_loading, str(broken), layout={"tp_size": 2})


def test_an_adapter_is_exported_whole_and_imported_in_parts(model):
    (whole,) = run_ranks(1, bodies_tp.round_trip, model)
    for size in (2, 4):
        for found in run_ranks(size, bodies_tp.round_trip, model, layout={"tp_size": size}):
            assert found["same"]
            for name, tensor in load(whole["weights"]).items():
                assert torch.equal(load(found["weights"])[name], tensor), name
            # With four ranks every KV head is held twice.
            assert found["held"] <= whole["held"] / size * (1 if size == 2 else 1.2)
            assert found["kv"] == whole["kv"] / 2


def test_peers_agree_on_what_the_leader_says():
    results = run_ranks(3, bodies_tp.agreements, layout={"tp_size": 3})
    for rank, found in enumerate(results):
        assert found == {
            "sum": [6.0],
            "leader": [1, -2],
            "every": (True, False),
            "least": 3,
            "gather": [[0], [1], [2]],
            "ranks": (rank, 3),
        }


def test_a_rank_that_hangs_is_named_after_a_timeout():
    texts = run_ranks(3, bodies_tp.a_peer_that_hangs, layout={"tp_size": 3}, timeout_s=2)
    assert texts[1] == "hung"
    for text in (texts[0], texts[2]):
        assert text.startswith("tensor-parallel group of replica 0 (ranks [0, 1, 2]): no answer from ranks [1]: ")


def test_a_member_that_hangs_in_a_round_is_named_after_a_timeout():
    texts = run_ranks(3, bodies_tp.a_member_that_hangs, timeout_s=2)
    for text in (texts[0], texts[2]):
        assert text.startswith("all-reduce of round 7 (ranks [0, 1, 2]): no answer from ranks [1]: ")


def test_rank_alone_agrees_with_itself():
    (found,) = run_ranks(1, bodies_tp.agreements)
    assert (
        found["sum"] == [1.0] and found["least"] == 13 and found["every"] == (True, True) and found["gather"] == [[0]]
    )


def test_a_round_of_replicas_of_two_ranks_averages_part_by_part(model, data, tmp_path: Path):
    """Promise 4: both ranks of a replica switch at the same step. Replicas 0 and 1 train, 2 gets the adapter sent."""
    results = run_ranks(6, bodies.whole_round, model, data, str(tmp_path), layout={"tp_size": 2})
    assert [r["settled"] for r in results] == [1] * 6
    assert all(r["long"] == {0} for r in results), "promise 2: the long request ran through the promotion"
    assert len({tuple(r["after"]) for r in results}) == 1 and results[0]["after"] != results[0]["before"]
    for replica in range(3):
        assert results[2 * replica]["step"] == results[2 * replica + 1]["step"]
    for part in (0, 1):
        shadows = [results[2 * replica + part]["shadow"] for replica in range(3)]
        assert torch.equal(shadows[0], shadows[1]) and torch.equal(shadows[0], shadows[2])
    assert [r["committed"] for r in results] == [24] * 4 + [0] * 2
    votes = [r["vote"] for r in results[:4]]
    assert all(v.finite and v.candidate_loss < v.active_loss for v in votes)
    assert votes[0].error2 == pytest.approx(votes[1].error2) and votes[0].error2 > 0, "of whole modules, on every rank"


def test_a_federated_round_gives_one_adapter_however_many_ranks_share_it(model, data, tmp_path: Path):
    one = run_ranks(2, bodies.whole_adapter_of_a_round, model, data, str(tmp_path / "one"))
    two = run_ranks(4, bodies.whole_adapter_of_a_round, model, data, str(tmp_path / "two"), layout={"tp_size": 2})
    for name, expected in one[0].items():
        assert (two[0][name] - expected).norm() <= 1e-3 * expected.norm() + 1e-9, name


def test_spans_cover_everything_once_and_share_kv_heads_when_there_are_too_few():
    assert [even_shard(6, r, 3) for r in range(3)] == [Shard(0, 2, 6), Shard(2, 4, 6), Shard(4, 6, 6)]
    assert [unit_shard(2, 8, r, 4) for r in range(4)] == [Shard(0, 8, 16)] * 2 + [Shard(8, 16, 16)] * 2
    assert unit_shard(4, 8, 1, 2) == Shard(16, 32, 32)
