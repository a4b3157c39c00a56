"""Tables of measured tiles: what was measured is read back, and a file that is something else is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from clif.kernels.tile_file import GradsEntry, LaunchShape, LinearEntry, Spread, Stamp, TileFile
from clif.kernels.tiles import GradTiles, LinearTiles
from clif.kernels.tuning import Defaults, load_table, table_path

STAMP = Stamp("2026-11-27", "a GPU", "2.11", "3.6", "0123456789ab")
FUSED, SEPARATE = LinearTiles(block_m=16), LinearTiles(form="separate", slices=4)


def entry(rows: int, chosen: str, captured: str | None = "fused") -> LinearEntry:
    us = {"fused": Spread(1.0, 2.0, 3.0), "separate": Spread(1.5, 1.6, 1.7)}
    shape, beside = LaunchShape(rows, 64, 64, 8, False), {"base": Spread(0.5, 0.6, 0.7)}
    tiles = {"fused": FUSED, "separate": SEPARATE}
    return LinearEntry(shape, chosen, captured, tiles, us, beside, STAMP, {"pair: no such thing": 2})


def table(*entries: LinearEntry) -> TileFile:
    shape = LaunchShape(256, 64, 64, 8, True)
    grads = GradsEntry(shape, GradTiles(slices=7), Spread(4.0, 5.0, 6.0), STAMP)
    return TileFile({"device": "a GPU"}, {e.shape: e for e in entries}, {shape: grads})


def test_a_table_is_read_as_it_was_written_with_spread_date_and_versions(tmp_path: Path) -> None:
    written = table(entry(16, "fused"), entry(256, "separate", None))
    written.write(tmp_path / "new" / "gpu.json")
    assert TileFile.read(tmp_path / "new" / "gpu.json") == written
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["gpu.json"]
    # A shape that is measured again, in the same object.
    written.linear[entry(16, "fused").shape] = entry(16, "separate")
    written.write(tmp_path / "new" / "gpu.json")
    assert TileFile.read(tmp_path / "new" / "gpu.json") == written


def test_a_table_answers_for_what_was_measured_and_the_rules_for_what_was_not(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    table(entry(16, "fused"), entry(256, "separate")).write(file)
    found = load_table(file, Defaults())
    assert found.linear(1, 64, 64, 8, False) == found.linear(16, 64, 64, 8, False) == FUSED
    assert found.linear(17, 64, 64, 8, False) == found.linear(9999, 64, 64, 8, False) == SEPARATE
    # Other widths, ranks or directions were not measured.
    for unknown in ((16, 65, 64, 8, False), (16, 64, 64, 16, False), (16, 64, 64, 8, True)):
        assert found.linear(*unknown) == Defaults().linear(*unknown)
    assert found.grads(300, 64, 64, 8).slices == 7
    assert found.grads(300, 64, 64, 16) == Defaults().grads(300, 64, 64, 16)


def test_captured_steps_take_the_fastest_form_whose_segments_are_data(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    table(entry(16, "separate", "fused"), entry(256, "separate", None)).write(file)
    defaults = Defaults(captured=True)
    captured = load_table(file, defaults)
    assert captured.linear(16, 64, 64, 8, False) == captured.linear(256, 64, 64, 8, False) == FUSED
    table(entry(16, "separate", None)).write(file)
    nothing = load_table(file, defaults)
    assert nothing.linear(16, 64, 64, 8, False) == defaults.linear(16, 64, 64, 8, False)


def test_launches_that_are_not_captured_take_the_fastest_form_of_one_stream(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    made = entry(16, "branches", "branches")
    branches = {"branches": LinearTiles(form="branches")}, {"branches": Spread(0.9, 1.0, 1.1)}
    table(replace(made, tiles=made.tiles | branches[0], us=made.us | branches[1])).write(file)
    assert load_table(file, Defaults(captured=True)).linear(16, 64, 64, 8, False).form == "branches"
    assert load_table(file, Defaults()).linear(16, 64, 64, 8, False) == SEPARATE


def test_a_layer_of_which_nothing_was_measured_is_not_taken_unless_the_kernels_are_wanted_everywhere(
    tmp_path: Path,
) -> None:
    file = tmp_path / "gpu.json"
    table(entry(16, "fused")).write(file)
    found = load_table(file, Defaults(), everywhere=False)
    assert found.takes(64, 64, 8) and not found.takes(64, 65, 8) and not found.takes(64, 64, 16)
    assert load_table(file, Defaults()).takes(64, 65, 8)


def test_the_best_tiles_of_one_form_can_be_had_where_another_is_faster(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    table(entry(16, "separate")).write(file)
    defaults = Defaults()
    assert load_table(file, defaults, form="fused").linear(16, 64, 64, 8, False) == FUSED
    assert load_table(file, defaults, form="pair").measured == {}


@pytest.mark.parametrize(
    ("rows", "rank", "backward", "form"),
    [
        (1, 16, False, "fused"), (1, 64, False, "fused"), (16, 16, False, "three"), (64, 16, False, "three"),
        (64, 64, False, "three"), (256, 64, False, "three"), (2048, 16, False, "three"), (2112, 64, False, "separate"),
        (2048, 16, True, "separate"),
    ],
)  # fmt: skip
def test_without_a_table_the_form_is_the_one_that_an_h200_found_fastest(
    rows: int, rank: int, backward: bool, form: str
) -> None:
    defaults = Defaults()
    found, why = defaults.form(rows, rank, backward)
    assert found == form == defaults.linear(rows, 4096, 4096, rank, backward).form and "r=" in why


def test_no_rule_takes_a_form_that_was_never_measured_or_that_a_captured_step_cannot_have() -> None:
    rules = [
        (captured, Defaults(captured=captured).form(rows, rank, backward)[0])
        for captured in (False, True) for rows in (1, 64, 725, 9999) for rank in (8, 64) for backward in (True, False)
    ]  # fmt: skip
    assert {form for _, form in rules} == {"fused", "three", "separate"}
    assert {form for captured, form in rules if captured} == {"fused", "three"}


def test_a_broken_table_is_named_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    table(entry(16, "fused")).write(file)
    tree = json.loads(file.read_text())
    wrong = [
        "{",
        "[]",
        json.dumps(tree | {"linear": [{"shape": {}, "tiles": {"colour": 1}}]}),
        json.dumps(tree | {"linear": [tree["linear"][0] | {"chosen": "pair"}]}),
    ]
    for text in wrong:
        file.write_text(text)
        with pytest.raises(ValueError, match=r"gpu\.json: not a table of tiles .* make tune-gpu"):
            load_table(file, Defaults())


def test_a_table_of_the_earlier_format_says_how_to_replace_it(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    old = {"about": {"device": "a GPU"}, "linear": [{"shape": {}, "tiles": {}, "us": {"kernel": 1.0}}], "grads": []}
    file.write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"gpu\.json: a table of an earlier format.*make tune-gpu AGAIN=1"):
        load_table(file, Defaults())


def test_an_entry_is_old_when_anything_but_its_date_differs() -> None:
    assert STAMP.same_versions(replace(STAMP, date="2027-01-01"))
    for name in ("device", "torch", "triton", "kernels"):
        assert not STAMP.same_versions(replace(STAMP, **{name: "other"}))


def test_tables_are_kept_by_the_name_of_the_gpu() -> None:
    assert table_path("NVIDIA H200 (141 GB)").name == "nvidia-h200-141-gb.json"
