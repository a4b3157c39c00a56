"""Which attention kernel a model's answers may have, as far as its description says. Free of torch."""

from __future__ import annotations

from typing import Literal

from clif.config import EngineConfig
from clif.errors import ConfigError
from clif.models.layer_spec import ModelSpec


def decode_kernel_of(config: EngineConfig, spec: ModelSpec) -> Literal["auto", "torch", "triton"]:
    """engine.decode_kernel where the kernel computes the model's attention, otherwise torch.

    spec: within the longest context. Raises ConfigError if the kernel is asked for and cannot compute it.
    """
    if spec.plain:
        return config.decode_kernel
    if config.decode_kernel == "triton":
        raise ConfigError(
            "engine.decode_kernel triton computes no windows, caps or sinks of scores, which this model has: set "
            "engine.decode_kernel=torch"
        )
    return "torch"
