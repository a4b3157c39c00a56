"""Choices between implementations of one operation: made here, once, and logged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, Literal, ParamSpec, TypeVar

import torch
from torch.nn.functional import linear

from clif.config import ConfigError, EngineConfig
from clif.kernels.cpu.host import HeadShape
from clif.kernels.cpu.library import HEAD_BYTES, LEVELS, MAX_HEAD_DIM, TYPES, Absent, level
from clif.kernels.kv_types import FP8
from clif.kernels.tile_file import TileFile
from clif.kernels.tuning import Defaults, load_decode, load_table, table_path
from clif.models.cpu_ops import CpuOps
from clif.models.cpu_ops import kernel_fault as cpu_fault
from clif.models.layer_ops import LayerOps, TorchOps
from clif.models.varlen import Varlen, varlen_attention, varlen_fault

if TYPE_CHECKING:
    from clif.kernels.dual_lora_host import KernelLauncher
    from clif.kernels.paged_decode_host import PagedDecode
    from clif.kernels.paged_prefill_host import PagedPrefill

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Linear = Callable[[torch.Tensor], torch.Tensor]
MAX_RANK = 64
"""Largest rank of the Triton kernels: beyond it the sums of a tile no longer fit in registers."""
PREPACK_ROWS = 8
"""Rows for which the prepacked layout is chosen: a decode batch. Any choice serves all sizes (AVX512-bf16)."""


def prepacked_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear | None:
    """x -> x W^T + b with W laid out once for the machine's matrix kernels; None where F.linear serves as well.

    Only for bfloat16 on a CPU for which oneDNN has it. There F.linear lays W out again in every call: prepacked is 2.0
    times as fast for 1 to 8 rows (576x1536, one thread) and 1.05 times for 256. It costs a second copy of W.
    weight: [out, in]; bias: [out]. Raises RuntimeError if it computes something else: torch may change its operators.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return None
    ops = torch.ops.mkldnn
    # On an older CPU the operators raise, where F.linear computes, if slowly.
    if not ops._is_mkldnn_bf16_supported():
        return None
    prepacked = ops._reorder_linear_weight(weight.detach(), PREPACK_ROWS)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return ops._linear_pointwise(x, prepacked, bias, "none", [], "")

    probe = torch.linspace(-1, 1, 3 * weight.shape[1], dtype=weight.dtype).view(3, -1)
    expected = linear(probe, weight, bias).float()
    if not (forward(probe).float() - expected).norm() <= 0.02 * expected.norm():
        raise RuntimeError("this torch's packed linear layer computes something else: set engine.prepack_weights=false")
    return forward


def choose_cpu_kernels(config: EngineConfig, device: torch.device, dtype: torch.dtype, head_dim: int) -> int | None:
    """The level of the C++ kernels for CPUs, see clif.kernels.cpu.library; None: torch's operators.

    auto takes them where they were built, the CPU has what they need and they compute what torch computes.
    """
    if device.type != "cpu" or config.cpu_kernels == "off":
        return None
    try:
        found, obstacle = level(), _cpu_obstacle(config, dtype, head_dim)
    except Absent as error:
        found, obstacle = 0, str(error)
    log.info("C++ kernels for CPUs: %s", LEVELS[found] if obstacle is None else f"none, {obstacle}")
    return found if obstacle is None else None


def _cpu_obstacle(config: EngineConfig, dtype: torch.dtype, head_dim: int) -> str | None:
    if "triton" in (config.lora_kernel, config.decode_kernel):
        return "Triton's are asked for"
    if dtype not in TYPES:
        return f"they do not compute {dtype}"
    if head_dim * dtype.itemsize % HEAD_BYTES or head_dim > MAX_HEAD_DIM:
        return f"they do not compute heads of {head_dim} numbers"
    return cpu_fault(dtype)


