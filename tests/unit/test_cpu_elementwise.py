"""The C++ kernels between a layer's products: as exact as torch's operators, and equal on any number of threads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from clif.kernels.cpu import host
from clif.kernels.cpu.library import GELU, Absent, level
from clif.kernels.elementwise_reference import rms_norm
from clif.kernels.testing.elementwise_specification import (
    Draw,
    GateBatch,
    HeadsBatch,
    NormBatch,
    Results,
    random_gate,
    random_heads,
    random_norm,
    violations,
)
from clif.models.head import or_none, top

try:
    level()
except Absent as absent:
    pytest.skip(f"no C++ kernels: {absent}", allow_module_level=True)

TYPES = [torch.float32, torch.bfloat16]
ROWS = [1, 2, 5, 33, 70]


class Forward:
    """What a batch computes, without its gradients."""

    def __init__(self, batch: NormBatch | HeadsBatch | GateBatch) -> None:
        self._batch = batch

    def by_torch(self, dtype: torch.dtype) -> Results:
        return {name: t for name, t in self._batch.by_torch(dtype).items() if name != "grad"}


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Numbers of torch's threads, which the kernels take."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def norm_by_kernels(batch: NormBatch) -> Results:
    summed, normed = host.add_rms_norm(batch.hidden, batch.added, host.RmsNorm(batch.weight, batch.eps))
    return {"summed": summed, "normed": normed}


def shape_of(batch: HeadsBatch) -> host.HeadShape:
    norms = None
    if batch.weights is not None:
        norms = host.RmsNorm(batch.weights[0], batch.eps), host.RmsNorm(batch.weights[1], batch.eps)
    return host.HeadShape(batch.heads, batch.kv_heads, batch.cos.shape[-1], norms)


def heads_by_kernels(batch: HeadsBatch) -> Results:
    """The angles of all rows are the table, read backwards."""
    shape, qkv, cache = shape_of(batch), batch.qkv.clone(), batch.cache.clone()
    table = torch.stack((batch.cos, batch.sin), 1).flip(0).contiguous()
    host.rotate_(qkv, shape, table, torch.arange(len(qkv)).flip(0).contiguous(), cache, batch.slots)
    query, key, value = qkv.unflatten(-1, (-1, shape.head_dim)).split([batch.heads, batch.kv_heads, batch.kv_heads], 1)
    elsewhere = torch.ones(cache.shape[1], dtype=torch.bool).index_fill_(0, batch.slots, False)
    assert cache[:, elsewhere].isnan().all()
    return {"query": query, "key": key, "value": value, "written": cache[:, batch.slots]}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("width", [8, 100, 576, 1680])
def test_norms_are_as_exact_as_torchs(dtype: torch.dtype, adds: bool, width: int) -> None:
    for rows in ROWS:
        batch = random_norm(rows, width, Draw(dtype, seed=rows), adds=adds)
        found = norm_by_kernels(batch)
        wanted = batch.by_torch(dtype)
        assert torch.equal(found["summed"], wanted["summed"])
        assert not violations(Forward(batch), found, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(9, 3, 64), (2, 1, 8), (4, 4, 16), (8, 1, 128), (21, 7, 80)])
def test_heads_are_rotated_and_cached_as_torch_does(
    dtype: torch.dtype, norms: bool, heads: int, kv_heads: int, d: int
) -> None:
    for rows in ROWS:
        batch = random_heads(rows, heads, kv_heads, d, Draw(dtype, seed=rows), norms=norms)
        assert not violations(Forward(batch), heads_by_kernels(batch), dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [8, 100, 256, 1536])
def test_gates_are_as_exact_as_torchs(dtype: torch.dtype, width: int) -> None:
    for rows in ROWS:
        batch = random_gate(rows, width, Draw(dtype, seed=rows))
        assert not violations(Forward(batch), {"narrow": host.gated(batch.wide)}, dtype)


def test_gates_of_any_number_are_those_of_torch() -> None:
    """Infinities, NaN, what overflows e^x, and zeros of both signs."""
    gate = torch.tensor([torch.inf, -torch.inf, torch.nan, 88.8, -88.8, 104.0, -104.0, 3e38, -3e38, 0.0, -0.0, -87.5])
    wanted = torch.nn.functional.silu(gate)
    found = host.gated(torch.cat((gate, torch.ones_like(gate)))[None])[0]
    torch.testing.assert_close(found, wanted, rtol=4e-7, atol=1e-38, equal_nan=True)


def test_gates_in_float32_are_right_to_a_few_units() -> None:
    gate = torch.linspace(-30, 30, 100_000)
    wanted = torch.nn.functional.silu(gate.double())
    found = host.gated(torch.cat((gate, torch.ones_like(gate)))[None])[0]
    assert float(((found.double() - wanted).abs() / wanted.abs().clamp_min(1e-30)).max()) < 4 * 2.0**-24


@pytest.mark.parametrize("dtype", TYPES)
def test_results_depend_on_neither_threads_nor_other_rows(dtype: torch.dtype, threads: int) -> None:
    norm, gate = random_norm(33, 576, Draw(dtype)), random_gate(33, 1536, Draw(dtype))
    heads = random_heads(33, 9, 3, 64, Draw(dtype), norms=True)
    together = norm_by_kernels(norm)["normed"], host.gated(gate.wide), heads_by_kernels(heads)["query"]
    torch.set_num_threads(1)
    for row in range(33):
        of_row = slice(row, row + 1)
        assert norm.added is not None
        _, normed = host.add_rms_norm(norm.hidden[of_row], norm.added[of_row], host.RmsNorm(norm.weight, norm.eps))
        qkv, angles = heads.qkv[of_row].clone(), torch.stack((heads.cos, heads.sin), 1)
        host.rotate_(qkv, shape_of(heads), angles, torch.tensor([row]))
        assert torch.equal(normed[0], together[0][row])
        assert torch.equal(host.gated(gate.wide[of_row])[0], together[1][row])
        assert torch.equal(qkv[0, : 9 * 64].view(9, 64), together[2][row])


def test_a_sum_may_take_the_place_of_an_addend() -> None:
    batch = random_norm(5, 100, Draw(torch.bfloat16))
    assert batch.added is not None
    from clif.kernels.cpu.library import TYPES as TYPE_CODES
    from clif.kernels.cpu.library import load

    hidden, out = batch.hidden.clone(), torch.empty_like(batch.hidden)
    load().clif_rms_norm(
        TYPE_CODES[torch.bfloat16], hidden.data_ptr(), batch.added.data_ptr(),
        ctypes.byref(host.RmsNorm(batch.weight, batch.eps).as_struct()), hidden.data_ptr(), out.data_ptr(),
        *hidden.shape, 1,
    )  # fmt: skip
    assert torch.equal(hidden, batch.hidden + batch.added)
    torch.testing.assert_close(out, rms_norm(hidden, batch.weight, batch.eps), rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 70, 49152])
def test_the_greedy_token_is_that_of_the_head(dtype: torch.dtype, width: int, threads: int) -> None:
    """Ties go to the first index; no token where a row has a NaN or its largest number is not finite."""
    rng = torch.Generator().manual_seed(width)
    logits = torch.randint(-9, 9, (12, width), generator=rng).to(dtype) / 4
    logits[1, -1] = torch.nan
    logits[2, width // 2] = torch.inf
    logits[3] = -torch.inf
    logits[4, : width // 2] = -torch.inf
    logits[5] = -0.0
    logits[5, width // 2 :] = 0.0
    logits[6] = torch.finfo(dtype).min
    assert torch.equal(host.argmax(logits), or_none(*top(logits)))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [8, 100, 576])
def test_a_norm_with_a_weight_in_float32_rounds_once(dtype: torch.dtype, width: int) -> None:
    rng = torch.Generator().manual_seed(width)
    hidden = torch.randn(33, width, generator=rng).to(dtype)
    norm = host.RmsNorm(1 + 0.2 * torch.randn(width, generator=rng), 1e-6)
    _, normed = host.add_rms_norm(hidden, None, norm)
    wide = hidden.double()
    exact = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * norm.weight
    # Half a unit in the last place, and what float32 leaves.
    assert ((normed.double() - exact).abs() <= exact.abs() * (0.5 * torch.finfo(dtype).eps + 1e-6)).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("d", "turned"), [(64, 32), (80, 16), (128, 96)])
def test_the_front_of_each_head_is_rotated_and_the_rest_stays(dtype: torch.dtype, d: int, turned: int) -> None:
    rng = torch.Generator().manual_seed(d)
    qkv, angles = torch.randn(9, 7, d, generator=rng).to(dtype), torch.randn(9, 2, turned, generator=rng).to(dtype)
    whole, front = qkv.clone(), qkv[..., :turned].contiguous()
    cache = torch.full((4, 9, d), torch.nan, dtype=dtype)
    host.rotate_(whole, host.HeadShape(3, 2, d, rotary_dim=turned), angles, torch.arange(9), cache, torch.arange(9))
    host.rotate_(front, host.HeadShape(3, 2, turned), angles, torch.arange(9))
    assert torch.equal(whole[..., :turned], front) and torch.equal(whole[..., turned:], qkv[..., turned:])
    assert torch.equal(cache, whole[:, 3:].transpose(0, 1))


def test_gelu_is_right_to_a_few_units() -> None:
    gate = torch.linspace(-6, 30, 100_000)
    wanted = torch.nn.functional.gelu(gate.double(), approximate="tanh")
    found = host.gated(torch.cat((gate, torch.ones_like(gate)))[None], GELU)[0]
    # e^-2y has an error of y units.
    assert float(((found.double() - wanted).abs() / wanted.abs().clamp_min(1e-30)).max()) < 64 * 2.0**-24


@pytest.mark.parametrize("dtype", TYPES)
def test_gelu_rounds_where_torch_does(dtype: torch.dtype) -> None:
    batch = random_gate(33, 256, Draw(dtype))
    gate, up = batch.wide.chunk(2, -1)
    wanted = torch.nn.functional.gelu(gate, approximate="tanh") * up
    near = 4e-6 if dtype is torch.float32 else 2**-7
    torch.testing.assert_close(host.gated(batch.wide, GELU), wanted, rtol=near, atol=1e-6)
