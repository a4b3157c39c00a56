"""A GGUF file is unpacked by one rank of each host; what the others read is the same model."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import torch.distributed as dist
from helpers import expected_part, tp_group_of
from tiny_gguf import CONTEXT, write_gguf

from clif.config import ConfigError, ModelConfig
from clif.models.weights import gguf as unpacked
from clif.models.weights import loading
from clif.models.weights.files import is_gguf
from clif.models.weights.gguf import load_gguf, remove_unpacked
from clif.models.weights.loading import LoadedModel, load_model

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 33]])


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are processes; in the threads of one, transformers must not load two models at a time."""
    lock = threading.Lock()
    for name in ("pretrained", "load_unpacked", "load_model"):
        monkeypatch.setattr(unpacked, name, locked(lock, getattr(unpacked, name)))


def locked(lock: threading.Lock, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return call(*args, **kwargs)

    return run


@pytest.fixture
def unpackings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were written, in their order."""
    written: list[Path] = []
    original = unpacked._unpack

    def watched(config: ModelConfig, device: torch.device, folder: Path, part: Path) -> None:
        original(config, device, folder, part)
        written.append(folder)

    monkeypatch.setattr(unpacked, "_unpack", watched)
    return written


def start(
    file: str, hosts: dict[Path, int], tp_size: int = 1, restarted: bool = False, **config: Any
) -> list[LoadedModel | Exception]:
    """Every rank of one start in a thread of its own; hosts: the run's folder on each, and its number of ranks."""
    store = dist.HashStore()
    places = [folder for folder, size in hosts.items() for _ in range(size)]
    found: list[Any] = [None] * len(places)
    settings = ModelConfig(**{"path": file, "dtype": "float32", "max_context": 64, **config})

    def rank(number: int, folder: Path) -> None:
        try:
            tp_group = tp_group_of(number % tp_size, tp_size)
            found[number] = load_gguf(settings, store, folder, CPU, tp_group, restarted, host=folder.name)
        except Exception as error:  # noqa: BLE001 - looked at by the test
            found[number] = error

    threads = [threading.Thread(target=rank, args=place) for place in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


def models(found: list[LoadedModel | Exception]) -> list[LoadedModel]:
    for loaded in found:
        if isinstance(loaded, Exception):
            raise loaded
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_rank_of_a_host_reads_what_one_of_them_unpacked(file, tmp_path, unpackings, dtype):
    direct = load_model(ModelConfig(path=file, dtype=dtype, max_context=64), CPU)
    ranks = models(start(file, {tmp_path / "run": 3}, dtype=dtype))
    assert len(unpackings) == 1
    for loaded in ranks:
        assert loaded.whole and loaded.dtype == direct.dtype and loaded.dtype_reason == "asked for"
        assert torch.equal(loaded.model(IDS).logits, direct.model(IDS).logits)
        assert not any(p.requires_grad for p in loaded.model.parameters()) and not loaded.model.training
        assert loaded.tokenizer.eos_ids == direct.tokenizer.eos_ids
        assert loaded.tokenizer.encode_answer("the") == direct.tokenizer.encode_answer("the")


def test_unpacked_weights_are_their_owners_alone_whatever_the_umask(file, tmp_path):
    before = os.umask(0)
    try:
        models(start(file, {tmp_path / "run": 1}))
    finally:
        os.umask(before)
    (folder,) = (tmp_path / "run").glob("base-*")
    modes = {(path.is_dir(), path.stat().st_mode & 0o777) for path in (folder, *folder.rglob("*"))}
    assert modes == {(True, 0o700), (False, 0o600)}


def test_a_rank_of_several_reads_its_part_of_a_gguf_file(file, tmp_path):
    direct = dict(load_model(ModelConfig(path=file, dtype="float32", max_context=64), CPU).model.named_parameters())
    for rank, loaded in enumerate(models(start(file, {tmp_path / "run": 3}, tp_size=3))):
        assert not loaded.whole
        for name, tensor in loaded.model.named_parameters():
            assert torch.equal(tensor, expected_part(name, direct[name], loaded.model.config, rank, 3)), name


def test_hosts_with_one_file_system_unpack_once_and_others_once_each(file, tmp_path, unpackings):
    shared = tmp_path / "run"
    (tmp_path / "link").symlink_to(shared, target_is_directory=True)
    models(start(file, {shared: 2, tmp_path / "link": 2}))
    assert unpackings == [next(shared.glob("base-*"))]
    unpackings.clear()
    ranks = models(start(file, {tmp_path / "a": 2, tmp_path / "b": 2}))
    assert len(unpackings) == 2 and len({folder.name for folder in unpackings}) == 1
    assert torch.equal(ranks[0].model(IDS).logits, ranks[3].model(IDS).logits)


def test_a_restart_unpacks_nothing_but_a_new_start_does(file, tmp_path, unpackings):
    hosts = {tmp_path / "a": 2, tmp_path / "b": 1}
    models(start(file, hosts))
    assert len(unpackings) == 2
    models(start(file, hosts, restarted=True))
    assert len(unpackings) == 2
    models(start(file, hosts))
    assert len(unpackings) == 4
    for folder in hosts:
        assert len(list(folder.iterdir())) == 1, "the old one is gone"
        remove_unpacked(folder)
        assert not list(folder.iterdir())


def test_a_host_that_has_the_name_of_another_loads_the_file_itself(file, tmp_path, unpackings):
    store, config = dist.HashStore(), ModelConfig(path=file, dtype="float32", max_context=64)
    here, there = (load_gguf(config, store, tmp_path / n, CPU, tp_group_of(0, 1), host="localhost") for n in "ab")
    assert [folder.parent.name for folder in unpackings] == ["a"]
    assert torch.equal(here.model(IDS).logits, there.model(IDS).logits)


def test_a_folder_that_another_host_made_meanwhile_is_taken(file, tmp_path):
    config, folder = ModelConfig(path=file, dtype="float32", max_context=64), tmp_path / "run" / "base-1"
    unpacked._unpack(config, CPU, folder, folder.with_name("part-a"))
    made = folder.stat().st_ino
    unpacked._unpack(config, CPU, folder, folder.with_name("part-b"))
    assert folder.stat().st_ino == made and list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "/nowhere/m.gguf"}, "does not exist"),
        ({"max_context": 2 * CONTEXT}, f"exceeds the model's own {CONTEXT}"),
    ],
)
def test_all_ranks_are_told_why_the_file_cannot_be_unpacked(file, tmp_path, change, message):
    for error in start(file, {tmp_path / "a": 2, tmp_path / "b": 2}, **change):
        assert isinstance(error, ConfigError) and message in str(error)
    assert not list(tmp_path.glob("*/*"))


