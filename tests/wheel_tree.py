"""What a wheel is built from, apart from the checkout: a build leaves files behind that a later one would pick up."""

from __future__ import annotations

import shutil
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def copy_sources(tree: Path) -> Path:
    """Copy the packages and what describes them, with a table of tiles as `make tune-gpu` writes one."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("clif", "kernels", "launch", "configs"):
        shutil.copytree(REPO / name, tree / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(REPO / name, tree)
    (tree / "kernels" / "tuned").mkdir(exist_ok=True)
    (tree / "kernels" / "tuned" / "a-gpu.json").write_text("{}")
    return tree
