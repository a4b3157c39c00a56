"""A plugin of pytest: failures are printed when they happen, for runs that may be ended at any moment."""

from __future__ import annotations

import pytest

SLOW_S = 8.0


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        print(f"\nFAILED {report.nodeid} ({report.when})\n{str(report.longrepr)[-3000:]}\n", flush=True)
    elif report.when == "call" and report.duration > SLOW_S:
        print(f"\n{report.duration:.0f} s: {report.nodeid}", flush=True)