def test_a_full_disk_is_said_with_what_to_change_and_leaves_nothing_to_be_read(file, tmp_path, monkeypatch):
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(unpacked.safetensors.torch, "save_file", full)
        for error in start(file, {tmp_path / "run": 2}):
            assert isinstance(error, ConfigError) and "No space left" in str(error) and "run.out_dir" in str(error)
    assert not list((tmp_path / "run").glob("base-*"))
    models(start(file, {tmp_path / "run": 2}, restarted=True))
    assert len(list((tmp_path / "run").iterdir())) == 1, "and what it left is gone after the next start"


def test_only_gguf_files_are_unpacked():
    assert is_gguf("assets/model.gguf") and not is_gguf("org/model") and not is_gguf("random:x.json")


def test_a_header_is_read_once_for_configuration_tokenizer_and_weights(file, monkeypatch):
    reads = list[str]()
    reader = gguf.GGUFReader

    def counted(path, *rest):
        reads.append(path)
        return reader(path, *rest)

    monkeypatch.setattr(gguf, "GGUFReader", counted)
    once = load_model(ModelConfig(path=file, dtype="float32", max_context=CONTEXT), torch.device("cpu"))
    assert reads == [file]
    assert gguf.GGUFReader is counted, "a file that is written anew is read anew"
    monkeypatch.setattr(loading, "read_once", lambda _: nullcontext())
    often = load_model(ModelConfig(path=file, dtype="float32", max_context=CONTEXT), torch.device("cpu"))
    assert len(reads) > 3, "this is worth it as long as transformers asks so often"
    assert all(torch.equal(a, b) for a, b in zip(once.model.parameters(), often.model.parameters(), strict=True))
    assert once.tokenizer.encode_text("a b") == often.tokenizer.encode_text("a b")
