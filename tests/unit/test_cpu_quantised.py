"""Products of 8 and 4 bits by the C++ kernels: those of the weights that they stand for, each row by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Rig, answer, make_rig, request

from clif.kernels.cpu import library
from clif.kernels.cpu.arena import Arena
from clif.kernels.cpu.products import PackedFactors, product
from clif.kernels.cpu.quantised_panels import QuantisedPanels, panels_size
from clif.kernels.quantised import GROUP, Bits, QuantisedMatrix, two_in_a_byte
from clif.models.estimate import estimate, read_spec
from clif.models.quantised_weight import PackedQuantisedWeight

try:
    MACHINE = library.level()
except library.Absent as absent:
    pytest.skip(f"the kernels for CPUs do not run here: {absent}", allow_module_level=True)

LEVELS = [level for level in (library.AVX512, library.AMX) if level <= MACHINE]
SIZES = [(8, 1), (24, 17), (33, 49), (96, 64), (192, 576), (70, 130)]
ROWS = [1, 2, 7, 16, 17, 32, 33, 70]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def matrix_of(out: int, in_: int, bits: Bits, least: bool = False) -> QuantisedMatrix:
    """least: with least numbers, which weights that were never quantised do not get."""
    found = QuantisedMatrix.of(numbers(out, in_).float(), bits)
    return QuantisedMatrix(bits, in_, found.numbers, found.scales, found.scales * -7) if least else found


CASES = [(8, False), (4, False), (4, True)]


@pytest.mark.parametrize(("bits", "least"), CASES)
@pytest.mark.parametrize(("out", "in_"), SIZES)
def test_panels_stand_for_the_same_numbers(out: int, in_: int, bits: Bits, least: bool):
    matrix = matrix_of(out, in_, bits, least)
    arena = Arena(panels_size(matrix))
    panels, dense = QuantisedPanels.of(matrix, arena), matrix.dense(torch.bfloat16)
    assert torch.equal(panels.dense(torch.bfloat16), dense)
    for columns in (slice(0, GROUP), slice(GROUP, 3 * GROUP)):
        assert torch.equal(panels.dense(torch.bfloat16, columns=columns), dense[:, columns])
        assert torch.equal(panels.widened(columns), dense[:, columns])
    with pytest.raises(ValueError, match="arena"):
        arena.cut(1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("bits", "least"), CASES)
@pytest.mark.parametrize(("out", "in_"), SIZES)
def test_products_and_adapters_are_those_of_the_weights_rounded_once(
    level: int, out: int, in_: int, bits: Bits, least: bool
):
    matrix, bias = matrix_of(out, in_, bits, least), numbers(out, seed=1)
    # 8 bits are multiplied as they are, and their sums are scaled.
    weight = matrix.dense(torch.float32 if bits == 8 else torch.bfloat16).double()
    panels = QuantisedPanels.of(matrix)
    a, b = numbers(3, 5, in_, seed=2), numbers(3, out, 5, seed=3)
    factors = PackedFactors(a, b, 0.5)
    for rows in ROWS:
        x = numbers(rows, in_, seed=rows)
        slots = torch.arange(rows, dtype=torch.int32) % 4 - 1
        wanted = x.double() @ weight.T + bias.double()
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                low = (a[slot].double() @ x[row].double()).bfloat16().double()
                wanted[row] += 0.5 * b[slot].double() @ low
        found = product(x, panels, bias, factors, slots, level=level)
        torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-4 * in_**0.5 + 1e-3)
        alone = [product(x[i : i + 1], panels, bias, factors, slots[i : i + 1], level=level) for i in range(rows)]
        assert torch.equal(torch.cat(alone), found), "a row has the same bits whatever lies beside it"


@pytest.mark.parametrize("bits", [8, 4])
def test_a_gradient_is_carried_down_by_the_same_numbers(bits: Bits):
    matrix, grad = matrix_of(70, 130, bits), numbers(9, 70, seed=4)
    wanted = grad.double() @ matrix.dense(torch.bfloat16).double()
    found = PackedQuantisedWeight(QuantisedPanels.of(matrix), None).backward(grad)
    torch.testing.assert_close(found.double(), wanted, rtol=2**-7, atol=1e-2)


FORMS = [
    # Bits, inputs that share a scale, type of scales, and what is added: as checkpoints and GGUF files have them.
    (8, 16, torch.float32, None), (8, 32, torch.float16, None), (8, 32, torch.float16, "least"),
    (8, 128, torch.bfloat16, "zeros"), (8, None, torch.float32, None), (8, 256, torch.float16, "zeros"),
    (4, 16, torch.float32, "least"), (4, 16, torch.float16, None), (4, 32, torch.float16, None),
    (4, 32, torch.float16, "least"), (4, 48, torch.float16, None), (4, 64, torch.float16, "zeros"),
    (4, 128, torch.bfloat16, "zeros"), (4, 96, torch.float16, "zeros"), (4, 1024, torch.float32, None),
]  # fmt: skip
Form = tuple[Bits, int | None, torch.dtype, str | None]


def of_form(out: int, in_: int, form: Form) -> QuantisedMatrix:
    """A matrix of any numbers in one of FORMS."""
    bits, group, dtype, added = form
    rng = torch.Generator().manual_seed(out)
    low, high = (-128, 128) if bits == 8 else (0, 16)
    whole = torch.randint(low, high, (out, in_), generator=rng).to(torch.int8 if bits == 8 else torch.uint8)
    shape = (out, -(-in_ // (group or in_)))
    scales = ((torch.rand(shape, generator=rng) + 0.5) / high).to(dtype)
    least = torch.randn(shape, generator=rng).to(dtype) if added == "least" else None
    zeros = torch.randint(low, high, shape, generator=rng).to(torch.int8) if added == "zeros" else None
    return QuantisedMatrix(bits, in_, whole if bits == 8 else two_in_a_byte(whole), scales, least, zeros, group)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_checkpoints_have_is_multiplied_as_the_numbers_that_it_stands_for(form: Form):
    for out, in_ in SIZES:
        matrix = of_form(out, in_, form)
        arena = Arena(panels_size(matrix))
        panels, dense = QuantisedPanels.of(matrix, arena), matrix.dense(torch.bfloat16)
        assert torch.equal(panels.dense(torch.float32), matrix.dense(torch.float32))
        assert torch.equal(panels.widened(slice(0, in_)), dense)
        assert torch.equal(panels.widened(slice(GROUP, 2 * GROUP)), dense[:, GROUP : 2 * GROUP])
        weight = (matrix.dense(torch.float32) if panels.matrix().by_output else dense).double()
        for level, rows in ((level, rows) for level in LEVELS for rows in (1, 9, 33)):
            x = numbers(rows, in_, seed=rows)
            wanted, found = x.double() @ weight.T, product(x, panels, level=level).double()
            torch.testing.assert_close(found, wanted, rtol=2**-8, atol=1e-4 * in_**0.5 + 1e-3)
        with pytest.raises(ValueError, match="arena"):
            arena.cut(1)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_parts_of_what_checkpoints_have_are_those_of_the_whole(form: Form):
    matrix = of_form(40, 320, form)
    dense = matrix.dense(torch.float32)
    for columns in (slice(0, 32), slice(32, 224), slice(256, 320)):
        assert torch.equal(matrix.dense(torch.float32, columns=columns), dense[:, columns])
    assert torch.equal(matrix.dense(torch.float32, slice(7, 12)), dense[7:12])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [8, 4])
def test_gates_meet_what_they_gate(level: int, bits: Bits):
    panels = QuantisedPanels.of(matrix_of(96, 64, bits))
    x = numbers(9, 64, seed=5)
    gate, up = product(x, panels, level=level).split(48, 1)
    wanted = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(product(x, panels, gated=True, level=level), wanted, rtol=2**-7, atol=1e-3)


# --- engines

PROMPTS = [[5, 9, 13], [*range(3, 40)], [7], [11, 4, 60, 2, 90]]


def rig_of(model: str, kind: str, **engine: Any) -> Rig:
    rig = make_rig(model, model={"dtype": "bfloat16", "weight_dtype": kind}, engine={"max_batch": 8, **engine})
    rig.fill(1, seed=1)
    return rig


def answers(rig: Rig, prompts: list[list[int]], arrive: dict[int, int] | None = None) -> list[list[int]]:
    events = rig.run([request(i, prompt, max_tokens=12) for i, prompt in enumerate(prompts)], arrive=arrive)
    return [answer(events[i]) for i in range(len(prompts))]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_answers_do_not_depend_on_the_requests_beside_them_nor_on_a_shadow_that_is_not_finite(stories: str, kind: str):
    rig = rig_of(stories, kind)
    together = answers(rig, PROMPTS, {1: 2, 3: 5})
    rig.bank.shadow.data.fill_(float("nan"))
    rig.bank.refresh()
    for prompt, found in zip(PROMPTS, together, strict=True):
        assert answers(rig, [prompt]) == [found]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_estimate_is_what_is_held(tiny_config: Path, kind: str):
    rig = rig_of(f"random:{tiny_config}", kind)
    stack = rig.runner.stack
    held = sum(t.nbytes for part in (*stack.linears, stack.head) for t in part.base.tensors)
    held += sum(p.nbytes for p in rig.loaded.model.parameters())
    factors = [linear.lora.packed for linear in stack.linears if linear.lora is not None]
    memory = estimate(rig.config, read_spec(rig.config.model.path), 1, "cpu")
    assert memory.weights == held
    assert memory.prepacked_weights == sum(t.nbytes for packed in factors for t in (packed.a, packed.b))
