"""What may be captured as a CUDA graph, and that the rules that a CPU checks find what may not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from clif.engine.capture import WARM_UPS, CudaRecorder
from clif.engine.checked_capture import CaptureError, CaptureRules, CheckedRecorder, forbid_host_reads

BUFFER = torch.arange(12.0).view(4, 3)
FORBIDDEN: dict[str, Callable[[], object]] = {
    "float": lambda: float(BUFFER.sum()),
    "bool": lambda: bool(BUFFER.sum() > 0),
    "item": lambda: BUFFER.sum().item(),
    "tolist": lambda: BUFFER.tolist(),
    "cpu": lambda: BUFFER.cpu(),
    "numpy": lambda: BUFFER.numpy(),
    "a tensor from a list": lambda: torch.tensor([1, 2]),
    "a tensor from a number": lambda: torch.as_tensor(1.5),
    "a mask as index": lambda: BUFFER[BUFFER > 3],
    "rows that are not zero": lambda: BUFFER.nonzero(),
    "equal": lambda: torch.equal(BUFFER, BUFFER),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_reads_or_is_made_on_the_host_cannot_be_captured(what):
    complaint = "reads a tensor on the host|from values of the host|needs the contents of a tensor"
    with pytest.raises(CaptureError, match=complaint):
        CheckedRecorder().capture(FORBIDDEN[what])
    with pytest.raises(CaptureError, match=complaint), forbid_host_reads():
        FORBIDDEN[what]()


def test_a_replay_computes_with_what_its_buffers_hold_then():
    buffer, weight, seen = torch.zeros(4, 3), torch.randn(3, 5), torch.zeros(4)

    def region() -> torch.Tensor:
        out = (buffer @ weight).relu()
        seen.copy_(out.sum(1))
        return out

    captured = CheckedRecorder().capture(region)
    first = captured.result
    for _ in range(2):
        buffer.normal_()
        captured.replay()
        assert captured.result is first and torch.equal(first, (buffer @ weight).relu())
        assert torch.equal(seen, first.sum(1))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rows": 3}, r"operator 0, aten::slice.*was aten::slice|has the constants"),
        ({"factor": 2.0}, "has the constants"),
        ({"table": torch.ones(4, 3)}, "reads another tensor from outside"),
        ({"twice": True}, "5 operators, 4 when"),
    ],
)
def test_a_replay_with_other_shapes_constants_or_tensors_is_refused(change, complaint):
    state = {"rows": 2, "factor": 1.0, "table": torch.zeros(4, 3), "twice": False}

    def region() -> torch.Tensor:
        out = state["table"][: state["rows"]].mul(state["factor"]).add(BUFFER[: state["rows"]])
        return out.neg() if state["twice"] else out

    captured = CheckedRecorder().capture(region)
    captured.replay()
    state.update(change)
    with pytest.raises(CaptureError, match=complaint):
        captured.replay()


def test_kernels_are_the_operators_that_are_no_views():
    rules = CaptureRules()
    rules.run(lambda: BUFFER.T.view(3, 4).unsqueeze(0)[:, 1:].mul(2.0).add_(1.0)[0])
    assert [operator.name for operator in rules.kernels] == ["aten::mul.Tensor", "aten::add_.Tensor"]


def test_a_backward_is_captured_apart_from_its_forward():
    entry, weight = torch.randn(2, 3, requires_grad=True), torch.nn.Parameter(torch.randn(3, 3))
    gradient, recorder = torch.ones(2, 3), CheckedRecorder()
    forward = recorder.capture(lambda: (entry @ weight).relu())
    backward = recorder.capture(lambda: torch.autograd.grad(forward.result, (entry, weight), gradient, True))
    for _ in range(2):
        gradient.normal_()
        backward.replay()
        expected = torch.autograd.grad((entry @ weight).relu(), (entry, weight), gradient)
        for got, wanted in zip(backward.result, expected, strict=True):
            assert torch.allclose(got, wanted)


def test_results_are_spoilt_by_launches_of_what_may_lie_in_the_same_memory():
    """Regions share memory: a smaller one lies in what a larger one before it used, or in released results."""
    source, recorder = torch.ones(3), CheckedRecorder()
    first = recorder.capture(lambda: source * 2)
    second = recorder.capture(lambda: (first.result + 1, source))
    second.replay()
    assert second.result[0].tolist() == [3, 3, 3]
    first.replay()
    assert second.result[0].isnan().all() and first.result.tolist() == [2, 2, 2]
    second.replay()
    assert first.result.tolist() == [2, 2, 2], "a region that was captured later leaves it alone"
    first.release()
    third = recorder.capture(lambda: source.long())
    second.replay()
    assert second.result[0].tolist() == [3, 3, 3], "it was captured before the release"
    third.replay()
    assert first.result.isnan().all() and second.result[0].tolist() == [3, 3, 3]
    second.replay()
    assert second.result[0].isnan().all() and third.result.tolist() == [-7, -7, -7], "what it reads is spoilt"
    assert source.tolist() == [1, 1, 1], "what was there before any region is never spoilt"


class FakeStream:
    """A stream that only writes down for which others it waits."""

    device = "cuda"

    def __init__(self) -> None:
        self.waited: list[FakeStream] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(other)


@pytest.fixture
def current(monkeypatch) -> FakeStream:
    """torch.cuda without a GPU; this is the stream that is current."""
    made, fakes = FakeStream(), SimpleNamespace(replay=lambda: None)
    for name, value in {
        "graph_pool_handle": lambda: (0, 1),
        "current_stream": lambda _: made,
        "memory_reserved": lambda _: 0,
        "stream": lambda _: nullcontext(),
        "CUDAGraph": lambda: fakes,
        "graph": lambda *_, **__: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def test_a_garbage_collection_never_falls_into_a_capture_and_may_happen_again_behind_it(current):
    enabled: list[bool] = []
    captured = CudaRecorder(FakeStream()).capture(lambda: enabled.append(gc.isenabled()) or BUFFER)
    assert captured.result is BUFFER and gc.isenabled()
    assert enabled == [True] * (WARM_UPS + 1) + [False]


def test_autograd_nodes_of_former_passes_are_gone_before_anything_is_captured(current):
    """A node belongs to the stream on which it was made, and lives as long as one pass that has it."""
    factor = torch.ones(3, requires_grad=True)
    former, out = FakeStream(), factor * 2
    former.held, node = [former, out], weakref.ref(former)
    del former, out
    assert node() is not None
    CudaRecorder(FakeStream())
    assert node() is None


def test_the_work_of_a_refused_region_is_in_order_with_what_comes_after_it(current):
    stream = FakeStream()
    with pytest.raises(CaptureError, match="on the host"):
        CudaRecorder(stream).capture(FORBIDDEN["item"])
    assert stream.waited == [current] and current.waited == [stream]


def test_what_the_device_refuses_names_the_setting_that_goes_without_graphs(current):
    runs: list[int] = []

    def region() -> torch.Tensor:
        runs.append(0)
        if len(runs) > WARM_UPS + 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return BUFFER

    with pytest.raises(RuntimeError, match=r"not permitted when stream is capturing\): set engine\.graphs=off"):
        CudaRecorder(FakeStream()).capture(region)