def choose_kernels(
    wanted: Literal["auto", "torch", "triton"], device: torch.device, dtype: torch.dtype, r: int
) -> KernelLauncher | None:
    """The Triton kernels of a model's dual LoRA layers; None: torch's products.

    auto takes them for the layers that a measured table for this type of GPU has: the fastest form of each shape. It
    leaves launches of others, unless they are captured, to torch's products: a launch of a kernel costs the host more.
    Measured on an H100, 64 requests of a 1B shape: a step of 20.8 ms with torch's products, 24.9 with one kernel for
    each layer; in one graph 3.79 and 3.38. Raises ConfigError for a choice that cannot be met.
    """
    defaults = _defaults(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    measured = table_path(name) if name else None
    tuned = wanted != "torch" and measured is not None and _has_forms(measured)
    if wanted == "torch" or (wanted == "auto" and not (tuned and _obstacle(device, dtype, r) is None)):
        log.info(
            "LoRA products: torch%s", "" if wanted == "torch" or not name else f" ({_why(device, dtype, r, name)})"
        )
        return None
    assert_supported("engine.lora_kernel", device, dtype, r)
    from clif.kernels.dual_lora_host import KernelLauncher

    log.info("LoRA products: kernels in the forms that %s", "were fastest here" if tuned else "an H200 found fastest")
    if not (measured and tuned):
        return KernelLauncher(device, defaults)
    return KernelLauncher(device, _of_file(load_table, measured, defaults, everywhere=wanted == "triton"))


def choose_captured_kernels(
    config: EngineConfig, device: torch.device, dtype: torch.dtype, r: int
) -> KernelLauncher | None:
    """The Triton kernels of the dual LoRA layers in captured steps; None: torch's products.

    In a graph the adapters of rows are data. Torch's products then compute every slot for every row, so that the
    kernels are taken wherever they can run, unless engine.lora_kernel is torch: in the form that was fastest here of
    those whose segments are data, without a measured table in that which an H200 found fastest.
    """
    if config.graphs == "off" or config.lora_kernel == "torch" or device.type != "cuda" or _obstacle(device, dtype, r):
        return None
    from clif.kernels.dual_lora_host import KernelLauncher

    defaults, measured = _defaults(device, captured=True), table_path(torch.cuda.get_device_name(device))
    tuned = _has_forms(measured)
    log.info("captured LoRA products: in the forms that %s", "were fastest here" if tuned else "an H200 found fastest")
    return KernelLauncher(device, _of_file(load_table, measured, defaults) if tuned else defaults)


def choose_decode(
    wanted: Literal["auto", "torch", "triton"],
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
) -> PagedDecode | None:
    """The Triton kernel for attention of decode rows; None: torch's products. Raises ConfigError, as above.

    kv_dtype: type of the KV cache, by default dtype.

    auto takes the kernel on a GPU that can run it. Measured on an H100, 64 requests of a 1B shape: a step of 33.4 ms
    with torch's products over a gathered context, 17.0 with the kernel.
    """
    obstacle = _obstacle(device, dtype, 1) or _cache_obstacle(device, kv_dtype)
    if wanted == "torch" or (wanted == "auto" and (device.type != "cuda" or obstacle is not None)):
        return None
    if obstacle is not None:
        raise ConfigError(f"engine.decode_kernel triton: {obstacle}, or set engine.decode_kernel=torch")
    from clif.kernels.paged_decode_host import PagedDecode

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    measured = _of_file(load_decode, table_path(name)) if name else {}
    splits = f"{len(measured)} measured splits" if measured else "default splits"
    log.info("attention of answers: Triton kernel, %s", splits)
    return PagedDecode(device, measured=measured)


def choose_prefill(
    config: EngineConfig, device: torch.device, dtype: torch.dtype, heads: HeadShape, kv_dtype: torch.dtype
) -> PagedPrefill | None:
    """The Triton kernel for attention of prompts in captured steps; None: steps with prompts are not captured.

    Only where the kernel for answers was chosen, which has the same needs. Waits for the device, once.
    """
    if device.type != "cuda" or config.graphs == "off":
        return None
    from triton.errors import TritonError

    from clif.kernels.paged_prefill_host import PagedPrefill, prefill_fault

    prefill = PagedPrefill()
    try:
        fault = prefill_fault(prefill, device, dtype, heads, kv_dtype, config.block_size)
    except (RuntimeError, ValueError, TritonError) as error:
        fault = f"it fails: {str(error).splitlines()[0]}"
    log.info(
        "attention of prompts in captured steps: %s",
        "Triton kernel" if fault is None else f"none, so that steps with prompts are not captured ({fault})",
    )
    return prefill if fault is None else None


def choose_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> Varlen | None:
    """Attention of prompts and of training rows in one launch; None: padded products. Waits for the device, once."""
    if device.type != "cuda":
        return None
    obstacle = _varlen_obstacle(device, dtype, head_dim) or varlen_fault(device, dtype, head_dim)
    log.info(
        "attention of prompts and training: %s", "torch's varlen_attn" if obstacle is None else f"padded ({obstacle})"
    )
    return varlen_attention if obstacle is None else None


def _varlen_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16):
        return f"varlen_attn does not compute {dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"varlen_attn does not compute heads of {head_dim} numbers"
    if find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no varlen_attn"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def choose_ops(
    device: torch.device,
    dtype: torch.dtype,
    max_context: int,
    kv_dtype: torch.dtype | None = None,
    cpu_level: int | None = None,
) -> LayerOps:
    """What layers compute between their products with: Triton kernels on a GPU where they are right, C++
    kernels on a CPU, torch otherwise.

    kv_dtype: type of the KV cache, by default dtype. cpu_level: of the C++ kernels. Waits for a GPU, once.
    """
    if device.type != "cuda":
        return TorchOps() if cpu_level is None else CpuOps(max_context)
    obstacle = _obstacle(device, dtype, 1) or _cache_obstacle(device, kv_dtype)
    if obstacle is None:
        from clif.models.triton_ops import TritonOps, kernel_fault

        obstacle = kernel_fault(device, dtype, kv_dtype)
    log.info("norms, rotation and gates of layers: %s", "Triton kernels" if obstacle is None else f"torch ({obstacle})")
    return TritonOps(max_context) if obstacle is None else TorchOps()


