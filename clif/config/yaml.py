"""YAML without surprises: the core schema of YAML 1.2, without the features that no configuration needs.

It reads mappings with names as keys, lists, and plain values: null, true, false, numbers, text. So `off`, `no`,
`2026-11-27` and `12:30` are text, as they look. It refuses, with the position, a key that is given twice (PyYAML drops
the first one silently), tags, anchors, deep nesting, numbers of hundreds of digits, and control characters in text.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

KeyPath = tuple[str, ...]
"""Names from the top of a document to a value."""
MAX_DEPTH = 20
MAX_NUMBER = 40
"""Characters of a number."""
NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    ),
}
WORDS = {
    "tag:yaml.org,2002:null": re.compile(r"~|null|Null|NULL|"),
    "tag:yaml.org,2002:bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
}


@dataclass(frozen=True)
class Document:
    """The parsed text. lines: the line, from 1, on which each mapping's value begins."""

    value: Any
    lines: dict[KeyPath, int]


def read_yaml(text: str) -> Document:
    """Parse a text. Raises yaml.YAMLError, whose text names the position and says what to change."""
    try:
        node = yaml.compose(text, _Core)
    except ValueError as error:
        # PyYAML's scanner accepts an escape beyond Unicode and a version of thousands of digits, and fails later.
        raise yaml.YAMLError(f"a character or number out of range ({error})") from error
    lines: dict[KeyPath, int] = {}
    return Document(None if node is None else _value(node, (), lines), lines)


class _Core(yaml.SafeLoader):
    """Composes nodes and resolves plain scalars by the core schema."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _refusal("anchors and aliases are not read: write the value out", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise _refusal("tags, as in !!int, are not read: leave them out", event.start_mark)
        if self._depth == MAX_DEPTH:
            raise _refusal(f"values are nested more than {MAX_DEPTH} deep: no field is", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


# These replace PyYAML's. The order matters: 12 must be an int, although it matches a float, too.
_Core.yaml_implicit_resolvers = {}
for _tag, _form in {**WORDS, **NUMBERS}.items():
    _Core.add_implicit_resolver(_tag, re.compile(f"(?:{_form.pattern})$"), None)


def _refusal(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, mark)


def _value(node: Node, key_path: KeyPath, lines: dict[KeyPath, int]) -> Any:
    if isinstance(node, MappingNode):
        return _mapping(node, key_path, lines)
    if isinstance(node, SequenceNode):
        return [_value(item, key_path, {}) for item in node.value]
    assert isinstance(node, ScalarNode)
    return _scalar(node)


def _mapping(node: MappingNode, key_path: KeyPath, lines: dict[KeyPath, int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in node.value:
        key = _scalar(name) if isinstance(name, ScalarNode) else None
        if not isinstance(key, str):
            raise _refusal("a key is no name: write section: and key: value, as in configs/", name.start_mark)
        if key in found:
            raise _refusal(f"{key} is given twice: remove one", name.start_mark)
        lines[*key_path, key] = name.start_mark.line + 1
        found[key] = _value(value, (*key_path, key), lines)
    return found


def _scalar(node: ScalarNode) -> Any:
    kind, text = node.tag.rpartition(":")[2], node.value
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind in ("int", "float"):
        if len(text) > MAX_NUMBER:
            raise _refusal(f"a number of {len(text)} characters: no field needs more than 20", node.start_mark)
        return _integer(text) if kind == "int" else float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise _refusal("text with a control character or half a character: remove it", node.start_mark)
    return text


def _integer(text: str) -> int:
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
