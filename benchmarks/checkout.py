"""Makes the kernels importable from a checkout that is not installed: a GPU machine may have only torch and Triton."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def use_checkout() -> None:
    """Call it before the first import of clif.kernels."""
    if find_spec("clif") is None:
        # At the end of sys.path: only the package clif is needed from there.
        sys.path.append(str(REPO))
    import clif

    if find_spec("clif.kernels") is None:
        clif.__path__.append(str(REPO))


def link_checkout(site: Path) -> None:
    """Make a folder for PYTHONPATH in which the checkout looks installed, so that subprocesses can import it, too.

    It holds links: the package clif with kernels/ and launch/ inside it, as setup.py maps them. Raises OSError.
    """
    package = site / "clif"
    package.mkdir(parents=True, exist_ok=True)
    for source in (*(REPO / "clif").iterdir(), REPO / "kernels", REPO / "launch"):
        link = package / source.name
        if source.name != "__pycache__" and not link.is_symlink():
            link.symlink_to(source)


def commit() -> str:
    """The commit of the checkout, or why there is none."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