def assert_supported(field: str, device: torch.device, dtype: torch.dtype, r: int = 1) -> None:
    """Raises ConfigError, with what to change, where the Triton kernels that `field` asks for cannot run."""
    obstacle = _obstacle(device, dtype, r)
    if obstacle is not None:
        raise ConfigError(f"{field} triton: {obstacle}, or set {field}=torch")


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton's kernels cannot compute this type on a device; None: they can."""
    return _obstacle(device, dtype, 1)


def _obstacle(device: torch.device, dtype: torch.dtype, r: int) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{dtype} is not supported: set model.dtype=bfloat16"
    if r > MAX_RANK:
        return f"adapter.r {r} is above {MAX_RANK}: lower it"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0: use a newer GPU"
    from triton import knobs

    if device.type == "cpu" and knobs.runtime.interpret:
        return None
    return f"a {device.type} runs it in Triton's interpreter only, for tests: set TRITON_INTERPRET=1"


def _cache_obstacle(device: torch.device, kv_dtype: torch.dtype | None) -> str | None:
    """Why the Triton kernels cannot read and write a KV cache of this type."""
    if kv_dtype != FP8 or device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (8, 9):
        return None
    return f"engine.kv_dtype fp8 needs compute capability 8.9, this GPU has {major}.{minor}: set engine.kv_dtype=auto"


def _has_forms(path: Path) -> bool:
    """Whether forms of linear layers were measured: a tuner that was ended early has splits of attention alone."""
    return path.is_file() and bool(_of_file(TileFile.read, path).linear)


def _of_file(read: Callable[Concatenate[Path, P], T], path: Path, *args: P.args, **options: P.kwargs) -> T:
    """What a table of tiles says. Raises ConfigError, with what to do, for a file that is none or of another format."""
    try:
        return read(path, *args, **options)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _why(device: torch.device, dtype: torch.dtype, r: int, name: str) -> str:
    return _obstacle(device, dtype, r) or f"nothing measured on {name}: make tune-gpu"


def _defaults(device: torch.device, captured: bool = False) -> Defaults:
    if device.type != "cuda":
        return Defaults(programs=4, capability=80)
    major, minor = torch.cuda.get_device_capability(device)
    return Defaults(torch.cuda.get_device_properties(device).multi_processor_count, 10 * major + minor, captured)
