"""Checks of a model before any rank loads it, from its files and the configuration. Free of torch.

A dry run and a start make the same checks; a start makes those that need torch before it reads weights.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil
from huggingface_hub import try_to_load_from_cache

from clif.config import Config
from clif.distributed.layout import Layout
from clif.errors import ConfigError
from clif.metrics.provenance import gpu_bytes, gpu_names
from clif.models.checkpoint_scheme import scheme_of
from clif.models.decode_kernel import decode_kernel_of
from clif.models.estimate import Device, Room, estimate
from clif.models.hf_config import Tree, check_tree
from clif.models.layer_spec import ModelSpec
from clif.models.spec import check_family, spec_of
from clif.models.targets import check_targets
from clif.models.weights.files import check_gguf, check_weights, is_gguf, locate, read_model
from clif.models.weights.gguf_header import read_header
from clif.models.weights.kept_forms import check_kept
from clif.storage.api_keys import keys_at

CPU_INFO = Path("/proc/cpuinfo")


def check_access(config: Config) -> None:
    """Raises InputError if clients' keys cannot be used, or are missing where other hosts reach the server."""
    if config.online:
        http = config.serve.http
        keys_at(http.keys_file, os.environ, http.host, http.local)


def check_model(config: Config, layout: Layout) -> Tree | None:
    """The fields of the model's config.json; None for a hub name that was not downloaded yet.

    Raises ConfigError or LayoutError for a model that cannot be loaded, shared or served.
    """
    path = config.model.path
    local = locate(path)
    here = local is not None
    local = local or _cached(path)
    if local is None:
        return None
    header = read_header(local) if is_gguf(local.name) else None
    tree = header.tree() if header else read_model(local)
    if header is not None:
        header.check_tree(path, config.model.max_context)
    else:
        check_tree(tree, path, config.model.max_context)
        check_family(tree["model_type"], f"model.path {path}")
    scheme = scheme_of(tree)
    check_kept(config.model, scheme)
    spec = _spec(tree)
    if spec is not None:
        check_targets(config.adapter, spec)
        decode_kernel_of(config.engine, spec.within(config.model.max_context))
        for size in {len(ranks) for ranks in layout.replicas}:
            spec.check_divisible(size)
    if header is not None and spec is not None:
        check_gguf(header, spec, path)
    elif here and local.is_dir():
        check_weights(local, spec, tree.get("tie_word_embeddings"), scheme)
    return tree


def check_room(config: Config, layout: Layout, ranks: int) -> None:
    """Raises ConfigError if the weights alone of this host's ranks exceed its memory: the system would kill them later.

    ranks: how many of them run on this host.
    """
    local = locate(config.model.path)
    spec = None if local is None or device_of(config) != "cpu" else _spec(read_model(local))
    if spec is None:
        return
    # auto may choose the narrower type.
    dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype
    narrow = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    size = max(len(group) for group in layout.replicas)
    need = ranks * estimate(narrow, spec, size, "cpu").weights
    have = psutil.virtual_memory().total + psutil.swap_memory().total
    if need > have:
        raise ConfigError(
            f"the weights of {ranks} ranks need {need / 2**30:,.1f} GiB, and this host has {have / 2**30:,.1f}: choose "
            "a smaller model or dtype, or start fewer ranks on it"
        )


def check_gpu(config: Config) -> None:
    """Raises ConfigError if a GPU is wanted and none is visible."""
    if config.model.device == "cuda" and not gpu_names():
        raise ConfigError(
            "model.device is cuda, but this host shows no NVIDIA GPU: start where there is one, or set model.device=cpu"
        )


def check_dtype(config: Config, device: Device) -> None:
    """Raises ConfigError for a type that the device does not compute in."""
    if config.model.dtype == "float16" and device == "cpu":
        raise ConfigError("model.dtype float16 is for GPUs: use bfloat16, float32 or auto on a CPU")


def room_of(config: Config, device: Device, ranks: int) -> Room | None:
    """The memory that `ranks` ranks of this host share, or those of one of its GPUs; None where there is no GPU."""
    if device == "cpu":
        return Room(psutil.virtual_memory().total, ranks)
    least = min(gpu_bytes(), default=None)
    return None if least is None else Room(least, config.dist.ranks_per_gpu)


def cpu_flags() -> frozenset[str]:
    """Names of this host's CPU instructions, as Linux has them; none where the system does not say."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def prove(config: Config) -> str:
    """What a dry run says of a model's family. A start computes with a narrow copy besides.

    Raises ConfigError for a family that is not supported.
    """
    local = locate(config.model.path) or _cached(config.model.path)
    if local is None:
        return f"model {config.model.path} is not here yet: it is checked when a start has downloaded its config.json"
    make = read_model(local)["model_type"]
    check_family(make, f"model.path {config.model.path}")
    return f"model {config.model.path} is of the family {make}, which CLIF computes"


def device_of(config: Config) -> Device:
    """The device of the ranks of this host."""
    wanted = config.model.device
    return "cuda" if wanted == "cuda" or (wanted == "auto" and gpu_names()) else "cpu"


def _cached(name: str) -> Path | None:
    """The config.json of a hub name that was downloaded before; the network is not used."""
    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError as error:
        raise ConfigError(f"model.path {name} is neither here nor a name of the hub: correct it") from error
    return Path(found) if isinstance(found, str) else None


def _spec(tree: Tree) -> ModelSpec | None:
    """None for a model of another architecture, and where sizes are left to transformers' defaults."""
    try:
        return spec_of(tree)
    except (KeyError, TypeError, ValueError):
        return None
