"""Tables of tiles are sound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clif.kernels.dual_lora_reference import Projection, Segment
from clif.kernels.dual_lora_table import column_tiles, grad_tiles, row_pairs
from clif.kernels.tiles import GradTiles, LinearTiles
from clif.kernels.tuning import Defaults, LaunchShape, TileTable, kernel_tiles, load_table, save_table, table_path


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
