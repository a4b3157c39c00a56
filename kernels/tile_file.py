"""The file of the tiles that were measured on one type of GPU: every form of a shape, its spread, date and versions.

The tuner (benchmarks/tune_gpu.py) writes it after every shape; CLIF reads it at its start. Free of Triton and torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clif.kernels.paged_decode_config import DecodeConfig, DecodeShape
from clif.kernels.tiles import GradTiles, LinearTiles

FORMAT = 2


@dataclass(frozen=True)
class LaunchShape:
    """What a launch computes. rows: of the batch at most; depth of the contraction; outputs; rank of an adapter."""

    rows: int
    depth: int
    out: int
    rank: int
    backward: bool


@dataclass(frozen=True)
class Spread:
    """Microseconds per layer: the median, and what 10 % and 90 % of the samples were below."""

    p10: float
    median: float
    p90: float


@dataclass(frozen=True)
class Stamp:
    """When an entry was measured, and with what: an entry of other versions is measured again."""

    date: str
    device: str
    torch: str
    triton: str
    kernels: str
    """Digest of the kernels' source."""

    def same_versions(self, other: Stamp) -> bool:
        return {**asdict(self), "date": ""} == {**asdict(other), "date": ""}


@dataclass(frozen=True)
class LinearEntry:
    """One shape of dual_lora_linear: the fastest tiles of each form whose results are right, in one heat.

    chosen: the fastest form; captured: the fastest whose segments are data, as in a captured step (None: no such form).
    beside: torch's times, the base product alone among them. left_out: how many candidates had no result, by reason.
    """

    shape: LaunchShape
    chosen: str
    captured: str | None
    tiles: dict[str, LinearTiles]
    us: dict[str, Spread]
    beside: dict[str, Spread]
    stamp: Stamp
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def eager(self) -> str:
        """The fastest form of one stream: beside launches that are not captured, switching streams costs the host."""
        of_one = {form: spread.median for form, spread in self.us.items() if form != "branches"}
        return self.chosen if self.chosen != "branches" or not of_one else min(of_one, key=lambda form: of_one[form])


@dataclass(frozen=True)
class GradsEntry:
    """One shape of dual_lora_grads. depth and outputs are the layer's."""

    shape: LaunchShape
    tiles: GradTiles
    us: Spread
    stamp: Stamp
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DecodeEntry:
    """One shape of paged_decode: the fastest configuration over all batches, whose results are right.

    us: the geometric mean over batches; default: that of the unmeasured configuration; batches: microseconds of each.
    """

    shape: DecodeShape
    config: DecodeConfig
    us: Spread
    default: Spread
    batches: dict[str, float]
    stamp: Stamp
    left_out: dict[str, int] = field(default_factory=dict)


Entry = LinearEntry | GradsEntry | DecodeEntry


@dataclass
class TileFile:
    """about: machine, versions, command; entries by shape; unfinished: what a tuner began and did not end."""

    about: dict[str, str] = field(default_factory=dict)
    linear: dict[LaunchShape, LinearEntry] = field(default_factory=dict)
    grads: dict[LaunchShape, GradsEntry] = field(default_factory=dict)
    decode: dict[DecodeShape, DecodeEntry] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    _lines: dict[int, tuple[Entry, str]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def read(cls, path: Path) -> TileFile:
        """Raises ValueError for a file that is not such a table, or of an earlier format, naming it."""
        try:
            tree = json.loads(path.read_text())
            if tree.get("format") != FORMAT:
                raise ValueError(
                    f"{path}: a table of an earlier format, without spread and date of its entries: measure again with "
                    "make tune-gpu AGAIN=1, or remove the file"
                )
            linear, grads = map(_linear, tree["linear"]), map(_grads, tree["grads"])
            # Absent from files of before: these splits are then not measured.
            decode = map(_decode, tree.get("decode", ()))
            return cls(
                tree["about"],
                {e.shape: e for e in linear},
                {e.shape: e for e in grads},
                {e.shape: e for e in decode},
                tree.get("unfinished", []),
            )
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a table of tiles ({error}): write it again with make tune-gpu") from error

    def write(self, path: Path) -> None:
        """All of it or nothing: a process that is ended meanwhile leaves the file as it was. A line for each entry."""
        head = {"format": FORMAT, "about": self.about, "unfinished": self.unfinished}
        parts = [f'"{name}": {json.dumps(value)}' for name, value in head.items()]
        for name, entries in (("linear", self.linear), ("grads", self.grads), ("decode", self.decode)):
            lines = ",\n ".join(self._line(entry) for entry in entries.values())
            parts.append(f'"{name}": [\n {lines}\n]')
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text("{" + ",\n".join(parts) + "}\n")
        part.replace(path)

    def _line(self, entry: Entry) -> str:
        """The tuner writes the file after every shape: entries that have been written before are not made again."""
        known = self._lines.get(id(entry))
        if known is None or known[0] is not entry:
            known = self._lines[id(entry)] = entry, json.dumps(asdict(entry))
        return known[1]


def _linear(entry: Mapping[str, Any]) -> LinearEntry:
    made = LinearEntry(
        LaunchShape(**entry["shape"]),
        entry["chosen"],
        entry["captured"],
        {form: LinearTiles(**tiles) for form, tiles in entry["tiles"].items()},
        {form: Spread(**us) for form, us in entry["us"].items()},
        {name: Spread(**us) for name, us in entry["beside"].items()},
        Stamp(**entry["stamp"]),
        entry["left_out"],
    )
    if not {made.chosen, made.captured or made.chosen} <= made.tiles.keys() == made.us.keys():
        raise KeyError(f"tiles or times of the chosen forms of {made.shape}")
    return made


def _grads(entry: Mapping[str, Any]) -> GradsEntry:
    return GradsEntry(
        LaunchShape(**entry["shape"]),
        GradTiles(**entry["tiles"]),
        Spread(**entry["us"]),
        Stamp(**entry["stamp"]),
        entry["left_out"],
    )


def _decode(entry: Mapping[str, Any]) -> DecodeEntry:
    return DecodeEntry(
        DecodeShape(**entry["shape"]),
        DecodeConfig(**entry["config"]),
        Spread(**entry["us"]),
        Spread(**entry["default"]),
        entry["batches"],
        Stamp(**entry["stamp"]),
        entry["left_out"],
    )
