"""Checks that a refactoring keeps the numbers: runs shipped configurations before and after it, and compares records.

    python benchmarks/same_numbers.py record --out /tmp/before --checkout ../before    # another checkout, with a .venv
    python benchmarks/same_numbers.py record --out /tmp/after                          # minutes on 2 cores
    python benchmarks/same_numbers.py compare /tmp/before /tmp/after                   # exits with 1 on any difference

Clocks decide when a round begins and which replica answers a request, so most columns differ between two runs of the
same commit. benchmarks/same_numbers_rules.py says which do not, and takes the clocks out of the training by overrides.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import h5py
import typer
from same_numbers_rules import OVERRIDES, RENAMED, RULES, SETTINGS, USUAL, Rule

from clif.config.renamed import KEYS, VALUES

REPO = Path(__file__).resolve().parents[1]
RANKS, LIMIT_S, SHOWN = 2, 400, 3
Row = dict[str, Any]


@dataclass
class Table:
    """columns: name -> type and unit."""

    rows: list[Row] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)


def read(run: Path) -> dict[str, Table]:
    """The records in a run's folder."""
    tables = {}
    with h5py.File(run / "run.h5") as file:
        for name, data in file.items():
            if isinstance(data, h5py.Dataset):
                columns = {c: f"{data.dtype[c]} {data.attrs.get(f'unit.{c}', '')}".strip() for c in data.dtype.names}
                rows = [dict(zip(columns, map(_plain, row.item()), strict=True)) for row in data[:]]
                tables[name] = Table(rows, columns)
    tables["answers"] = Table([json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()])
    files = sorted((run / "adapters").glob("v*/*"))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    named = zip(files, digests, strict=True)
    tables["weights"] = Table([{"file": f"{path.parent.name}/{path.name}", "sha256": digest} for path, digest in named])
    return tables


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def rename(tables: dict[str, Table], renamed: dict[str, str]) -> dict[str, Table]:
    """Translate to the new names: words in the columns first, then columns, then tables."""
    for old, new in sorted(renamed.items(), key=lambda item: (":" not in item[0], "." not in item[0])):
        name, _, rest = old.partition(".")
        column, _, word = rest.partition(":")
        table = tables.get(name, Table())
        if word:
            for row in table.rows:
                row[column] = re.sub(rf"\b{re.escape(word)}\b", new, row.get(column, ""))
        elif column:
            table.columns = {new if c == column else c: kind for c, kind in table.columns.items()}
            table.rows = [{new if c == column else c: value for c, value in row.items()} for row in table.rows]
        elif name in tables:
            tables[new] = tables.pop(name)
    return tables


def column_differences(before: Table, after: Table) -> list[str]:
    """Differences in names, types and units."""
    names = sorted(before.columns.keys() | after.columns.keys())
    pairs = [(name, before.columns.get(name, "not there"), after.columns.get(name, "not there")) for name in names]
    return [f"column {name}: {one}, then {other}" for name, one, other in pairs if one != other]


def row_differences(rule: Rule, before: Table, after: Table, tolerance: float) -> tuple[list[str], str]:
    """A line for each difference in what the rule names, and what was compared."""
    found = []
    for column in rule.words.split():
        one, other = ({str(row.get(column)) for row in table.rows} for table in (before, after))
        if one != other:
            found.append(f"{column}: {sorted(one)}, then {sorted(other)}")
    if not rule.keys:
        return found, f"words of {rule.words}" if rule.words else "columns only"
    old, new = _keyed(before.rows, rule.keys), _keyed(after.rows, rule.keys)
    if not rule.shared:
        found += [f"{rule.keys} {key}: in one run only" for key in sorted(old.keys() ^ new.keys(), key=str)]
    both = [key for key in old if key in new]
    columns = [(c, 0.0) for c in rule.same.split()] + [(c, tolerance) for c in rule.near.split()]
    for key in both:
        for column, allowed in columns:
            one, other = old[key].get(column), new[key].get(column)
            if not _equal(one, other, allowed):
                found.append(f"{rule.keys} {key}: {column} {one!r}, then {other!r}")
    tokens = sum(old[key].get("output_tokens", 0) for key in both)
    counted = f"{len(both)} of {len(old.keys() | new.keys())} rows by {rule.keys}"
    return found, f"{counted} ({tokens} tokens)" if tokens else counted


