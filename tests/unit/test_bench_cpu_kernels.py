"""The benchmark of the CPU kernels: every way is measured for every number of rows, and computes the same product."""

from __future__ import annotations

import cpu_products_line
import pytest
import torch

from clif.kernels.cpu import library

try:
    library.level()
except library.Absent as absent:
    pytest.skip(f"the kernels for CPUs do not run here: {absent}", allow_module_level=True)
if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
    pytest.skip("oneDNN has no bfloat16 here", allow_module_level=True)


@pytest.fixture(autouse=True)
def small_head(monkeypatch):
    monkeypatch.setattr(cpu_products_line, "HEAD", (320, 576))


def test_every_way_computes_the_same_product():
    ways = cpu_products_line.Ways(1, 1)
    x = torch.randn(5, 576).bfloat16()
    calls = ways.calls(0, x)
    _, y, _, _ = calls[cpu_products_line.CLIF]()
    for way in (cpu_products_line.TORCH, cpu_products_line.PREPACKED):
        torch.testing.assert_close(y, calls[way](), rtol=2**-7, atol=2e-2)
    for way, most in ((cpu_products_line.INT8, 0.02), (cpu_products_line.INT4, 0.12)):
        assert (calls[way]()[1] - y).norm() < most * y.norm()


def test_every_number_of_rows_has_a_line_for_every_way_and_many_rows_have_no_head():
    lines = [line.split(" | ") for line in cpu_products_line.products_report(1, (1, 65), 0.0)]
    figures = [line for line in lines if line[0] in ("| 1", "| 65")]
    assert [line[1] for line in figures] == 2 * [
        "CLIF",
        "CLIF, all rows with an adapter",
        "CLIF, int8",
        "CLIF, int4",
        "F.linear",
        "oneDNN, prepacked",
    ]
    assert [line[5] == "-" for line in figures] == [False, True, *[False] * 4, *[True] * 6]
