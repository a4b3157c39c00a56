"""The estimate of a dry run against what a replica really holds, and against sums done by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import finish

from clif.config import Config, config_from_tree
from clif.distributed.layout import make_layout
from clif.engine.engine import Engine
from clif.kernels.cpu.library import Absent, level
from clif.models.estimate import EstimateError, Memory, dtype_of, estimate, read_spec
from clif.models.weights.loading import load_model
from clif.rank.dry_run import group_lines, plan_lines
from clif.training.train_runner import TrainRunner
from clif.training.trainer import ShadowTrainer
from clif.types import TrainSample

REPO = Path(__file__).resolve().parents[2]
DATA = {"path": str(REPO / "configs/data/words.jsonl")}


def configured(path: str, **sections) -> Config:
    tree = {"model": {"path": path, "dtype": "float32", "device": "cpu", "max_context": 64}, "data": DATA}
    tree["engine"] = {"kv_tokens": 128, "activation_mib": 4}
    return config_from_tree({**tree, **sections})


def in_bfloat16(file: Path, **engine) -> Config:
    model = {"path": f"random:{file}", "dtype": "bfloat16", "max_context": 64}
    return configured("", model=model, engine={"kv_tokens": 128, "activation_mib": 4, **engine})


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj"), r".*\.1\.mlp\.(gate|up)_proj"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_estimate_is_what_a_replica_holds(tiny_config, tmp_path, targets, tied):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(tiny_config.read_text()), "tie_word_embeddings": tied}))
    config = configured(f"random:{file}", adapter={"r": 3, "target_modules": targets})
    memory = estimate(config, read_spec(config.model.path), 1, "cpu")

    loaded = load_model(config.model, torch.device("cpu"))
    weights = sum(p.nbytes for p in loaded.model.parameters())
    runner = Engine.from_config(config, loaded).runner
    bank = runner.bank
    trainer = ShadowTrainer(TrainRunner(runner), bank, [TrainSample(id=0, ids=(1, 2, 3), target_start=1)], config.train)
    finish(trainer.step(1, 1))
    slots = sum(t.nbytes for x in bank.layers for t in (x.serving_a, x.serving_b, x.compute_a, x.compute_b))
    snapshot = trainer.snapshot()
    moments = sum(m.nbytes for m in snapshot["moments"].values() if m.numel() > 1)
    assert memory == Memory(
        weights=weights,
        prepacked_weights=0,
        kv_cache=runner.cache.bytes,
        adapter_slots=slots,
        shadow=bank.shadow.nbytes,
        gradient=bank.gradient.nbytes,
        moments=moments,
        snapshot=snapshot["shadow"].nbytes + moments + bank.shadow.nbytes,
        activations=4 << 20,
    )


def test_bfloat16_on_a_cpu_counts_the_packed_copy_of_linear_layers_and_head(tiny_config):
    config = in_bfloat16(tiny_config, cpu_kernels="off")
    spec = read_spec(config.model.path)
    whole, gpu = estimate(config, spec, 1, "cpu"), estimate(config, spec, 1, "cuda")
    norms = 2 * (2 * spec.num_layers + 1) * spec.hidden_size
    assert whole.prepacked_weights == whole.weights - norms, "all but the norms, as the head is the embedding"
    assert gpu == replace(whole, prepacked_weights=0)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj")])
def test_bfloat16_counts_what_the_cpus_kernels_pack(tiny_config, tmp_path, targets):
    try:
        level()
    except Absent as absent:
        pytest.skip(f"no C++ kernels: {absent}")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(tiny_config.read_text()), "intermediate_size": 104, "vocab_size": 301}))
    model = {"path": f"random:{file}", "dtype": "bfloat16", "max_context": 64}
    config = configured("", model=model, adapter={"r": 3, "target_modules": targets, "serving_slots": 3})
    stack = Engine.from_config(config, load_model(config.model, torch.device("cpu"))).runner.stack
    held = [part.base.matrix.numbers for part in (*stack.linears, stack.head)]
    factors = [linear.lora.packed for linear in stack.linears if linear.lora is not None]
    held += [numbers for packed in factors for numbers in (packed.a, packed.b)]
    memory = estimate(config, read_spec(config.model.path), 1, "cpu")
    assert memory.prepacked_weights == sum(numbers.nbytes for numbers in held)


def test_a_dtype_that_a_start_chooses_is_that_of_the_cpus_instructions(tiny_config):
    auto = configured("", model={"path": f"random:{tiny_config}", "max_context": 64})
    spec = read_spec(auto.model.path)
    for flags, dtype in (({"fma", "avx512_bf16"}, "bfloat16"), ({"amx_bf16"}, "bfloat16"), ({"avx512f"}, "float32")):
        model = auto.model.model_copy(update={"dtype": dtype})
        expected = estimate(auto.model_copy(update={"model": model}), spec, 1, "cpu")
        assert estimate(auto, spec, 1, "cpu", flags) == expected
        (line,) = [one for one in plan_lines(auto, make_layout(1), "cpu", None, flags) if one.startswith("memory")]
        assert f"{dtype} on the CPU (model.dtype auto: a start measures)" in line
    assert dtype_of(auto, "cuda") == "bfloat16"
    assert dtype_of(in_bfloat16(tiny_config), "cpu") == "bfloat16", "what is asked for is not chosen"


def test_llama_8b_has_the_parameters_it_is_named_after():
    path = f"random:{REPO / 'configs/models/llama-8b.json'}"
    memory = estimate(configured(path), read_spec(path), 1, "cpu")
    assert memory.weights == 4 * 8_030_261_248
    assert memory.kv_cache == (128 + 16) * 4 * 32 * 2 * 8 * 128


def test_ranks_of_a_replica_share_linear_layers_head_and_cache_but_hold_the_embedding_whole():
    path = f"random:{REPO / 'configs/models/llama-8b.json'}"
    spec = read_spec(path)
    one, four = (estimate(configured(path), spec, n, "cuda") for n in (1, 4))
    whole = 4 * (spec.vocab_size + 2 * spec.num_layers + 1) * spec.hidden_size
    assert 4 * (four.weights - whole) == one.weights - whole
    assert 4 * four.kv_cache == one.kv_cache
    assert one.shadow / 4 < four.shadow < one.shadow, "one factor of each layer is cut, the other is not"
    assert estimate(configured(path), spec, 16, "cuda").kv_cache == one.kv_cache // 8, "8 KV heads cannot be halved"


def test_a_shared_head_is_counted_by_its_largest_slice_and_costs_nothing_where_it_is_a_view(tiny_config):
    config = in_bfloat16(tiny_config, cpu_kernels="off")
    tied = replace(read_spec(config.model.path), vocab_size=301)
    one, three = (estimate(config, tied, n, "cpu") for n in (1, 3))
    rest = 2 * (301 + 2 * tied.num_layers + 1) * tied.hidden_size
    linears = three.weights - rest
    assert 3 * linears > one.weights - rest > linears, "fewer KV heads than ranks: some are held twice"
    assert three.prepacked_weights == linears + 2 * 101 * tied.hidden_size, "of the embedding only the slice is packed"
    untied = estimate(config, replace(tied, tied=False), 3, "cpu")
    assert untied.weights == three.weights + 2 * 101 * tied.hidden_size
    assert untied.prepacked_weights == three.prepacked_weights


def test_a_cache_that_takes_what_is_left_counts_as_one_request_and_the_dry_run_says_so(tiny_config):
    whole = configured(f"random:{tiny_config}", engine={"kv_tokens": 64, "activation_mib": 4})
    auto = configured(f"random:{tiny_config}", engine={"kv_tokens": "auto", "activation_mib": 4, "max_batch": 5})
    spec = read_spec(auto.model.path)
    assert estimate(auto, spec, 1, "cpu") == estimate(whole, spec, 1, "cpu"), "model.max_context is 64"
    (line,) = [line for line in plan_lines(auto, make_layout(1), "cpu") if "kv cache" in line]
    assert line.endswith("at least: engine.kv_tokens auto takes what is left, for 320 tokens at most")


def test_a_run_that_only_serves_needs_nothing_for_training(tiny_config):
    config = configured(f"random:{tiny_config}", train={"enabled": False})
    memory = estimate(config, read_spec(config.model.path), 1, "cpu")
    assert (memory.moments, memory.snapshot, memory.activations) == (0, 0, 0)


@pytest.mark.parametrize("path", ["org/name", "assets/model.gguf", "random:nowhere"])
def test_a_model_whose_sizes_are_not_here_gets_no_estimate_but_the_layout(path):
    lines = list(plan_lines(configured(path), make_layout(2), "cpu"))
    assert lines[0] == "replica 0: ranks [0], leader 0"
    assert lines[-1].startswith("no estimate of memory: ") and path in lines[-1]


def test_a_config_without_a_size_is_refused_with_its_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}')
    with pytest.raises(EstimateError, match="vocab_size"):
        read_spec(str(tmp_path))


def test_a_dry_run_names_the_groups_of_tensor_parallelism_and_of_rounds():
    lines = list(group_lines(configured("none"), make_layout(8, tp_size=4)))
    assert lines[:2] == [f"tensor-parallel group of replica {i}: ranks {list(range(4 * i, 4 * i + 4))}" for i in (0, 1)]
    assert lines[2:] == [f"federation group of tp_rank {t}, all members: ranks {[t, t + 4]}" for t in range(4)]


def test_replicas_that_only_serve_are_in_no_federation_group():
    config = configured("none", run={"mode": "split", "trainers": 1})
    assert list(group_lines(config, make_layout(3))) == ["federation group of tp_rank 0, all members: ranks [2]"]
    off = configured("none", run={"mode": "serve_only"}, train={"enabled": False})
    assert list(group_lines(off, make_layout(3))) == []
