"""The kernels compile for Hopper and Ampere within their limits, on any machine; tables of tiles are sound."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clif.kernels.dual_lora_reference import Projection, Segment
from clif.kernels.dual_lora_table import column_tiles, grad_tiles, row_pairs
from clif.kernels.tiles import GradTiles, LinearTiles
from clif.kernels.tuning import Defaults, LaunchShape, TileTable, kernel_tiles, load_table, save_table, table_path


def test_the_corners_are_cases_for_both_makes_of_gpu_and_every_kernel() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    from clif.kernels.testing.compile_gate import CORNERS, cases

    found = [case for case in cases() if case.name in CORNERS]
    assert {case.name for case in found} == CORNERS and len(found) == 12
    every = {(case.capability, case.kernel, case.constants.get("FORM")) for case in cases()}
    assert {(case.capability, case.kernel, case.constants.get("FORM")) for case in found} == every


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("which", "count"), [(["--corners"], 12), pytest.param([], 58, marks=pytest.mark.slow)], ids=["corners", "all"]
)
def test_the_kernels_compile_for_hopper_and_ampere_within_their_limits(tmp_path: Path, which: list[str], count: int):
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    # Compiled in a process of its own: in this one the interpreter has taken the kernels' place.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-P", "-m", "clif.kernels.testing.compile_gate", *which]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "sm_90" in done.stdout and "sm_80" in done.stdout and len(done.stdout.splitlines()) == count


def test_a_kernel_that_breaks_a_limit_is_found() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    from clif.kernels.testing.compile_gate import Compiled, linear_case

    case = linear_case("x", LinearTiles(), 16)
    assert Compiled(case, 255, 0, 1 << 10, wgmma=True, mma=False).broken() == []
    assert "8 bytes of stack" in Compiled(case, 255, 8, 1 << 10, wgmma=True, mma=False).broken()[0]
    assert "shared memory" in Compiled(case, 255, 0, 228 << 10, wgmma=True, mma=False).broken()[0]
    assert Compiled(case, 255, 0, 1 << 10, wgmma=False, mma=True).broken() == ["no wgmma"]
    assert "no tensor-core product" in Compiled(case, 255, 0, 0, wgmma=False, mma=False).broken()


def test_a_row_tile_has_rows_of_any_slots_and_a_pair_for_each_segment_in_it() -> None:
    firsts, pairs = row_pairs((Segment(2, 20, 1), Segment(20, 21, -1), Segment(40, 40, 2)), 65, 16, 4)
    assert pairs == [(2, 16, 1, 0), (16, 20, 1, 1), (20, 21, 3, 1)]
    # Rows 32 to 64 use no adapter, and the last tile is not full.
    assert firsts == [0, 1, 3, 3, 3, 3]
    assert row_pairs((), 0, 16, 4) == ([0], [])


def test_a_column_tile_never_crosses_from_one_packed_layer_to_the_next() -> None:
    projections = (Projection(0, 40, 0), Projection(40, 50, None), Projection(50, 70, 1))
    assert column_tiles(projections, 32) == [(0, 32, 0, 1), (32, 40, 0, 1), (40, 50, 0, 0), (50, 70, 1, 2)]
    # Rows of B's gradient: those of the layer without adapter are left out.
    assert grad_tiles(projections, 32) == [(0, 32, 0, 0), (32, 40, 0, 32), (50, 70, 1, 40)]


def test_a_table_answers_for_what_was_measured_and_says_separate_for_what_was_not(tmp_path: Path) -> None:
    small, large = LinearTiles(block_m=16), LinearTiles(form="separate")
    linear = {
        LaunchShape(16, 64, 64, 8, False): (small, {"us": 1.0}),
        LaunchShape(256, 64, 64, 8, False): (large, {"us": 2.0}),
    }
    file = tmp_path / "gpu.json"
    gradients = {LaunchShape(256, 64, 64, 8, True): (GradTiles(slices=7), {})}
    own = {shape: LinearTiles(block_n=16) for shape in linear}
    save_table(file, {"device": "test"}, linear, gradients, own)
    assert kernel_tiles(file) == own
    table = load_table(file, None, Defaults())
    assert table.linear(1, 64, 64, 8, False) == table.linear(16, 64, 64, 8, False) == small
    assert table.linear(17, 64, 64, 8, False) == table.linear(9999, 64, 64, 8, False) == large
    # Other widths, ranks or directions were not measured: torch's products.
    for unknown in ((16, 65, 64, 8, False), (16, 64, 64, 16, False), (16, 64, 64, 8, True)):
        assert table.linear(*unknown).form == "separate"
    assert table.grads(300, 64, 64, 8).slices == 7
    assert table.grads(300, 64, 64, 16) == Defaults().grads(300, 64, 64, 16)
    assert TileTable({}, {}, Defaults()).linear(64, 4096, 4096, 16, False).form == "fused"


def test_a_broken_table_is_named_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    for text in ("{", json.dumps({"linear": [{"shape": {}, "tiles": {"colour": 1}}], "grads": []})):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"gpu\.json: not a table of tiles .* make tune-gpu"):
            load_table(file, None, Defaults())


def test_tables_are_kept_by_the_name_of_the_gpu() -> None:
    assert table_path("NVIDIA H200 (141 GB)").name == "nvidia-h200-141-gb.json"
