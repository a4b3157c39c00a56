"""The cost of a replica's failure: its outage, and the delay of its requests and of the other replica's.

    python benchmarks/rebuild.py --times 3 [--config configs/demo.yaml] [--out benchmarks/rebuild-DATE.md]

Each time is a run under torchrun in which rank 1 meets an out-of-memory error in the middle of a serving step (see
tests/faulty_run.py). All stamps are the control process's. Gaps between two tokens are those of the requests that
ended within WINDOW_S of the failure; moved requests are those whose replica failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from clif.metrics.collect import collect
from clif.metrics.provenance import provenance

REPO = Path(__file__).resolve().parents[1]
WINDOW_S = 5.0
LIMIT_S = 400


def run(folder: Path, config: str, call: int, overrides: list[str]) -> Path:
    """A whole run; returns its merged file."""
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["tests/faulty_run.py", "--config", config, f"run.out_dir={folder}", "run.name=run", "run.status=plain"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CLIF_FAULTS": f"1:forward:{call}"}
    done = subprocess.run(
        [*command, *overrides], cwd=REPO, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    if done.returncode:
        raise SystemExit(f"the run ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    return collect(folder / "run")


def measure(run_h5: Path) -> dict[str, float]:
    with h5py.File(run_h5) as file:
        states, requests, gaps = (file[name][:] for name in ("transitions", "requests", "gaps"))
        dispatches = file["dispatches"][:]
    failed = next(r for r in states if r["to_state"] == b"failed")
    back = next(r for r in states if r["replica"] == failed["replica"] and r["from_state"] == b"failed")
    users = requests[requests["purpose"] == b"user"]
    times = {i: int(n) for i, n in zip(*np.unique(dispatches["request"], return_counts=True), strict=True)}
    moved = [r for r in users if times.get(r["id"], 0) > 1]
    near = users[np.abs(users["finished_s"] - failed["t"]) < WINDOW_S]
    others = np.isin(gaps["request"], near["id"]) & ~np.isin(gaps["request"], [r["id"] for r in moved])
    # Requests whose first token came from another replica only continue here: they have no first token of this one.
    first = users[(users["replica"] == failed["replica"]) & (users["first_token_s"] > back["t"])]
    return {
        "away, s": float(back["t"] - failed["t"]),
        "to its next first token, s": float(first["first_token_s"].min() - failed["t"]),
        "requests moved": len(moved),
        "answered": sum(r["finish"] in (b"stop", b"length") for r in moved),
        "longest gap of a moved one, ms": 1e3 * max((float(r["max_itl_s"]) for r in moved), default=np.nan),
        "others' p99 gap then, ms": 1e3 * percentile(gaps[others]),
        "p99 gap of the run, ms": 1e3 * percentile(gaps),
        "not answered in the run": sum(r["finish"] not in (b"stop", b"length") for r in users),
    }


def percentile(gaps: Any) -> float:
    return float(np.percentile(gaps["itl_s"], 99)) if len(gaps) else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--call", type=int, default=250, help="serving step of rank 1 that fails")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the table there")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    arguments = parser.parse_args()
    rows = []
    for _ in range(arguments.times):
        with tempfile.TemporaryDirectory() as name:
            rows.append(measure(run(Path(name), arguments.config, arguments.call, arguments.overrides)))
        print(rows[-1], flush=True)
    facts = provenance(None)
    lines = [f"# A replica fails and is rebuilt in place: 2 replicas of {arguments.config}", ""]
    lines += [f"`python benchmarks/rebuild.py {' '.join(sys.argv[1:])}`", ""]
    versions = ", ".join(f"{name} {facts[key]}" for name, key in (("torch", "version.torch"), ("commit", "git_commit")))
    lines += [f"{facts['cpu']}, {os.cpu_count()} cores; {versions}", ""]
    lines += ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(f"{value:.3g}" for value in row.values()) + " |" for row in rows]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
