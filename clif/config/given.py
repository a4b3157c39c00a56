"""The user's input: the file, the overrides after it, and the origin of each value. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from clif.config.yaml import KeyPath, read_yaml
from clif.errors import ConfigError

MAX_BYTES = 1 << 16
"""Largest file: a configuration is a few lines, and /dev/zero has no end."""
FIELD = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")
SHOWN = 80
"""Characters of a value that a sentence repeats."""


@dataclass(frozen=True)
class Origin:
    """Where a value was given. where: file and line, or the override. taken_back: an override set it to null."""

    where: str
    override: bool = False
    taken_back: bool = False


@dataclass
class Given:
    """tree: the resulting plain values by section. origins: of each of them."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)

    def where(self, loc: Iterable[int | str], sentence: str) -> str:
        """The origin of a value, to append to a sentence about it.

        A sentence about one or several sections names its fields: the origins of these are appended.
        """
        key_path = tuple(map(str, loc))
        key_paths = [tuple(name.split(".")) for name in FIELD.findall(sentence)] if len(key_path) < 2 else []
        # The origin of a list's item is that of the list; that of a missing field is its section's.
        around = [key_path[:end] for end in range(len(key_path), 0, -1) if key_path[:end] in self.origins][:1]
        found = dict.fromkeys(self.origins[at].where for at in key_paths if at in self.origins)
        shown = list(found) or [self.origins[at].where for at in around]
        return f" ({', '.join(shown)})" if shown else ""


def read_given(path: Path | str, overrides: tuple[str, ...]) -> Given:
    """Read a file and apply `section.key=value` overrides to it. Raises ConfigError."""
    given = _read_file(Path(path))
    for key_path, value, origin in sorted(_changes(overrides), key=_sections_first):
        _put(given, key_path, value, origin)
    return given


def _read_file(path: Path) -> Given:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {getattr(error, 'strerror', error)}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES >> 10} KiB: name a YAML file, as in configs/")
    try:
        document = read_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file: name a YAML file, as in configs/") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_said(error)}") from error
    tree = {} if document.value is None else document.value
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a mapping of sections, not a {type(tree).__name__}")
    # A section whose lines are all commented out is read as null.
    tree = {name: {} if section is None else section for name, section in tree.items()}
    origins = {key_path: Origin(f"{path}, line {line}") for key_path, line in document.lines.items()}
    return Given(tree, origins)


def _changes(overrides: tuple[str, ...]) -> Iterator[tuple[KeyPath, Any, Origin]]:
    """Each value of the overrides; a mapping has several. Raises ConfigError for a value that is given twice.

    Hence the order of overrides never matters.
    """
    seen: dict[KeyPath, str] = {}
    for override in overrides:
        for key_path, value in _leaves(*_parse(override)):
            if key_path in seen:
                both = f'"{_short(seen[key_path])}" and "{_short(override)}"'
                raise ConfigError(f"{'.'.join(key_path)} is given twice, by {both}: remove one")
            seen[key_path] = override
            yield key_path, value, Origin(f'override "{_short(override)}"', override=True)


def _parse(override: str) -> tuple[KeyPath, Any]:
    key, equals, value = override.partition("=")
    parts = tuple(key.split("."))
    if not equals or not all(parts):
        raise ConfigError(f'"{_short(override)}" is not an override: write section.key=value')
    try:
        return parts, read_yaml(value).value
    except yaml.YAMLError as error:
        raise ConfigError(f'"{_short(override)}": the value is not valid YAML: {_said(error)}') from error


def _leaves(key_path: KeyPath, value: Any) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves((*key_path, name), inner)
    else:
        yield key_path, value


def _sections_first(change: tuple[KeyPath, Any, Origin]) -> int:
    """Sort key: load=null removes the file's section before load.kind=poisson is applied, whatever their order is."""
    return len(change[0])


def _put(given: Given, key_path: KeyPath, value: Any, origin: Origin) -> None:
    node = given.tree
    for depth, part in enumerate(key_path[:-1], 1):
        child = node.get(part)
        if child is None:
            child = node[part] = {}
            given.origins.setdefault(key_path[:depth], origin)
        if not isinstance(child, dict):
            raise ConfigError(f"{origin.where}: {part} is a value, not a section")
        node = child
    if not isinstance(node.get(key_path[-1]), dict) and len(key_path) > 1:
        node[key_path[-1]], given.origins[key_path] = value, origin
    elif value is None:
        node.pop(key_path[-1], None)
        gone = replace(origin, taken_back=True)
        given.origins |= {at: gone for at in given.origins if at[: len(key_path)] == key_path}
    elif value != {}:
        node[key_path[-1]], given.origins[key_path] = value, origin


def _said(error: yaml.YAMLError) -> str:
    """The problem and its position, in one line."""
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return f"{getattr(error, 'problem', None) or ' '.join(str(error).split())}{where}"


def _short(text: str) -> str:
    """The text for a sentence of one line: shortened, without control sequences of a terminal."""
    shown = "".join(c if c.isprintable() else "?" for c in text[:SHOWN])
    return shown if len(text) <= SHOWN else f"{shown}…"
