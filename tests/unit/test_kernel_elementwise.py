"""Norm, rotation and gate kernels in Triton's interpreter, against the specification that the GPU tests use, too."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from clif.kernels import elementwise_host as host
from clif.kernels.elementwise_reference import write_rows
from clif.kernels.kv_types import FP8
from clif.kernels.testing.elementwise_specification import (
    Batch,
    Draw,
    computed,
    random_gate,
    random_heads,
    random_norm,
    violations,
)

pytestmark = pytest.mark.skipif(not host.INTERPRET, reason="the kernels are compiled in this process: see tests/gpu")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = ("add_rms_norm", "rms_norm_grad", "rotate_heads", "rotate_heads_grad", "swiglu", "swiglu_grad")


def of_type(dtype: torch.dtype = torch.bfloat16, pad: int = 0) -> dict[str, Batch]:
    """One batch for each kernel and each of its forms, of sizes that no block divides."""
    draw = Draw(dtype, pad=pad)
    return {
        "norm": random_norm(8, 80, draw, adds=False, learns=False),
        "add and norm": random_norm(3, 300, draw),
        "heads": random_heads(2, 21, 7, 80, draw),
        "heads with norms": random_heads(3, 6, 2, 64, draw, norms=True, slots=torch.int32),
        "gate": random_gate(2, 1100, draw),
    }


@pytest.mark.parametrize("pad", [0, 5], ids=["contiguous", "parts of wider rows"])
@pytest.mark.parametrize("dtype", TYPES, ids=["fp32", "bf16", "fp16"])
def test_results_are_as_near_to_float64_as_torch_s(dtype: torch.dtype, pad: int) -> None:
    for name, batch in of_type(dtype, pad).items():
        assert violations(batch, computed(batch), dtype) == [], name


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_any_number_of_rows_will_do(rows: int) -> None:
    draw = Draw(torch.bfloat16)
    for batch in (
        random_norm(rows, 33, draw),
        random_norm(rows, 1, draw, adds=False),
        random_heads(rows, 1, 1, 2, draw),
        random_heads(rows, 3, 1, 6, draw, norms=True),
        random_gate(rows, 1, draw),
    ):
        assert violations(batch, computed(batch), torch.bfloat16) == []


def test_slots_of_nobody_stay_as_they_are_and_a_cache_may_have_any_strides() -> None:
    batch = random_heads(5, 4, 2, 16, Draw(torch.float32))
    expected, slots = computed(batch)["written"], batch.slots
    room = torch.full((batch.cache.shape[1], 9, 20), torch.nan)
    cache = room[:, 2:6, 3:19].transpose(0, 1)
    host.launch_rotate_heads(batch.qkv, batch.cos, batch.sin, 4, 2, None, cache, slots)
    assert torch.equal(cache[:, slots], expected)
    assert int(room.isfinite().sum()) == expected.numel()


def test_a_row_that_is_sent_to_another_s_slot_is_the_only_thing_that_changes() -> None:
    """Unused rows of a captured step share a spare slot."""
    batch = random_heads(4, 2, 1, 8, Draw(torch.float32))
    clean = computed(batch)
    slots = batch.slots.clone()
    slots[3] = slots[2]
    found = computed(replace(batch, slots=slots))
    assert torch.equal(found["written"][:, :2], clean["written"][:, :2]) and torch.equal(found["key"], clean["key"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_one_row_holds_never_reaches_another(poison: float) -> None:
    for name, batch in of_type().items():
        clean = computed(batch)
        field = {"n": "hidden", "a": "added", "h": "qkv", "g": "wide"}[name[0]]
        source = getattr(batch, field).clone()
        source[1] = poison
        for key, dirty in computed(replace(batch, **{field: source})).items():
            others = [i for i in range(len(source)) if i != 1]
            dim = int(key == "written")
            take = [x.index_select(dim, torch.tensor(others)) for x in (dirty, clean[key])]
            assert torch.equal(*take), (name, key)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_cache_of_eight_bits_gets_what_the_layer_sees_rounded_once_more(dtype: torch.dtype) -> None:
    """Saturated beyond 448; a NaN stays one."""
    batch = random_heads(5, 4, 2, 16, Draw(dtype))
    qkv = batch.qkv * 100
    qkv[1, -1], qkv[2, -2:] = torch.nan, torch.tensor([torch.inf, -1e6])
    cache = torch.zeros(batch.cache.shape, dtype=torch.uint8).view(FP8)
    _, key, value = host.launch_rotate_heads(qkv, batch.cos, batch.sin, 4, 2, None, cache, batch.slots)
    expected = torch.zeros_like(cache)
    write_rows(expected, batch.slots, key, value)
    assert torch.equal(cache.float().nan_to_num(nan=999), expected.float().nan_to_num(nan=999))
    written = cache[-1, batch.slots].float()
    assert written[1, -1].isnan() and written[2, -2:].tolist() == [448.0, -448.0]


def test_values_reach_the_cache_bit_for_bit_also_infinite_ones() -> None:
    batch = random_heads(3, 2, 1, 8, Draw(torch.float16))
    batch.qkv[:, -8] = torch.inf
    found = computed(batch)
    assert torch.equal(found["value"], batch.qkv[:, -8:].view(3, 1, 8)) and found["value"].isinf().any()
    assert torch.equal(found["written"][1], batch.qkv[:, -8:])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_gate_far_from_zero_is_zero_or_the_product() -> None:
    gate = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4]])
    wide = torch.cat((gate, torch.full_like(gate, 2.0)), 1)
    assert host.launch_swiglu(wide).tolist() == [[0.0, 0.0, 0.0, 400.0, 2e4]]
    grad = host.launch_swiglu_grad(wide, torch.ones_like(gate))
    assert grad.tolist() == [[0.0, 0.0, 1.0, 2.0, 2.0, 0.0, 0.0, 0.0, 200.0, 1e4]]


def test_equal_rows_give_equal_bits_in_any_batch() -> None:
    batch = random_norm(6, 300, Draw(torch.bfloat16))
    together, alone = (
        host.launch_add_rms_norm(batch.hidden[part], batch.added[part], batch.weight, batch.eps)
        for part in (slice(None), slice(4, 5))
    )
    assert all(torch.equal(a[4:5], b) for a, b in zip(together, alone, strict=True))


def test_the_norm_is_that_of_the_sum_that_later_layers_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the rounded one: float64 would call the other one more exact."""
    batch = random_norm(4, 300, Draw(torch.bfloat16))

    def same() -> bool:
        summed, normed = host.launch_add_rms_norm(batch.hidden, batch.added, batch.weight, batch.eps)
        return torch.equal(normed, host.launch_add_rms_norm(summed, None, batch.weight, batch.eps)[1])

    assert same()
    unrounded = broken_kernel(tmp_path, "add_rms_norm", "x = total.to(tl.float32)", "pass")
    monkeypatch.setattr(host, "add_rms_norm", unrounded)
    assert not same()


