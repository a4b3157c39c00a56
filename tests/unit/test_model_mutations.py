"""Whatever is wrong with the files of a model: a sentence, or a model that computes what transformers computes."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import stack_logits, tp_group_of
from model_folders import saved
from tiny_gguf import write_gguf

from clif.config import Config, config_from_tree
from clif.distributed.layout import make_layout
from clif.engine.base import build_base
from clif.errors import InputError
from clif.models.weights.loading import load_model
from clif.rank.preflight import check_model

CPU = torch.device("cpu")
CASE_S = 30
"""More than any case takes, by far: one that takes longer hangs."""
VALUES: list[Any] = [
    None, 0, 1, -1, 2, 3, 10**9, 10**30, 0.5, 1e308, float("nan"), float("inf"), True, False, "", "x", "llama", "bert",
    [], [0], {}, {"a": 1}, ["full_attention"] * 2, ["sliding_attention"] * 2, "silu", "gelu", [[[]]] * 3, "\ud83d", "0",
]  # fmt: skip
FIELDS = [
    "sliding_window", "use_sliding_window", "layer_types", "rope_scaling", "rope_parameters", "attention_chunk_size",
    "partial_rotary_factor", "quantization_config", "auto_map", "attention_bias", "mlp_bias", "head_dim", "hidden_act",
    "residual_multiplier", "tie_word_embeddings", "dtype", "architectures", "text_config", "rms_norm_eps",
    "pretraining_tp", "attn_implementation", "_attn_implementation", "is_encoder_decoder", "pad_token_id", "vocab_size",
    "original_max_position_embeddings", "num_hidden_layers", "max_position_embeddings", "num_attention_heads",
    "num_key_value_heads", "hidden_size", "intermediate_size", "model_type", "eos_token_id", "compression_config",
]  # fmt: skip
MAKES = [
    "qwen2", "qwen3", "mistral", "gemma", "gemma2", "stablelm", "phi3", "granite", "smollm3", "olmo2", "ministral3",
    "cohere", "bloom", "gpt2", "mamba", "mixtral", "t5", "bert", "gpt_oss", "llama4_text", "deepseek_v3", "clip",
]  # fmt: skip
ROPES = [
    {"rope_type": kind, "rope_theta": theta, "factor": factor, **more}
    for kind in ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "nonesuch", None, 3)
    for theta, factor in ((1e4, 2.0), (0, 0), (None, -1))
    for more in ({}, {"original_max_position_embeddings": 16}, {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8})
]
Change = Callable[[random.Random, Path], None]


def tree_of(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text())
    assert isinstance(found, dict)
    return found


def field(rng: random.Random, folder: Path) -> None:
    """A field of config.json, of those it has and those it might have, becomes anything."""
    tree = tree_of(folder / "config.json")
    tree[rng.choice([*tree, *FIELDS])] = rng.choice(VALUES)
    (folder / "config.json").write_text(json.dumps(tree))


def field_gone(rng: random.Random, folder: Path) -> None:
    tree = tree_of(folder / "config.json")
    del tree[rng.choice(list(tree))]
    (folder / "config.json").write_text(json.dumps(tree))


def make(rng: random.Random, folder: Path) -> None:
    tree = tree_of(folder / "config.json")
    tree["model_type"] = rng.choice(MAKES)
    (folder / "config.json").write_text(json.dumps(tree))


def rope(rng: random.Random, folder: Path) -> None:
    tree = tree_of(folder / "config.json")
    tree[rng.choice(["rope_parameters", "rope_scaling"])] = rng.choice(ROPES)
    (folder / "config.json").write_text(json.dumps(tree))


def side_field(rng: random.Random, folder: Path) -> None:
    """The same in one of the files beside."""
    file = folder / rng.choice(["generation_config.json", "tokenizer_config.json", "tokenizer.json"])
    tree = tree_of(file) if file.is_file() else {}
    tree[rng.choice([*tree, "eos_token_id", "eos_token", "tokenizer_class", "auto_map"])] = rng.choice(VALUES)
    file.write_text(json.dumps(tree))


def tensors(rng: random.Random, folder: Path) -> None:
    """Some tensors go, get another name, shape, type or content."""
    file = folder / "model.safetensors"
    found = safetensors.torch.load_file(file)
    for name in rng.sample(list(found), rng.choice([1, 2, len(found) // 2])):
        tensor = found.pop(name)
        how = rng.randrange(7)
        if how == 1:
            found[rng.choice(["model.", "", "lm_head.", "x."]) + name] = tensor
        elif how == 2:
            found[name] = tensor[:-1].contiguous() if len(tensor) > 1 else tensor
        elif how == 3:
            found[name] = tensor.to(
                rng.choice([torch.int8, torch.float64, torch.float16, torch.float8_e4m3fn, torch.bool])
            )
        elif how == 4:
            found[name] = torch.full_like(tensor, rng.choice([torch.nan, torch.inf, 1e38, 0.0]))
        elif how == 5:
            found[name] = tensor.flatten()
        elif how == 6:
            found[name] = tensor
            found[f"{name.rpartition('.')[0]}.{rng.choice(['bias', 'scales', 'qweight'])}"] = torch.ones(4)
    safetensors.torch.save_file(found, file, metadata={"format": "pt"})


def flipped(rng: random.Random, folder: Path) -> None:
    """Bytes of a file change, more often near its beginning, where headers are."""
    file = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 3, 30])):
        if data:
            data[rng.randrange(min(len(data), rng.choice([16, 400, len(data)])))] = rng.randrange(256)
    file.write_bytes(data)


def cut(rng: random.Random, folder: Path) -> None:
    file = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    file.write_bytes(file.read_bytes()[: rng.choice([0, 1, 8, rng.randrange(1 + file.stat().st_size)])])


def gone(rng: random.Random, folder: Path) -> None:
    rng.choice(sorted(p for p in folder.iterdir() if p.is_file())).unlink()


def other(rng: random.Random, folder: Path) -> None:
    """A file is a folder, noise, deep JSON, a number of 5,000 digits, or a pickle that would run a command."""
    file = folder / rng.choice(["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
    file.unlink(missing_ok=True)
    how = rng.randrange(6)
    if how == 0:
        file.mkdir()
    elif how == 5:
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n(X\x05\x00\x00\x00falsetR.")
    else:
        file.write_bytes([b"", rng.randbytes(999), b"[" * 99_999, b'{"a": ' + b"9" * 5000 + b"}", b"{}"][how])


CHANGES: list[Change] = [field, field, field_gone, make, rope, side_field, tensors, tensors, flipped, cut, gone, other]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(saved(tmp_path_factory.mktemp("plain"), {}))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    write_gguf(folder / "model.gguf")
    return folder


@contextmanager
def ends() -> Iterator[None]:
    """Raises TimeoutError for a case that hangs."""

    def late(*_: object) -> None:
        raise TimeoutError(f"still busy after {CASE_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(CASE_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(work: Callable[[], object]) -> bool:
    """Whether work was refused, by a sentence."""
    try:
        work()
    except InputError as error:
        assert str(error).strip()
        return True
    return False


def configured(path: Path, context: int) -> Config:
    model = {"path": str(path), "dtype": "float32", "device": "cpu", "max_context": context}
    return config_from_tree({"model": model, "train": {"enabled": False}})


def serve(config: Config) -> None:
    """Load a model as a rank does, and hold what is served against transformers."""
    loaded = load_model(config.model, CPU)
    ids = torch.arange(1, 30)
    expected = loaded.model(ids.unsqueeze(0), use_cache=False).logits[0]
    got = stack_logits(build_base(config, loaded).stack, ids)
    assert (got - expected).norm() <= 1e-3 * expected.norm()


def case(seed: int, source: Path, folder: Path, changes: list[Change]) -> str:
    """One damaged copy of a folder; what came of it."""
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    # Those that want whole files go first.
    for change in sorted(rng.sample(changes, rng.choice([1, 1, 1, 2])), key=changes.index):
        change(rng, folder)
    path = folder / "model.gguf" if (folder / "model.gguf").exists() else folder
    config = configured(path, rng.choice([16, 64, 256]))
    with ends():
        early = refused(lambda: check_model(config, make_layout(1)))
        late = refused(lambda: serve(config))
        # Another way to read weights; not in each case, as it takes as long.
        part = refused(lambda: load_model(config.model, CPU, tp_group=tp_group_of(0, 2))) if seed % 3 == 0 else late
    return f"{early:d}{late:d}{part:d}"


def run(source: Path, folder: Path, changes: list[Change], seeds: range) -> dict[str, int]:
    """Cases by what came of them. Fails with all seeds that ended otherwise than by a sentence or a right model."""
    wrong: list[str] = []
    found: dict[str, int] = {}
    for seed in seeds:
        try:
            outcome = case(seed, source, folder / "case", changes)
        except Exception as error:  # noqa: BLE001 - told with its seed
            wrong.append(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}")
            continue
        found[outcome] = found.get(outcome, 0) + 1
    assert not wrong, "\n".join(wrong)
    return found


def test_a_damaged_folder_is_refused_by_a_sentence_or_served_rightly(plain, tmp_path):
    found = run(plain, tmp_path, CHANGES, range(120))
    assert found["111"] > 20 and found["000"] > 5, found


def test_a_damaged_gguf_file_is_refused_by_a_sentence_or_served_rightly(packed, tmp_path):
    found = run(packed, tmp_path, [flipped, cut], range(40))
    assert found["111"] > 10, found


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 5000, 500))
def test_thousands_of_damaged_folders(plain, tmp_path, start):
    run(plain, tmp_path, CHANGES, range(start, start + 500))


@pytest.mark.slow
def test_hundreds_of_damaged_gguf_files(packed, tmp_path):
    run(packed, tmp_path, [flipped, cut], range(1000, 1400))
