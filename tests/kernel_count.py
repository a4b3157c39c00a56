"""Counts what a GPU would launch, on a machine without one: operators that compute, and launches of Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from clif.engine.checked_capture import TAKES


@contextmanager
def whole_launches(names: list[str]) -> Iterator[None]:
    """Within it, a launch in Triton's interpreter is its name in `names`, and none of the interpreter's operators."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def counted(executor: Any, *args: Any, **kwargs: Any) -> None:
        names.append(executor.fn.__name__)
        # The interpreter copies arguments, which no GPU does.
        with _disable_current_modes():
            launch(executor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", counted)
        yield


@contextmanager
def counted_kernels() -> Iterator[list[str]]:
    """Names of the operators and kernels that run within it, in their order.

    An operator counts as one kernel: on a GPU that is so for element-wise ones, and for products that are not split.
    """
    names: list[str] = []
    with whole_launches(names), _Operators(names):
        yield names


class _Operators(TorchDispatchMode):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, returned = func._schema.name, [value.alias_info for value in func._schema.returns]
        view = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
        # _unsafe_view is a view by another name.
        if not view and name not in TAKES and name != "aten::_unsafe_view":
            self._names.append(name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))
