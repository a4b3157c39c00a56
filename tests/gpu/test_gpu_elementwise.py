"""Norm, rotation and gate kernels compiled for a GPU: the specification of the interpreter's tests, and replays."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import Rig, answer, finish, make_rig, random_state, request

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from clif.kernels import elementwise_host as host
from clif.kernels.elementwise_reference import write_rows
from clif.kernels.kv_types import FP8
from clif.kernels.testing.elementwise_specification import (
    Batch,
    Draw,
    HeadsBatch,
    computed,
    random_gate,
    random_heads,
    random_norm,
    violations,
)
from clif.models.layer_ops import TorchOps
from clif.models.triton_ops import TritonOps
from clif.types import TrainSample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
DEVICE = "cuda"
SAMPLES = [TrainSample(id=i, ids=tuple(range(5 + i, 60 + 9 * i)), target_start=6) for i in range(3)]


def batches(dtype: torch.dtype, pad: int = 0) -> dict[str, Batch]:
    """Decode and training sizes of 1B, 8B and 70B models, and sizes that no block divides."""
    draw = Draw(dtype, DEVICE, pad)
    return {
        "norm of 64 rows, 2048": random_norm(64, 2048, draw),
        "norm of 8192": random_norm(33, 8192, draw),
        "norm of 1680, nothing added": random_norm(9, 1680, draw, adds=False, learns=False),
        "heads of 64 rows, 1B": random_heads(64, 32, 8, 64, draw, slots=torch.int32),
        "heads of 128 with norms": random_heads(33, 32, 8, 128, draw, norms=True),
        "21 heads of 80 on 7": random_heads(9, 21, 7, 80, draw),
        "gate of 64 rows, 8192": random_gate(64, 8192, draw),
        "gate of 4500": random_gate(9, 4500, draw),
        "no rows": random_gate(0, 64, draw),
        "many rows": random_norm(4096, 2048, draw),
    }


@pytest.mark.parametrize("pad", [0, 3], ids=["contiguous", "parts of wider rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_results_are_as_near_to_float64_as_torch_s(dtype: torch.dtype, pad: int) -> None:
    found = {name: violations(batch, computed(batch), dtype) for name, batch in batches(dtype, pad).items()}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_a_row_of_nan_stays_one() -> None:
    for name, batch in batches(torch.bfloat16).items():
        field = {"n": "hidden", "h": "qkv", "2": "qkv", "g": "wide", "m": "hidden"}[name[0]]
        if name == "no rows":
            continue
        clean = computed(batch)
        getattr(batch, field)[1] = torch.nan
        for key, dirty in computed(batch).items():
            dim = int(key == "written")
            for part in (slice(0, 1), slice(2, None)):
                rows = torch.arange(dirty.shape[dim], device=DEVICE)[part]
                assert torch.equal(dirty.index_select(dim, rows), clean[key].index_select(dim, rows)), (name, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_a_cache_of_eight_bits_gets_what_the_layer_sees_rounded_once_more(dtype: torch.dtype) -> None:
    """Saturated beyond 448; a NaN stays one."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("numbers of eight bits need compute capability 8.9")
    batch = random_heads(64, 32, 8, 64, Draw(dtype, DEVICE))
    qkv = batch.qkv * 100
    qkv[1, -1], qkv[2, -2:] = torch.nan, torch.tensor([torch.inf, -60000.0], device=DEVICE)
    cache = torch.zeros(batch.cache.shape, dtype=torch.uint8, device=DEVICE).view(FP8)
    _, key, value = host.launch_rotate_heads(qkv, batch.cos, batch.sin, 32, 8, None, cache, batch.slots)
    expected = torch.zeros_like(cache)
    write_rows(expected, batch.slots, key, value)
    assert torch.equal(cache.float().nan_to_num(nan=999), expected.float().nan_to_num(nan=999))


def test_a_graph_replayed_over_other_contents_gives_the_bits_of_a_launch() -> None:
    """Rows, angles and slots are read from memory; nothing is allocated but results, which lie in the graph's pool."""
    static = random_heads(64, 32, 8, 64, Draw(torch.bfloat16, DEVICE), slots=torch.int32)
    cache, stream, graph = torch.zeros_like(static.cache), torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def region() -> tuple[torch.Tensor, ...]:
        made = host.launch_rotate_heads(static.qkv, static.cos, static.sin, 32, 8, cache=cache, slots=static.slots)
        summed, normed = host.launch_add_rms_norm(static.qkv, static.qkv, static.qkv[0].abs(), 1e-5)
        return *made, summed, normed, host.launch_swiglu(normed)

    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        region()
    with torch.cuda.graph(graph, stream=stream):
        results = region()
    for seed in range(1, 5):
        other: HeadsBatch = random_heads(64, 32, 8, 64, Draw(torch.bfloat16, DEVICE, seed=seed), slots=torch.int32)
        for name in ("qkv", "cos", "sin", "slots"):
            getattr(static, name).copy_(getattr(other, name))
        cache.zero_()
        graph.replay()
        replayed = [t.clone() for t in (*results, cache)]
        cache.zero_()
        launched = [*region(), cache]
        assert all(torch.equal(a, b) for a, b in zip(replayed, launched, strict=True))


def serve_and_train(rig: Rig) -> tuple[list[list[int]], float, torch.Tensor]:
    rig.fill(1, seed=4)
    rig.bank.set_shadow(random_state(rig.bank, 5))
    requests = [request(i, [*range(20), *[99 + i] * 40], max_tokens=20, ignore_eos=True) for i in range(3)]
    events = rig.run(requests, arrive={i: 2 * i for i in range(3)})
    loss = finish(rig.train_runner.loss_and_gradients(SAMPLES, 100.0))
    return [answer(events[i]) for i in range(3)], float(loss), rig.bank.gradient.clone()


def test_an_engine_with_the_kernels_gives_torch_s_tokens_loss_and_gradient(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for ops in (TorchOps(), TritonOps(256)):
        monkeypatch.setattr("clif.engine.base.choose_ops", lambda *_, ops=ops: ops)
        runs.append(serve_and_train(make_rig(f"random:{tiny_config}", device=DEVICE)))
    (tokens, loss, grad), (found, found_loss, found_grad) = runs
    assert found == tokens
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert (found_grad - grad).norm() <= 1e-4 * grad.norm()


def test_a_layer_of_decode_rows_is_at_most_twelve_kernels(tiny_config: Path) -> None:
    """What the profiler sees of one layer beside LoRA, where the count on a CPU sees operators."""
    from torch.profiler import ProfilerActivity, profile

    rig = make_rig(f"random:{tiny_config}", device=DEVICE, engine={"decode_kernel": "triton", "graphs": "off"})
    layer, seen = rig.runner.stack.decoder_layers[0], []
    run = type(layer).__call__

    def watched(self, hidden, added, sub_batches):
        if self is not layer or len(hidden[0]) != 2:
            return run(self, hidden, added, sub_batches)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            out = run(self, hidden, added, sub_batches)
            torch.cuda.synchronize()
        events = (e for e in record.events() if e.device_type == torch.autograd.DeviceType.CUDA)
        seen.append(Counter(event.name for event in events))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layer), "__call__", watched)
        rig.run([request(i, [3, 9, 20, 11, 5], max_tokens=6, ignore_eos=True) for i in range(2)])
    # The first steps compile kernels and allocate workspaces.
    assert len(seen) >= 3
    # A product that cuBLAS splits has a second kernel.
    assert sum(count for name, count in seen[-1].items() if "splitk" not in name.lower()) <= 12, seen[-1]