def _keyed(rows: list[Row], keys: str) -> dict[tuple[Any, ...], Row]:
    """Rows by their keys; later ones with the same keys also by a number."""
    seen: Counter[tuple[Any, ...]] = Counter()
    found = {}
    for row in rows:
        key = tuple(row.get(k) for k in keys.split())
        found[(*key, seen[key]) if seen[key] else key] = row
        seen[key] += 1
    return found


def _equal(one: Any, other: Any, tolerance: float) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return (math.isnan(one) and math.isnan(other)) or math.isclose(one, other, rel_tol=tolerance)
    return type(one) is type(other) and one == other


def compare_runs(before: Path, after: Path, tolerance: float, renamed: dict[str, str]) -> int:
    """Print a line for each rule, with the first differences; returns how many differences there are."""
    old, new = rename(read(before), renamed), read(after)
    reports = []
    for name in sorted(old.keys() | new.keys()):
        known = name in old and name in new and any(rule.table == name for rule in RULES)
        wrong = column_differences(old[name], new[name]) if known else ["in one run only, or without a rule"]
        reports += [(name, wrong, "columns")] if wrong else []
    for rule in RULES:
        if rule.table != "weights" or not tolerance:
            tables = old.get(rule.table, Table()), new.get(rule.table, Table())
            reports.append((rule.table, *row_differences(rule, *tables, tolerance)))
    for name, found, compared in reports:
        print(f"  {'DIFFERENT' if found else 'same':10}{name:13}{compared}")
        for line in found[:SHOWN]:
            print(f"            {line}")
    return sum(len(found) for _, found, _ in reports)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def record(
    out: Annotated[Path, typer.Option(help="folder for the runs")],
    checkout: Annotated[Path, typer.Option(help="of CLIF, with a .venv and the demo's assets")] = REPO,
    only: Annotated[str, typer.Option(help="settings, separated by commas")] = ",".join(USUAL),
) -> None:
    """Run the settings from a checkout."""
    for name in only.split(","):
        setting = SETTINGS[name]
        if (out / name).exists():
            raise typer.BadParameter(f"{out / name} is there already: name another folder")
        print(f"{name}: {setting.config}", flush=True)
        where = (f"run.out_dir={out.resolve()}", f"run.name={name}")
        _launch(checkout.resolve(), setting.config, (*where, *OVERRIDES, *setting.overrides))


def _launch(checkout: Path, config: str, overrides: tuple[str, ...]) -> None:
    """Run to the end, with old names of the keys that the checkout does not know. Raises Exit if the run fails."""
    torchrun = [str(checkout / ".venv/bin/python"), "-P", "-m", "torch.distributed.run", "--standalone"]
    start = [*torchrun, "--nproc-per-node", str(RANKS), "launch/run.py", "--config", config, *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(start, cwd=checkout, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    if not done.returncode:
        return
    older = tuple(_older(o) if o.split("=")[0] in done.stderr else o for o in overrides)
    if older == overrides:
        print(done.stderr[-3000:])
        raise typer.Exit(2)
    _launch(checkout, config, older)


def _older(override: str) -> str:
    """The override with the old name of its value or its key; unchanged if it was never renamed."""
    key, _, value = override.partition("=")
    now = KEYS.get(key, key)
    values = [old for (of, old), new in VALUES.items() if of == now and new == value]
    keys = [old for old, new in KEYS.items() if new == key]
    return f"{key}={values[0]}" if values else f"{keys[0]}={value}" if keys else override


@app.command()
def compare(
    before: Path,
    after: Path,
    renamed: Annotated[list[str] | None, typer.Option(help="TABLE[.COLUMN[:WORD]]=NEW, besides RENAMED")] = None,
) -> None:
    """Compare two records; exits with 1 if anything differs."""
    names = RENAMED | dict(pair.split("=", 1) for pair in renamed or ())
    count = 0
    for name in sorted({path.name for record in (before, after) for path in record.iterdir() if path.is_dir()}):
        if not all((record / name / "run.h5").is_file() for record in (before, after)):
            print(f"{name}: DIFFERENT, no run.h5 in one of them")
            count += 1
            continue
        tolerance = SETTINGS[name].tolerance
        print(f"{name}: losses and norms within {tolerance:g}" if tolerance else f"{name}: bit for bit")
        count += compare_runs(before / name, after / name, tolerance, names)
    print(f"{count} differences" if count else "same numbers")
    raise typer.Exit(1 if count else 0)


if __name__ == "__main__":
    app()
