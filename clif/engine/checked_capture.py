"""The rules of a captured region, checked on a CPU: for tests, and for dry runs of what needs a GPU.

A region is run under the rules, and once more for each launch. It breaks them if it reads a tensor on the host, makes
one from Python values, needs other operators, shapes or constants than before, or reads a tensor from outside that was
not there when it was captured. Each launch spoils the results of other regions that need not hold any longer (see
capture.Recorder), so that what reads them finds no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
READS = frozenset(
    ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__")
)
"""Methods of a tensor that wait for the device and read it."""
MAKES = frozenset(("tensor", "as_tensor", "asarray", "from_numpy", "frombuffer", "scalar_tensor"))
"""Functions of torch that make a tensor from values of the host."""
BY_CONTENT = frozenset(
    (
        "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select",
        "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::lift_fresh",
        "aten::repeat_interleave.Tensor",
    )
)  # fmt: skip
"""Operators that need contents of a tensor on the host, or whose shapes depend on them."""
BY_INDEX = frozenset(("aten::index", "aten::index_put", "aten::index_put_"))
"""Operators that need them if an index is a mask."""
NO_NUMBER = -7
"""What stands in results that are spoilt and hold no floating-point numbers."""
TAKES = frozenset(("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::detach"))
"""Operators that take memory and run no kernel."""


class CaptureError(RuntimeError):
    """A region does what cannot be captured."""


Form = tuple[torch.dtype, torch.Size]


class Operator(NamedTuple):
    """One operator that a region dispatched. inputs, outputs: shapes and types; constants: all other arguments.

    outside: addresses of inputs that were not made in the region. idle: it launches no kernel.
    """

    name: str
    inputs: tuple[Form, ...]
    outputs: tuple[Form, ...]
    constants: tuple[Any, ...]
    outside: tuple[int, ...]
    idle: bool

    def __str__(self) -> str:
        inputs, outputs = (", ".join(map(_shown, forms)) for forms in (self.inputs, self.outputs))
        return f"{self.name}({inputs}) -> {outputs}"


class CaptureRules:
    """Runs regions under the rules. operators: what the last one dispatched, in order. made: results that it made."""

    def __init__(self) -> None:
        self.operators: list[Operator] = []
        self.made: list[torch.Tensor] = []

    def run(self, region: Callable[[], T]) -> T:
        """What the region returns. Raises CaptureError."""
        self.operators = []
        with _NoHost(), _Watch(self.operators) as watch:
            result = region()
        self.made = [tensor for tensor in _tensors(result) if watch.made(tensor)]
        return result

    @property
    def kernels(self) -> list[Operator]:
        """Operators that launch a kernel on a GPU, at least one each."""
        return [operator for operator in self.operators if not operator.idle]


class _NoHost(TorchFunctionMode):
    """Refuses what never becomes an operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS and getattr(torch.Tensor, name, None) is func:
            raise CaptureError(f"{name}() reads a tensor on the host")
        if name in MAKES and getattr(torch, name, None) is func:
            raise CaptureError(f"torch.{name}() makes a tensor from values of the host")
        return func(*args, **(kwargs or {}))


class _Watch(TorchDispatchMode):
    """Writes operators down, and refuses those that depend on contents."""

    def __init__(self, operators: list[Operator]) -> None:
        super().__init__()
        self._operators = operators
        # Kept until the end: an address that is free again would make a tensor from outside look like one from inside.
        self._made: list[torch.Tensor] = []
        self._inside: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, (name, full, idle) = kwargs or {}, _about(func)
        inputs, constants = _parted((args, kwargs))
        by_mask = name in BY_INDEX and any(leaf.dtype in (torch.bool, torch.uint8) for leaf in inputs[1:])
        if name in BY_CONTENT or full in BY_CONTENT or by_mask:
            raise CaptureError(f"{name} needs the contents of a tensor on the host")
        known = [_address(leaf) for leaf in inputs]
        outside = tuple(leaf.data_ptr() for leaf, at in zip(inputs, known, strict=True) if at not in self._inside)
        out = func(*args, **kwargs)
        outputs, _ = _parted(out)
        for leaf in outputs:
            at = _address(leaf)
            if at not in known:
                self._made.append(leaf)
                self._inside.add(at)
        self._operators.append(Operator(full, _forms(inputs), _forms(outputs), tuple(constants), outside, idle))
        return out

    def made(self, tensor: torch.Tensor) -> bool:
        """Whether the memory of a tensor was taken in the region."""
        return _address(tensor) in self._inside


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _parted(values: Any) -> tuple[list[torch.Tensor], list[Any]]:
    """The tensors in tuples, lists and dictionaries, and all else in them: torch's own way is several times as slow.

    NaN differs from itself, and becomes a word.
    """
    tensors: list[torch.Tensor] = []
    others: list[Any] = []
    left = [values]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, (tuple, list)):
            left.extend(reversed(value))
        elif isinstance(value, dict):
            left.extend(reversed(value.values()))
        else:
            others.append(value if value == value else "NaN")
    return tensors, others


