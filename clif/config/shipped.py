"""The configurations that come with CLIF, and their files, wherever CLIF is installed. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clif.config.base import is_there
from clif.errors import ConfigError, plain

FOLDER = "configs"
RANDOM = "random:"
PACKAGE = Path(__file__).parents[1]


def shipped_folder() -> Path:
    """configs/ inside the installed package, or beside the package in a checkout."""
    inside = PACKAGE / FOLDER
    return inside if inside.is_dir() else PACKAGE.parent / FOLDER


def find_config(name: str) -> Path:
    """The file of a name or path: from the working folder first, then from the configurations that come with CLIF.

    Raises ConfigError, with the known names, for a name without a file.
    """
    path = Path(name)
    # load_config reports what is wrong with a path.
    if path.is_file() or path.suffix or len(path.parts) > 1:
        return Path(shipped_path(name))
    shipped = shipped_folder() / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    known = ", ".join(sorted(file.stem for file in shipped_folder().glob("*.yaml")))
    raise ConfigError(f"there is no configuration {plain(name, 80)}: name a YAML file, or one of CLIF's own ({known})")


def shipped_path(text: str) -> str:
    """The path; one that begins with configs/ and is no file here becomes that of CLIF's own file."""
    prefix = RANDOM if text.startswith(RANDOM) else ""
    path = Path(text.removeprefix(prefix))
    if path.parts[:1] != (FOLDER,) or ".." in path.parts or is_there(path):
        return text
    shipped = shipped_folder().joinpath(*path.parts[1:])
    return f"{prefix}{shipped}" if is_there(shipped) else text


def with_shipped_paths(value: Any) -> Any:
    """A tree of plain values, with shipped_path() applied to its texts."""
    if isinstance(value, dict):
        return {key: with_shipped_paths(inner) for key, inner in value.items()}
    return shipped_path(value) if isinstance(value, str) else value
