"""Tiles for each form of the dual LoRA layer, and what is taken without a form being forced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from kernel_goals import AUTO, FORMS

from clif.kernels.dual_lora_host import Tiling
from clif.kernels.tiles import Form, GradTiles, LinearTiles
from clif.kernels.tuning import Defaults, Fixed, load_table


@dataclass(frozen=True)
class Machine:
    """What is measured on, and how: the ways of CLIF by name, and the samples of each way.

    captured: what AUTO takes in a captured step, where it may be another form.
    """

    device: torch.device
    tilings: Mapping[str, Tiling]
    repeats: int
    dtype: torch.dtype = torch.bfloat16
    captured: Tiling | None = None


@dataclass(frozen=True)
class Forced:
    """One form for every shape: the tiles in use where they are of this form, otherwise those by reasoning.

    used: the table of this form, or the tiles of any form.
    """

    form: Form
    used: Tiling
    defaults: Defaults

    def linear(self, rows: int, depth: int, out: int, rank: int, backward: bool) -> LinearTiles:
        used = self.used.linear(rows, depth, out, rank, backward)
        if used.form == self.form:
            return used
        return self.defaults.tiles(self.form, rows, depth, out, rank)

    def takes(self, depth: int, out: int, rank: int) -> bool:
        return True

    def grads(self, rows: int, depth: int, out: int, rank: int) -> GradTiles:
        return self.used.grads(rows, depth, out, rank)


def tilings(defaults: Defaults, path: Path | None) -> dict[str, Tiling]:
    """By way of CLIF. path: of the measured table of this type of GPU, None: there is none."""
    if path is None:
        return {AUTO: defaults, **{way: Forced(form, defaults, defaults) for way, form in FORMS.items()}}
    of_forms = {way: Forced(f, load_table(path, defaults, form=f), defaults) for way, f in FORMS.items()}
    return {AUTO: load_table(path, defaults), **of_forms}


def captured_tiling(defaults: Defaults, path: Path | None) -> Tiling:
    """What AUTO takes in a captured step."""
    captured = replace(defaults, captured=True)
    return load_table(path, captured) if path else captured


def dry_tilings(forms: Mapping[str, Form] = FORMS) -> dict[str, Tiling]:
    """The same with tiles of which the interpreter, which runs one program after the other, needs few."""
    tiles = LinearTiles(block_m=16, block_n=128, block_k=64, slices=1, shrinkers=1)
    return {AUTO: Fixed(tiles), **{way: Fixed(replace(tiles, form=form)) for way, form in forms.items()}}
