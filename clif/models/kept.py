"""What a start says of weights that stay as their file has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from clif.kernels.quantised import GROUP, QuantisedMatrix
from clif.models.base_weight import BaseWeight, Permuted, Stacked
from clif.models.quantised_weight import QuantisedWeight
from clif.models.stack import CausalStack


def kept(stack: CausalStack) -> str | None:
    """Of a stack's linear layers and head: which forms they have, and what that takes; None where all are plain."""
    bases = [one for part in stack.weighed() for one in _parts(part.base)]
    packed = [base for base in bases if isinstance(base, QuantisedWeight)]
    if not packed:
        return None
    forms = Counter(_form(base.matrix) for base in packed)
    size = sum(tensor.nbytes for base in packed for tensor in base.matrix.tensors)
    dense = sum(base.shape.numel() * base.dtype.itemsize for base in packed)
    plain = f"; {len(bases) - len(packed)} are plain" if len(packed) < len(bases) else ""
    return (
        f"base weights of linear layers and head: as the file has them ({_listed(forms)}{plain}), {size / 2**20:,.1f} "
        f"MiB in place of {dense / 2**20:,.1f}; their numbers are those of the file, rounded once to the model's type"
    )


def _parts(base: BaseWeight) -> Iterator[BaseWeight]:
    for part in base.parts if isinstance(base, Stacked) else (base,):
        yield part.inner if isinstance(part, Permuted) else part


def _form(matrix: QuantisedMatrix) -> str:
    group = matrix.group or (GROUP if matrix.bits == 4 else None)
    return f"{matrix.bits} bits by {'output' if group is None or group >= matrix.in_ else f'{group} inputs'}"


def _listed(forms: Counter[str]) -> str:
    return ", ".join(f"{form} {count}" for form, count in sorted(forms.items()))