@cache
def _about(func: Any) -> tuple[str, str, bool]:
    """Name without and with the overload, and whether no kernel runs: memory is taken, or what comes out lies in the
    memory of what goes in, unchanged."""
    name, overload = func._schema.name, func._schema.overload_name
    returned = [value.alias_info for value in func._schema.returns]
    views = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
    return name, f"{name}.{overload}" if overload else name, views or name in TAKES


def _forms(tensors: list[torch.Tensor]) -> tuple[Form, ...]:
    return tuple([(tensor.dtype, tensor.shape) for tensor in tensors])


def _shown(form: Form) -> str:
    return f"{str(form[0]).removeprefix('torch.')}{list(form[1])}"


@dataclass(eq=False)
class CheckedRegion(Generic[T]):
    """A region that runs again at each launch, and has to do the same operations as when it was captured."""

    region: Callable[[], T]
    result: T
    operators: list[Operator]
    made: list[torch.Tensor]
    number: int
    recorder: CheckedRecorder
    released_at: int | None = None
    """How many regions there were when it was released."""
    rules: CaptureRules = field(default_factory=CaptureRules)
    replays: int = 0

    def release(self) -> None:
        self.released_at = len(self.recorder.regions)

    def replay(self) -> None:
        """Raises CaptureError where the region would do something else than a graph of it."""
        self.replays += 1
        self.recorder.spoil(self)
        again = self.rules.run(self.region)
        _compare(self.operators, self.rules.operators)
        with torch.no_grad():
            for static, new in zip(_tensors(self.result), _tensors(again), strict=True):
                if static.data_ptr() != new.data_ptr():
                    static.copy_(new)


@dataclass(eq=False)
class CheckedRecorder:
    """Stands in for CUDA graphs on a CPU. regions: what was captured, in order."""

    regions: list[CheckedRegion[Any]] = field(default_factory=list)
    bytes: int = 0

    def capture(self, region: Callable[[], T]) -> CheckedRegion[T]:
        """Raises CaptureError for a region that cannot be captured."""
        rules = CaptureRules()
        region()
        result = rules.run(region)
        self.regions.append(CheckedRegion(region, result, rules.operators, rules.made, len(self.regions), self))
        return self.regions[-1]

    @torch.no_grad()
    def spoil(self, launched: CheckedRegion[Any]) -> None:
        """Overwrite results that may lie in the memory of a region that is launched."""
        for other in self.regions:
            later, released = other.number > launched.number, other.released_at
            if later or (released is not None and released <= launched.number):
                for tensor in other.made:
                    tensor.fill_(torch.nan if tensor.is_floating_point() else NO_NUMBER)


def _compare(first: list[Operator], again: list[Operator]) -> None:
    for number, (a, b) in enumerate(zip(first, again, strict=False)):
        if a != b:
            raise CaptureError(f"operator {number}, {b}, {_difference(a, b)}")
    if len(first) != len(again):
        raise CaptureError(f"{len(again)} operators, {len(first)} when the region was captured")


def _difference(a: Operator, b: Operator) -> str:
    if str(a) != str(b):
        return f"was {a} when the region was captured"
    if a.constants != b.constants:
        return f"has the constants {b.constants}, and had {a.constants}"
    return "reads another tensor from outside than when the region was captured"


def _tensors(result: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


@contextmanager
def forbid_host_reads() -> Iterator[None]:
    """Raises CaptureError for what reads a tensor on the host; shapes may change. For work that must not wait."""
    with _NoHost(), _Watch([]):
        yield
