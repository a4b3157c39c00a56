"""Before any rank loads a model, its files say whether that can end well; a dry run asks the same."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import safetensors.torch
import torch
import warm
from helpers import tp_group_of
from model_folders import SMALL, saved
from tiny_gguf import write_gguf

from clif.config import Config, ConfigError, ModelConfig, config_from_tree
from clif.distributed.layout import LayoutError, make_layout
from clif.errors import InputError
from clif.models.estimate import Room
from clif.models.weights.gguf_header import read_header
from clif.models.weights.loading import load_model
from clif.rank import preflight
from clif.rank.dry_run import plan_lines
from clif.rank.preflight import check_model, check_room, cpu_flags, prove, room_of

REPO = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def configured(path: object, **sections: Any) -> Config:
    model = {"path": str(path), "dtype": "float32", "device": "cpu", "max_context": 64, **sections.pop("model", {})}
    return config_from_tree({"model": model, "train": {"enabled": False}, **sections})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as its makers write it."""
    return Path(saved(tmp_path_factory.mktemp("plain"), {"tie_word_embeddings": False}))


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in plain.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def fields(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def weights(keep: Callable[[str], bool] = lambda _: True, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = {k: v for k, v in safetensors.torch.load_file(file).items() if keep(k)}
        safetensors.torch.save_file({**tensors, **changes}, file, metadata={"format": "pt"})

    return change


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def indexed(content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_bytes(content)

    return change


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n(X\x04\x00\x00\x00truetR.")


SEEN = {
    "most weights missing": (weights(lambda name: "layers.0" in name), "lacks the tensors model.embed_tokens.weight"),
    "one tensor missing": (weights(lambda name: name != "model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj"),
    "head missing": (weights(lambda name: name != "lm_head.weight"), "lm_head.weight"),
    "other sizes": (fields(intermediate_size=64), r"has shape \[48, 32\], and \[64, 32\]"),
    "more layers": (fields(num_hidden_layers=3), "lacks the tensors model.layers.2"),
    "endless layers": (fields(num_hidden_layers=10**9), "num_hidden_layers 1000000000"),
    "no heads": (fields(num_attention_heads=0), "num_attention_heads 0"),
    "heads that do not divide": (fields(num_attention_heads=3, num_key_value_heads=2), "cannot share 2 key"),
    "bitsandbytes": (fields(quantization_config={"quant_method": "bitsandbytes"}), r"quantised weights \(bitsandbytes"),
    "gptq": (fields(quantization_config={"quant_method": "gptq", "bits": 4}), r"quantised weights \(gptq"),
    "awq": (fields(quantization_config={"quant_method": "awq"}), r"quantised weights \(awq"),
    "torchao": (fields(quantization_config={"quant_method": "torchao"}), r"quantised weights \(torchao"),
    "compressed": (fields(quantization_config={"quant_method": "compressed-tensors"}), r"weights \(compressed-tensors"),
    "unknown method": (fields(quantization_config={"quant_method": "nonesuch"}), r"quantised weights \(nonesuch"),
    "nameless method": (fields(quantization_config={"bits": 4}), "quantised weights"),
    "remote code": (fields(auto_map={"AutoModelForCausalLM": "evil.Model"}), "runs no code from model folders"),
    "remote code of another": (
        fields(model_type="nonesuch", auto_map={"AutoConfig": "evil.Config"}),
        "runs no code from model folders",
    ),
    "family": (fields(model_type="nonesuch"), "of the family nonesuch, which is not supported: choose one of .*llama"),
    "random safetensors": (write("model.safetensors", bytes(range(256)) * 8), "lacks a part"),
    "a bomb": (write("model.safetensors", struct.pack("<Q", 1 << 60) + b"{}"), "lacks a part"),
    "no config": (write("config.json", b"\xff{"), "is not JSON"),
    "nested": (write("config.json", b"[" * 200_000), "is not JSON"),
    "no make": (write("config.json", b"[]"), "names no model_type"),
    "index of nothing": (indexed(b"{}"), "not an index of weights"),
    "index of elsewhere": (
        indexed(b'{"weight_map": {"a": "../x.safetensors"}}'),
        "not a file beside it",
    ),
    "context": (fields(max_position_embeddings=32), "exceeds the model's own 32"),
}  # fmt: skip
"""What is wrong with a folder and can be seen without torch."""
LATER = {
    "pickle": (only_pickle, "cannot be loaded"),
    "unknown make": (fields(model_type="nonesuch"), "cannot be loaded"),
    "unknown rope": (fields(rope_parameters={"rope_type": "nonesuch", "rope_theta": 1e4}), "nonesuch"),
    "biases that are not used": (weights(**{"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}), "q_proj.bias"),
    "fewer layers": (fields(num_hidden_layers=1), "model.layers.1"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").write_bytes(b"{"), "cannot be loaded"),
    "numbers that are not finite": (
        weights(**{"model.norm.weight": torch.full((32,), torch.nan)}),
        "not finite",
    ),
}  # fmt: skip
"""What takes torch to see: the start asks before it serves."""
REMEDY = r"correct|get it again|choose|lower|remove|name a|cannot share"


@pytest.mark.parametrize("name", SEEN)
def test_what_a_models_files_say_is_refused_before_torch_is_loaded(folder, name):
    damage, sentence = SEEN[name]
    damage(folder)
    with pytest.raises(ConfigError, match=sentence):
        check_model(configured(folder), make_layout(1))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", [*SEEN, *LATER])
def test_a_rank_that_meets_it_says_a_sentence_too(folder, name, ranks):
    """The files of another host may be others; whoever loads a part of a model sees it as well."""
    damage, sentence = {**SEEN, **LATER}[name]
    damage(folder)
    if name == "numbers that are not finite" and ranks > 1:
        pytest.skip("no rank holds all of the model, which could be run")
    with pytest.raises(InputError, match=sentence if name in LATER and ranks == 1 else REMEDY):
        make_base(folder, ranks)


def make_base(folder: Path, ranks: int) -> None:
    from clif.engine.base import build_base

    loaded = load_model(
        ModelConfig(path=str(folder), dtype="float32", max_context=64), CPU, tp_group=tp_group_of(0, ranks)
    )
    if ranks == 1:
        build_base(configured(folder), loaded)


def test_a_whole_folder_passes_and_is_served(folder):
    tree = check_model(configured(folder), make_layout(2))
    assert tree is not None and tree["hidden_size"] == SMALL["hidden_size"]
    make_base(folder, 1)
    make_base(folder, 2)


def test_what_lies_beside_a_models_weights_does_no_harm(folder):
    weights(**{"vision.tower": torch.ones(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})(folder)
    check_model(configured(folder), make_layout(1))
    make_base(folder, 1)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/nowhere", "is not a folder: correct it"),
        ("a/b/c", "is not a folder: correct it"),
        ("not a name", "neither here nor a name of the hub"),
        ("random:/nowhere", "name a config.json or a folder with one"),
        ("/nowhere/m.gguf", "does not exist: correct it"),
        (str(REPO / "pyproject.toml"), r"is not a folder: name one, a .gguf file or random:"),
        (str(REPO / "clif"), "has no config.json: name a folder with one"),
    ],
)
def test_a_path_that_names_no_model_is_refused(path, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_model(configured(path), make_layout(1))


def test_a_name_of_the_hub_that_is_not_here_is_left_to_the_start():
    config = configured("org/surely-not-here")
    assert check_model(config, make_layout(1)) is None
    assert "checked when a start has downloaded" in prove(config)


def test_names_of_layers_and_shares_are_checked_without_torch(folder):
    with pytest.raises(ConfigError, match="'gate_prj' matches no linear layer of the model: there are q_proj"):
        check_model(configured(folder, adapter={"target_modules": ["q_proj", "gate_prj"]}), make_layout(1))
    check_model(configured(folder, adapter={"target_modules": r".*\.1\.mlp\.(gate|up)_proj"}), make_layout(1))
    with pytest.raises(LayoutError, match="3 ranks cannot share"):
        check_model(configured(folder), make_layout(3, tp_size=3))


def test_a_kernel_that_does_not_compute_a_models_attention_is_refused_by_a_dry_run_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "model_type": "mistral", "sliding_window": 32}))
    path, kernel = f"random:{tmp_path}", {"decode_kernel": "triton"}
    for choose in ({"max_context": 64}, {"max_context": 32}):
        check_model(configured(path, model=choose), make_layout(1))
    with pytest.raises(
        ConfigError, match=r"decode_kernel triton computes no windows.*: set engine\.decode_kernel=torch"
    ):
        check_model(configured(path, engine=kernel), make_layout(1))
    check_model(configured(path, engine=kernel, model={"max_context": 32}), make_layout(1))


def test_the_instructions_of_a_cpu_are_those_that_linux_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "CPU_INFO", tmp_path / "cpuinfo")
    assert cpu_flags() == frozenset()
    (tmp_path / "cpuinfo").write_text("model name\t: X\nflags\t\t: fma amx_bf16\nprocessor\t: 1\nflags\t\t: fma\n")
    assert cpu_flags() == {"fma", "amx_bf16"}


def gguf(folder: Path, change: Callable[[bytearray], None]) -> Path:
    file = folder / "m.gguf"
    data = bytearray(Path(write_gguf(file)).read_bytes())
    change(data)
    file.write_bytes(data)
    return file


def put(at: int, value: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[at : at + 8] = struct.pack("<Q", value)

    return change


def cut(share: float) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        del data[int(len(data) * share) :]

    return change


@pytest.mark.parametrize(
    "change",
    [put(0, 7), put(8, 1 << 62), put(16, 1 << 62), put(24, 1 << 62), put(8, 25), cut(0.001), cut(0.05), cut(0.9)],
)
def test_a_header_of_a_gguf_file_that_does_not_fit_the_file_is_refused_at_once(tmp_path, change):
    file = gguf(tmp_path, change)
    with pytest.raises(ConfigError, match="is not a whole GGUF file"):
        check_model(configured(file), make_layout(1))
    with pytest.raises(ConfigError, match="get it again"):
        load_model(ModelConfig(path=str(file), dtype="float32", max_context=64), CPU)


def test_a_gguf_file_tells_its_sizes_and_lacks_no_tensor(tmp_path):
    file = gguf(tmp_path, lambda _: None)
    tree = check_model(configured(file), make_layout(3, tp_size=3))
    assert tree is not None and (tree["hidden_size"], tree["num_key_value_heads"], tree["vocab_size"]) == (96, 3, 258)
    assert any("memory of a rank" in line for line in plan_lines(configured(file), make_layout(1), "cpu"))
    renamed = gguf(tmp_path, lambda data: data.__setitem__(slice(None), data.replace(b"blk.1.ffn_up", b"blk.7.ffn_up")))
    with pytest.raises(ConfigError, match=r"lacks the tensors blk.1.ffn_up.weight"):
        check_model(configured(renamed), make_layout(1))
    with pytest.raises(ConfigError, match=r"lacks the tensors model.layers.1.mlp.up_proj"):
        load_model(ModelConfig(path=str(renamed), dtype="float32", max_context=64), CPU)
    assert read_header(renamed).tensors["blk.7.ffn_up.weight"] == (192, 96)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"freqs": True}, "scaled rotary frequencies .*: choose the model as a folder with safetensors"),
        ({"scaling": "yarn"}, "scaled rotary frequencies .*: choose the model as a folder with safetensors"),
        ({"window": 32}, "sliding-window attention over 32 tokens"),
        ({"experts": 4}, "has experts, .*: choose the model as a folder with safetensors"),
        ({"turned": 8}, "turns 8 of the [0-9]+ numbers of each head .*: choose the model as a folder"),
    ],
)
def test_what_transformers_does_not_read_from_a_gguf_file_is_refused(tmp_path, more, sentence):
    """It would be served with other positions, or attention to all of the context, without a word."""
    file = write_gguf(tmp_path / "m.gguf", **more)
    for ask in (
        lambda: check_model(configured(file), make_layout(1)),
        lambda: load_model(ModelConfig(path=file, dtype="float32", max_context=64), CPU),
    ):
        with pytest.raises(ConfigError, match=sentence):
            ask()
    check_model(configured(write_gguf(tmp_path / "n.gguf", scaling="none", window=64)), make_layout(1))


def test_a_plan_says_whether_it_fits(folder):
    config = configured(folder)
    needed = next(line for line in plan_lines(config, make_layout(2), "cpu") if line.startswith("memory"))
    assert "about 2.4 MiB" in needed
    for size, sentence in ((6 << 20, "fits: 2 such ranks on a host of 6.0 MiB"), (4 << 20, "does not fit: 2 such")):
        lines = list(plan_lines(config, make_layout(2), "cpu", Room(size, 2)))
        assert any(line.startswith(sentence) for line in lines), lines
    assert any("not known: no GPU" in line for line in plan_lines(config, make_layout(2), "cuda", None))


def test_the_room_of_ranks_is_their_host_or_their_gpu(monkeypatch):
    config = configured("x", dist={"ranks_per_gpu": 1})
    monkeypatch.setattr(preflight, "gpu_bytes", lambda: [80 << 30, 40 << 30])
    assert room_of(config, "cuda", 8) == Room(40 << 30, 1)
    monkeypatch.setattr(preflight, "gpu_bytes", list)
    assert room_of(config, "cuda", 8) is None
    assert room_of(config, "cpu", 8).ranks == 8


def test_weights_that_no_host_holds_are_refused_before_the_system_ends_the_rank(monkeypatch):
    config = configured("random:configs/models/llama-70b.json", model={"dtype": "auto", "max_context": 64})
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: type("Memory", (), {"total": 64 << 30}))
    with pytest.raises(ConfigError, match=r"the weights of 1 ranks need 131\.\d GiB, and this host has"):
        check_room(config, make_layout(1), 1)
    check_room(configured("random:configs/models/tiny-llama.json"), make_layout(1), 1)


DRY_RUN = ("launch/run.py", "--dry-run", "--config", "configs/smoke.yaml")


def dry_run(*overrides: str) -> subprocess.CompletedProcess[str]:
    return warm.run([*DRY_RUN, *overrides], {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")})


def test_a_dry_run_refuses_a_family_that_is_not_known_and_names_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "model_type": "stablelm"}))
    overrides = (f"model.path=random:{tmp_path}", "data.max_sample_tokens=128")
    done = dry_run(*overrides)
    assert done.returncode == 2 and "is of the family stablelm, which is not supported: choose one of " in done.stderr


def test_a_dry_run_refuses_what_a_cpu_does_not_compute_in():
    done = dry_run("model.dtype=float16", "model.device=cpu")
    assert done.returncode == 2 and "model.dtype float16 is for GPUs: use bfloat16, float32 or auto" in done.stderr


def test_a_dry_run_of_a_model_that_is_not_there_is_an_error():
    done = dry_run("model.path=./nowhere")
    assert done.returncode == 2 and "error: model.path ./nowhere is not a folder: correct it" in done.stderr
