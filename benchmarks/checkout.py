"""Lets the kernels be imported from a checkout that is not installed: a GPU machine may have torch and Triton only."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def use_checkout() -> None:
    """To be called before the first import of clif.kernels."""
    if find_spec("clif") is None:
        # At the end: nothing but the package clif is wanted from there.
        sys.path.append(str(REPO))
    import clif

    if find_spec("clif.kernels") is None:
        clif.__path__.append(str(REPO))


def commit() -> str:
    """The commit of the checkout, or why there is none."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
