"""Two streams on a machine that has none: which operator is given to which, and what it touches without an order.

Work of one stream is done in the order of its launches. Nothing orders the work of two, but publish(), and what the
host has waited for before it launches. An operator that touches what another stream writes, in no order, is a race; so
is a tensor of one stream that another one touches, whose memory the allocator would give out again too early.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEFAULT, SERVING, TRAINING = "default", "serving", "training"
Range = tuple[int, int]
PARTS = 64
"""Ranges that the memory of one tensor is taken apart into, at most."""


class CheckedStreams:
    """Stands in for TwoStreams. races: what was found. launched: operators of each stream; published: how often."""

    def __init__(self) -> None:
        self.stack = [DEFAULT]
        self.races: list[str] = []
        self.launched: dict[str, int] = defaultdict(int)
        self.published = self.synchronized = 0
        self._done: dict[str, int] = defaultdict(int)
        self._published: dict[str, int] = defaultdict(int)

    @property
    def current(self) -> str:
        return self.stack[-1]

    def serving(self) -> Any:
        return self._in(SERVING)

    def training(self) -> Any:
        return self._in(TRAINING)

    @contextmanager
    def _in(self, stream: str) -> Iterator[None]:
        self.stack.append(stream)
        try:
            yield
        finally:
            self.stack.pop()

    def publish(self) -> None:
        self.published += 1
        self._published[self.current] = self.launched[self.current]

    def synchronize(self) -> None:
        self.synchronized += 1
        for stream, time in self.launched.items():
            self.host_waited(stream, time)

    def host_waited(self, stream: str, time: int) -> None:
        """The host has waited until the stream had done so many operators."""
        self._done[stream] = max(self._done[stream], time)

    def under_way(self, stream: str) -> bool:
        return self.launched[stream] > self._done[stream]

    def comes_after(self, stream: str, time: int) -> bool:
        """Whether an operator that is launched now comes after that one."""
        ordered = self._published[stream] if self.current == SERVING else 0
        return stream == self.current or time <= max(ordered, self._done[stream])


class StreamRules(TorchDispatchMode):
    """Watches all operators that run within it."""

    def __init__(self, streams: CheckedStreams) -> None:
        super().__init__()
        self._streams = streams
        # Of each storage and stream: ranges, with the times of the last read and of the last write.
        self._touched: dict[int, dict[str, dict[Range, list[int]]]] = defaultdict(lambda: defaultdict(dict))
        self._made_by: dict[int, str] = {}
        # Kept: memory that is given out again would carry the history of what was there before.
        self._kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, streams = func(*args, **(kwargs or {})), self._streams
        returned = [value.alias_info for value in func._schema.returns]
        # What lift_fresh takes was made of values of the host, by no operator.
        if func._schema.name != "aten::lift_fresh" and returned and all(a and not a.is_write for a in returned):
            return out
        streams.launched[streams.current] += 1
        values = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        given: set[int] = set()
        for argument in func._schema.arguments:
            write = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in self._tensors(values.get(argument.name)):
                given.add(_storage(tensor))
                self._touch(func, tensor, write)
        for tensor in self._tensors(out):
            if _storage(tensor) not in given or func._schema.name == "aten::lift_fresh":
                self._kept.append(tensor)
                self._made_by[_storage(tensor)] = streams.current
                # What was there before was no tensor of torch's operators, and its memory has been given back.
                self._touched.pop(_storage(tensor), None)
                self._touch(func, tensor, True)
        if func._schema.name == "aten::_local_scalar_dense":
            streams.host_waited(streams.current, streams.launched[streams.current])
        return out

    @staticmethod
    def _tensors(value: Any) -> list[torch.Tensor]:
        return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor) and leaf.numel()]

    def _touch(self, func: Any, tensor: torch.Tensor, write: bool) -> None:
        streams = self._streams
        maker, now = self._made_by.get(_storage(tensor)), streams.launched[streams.current]
        if maker not in (None, DEFAULT, streams.current):
            streams.races.append(f"{func} on {streams.current} touches a tensor of {maker}")
        of_streams = self._touched[_storage(tensor)]
        places, mine = _ranges(tensor), of_streams[streams.current]
        for stream, theirs in list(of_streams.items()):
            if stream != streams.current:
                self._compare(func, stream, theirs, places, write)
        for place in places:
            last = mine.setdefault(place, [0, 0])
            last[write] = now

    def _compare(
        self, func: Any, stream: str, theirs: dict[Range, list[int]], places: list[Range], write: bool
    ) -> None:
        """Two reads need no order."""
        for (start, stop), (read, written) in theirs.items():
            time = max(read, written) if write else written
            unordered = time and not self._streams.comes_after(stream, time)
            if unordered and any(start < place[1] and place[0] < stop for place in places):
                self._streams.races.append(f"{func} on {self._streams.current} does not come after {stream}")


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _ranges(tensor: torch.Tensor) -> list[Range]:
    """First and last bytes of what it can touch: the parts between which it leaves memory out, up to a number."""
    size = tensor.element_size()
    dims = sorted(((stride, n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True)), reverse=True)
    starts = [tensor.data_ptr()]
    while dims and len(starts) * dims[0][1] <= PARTS and dims[0][0] > _extent(dims[1:]):
        stride, n = dims.pop(0)
        starts = [start + i * stride * size for start in starts for i in range(n)]
    return [(start, start + _extent(dims) * size) for start in starts]


def _extent(dims: list[tuple[int, int]]) -> int:
    return 1 + sum((n - 1) * stride for stride, n in dims)
