"""Sections of the configuration about the model, its adapters and the engine. Free of torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from clif.config.base import NotNegativeFloat, Positive, PositiveFloat, Section
from clif.types import CoservingMode


class ModelConfig(Section):
    path: str
    """A hub name, a local folder, a `.gguf` file, or `random:` and a folder or `config.json`. With `layout.tp_size`
    above 1 each rank loads its part only, except of models without safetensors. Weights must be complete, and plain or
    packed as docs/models.md says, and code of a model's own (`auto_map`) is not run. A GGUF file is unpacked by one
    rank of each host, in the run's folder, which needs room for it, and read by all."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`float32`, `bfloat16`, `float16` (GPU only). `auto`: bfloat16 on a GPU that has it; on a CPU the faster of
    bfloat16 and float32 in a short measurement."""
    weight_dtype: Literal["auto", "file", "int8", "int4", "fp8", "nf4"] = "auto"
    """Type of the frozen weights of linear layers and head. `auto`: `dtype`, but for folders that are quantised (GPTQ,
    AWQ, compressed-tensors), which stay packed. `file`: what the file has, of a GGUF file as well, which is not
    unpacked then: its numbers are the same. `int8`, `int4`: whole numbers with scales, by output, or by 32 inputs of
    one; about a half and 0.28 of the memory of 16 bits, and as much less to read for each token. `fp8`: float8_e4m3fn
    with a scale for each output, on GPUs of compute capability 8.9 and up; on a CPU torch widens it, which is slow.
    `nf4`: NormalFloat of 4 bits with a scale for 64 inputs, by bitsandbytes, which must be installed; each product
    widens them first, so that they save memory and no time. Activations, adapters and training stay in `dtype` and
    float32. Answers change, a little with `int8` and more with `fp8`, `nf4` and `int4`: the start says by how much a
    layer's outputs differ. Weights are quantised once they are loaded."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`cpu`, `cuda`, or `auto`: the GPU where there is one."""
    max_context: Positive = 2048
    """[tokens] Longest prompt plus answer. At most `engine.kv_tokens`, the model's own limit, and what its rotary
    embedding or query scale is the same for."""


class AdapterConfig(Section):
    r: Annotated[int, Field(gt=0, le=4096)] = 8
    """LoRA rank."""
    lora_alpha: PositiveFloat = 16.0
    """The low-rank part is scaled by `lora_alpha / r`."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """As in peft: `all-linear` (all but the output head), a regular expression on full names, or a list of name
    endings, each of which matches a layer."""
    serving_slots: Annotated[int, Field(ge=2, le=1024)] = 3
    """[versions] Versions that can answer at the same time: the active one of each adapter, those that an operator
    keeps, retiring ones, and with more than 3 slots the newest ones. One slot stays free for the next promotion. Each
    version lies in the host's memory once more, in float32. At least 2."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _targets(cls, targets: object) -> object:
        """Raise one sentence instead of one for each type; names are checked against the model once it is known."""
        if isinstance(targets, str):
            _check_pattern(targets)
            return targets
        if not isinstance(targets, (list, tuple)) or not all(isinstance(name, str) for name in targets):
            raise ValueError('target_modules must be "all-linear", a regular expression, or a list of names of modules')
        if len(set(targets)) < len(targets):
            raise ValueError("target_modules lists a name twice: remove one")
        return targets


