"""YAML without surprises: no key twice (PyYAML would drop the first one in silence), and overrides that merge."""

from __future__ import annotations

from typing import Any

import yaml

from clif.errors import ConfigError


def strict_yaml(text: str) -> Any:
    """Plain values of a document. Raises yaml.YAMLError."""
    return yaml.load(text, _UniqueKeys)


class _UniqueKeys(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in a tree of plain values; the value is YAML. Raises ConfigError."""
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f'"{override}" is not an override: write section.key=value')
    node = tree
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(f'"{override}": {part} is a value, not a section')
        node = child
    try:
        given = strict_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f'"{override}": the value is not valid YAML') from error
    _merge(node, parts[-1], given)


def _merge(node: dict[str, Any], key: str, given: Any) -> None:
    """Put a value in its place; of a section, only the fields that are given, so that no other is dropped."""
    if isinstance(given, dict) and isinstance(node.get(key), dict):
        for name, value in given.items():
            _merge(node[key], name, value)
    else:
        node[key] = given
