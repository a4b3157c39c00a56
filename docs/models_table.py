"""The table of docs/models.md: the families that tests prove, from tests/families.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

LIST = Path(__file__).resolve().parent.parent / "tests/families.py"


def families_table(_: str) -> Iterator[str]:
    """One line for each way in which the models of a family are built."""
    yield "| models | `model_type` | float | int8 | int4 | fp8 | nf4 | ranks of a replica | adapters on | proved by |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for family in _families().FAMILIES:
        tp = ", ".join(map(str, family.tp)) or "as Llama"
        yield (
            f"| {family.models} | `{family.model_type}` | yes | yes | yes | yes | yes | {tp} | {family.targets} | "
            f"`-k {family.name}` |"
        )


def _families() -> ModuleType:
    name = "families"
    if name not in sys.modules:
        spec = spec_from_file_location(name, LIST)
        assert spec is not None and spec.loader is not None
        # Data classes look their module up there.
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
