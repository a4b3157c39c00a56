"""Packed weights of GPTQ, AWQ and compressed-tensors files as matrices of the same numbers: nothing is rounded.

Sources: the layouts of GPTQ (Frantar et al. 2022, as AutoGPTQ and GPTQModel store it), of AWQ (Lin et al. 2023, as
AutoAWQ's "gemm"), and of compressed-tensors' pack-quantized and int-quantized formats.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from clif.kernels.quantised import Bits, QuantisedMatrix, two_in_a_byte, unpacked
from clif.models.checkpoint_scheme import Scheme
from clif.models.shard import Shard
from clif.models.weights.sharded_build import Kept

Read = Callable[[str], torch.Tensor | None]
"""The name of a tensor within a module -> it, whole; None: there is none."""
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""Which number of a word each of eight outputs is."""


class LayoutFaultError(ValueError):
    """A module's tensors do not fit together; the text says how."""


def read_packed(scheme: Scheme, read: Read, out: int, in_: int, rows: Shard | None) -> Kept:
    """The weight [out, in_] of a module, or those outputs of it; and the input that stands in each of its columns.

    Raises LayoutFaultError for tensors that do not fit the scheme.
    """
    bits: Bits = 4 if scheme.bits == 4 else 8
    layout = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}[scheme.method]
    numbers, scales, zeros, groups = layout(scheme, read, out, in_)
    if rows is not None:
        numbers, scales = rows.take(numbers, 0), rows.take(scales, 0)
        zeros = None if zeros is None else rows.take(zeros, 0)
    if zeros is not None and bool((zeros == (8 if bits == 4 else 0)).all()):
        zeros = None
    group = scheme.group if scheme.group is not None or (bits == 8 and zeros is None) else -(-in_ // 32) * 32
    order = None if groups is None else _order(groups, group or in_)
    if order is not None:
        numbers = numbers.index_select(1, order) if bits == 8 else _packed(unpacked(numbers).index_select(1, order))
    matrix = QuantisedMatrix(bits, in_, numbers.contiguous(), scales.contiguous(), None, zeros, group)
    wanted = -(-in_ // (group or in_))
    if matrix.scales.shape[1] != wanted or (zeros is not None and zeros.shape != matrix.scales.shape):
        raise LayoutFaultError(f"it has {matrix.scales.shape[1]} scales for each output, and {wanted} by its groups")
    return matrix, order


Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Numbers as QuantisedMatrix has them, scales and zero points [out, groups], and the group of each input (or None)."""


def _needed(read: Read, name: str, *shape: int) -> torch.Tensor:
    found = read(name)
    if found is None or tuple(found.shape) != shape:
        what = "is missing" if found is None else f"has shape {list(found.shape)}, and {list(shape)} by its sizes"
        raise LayoutFaultError(f"{name} {what}")
    return found


def _gptq(scheme: Scheme, read: Read, out: int, in_: int) -> Parts:
    fit = 32 // scheme.bits
    qweight = _needed(read, "qweight", in_ // fit, out)
    numbers = _of_words(qweight.T, scheme.bits)
    scales, qzeros, groups = read("scales"), read("qzeros"), read("g_idx")
    if scales is None:
        raise LayoutFaultError("scales is missing")
    zeros = None
    if qzeros is not None:
        wide = _unsigned(qzeros, scheme.bits).short().T + (0 if scheme.as_stored else 1)
        zeros = _zero_points(wide[:out], scheme.bits)
    return numbers, scales.T, zeros, groups


def _awq(scheme: Scheme, read: Read, out: int, in_: int) -> Parts:
    def by_output(words: torch.Tensor) -> torch.Tensor:
        """Words [rows, out / 8] -> numbers [out, rows]."""
        return _unsigned(words, 4).unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1).T

    numbers = _packed(by_output(_needed(read, "qweight", in_, out // 8)))
    scales, qzeros = read("scales"), read("qzeros")
    if scales is None:
        raise LayoutFaultError("scales is missing")
    zeros = None if qzeros is None else by_output(qzeros).to(torch.int8)
    return numbers, scales.T, zeros, None


def _compressed(scheme: Scheme, read: Read, out: int, in_: int) -> Parts:
    words, zero_points = read("weight_packed"), read("weight_zero_point")
    scales = read("weight_scale")
    if scales is None:
        raise LayoutFaultError("weight_scale is missing")
    if words is not None:
        numbers = _of_words(_needed(read, "weight_packed", out, -(-in_ * scheme.bits // 32)), scheme.bits)
        numbers = numbers[:, :in_] if scheme.bits == 8 else numbers
    else:
        signed = _needed(read, "weight", out, in_)
        numbers = signed if scheme.bits == 8 else _packed((signed + 8).to(torch.uint8))
    zeros = None
    if zero_points is not None and zero_points.dtype == torch.int32:
        wide = _unsigned(zero_points.T, scheme.bits).T[:out]
        zeros = _zero_points(wide.short(), scheme.bits)
    elif zero_points is not None:
        zeros = zero_points.view(out, -1).to(torch.int8) + (8 if scheme.bits == 4 else 0)
    return numbers, scales.view(out, -1), zeros, read("weight_g_idx")


def _of_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Words [out, words] of whole numbers above zero, the first in the lowest bits -> as QuantisedMatrix has them."""
    numbers = words.contiguous().view(torch.uint8)
    if bits == 8:
        return (numbers ^ 128).view(torch.int8)
    return torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % 16))


def _unsigned(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Words [rows, n] -> numbers uint8 [rows, n * 32 / bits]."""
    numbers = words.contiguous().view(torch.uint8)
    return unpacked(numbers) if bits == 4 else numbers


def _zero_points(wide: torch.Tensor, bits: int) -> torch.Tensor:
    """Those of numbers from 0 on, int16 -> as QuantisedMatrix has them."""
    shifted = wide if bits == 4 else wide - 128
    if bool((shifted > 127).any()):
        raise LayoutFaultError("a zero point is above 255")
    return shifted.to(torch.int8).contiguous()


def _packed(whole: torch.Tensor) -> torch.Tensor:
    return two_in_a_byte(whole)


def _order(groups: torch.Tensor, group: int) -> torch.Tensor | None:
    """Inputs in the order of their groups; None: they lie so."""
    lying = torch.arange(len(groups), device=groups.device) // group
    if torch.equal(groups.long(), lying):
        return None
    order = groups.argsort(stable=True)
    if not torch.equal(groups[order].long(), lying):
        raise LayoutFaultError(f"its groups (g_idx) are not of {group} inputs each")
    return order
