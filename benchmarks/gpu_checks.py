"""Runs the checks of a GPU stage: each one is tried, whatever became of those before it."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterable

from gpu_bench import provenance, scale_of

Check = Callable[[], str]
"""Returns the fault; empty if there is none. It may also raise one."""


def run_checks(title: str, checks: Iterable[tuple[str, Check]]) -> int:
    """Print `ok` or `FAIL` with the reason for each, and tracebacks where they happen; returns how many failed."""
    scale_of(sys.argv)
    print(provenance(), flush=True)
    lines = []
    for name, check in checks:
        start = time.perf_counter()
        try:
            wrong = check()
        except Exception as error:  # noqa: BLE001 - whatever it was, its line says it and the next check comes
            traceback.print_exc(file=sys.stdout)
            wrong = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        verdict = f"FAIL {wrong}" if wrong else "ok"
        lines.append(f"* {name}: {verdict} ({time.perf_counter() - start:.1f} s)")
        print(lines[-1], flush=True)
    failed = sum(": FAIL" in line for line in lines)
    print(f"\n### {title}: {failed} of {len(lines)} fail\n\n" + "\n".join(lines))
    return failed
