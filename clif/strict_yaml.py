"""YAML without surprises: a key that is given twice is an error, where PyYAML would drop the first one in silence."""

from __future__ import annotations

from typing import Any

import yaml


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
