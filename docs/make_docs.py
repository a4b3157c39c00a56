#!/usr/bin/env python3
"""Write the pages of docs/templates: prose from there, tables from the code. Run by `make docs`.

A line `{{ name argument }}` of a template is replaced by a table. What a field of the configuration means stands below
it in clif/config, with its unit in brackets where neither name nor type tells it; what a column means, in
clif/metrics/schema.py.
"""

from __future__ import annotations

import ast
import enum
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

from api_tables import bodies_tables, errors_table, routes_table
from kernel_limits import limits_table, spread_table
from models_table import families_table

from clif.config import Config
from clif.config.base import Section
from clif.config.relevance import ALWAYS, RELEVANCE
from clif.metrics.schema import CONTROL_TABLES, RANK_TABLES, REQUIRED, TABLES, Column

DOCS = Path(__file__).resolve().parent
PAGES = ("api.md", "configuration.md", "metrics.md", "kernels.md", "models.md")
MARK = re.compile(r"^\{\{ (\w+)(?: ([\w.]+))? \}\}$", re.MULTILINE)
UNITS = {"_s": "s", "_ms": "ms", "_mib": "MiB", "_rps": "requests/s"}
"""Units that a field's name tells."""
TYPES = {"f8": "float64", "i8": "int64", "i1": "int8", "bool": "bool"}


def page(name: str) -> str:
    """A page as it should be. Raises KeyError for a mark without a table, and for a field without a meaning."""
    template = (DOCS / "templates" / name).read_text()
    return MARK.sub(lambda mark: "\n".join(MAKERS[mark[1]](mark[2] or "")), template)


def section_table(section: str) -> Iterator[str]:
    """Fields of a section such as load.trace, with what holds if they are not given."""
    kind = section_class(section)
    yield "| field | default | unit | meaning |"
    yield "|---|---|---|---|"
    meanings = meanings_of(kind)
    for name, field in kind.model_fields.items():
        nested = isinstance(field.default, Section)
        default = "required" if field.is_required() else "-" if nested else f"`{shown(field.default)}`"
        unit, text = split_unit(name, str(field.annotation), meanings[name])
        yield f"| `{name}` | {default} | {unit} | {text} |"


def relevance_table(_: str) -> Iterator[str]:
    """Which field matters when, one line for each kind of need."""
    yield "| given | matters only with |"
    yield "|---|---|"
    groups: dict[str, list[str]] = {}
    for field, needs in RELEVANCE.items():
        if needs != ALWAYS:
            groups.setdefault(", and ".join(map(str, needs)), []).append(f"`{field}`")
    for need, names in groups.items():
        yield f"| {', '.join(names)} | {need} |"


def metrics_tables(which: str) -> Iterator[str]:
    """The tables of control.h5 or of a rank's file, each below its heading."""
    for number, name in enumerate({"control": CONTROL_TABLES, "rank": RANK_TABLES}[which]):
        yield from ([""] if number else [])
        yield from (f"### {name}", "", TABLES[name].doc, "")
        yield "| column | type | unit | unknown | meaning |"
        yield "|---|---|---|---|---|"
        for column in TABLES[name].columns:
            kind = f"text[{column.width}]" if column.kind == "text" else TYPES[column.kind]
            yield f"| `{column.name}` | {kind} | {column.unit or '-'} | {unknown(column)} | {column.doc} |"


MAKERS: dict[str, Callable[[str], Iterator[str]]] = {
    "section": section_table,
    "relevance": relevance_table,
    "tables": metrics_tables,
    "limits": limits_table,
    "spread": spread_table,
    "routes": routes_table,
    "bodies": bodies_tables,
    "errors": errors_table,
    "families": families_table,
}


def section_class(section: str) -> Any:
    kind: Any = Config
    for name in section.split("."):
        annotation = kind.model_fields[name].annotation
        kind = next(t for t in (annotation, *get_args(annotation)) if hasattr(t, "model_fields"))
    return kind


@cache
def meanings_of(kind: type) -> dict[str, str]:
    """The text below each field in the class's source, on one line. Raises KeyError for a field without one."""
    (tree,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[ast.unparse(node.target)] = " ".join(str(below.value.value).split())
    return found


def split_unit(name: str, annotation: str, text: str) -> tuple[str, str]:
    """Unit and meaning: "[tokens] Size of a KV block." """
    if given := re.match(r"\[([^\]]+)\] (.*)", text):
        return given[1], given[2]
    return next(
        (unit for end, unit in UNITS.items() if name.endswith(end)), "path" if "Path" in annotation else "-"
    ), text


def shown(value: Any) -> str:
    """A default as it is written in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value.value if isinstance(value, enum.Enum) else value)


def unknown(column: Column) -> str:
    """What stands for a value that is not there."""
    if column.name == "t":
        return "set by the writer"
    if column.default is REQUIRED:
        return "always given"
    if column.kind == "f8":
        return "NaN" if column.default != column.default else f"{column.default:g}"
    return str(column.default) or "empty"


def main() -> None:
    for name in PAGES:
        (DOCS / name).write_text(page(name))
        print(f"docs/{name}")


if __name__ == "__main__":
    main()
