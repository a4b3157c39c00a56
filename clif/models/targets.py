"""Which linear layers get adapters, by peft's rules for target_modules. Free of torch."""

from __future__ import annotations

import re

from clif.config import AdapterConfig
from clif.errors import ConfigError
from clif.models.layer_spec import ModelSpec

Targets = str | tuple[str, ...]
ALL = "all-linear"
"""Every linear layer but the output head."""


def is_target(name: str, targets: Targets) -> bool:
    """Whether a linear layer gets an adapter. targets: "all-linear", a regular expression, or a list of suffixes."""
    if targets == ALL:
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def each(targets: Targets) -> dict[str, Targets]:
    """What is written, each by itself: the one expression, or every name of a list."""
    return {targets: targets} if isinstance(targets, str) else {target: (target,) for target in targets}


def check_targets(config: AdapterConfig, spec: ModelSpec) -> None:
    """Raises ConfigError for adapter.target_modules, or a name of its list, that matches no layer of the model."""
    names = [name for name, _, _ in spec.linears()]
    for target, alone in each(config.target_modules).items():
        if not any(is_target(name, alone) for name in names):
            leaves = ", ".join(name.rpartition(".")[2] for name in spec.layer.module_names)
            raise ConfigError(
                f"adapter.target_modules: {target!r} matches no linear layer of the model: there are {leaves}"
            )
