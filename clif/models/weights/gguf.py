"""A GGUF file as plain weights in the run's folder: one rank of each host unpacks it, all ranks read the result.

transformers reads a GGUF file three times, whole and in Python: with every rank doing so on few cores, that is most of
a start. Of plain weights each rank of a replica reads its part only, and a restart finds them unpacked.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import time
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
import transformers

from clif.config import ConfigError, ModelConfig
from clif.distributed.collectives import TpGroup
from clif.distributed.rendezvous import KeyValues
from clif.models.guard import reading
from clif.models.weights.loading import LoadedModel, choose_dtype, load_model, load_whole, pretrained
from clif.models.weights.safetensors_shard import load_sliced
from clif.storage.files import keep_from_others
from clif.tokenizer import ChatTokenizer

PREFIX = "base-"
PART = "part-"
POLL_S = 0.05
ALL = "/"
"""All hosts: no host has this name."""


class Store(KeyValues, Protocol):
    """The part of torch.distributed.Store that is used here."""

    def add(self, key: str, amount: int, /) -> int: ...


def load_gguf(
    config: ModelConfig,
    store: Store,
    run_dir: Path,
    device: torch.device,
    tp_group: TpGroup,
    restarted: bool = False,
    host: str | None = None,
) -> LoadedModel:
    """The model of a GGUF file, by way of RUN/base-*; with peers this rank's part of it. Collective over all ranks.

    store: of this start alone. host: name of this host. Raises ConfigError, also on ranks that wait for one that cannot
    unpack the file, and LayoutError when the peers cannot share the model.
    """
    host = host or socket.gethostname()
    # The first to come: not every launcher numbers the ranks host by host.
    unpacks = _first_of(store, host)
    name = _provide(config, store, run_dir, device, restarted, host) if unpacks else _answer(store, host)
    if (run_dir / name).is_dir():
        return load_unpacked(run_dir / name, device, tp_group)
    # Another host has the same name, or the file system is late.
    return load_model(config, device, tp_group=tp_group)


def _provide(config: ModelConfig, store: Store, run_dir: Path, device: torch.device, restarted: bool, host: str) -> str:
    """Make sure that this host has the folder; returns its name. One host goes first: all may see its files."""
    waiting = (host, ALL) if _first_of(store, ALL) else (host,)
    try:
        name = _choose(run_dir, restarted) if ALL in waiting else _answer(store, ALL)
        for old in (*run_dir.glob(f"{PREFIX}*"), *run_dir.glob(f"{PART}{host}-*")):
            if old.name != name:
                shutil.rmtree(old, ignore_errors=True)
        if not (run_dir / name).is_dir():
            _unpack(config, device, run_dir / name, run_dir / f"{PART}{host}-{name}")
    except Exception as error:
        _publish(store, waiting, {"error": str(error)})
        raise
    _publish(store, waiting, {"name": name})
    return name


def _choose(run_dir: Path, restarted: bool) -> str:
    """A name that no other start has used, as the configuration may have changed; a restart's is the same."""
    found = sorted(run_dir.glob(f"{PREFIX}*")) if restarted else []
    return found[0].name if found else f"{PREFIX}{secrets.token_hex(4)}"


def _first_of(store: Store, group: str) -> bool:
    return store.add(f"{_key(group)}/came", 1) == 1


def _publish(store: Store, groups: tuple[str, ...], answer: dict[str, str]) -> None:
    for group in groups:
        store.set(_key(group), json.dumps(answer))


def _answer(store: Store, group: str) -> str:
    # Without a limit: this takes as long as the file is large. When that rank dies, the launcher ends this one.
    while not store.check([_key(group)]):
        time.sleep(POLL_S)
    said = json.loads(store.get(_key(group)))
    if "error" in said:
        raise ConfigError(str(said["error"]))
    return str(said["name"])


def _key(group: str) -> str:
    return f"clif/unpacked/{group}"


def _unpack(config: ModelConfig, device: torch.device, folder: Path, part: Path) -> None:
    """Write weights, configuration and tokenizer to `part` and make it `folder`, as a whole or not at all.

    Raises ConfigError for a file that cannot be loaded and a place that cannot be written to.
    """
    dtype, reason = choose_dtype(config.dtype, device)
    model, tokenizer = pretrained(config, dtype)
    described: dict[str, Any] = model.config.to_dict()
    # It describes the blocks of the GGUF file; these weights are plain.
    described.pop("quantization_config", None)
    # Tied weights once, under the name that readers of parts ask for.
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name in names}
    try:
        tokenizer.save(part / "tokenizer")
        (part / "config.json").write_text(json.dumps(described, default=str))
        (part / "dtype.txt").write_text(reason)
        safetensors.torch.save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
        # Not by umask: the process is still loading, and what it puts into caches may be meant for others.
        keep_from_others(part)
        os.replace(part, folder)
    except (OSError, safetensors.SafetensorError) as error:
        # Another host's folder was there, not visible until now: a full folder is not replaced, and both are equal.
        if folder.is_dir():
            shutil.rmtree(part, ignore_errors=True)
            return
        raise ConfigError(
            f"the unpacked model cannot be written to {folder.parent} ({error}): mend that, or set run.out_dir"
        ) from error


def load_unpacked(folder: Path, device: torch.device, tp_group: TpGroup) -> LoadedModel:
    """The model that was unpacked to a folder; with peers this rank's part of it. Raises LayoutError."""
    # The rank that unpacked it has proved its architecture.
    with reading(str(folder)):
        if tp_group.size > 1:
            shape = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
            model = load_sliced(str(folder), shape, shape.dtype, device, tp_group)
        else:
            transformers.utils.logging.disable_progress_bar()
            source = {"pretrained_model_name_or_path": str(folder), "local_files_only": True}
            model = load_whole(str(folder), **source, trust_remote_code=False, dtype="auto")
    model.eval().requires_grad_(False).to(device)
    reason = (folder / "dtype.txt").read_text()
    return LoadedModel(model, ChatTokenizer.load(folder / "tokenizer"), device, model.dtype, reason)


def remove_unpacked(run_dir: Path) -> None:
    """Remove unpacked weights: all ranks have loaded them, and none will be restarted."""
    for folder in run_dir.glob(f"{PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)
