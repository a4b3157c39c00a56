"""An old name of the configuration is refused with the new one."""

from __future__ import annotations

import pytest
from config_fields import fields

from clif.config import ConfigError, config_from_tree, load_config
from clif.config.renamed import KEYS, VALUES


def tree(key, value):
    *sections, name = key.split(".")
    inner = {name: value}
    for section in reversed(sections):
        inner = {section: inner}
    return {"model": {"path": "m"}, "train": {"enabled": False}, **inner}


def refusal(key, value):
    with pytest.raises(ConfigError) as raised:
        config_from_tree(tree(key, value))
    return str(raised.value).splitlines()


def test_every_old_key_is_refused_with_the_new_one():
    for old, new in KEYS.items():
        assert f"{old} is named {new} now: write that" in refusal(old, 1)
        assert new in fields() and old not in fields(), f"{old} -> {new}"


def test_every_old_value_is_refused_with_the_new_one():
    for (key, old), new in VALUES.items():
        assert f"{key} {old} is named {new} now: write that" in refusal(key, old)
        config_from_tree(tree(key, new))


def test_a_key_that_moved_to_another_section_is_refused_with_where_it_is(monkeypatch):
    monkeypatch.setitem(KEYS, "engine.answers", "metrics.answers")
    assert refusal("engine.answers", "all") == ["engine.answers is named metrics.answers now: write that"]


def test_an_override_with_an_old_value_is_refused_with_the_new_one(monkeypatch, tmp_path):
    monkeypatch.setitem(VALUES, ("metrics.answers", "every"), "all")
    (tmp_path / "c.yaml").write_text("model: {path: m}\n")
    with pytest.raises(ConfigError, match=r"metrics\.answers every is named all now: write that \(override"):
        load_config(tmp_path / "c.yaml", ("metrics.answers=every",))