def test_nothing_but_results_is_allocated_and_inputs_stay_as_they_are() -> None:
    for name, batch in of_type().items():
        before = {k: v.clone() for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
        computed(batch)
        for key, value in before.items():
            assert torch.equal(value.nan_to_num(), getattr(batch, key).nan_to_num()), (name, key)


def test_tensors_that_do_not_fit_are_refused() -> None:
    norm, heads = random_norm(3, 8, Draw(torch.float32)), random_heads(3, 2, 1, 8, Draw(torch.float32))
    x, weight, qkv, cos, sin = norm.hidden, norm.weight, heads.qkv, heads.cos, heads.sin
    for call, words in (
        (lambda: host.launch_add_rms_norm(x, x[:2], weight, 1e-6), r"added \[2, 8\]: \[3, 8\] is needed"),
        (lambda: host.launch_add_rms_norm(x, None, weight[:4], 1e-6), r"weight \[1, 4\]"),
        (lambda: host.launch_add_rms_norm(x, x.half(), weight, 1e-6), "one type is needed"),
        (lambda: host.launch_add_rms_norm(x.T.contiguous().T, None, weight, 1e-6), "contiguous"),
        (lambda: host.launch_rotate_heads(qkv[:, 1:], cos, sin, 2, 1), "heads of an even size"),
        (lambda: host.launch_rotate_heads(qkv, cos[:2], sin, 2, 1), r"cos \[2, 8\]"),
        (lambda: host.launch_rotate_heads(qkv, cos, sin.half(), 2, 1), "one type"),
        (lambda: host.launch_rotate_heads(qkv, cos, sin, 2, 1, None, heads.cache[:1], heads.slots), "do not fit"),
        (lambda: host.launch_rotate_heads(qkv, cos, sin, 2, 1, None, heads.cache, heads.slots[:2]), "do not fit"),
        (lambda: host.launch_rotate_heads(qkv, cos, sin, 2, 1, None, heads.cache.half(), heads.slots), "one type"),
        (lambda: host.launch_rotate_heads(qkv, cos, sin, 2, 1, host.HeadNorms(cos, 0.1, cos, 0.1)), "norm of heads"),
        (lambda: host.launch_rotate_heads_grad(heads.grads, cos, sin, host.HeadNorms(x[0], 0.1, x[0], 0.1)), "qkv"),
        (lambda: host.launch_swiglu_grad(x, x), r"grad_narrow \[3, 8\]: \[3, 4\] is needed"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# --- mutations: each of these faults is found by the specification


def broken_kernel(folder: Path, kernel: str, old: str, new: str) -> Any:
    """A kernel with a piece of its text replaced."""
    text = Path(host.swiglu.fn.__code__.co_filename).read_text()
    start = text.index(f"def {kernel}(")
    end = text.find("@triton.jit", start)
    body = text[start : end if end > 0 else None]
    assert body.count(old) == 1, old
    (folder / "broken.py").write_text(text.replace(body, body.replace(old, new)))
    spec = importlib.util.spec_from_file_location("broken", folder / "broken.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, kernel)


MUTATIONS = [
    ("add_rms_norm", "/ WIDTH + eps", "/ BLOCK + eps", "norm", "normed"),
    ("add_rms_norm", "unit * w", "unit", "norm", "normed"),
    ("add_rms_norm", "added + row * added_row", "added", "add and norm", "summed"),
    ("rms_norm_grad", "scale * (g - unit * (tl.sum(g * unit, 0) / WIDTH))", "scale * g", "norm", "grad"),
    ("rms_norm_grad", ".to(tl.float32) * w", ".to(tl.float32)", "norm", "grad"),
    ("rms_norm_grad", "result +=", "result -=", "add and norm", "grad"),
    ("rotate_heads", "x_low * cos_low[None, :] + x_high", "x_low * cos_low[None, :] - x_high", "heads", "query"),
    ("rotate_heads", "cos + row * cos_row", "cos", "heads", "key"),
    ("rotate_heads", "is_query, q_eps, k_eps", "is_query, 0.1, k_eps", "heads with norms", "query"),
    ("rotate_heads", "low * scale, dtype", "low, dtype", "heads with norms", "key"),
    ("rotate_heads", "(heads - HEADS).to", "(HEADS + 2 * KV_HEADS - 1 - heads).to", "heads", "written"),
    ("rotate_heads", "slot * cache_slot", "slot // 2 * cache_slot", "heads with norms", "written"),
    ("rotate_heads", "out_high, mask=of_key", "out_low, mask=of_key", "heads", "key"),
    ("rotate_heads_grad", "g_high * sin_high", "g_high * sin_low", "heads", "grad"),
    ("rotate_heads_grad", "(heads - HEADS - KV_HEADS)[:, None]", "(heads - HEADS - KV_HEADS)[:, None] * 0", "heads",
     "grad"),
    ("rotate_heads_grad", "d_low - low * mean", "d_low", "heads with norms", "grad"),
    ("swiglu", "/ (1.0 + tl.exp(-gate))", "/ (1.02 + tl.exp(-gate))", "gate", "narrow"),
    ("swiglu_grad", "(1.0 + gate * (1.0 - share))", "1.0", "gate", "grad"),
    ("swiglu_grad", "to + WIDTH, rounded(g * gate", "to + WIDTH, rounded(g * up", "gate", "grad"),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "old", "new", "batch", "part"), MUTATIONS, ids=lambda value: str(value)[:24])
def test_a_broken_kernel_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kernel: str, old: str, new: str, batch: str, part: str
) -> None:
    chosen = of_type()[batch]
    monkeypatch.setattr(host, kernel, broken_kernel(tmp_path, kernel, old, new))
    assert any(wrong.startswith(f"{part}:") for wrong in violations(chosen, computed(chosen), torch.bfloat16))


def test_every_kernel_has_mutations() -> None:
    assert {kernel for kernel, *_ in MUTATIONS} == set(KERNELS)
