"""Candidates of the tuner: a few dozen for each shape, of every form, that fit a GPU and keep it busy."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest

from clif.engine.adapter_tables import HEIGHTS
from clif.kernels.candidates import (
    AFTER_TORCH,
    FULL,
    MOST,
    MOST_SUMS,
    Problem,
    first_choice,
    grads_candidates,
    linear_candidates,
    shared_bytes,
    waves,
)
from clif.kernels.tiles import Form, LinearTiles

WIDTHS = ((4096, 4096), (4096, 6144), (4096, 28672), (14336, 4096), (2048, 2048), (2048, 3072), (2048, 16384))
SHAPES = tuple(itertools.product((1, 16, 64, 256, 2048, 2112), WIDTHS, (8, 16, 64)))
GPUS = ((132, 90), (108, 80), (58, 89), (170, 120))
"""Multiprocessors and compute capability of an H100, an A100, an L4 and an RTX 5090."""


def found(rows: int, widths: tuple[int, int], r: int, gpu: tuple[int, int]) -> tuple[LinearTiles, ...]:
    return linear_candidates(rows, *widths, r, rows == 2048, *gpu)


@pytest.mark.parametrize("gpu", GPUS, ids=["H100", "A100", "L4", "RTX 5090"])
def test_there_are_a_few_dozen_candidates_of_every_form_that_the_gpu_has(gpu: tuple[int, int]) -> None:
    forms = set(get_args(Form)) - (set() if gpu[1] >= 90 else {"pair"})
    for rows, widths, r in SHAPES:
        candidates = found(rows, widths, r, gpu)
        assert {tiles.form for tiles in candidates} == forms, (rows, widths, r)
        assert len(forms) < len(candidates) <= MOST and len(set(candidates)) == len(candidates)


@pytest.mark.parametrize("gpu", GPUS, ids=["H100", "A100", "L4", "RTX 5090"])
def test_no_candidate_needs_more_than_a_multiprocessor_has(gpu: tuple[int, int]) -> None:
    limit = Problem(1, 1, 1, 1, *gpu).shared_bytes
    for rows, widths, r in SHAPES:
        for tiles in found(rows, widths, r, gpu):
            assert shared_bytes(tiles, r) <= limit
            assert tiles.block_m * tiles.block_n <= MOST_SUMS * 32 * tiles.warps
            assert gpu[1] >= 90 or not (tiles.tma or tiles.store_tma or tiles.early)


def test_the_shared_memory_that_was_counted_in_advance_is_not_less_than_the_compiler_takes() -> None:
    # Bytes that Triton 3.6 states for sm_90; pipelines without Hopper's products keep a stage less.
    for tiles, taken in (
        (LinearTiles(block_m=64, block_n=64, block_k=64, stages=4), 65568),
        (LinearTiles(block_m=16, block_n=64, block_k=128, stages=4), 61464),
        (LinearTiles(block_m=128, block_n=256, block_k=64, stages=3), 147480),
        (LinearTiles(block_m=128, block_n=128, block_k=64, stages=3), 98328),
        (LinearTiles(block_m=128, block_n=128, block_k=64, stages=4, store_tma=True), 147488),
    ):
        assert taken <= shared_bytes(tiles, 16) <= 1.4 * taken
    # The launch that adds what h gives takes more than the one for h, here for sm_80 with a rank of 64.
    wide = LinearTiles("three", block_m=64, block_n=256, block_k=64, stages=4)
    assert 122880 <= shared_bytes(wide, 64) <= 1.4 * 122880


def test_every_launch_that_computes_the_base_product_has_work_for_the_multiprocessors() -> None:
    for rows, widths, r in SHAPES:
        shape = Problem(rows, *widths, r, 132, 90)
        whole = [tiles for tiles in found(rows, widths, r, (132, 90)) if tiles.form not in AFTER_TORCH]
        assert len(whole) >= 8
        for tiles in whole:
            assert waves(shape, tiles) >= FULL, (rows, widths, tiles)


def test_a_decode_batch_of_the_widths_that_were_slow_has_128_programs_and_more_with_a_contraction_in_parts() -> None:
    whole = [tiles for tiles in found(64, (4096, 4096), 16, (132, 90)) if tiles.form == "fused"]
    assert all(waves(Problem(64, 4096, 4096, 16, 132, 90), tiles) * 132 >= 128 for tiles in whole)
    assert {2, 4, 8} <= {tiles.split for tiles in whole}
    assert {32, 64, 128, 256} <= {tiles.block_n for tiles in whole}


@pytest.mark.parametrize("gpu", GPUS, ids=["H100", "A100", "L4", "RTX 5090"])
def test_the_first_choice_of_a_form_that_a_rule_may_take_is_one_of_its_candidates(gpu: tuple[int, int]) -> None:
    for rows, widths, r in SHAPES:
        candidates = found(rows, widths, r, gpu)
        for form in {tiles.form for tiles in candidates} - {"pair"}:
            assert first_choice(form, rows, *widths, r, *gpu) in candidates


def test_the_first_choice_of_a_decode_batch_keeps_every_multiprocessor_loading_a_part_of_w() -> None:
    for widths in ((4096, 4096), (4096, 1024), (2048, 2048), (4096, 6144)):
        tiles = first_choice("fused", 64, *widths, 16, 132, 90)
        assert 4 <= tiles.split <= 8 and tiles.block_n == 64 and tiles.stages >= 6
        assert waves(Problem(64, *widths, 16, 132, 90), tiles) >= FULL


def test_the_first_choice_of_many_rows_fills_whole_waves() -> None:
    for rows, out, block_n, count in ((2112, 4096, 256, 4.0), (2112, 6144, 256, 6.0), (2048, 4096, 256, 2)):
        tiles = first_choice("fused", rows, 4096, out, 16, 132, 90)
        assert tiles.block_n == block_n and 0.95 * count <= waves(Problem(rows, 4096, out, 16, 132, 90), tiles) <= count


def test_many_rows_are_measured_with_and_without_stores_by_descriptor() -> None:
    stores = {tiles.store_tma for tiles in found(2112, (4096, 4096), 16, (132, 90)) if tiles.form == "fused"}
    assert stores == {True, False}
    for rows, widths, r in SHAPES:
        assert not any(tiles.store_tma and tiles.split > 1 for tiles in found(rows, widths, r, (132, 90)))


def test_a_captured_step_has_tables_for_the_tiles_of_every_candidate() -> None:
    """A large step takes the entry of a larger shape, whatever its tiles are."""
    heights = {tiles.block_m for gpu in GPUS for rows, widths, r in SHAPES for tiles in found(rows, widths, r, gpu)}
    assert heights <= set(HEIGHTS)


def test_a_shape_of_any_size_has_candidates() -> None:
    for rows, depth, out in ((1, 16, 8), (7, 96, 40), (300, 64, 32), (5000, 40, 24)):
        assert {tiles.form for tiles in linear_candidates(rows, depth, out, 4, False, 4, 80)} >= {"fused", "three"}
        assert grads_candidates(rows, depth, out, 4, 4, 80)


@pytest.mark.parametrize("gpu", GPUS, ids=["H100", "A100", "L4", "RTX 5090"])
def test_gradients_of_factors_have_about_ten_candidates_that_fill_the_gpu(gpu: tuple[int, int]) -> None:
    for widths, r in itertools.product(WIDTHS, (8, 16, 64)):
        candidates = grads_candidates(2048, *widths, r, *gpu)
        assert 4 <= len(candidates) <= 12 and len(set(candidates)) == len(candidates)
        assert all(sum(-(-w // t.block_c) for w in widths) * t.slices >= 1.5 * gpu[0] for t in candidates)
