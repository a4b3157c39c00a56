"""Counts what a GPU would launch, on a machine without one: operators that compute, and launches of Triton kernels."""

from __future__ import annotations

from typing import Any, Self

import pytest
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view")
"""Operators that launch nothing although their results are no views; _unsafe_view is one by another name."""


class KernelCount(TorchDispatchMode):
    """names: of the operators and kernels that ran within this context, in their order.

    An operator counts as one kernel: on a GPU that is so for element-wise operators, and for products but for splits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Self:
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def counted(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.names.append(executor.fn.__name__)
            # The interpreter copies arguments, which no GPU does.
            with _disable_current_modes():
                launch(executor, *args, **kwargs)

        self._patch.setattr(GridExecutor, "__call__", counted)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patch.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _computes(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _computes(func: Any) -> bool:
    returned = [r.alias_info for r in func._schema.returns]
    view = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
    return not view and func._schema.name.removeprefix("aten::") not in ALLOCATIONS
