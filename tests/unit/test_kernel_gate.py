"""Tables of rows and columns are sound."""

from __future__ import annotations

from clif.kernels.dual_lora_reference import Projection, Segment
from clif.kernels.dual_lora_table import column_tiles, grad_tiles, row_pairs


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