class EngineConfig(Section):
    max_batch: Annotated[int, Field(gt=0, le=65536)] = 16
    """[requests] Requests that run at the same time in a replica."""
    kv_tokens: Positive | Literal["auto"] = 8192
    """[tokens] KV cache of a replica. A multiple of `block_size`. `auto`: what is free once model, training, the
    largest step and captured steps have their memory, less 5 %; on a CPU half of the host's free memory, shared by its
    ranks. Never more than `max_batch` requests of full length fill; a start that leaves less than `model.max_context`
    is refused."""
    kv_dtype: Literal["auto", "fp8"] = "auto"
    """Type of the KV cache. `auto`: the model's. `fp8`: float8_e4m3fn, twice the tokens of a 16-bit type in the same
    memory, and half the bytes to read. Keys and values are rounded to 4 significant bits, without scales; what is
    beyond 448 becomes 448. Answers change a little: compare them first. The Triton kernels read and write it on GPUs of
    compute capability 8.9 and up, torch's operators anywhere."""
    block_size: Positive = 16
    """[tokens] Size of a KV block."""
    prefix_reuse: bool = True
    """Prompts that begin alike share the full KV blocks of their beginning, within one adapter version."""
    prepack_weights: bool = True
    """On a CPU in bfloat16: keep a second copy of the weights, laid out for the matrix kernels, for serving."""
    cpu_kernels: Literal["auto", "off"] = "auto"
    """On a CPU: `auto` computes with the C++ kernels that are built when CLIF is installed, where the CPU has AVX512
    with bfloat16; products and whole serving steps in bfloat16, attention and norms in float32 too. `off`: torch's
    operators, as on any other CPU."""
    lora_kernel: Literal["auto", "torch", "triton"] = "auto"
    """Products of the layers with adapters. `triton`: kernels, on a GPU (a CPU only in Triton's interpreter), in the
    form that is fastest for a shape: one launch for all rows, or two that add to torch's base product. `auto`: `triton`
    in captured steps, and for all others where `make tune-gpu` has measured this make of GPU; otherwise `torch`. See
    [kernels.md](kernels.md)."""
    decode_kernel: Literal["auto", "torch", "triton"] = "auto"
    """Attention of rows that continue an answer. `triton`: reads the KV cache in place, on a GPU (a CPU only in
    Triton's interpreter). `auto`: `triton` on a GPU that can run it, otherwise `torch`."""
    max_prefill_tokens: Positive = 512
    """[tokens] Prompt tokens computed in one step at most; longer prompts go in chunks."""
    overlap: Literal["auto", True, False] = "auto"
    """Launch a step before the tokens of the one before are read: a GPU need not wait for the host, a CPU gains
    nothing. Answers do not change; ends are seen a step later, and what a request holds is held that much longer.
    `auto`: true on a GPU."""
    graphs: Literal["auto", "off"] = "auto"
    """Capture serving steps, without prompts and with them, and the layers of training, as CUDA graphs when the replica
    starts: a launch of the whole step costs as much as that of one operation. `auto`: on a GPU with the Triton kernels,
    for replicas of one rank. `off`: for debugging. See [gpu.md](gpu.md)."""
    coserving: CoservingMode = CoservingMode.AUTO
    """`fused`: training forwards share the products of serving steps. `concurrent`: training slices run beside serving
    steps, on half of the rank's CPU threads or, on a GPU, on a stream of lower priority; for replicas of one rank.
    `interleaved`: slices between steps. `auto`: on a CPU `concurrent` with several threads, otherwise `interleaved`; on
    a GPU what is best in a measurement of about two seconds when the replica starts, see [gpu.md](gpu.md), and `fused`
    for replicas of several ranks."""
    slice_ms: PositiveFloat = 40.0
    """Aim for the length of a training slice between two steps, up to four times as long where the token gaps leave
    that much; at least one layer. On a CPU slices leave gaps between tokens at most a quarter longer than the longest
    usual ones of serving alone, or as long as this: more means more training."""
    concurrent_slice_ms: PositiveFloat = 160.0
    """The same for a slice that runs concurrently with serving, for which no token waits."""
    activation_mib: Positive = 1024
    """Memory for what training forwards keep for their backwards. Layers that do not fit are computed again, those of
    a long sample in pieces; a sample that cannot fit even so is an error at start. See [operations](operations.md)."""
    eval_tokens: Positive = 256
    """[tokens] Tokens of one held-out forward."""
    emulated: Literal["default"] | NotNegativeFloat | Path | None = None
    """Answer without a model, to develop clients and to measure what is in front of the engine: one process without
    torch and weights answers with a fixed text, up to `max_tokens`, trains with made-up losses, and says so in all
    metrics. It takes the model's tokenizer. A number: each step takes so many milliseconds, with 0 as few as
    possible. `default`: 10 ms. A path: of a run or its `run.h5`, from whose table `ticks` the time of each step is
    drawn, by its size."""

    @property
    def num_kv_tokens(self) -> int:
        """Size of the KV cache in tokens. Only a replica knows it for `auto`: resolve_kv_tokens() puts it in."""
        assert self.kv_tokens != "auto", "engine.kv_tokens is auto: it was not resolved"
        return self.kv_tokens

    @field_validator("kv_tokens", mode="before")
    @classmethod
    def _tokens_or_auto(cls, tokens: object) -> object:
        """Raise one sentence instead of one for each type."""
        if tokens == "auto" or (isinstance(tokens, int) and not isinstance(tokens, bool) and tokens > 0):
            return tokens
        raise ValueError(f"kv_tokens is {repr(tokens)[:60]}: it must be a whole number above 0, or auto")

    @field_validator("emulated", mode="before")
    @classmethod
    def _known_times(cls, times: object) -> object:
        """Raise one sentence instead of one for each type."""
        number = isinstance(times, (int, float)) and not isinstance(times, bool) and 0 <= times <= 1e9
        if times is None or number or isinstance(times, (str, Path)):
            return times
        raise ValueError(f"emulated is {repr(times)[:60]}: it must be default, milliseconds from 0, or a run's path")

    @model_validator(mode="after")
    def _blocks(self) -> EngineConfig:
        if self.kv_tokens != "auto" and self.kv_tokens % self.block_size:
            raise ValueError(
                f"engine.kv_tokens {self.kv_tokens} is not a multiple of engine.block_size {self.block_size}"
            )
        return self


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"target_modules {pattern[:60]!r} is not a regular expression ({error}): correct it, or give a list of the "
            "last parts of module names"
        ) from error
