"""The pages of docs/templates say what the code says."""

from __future__ import annotations

import re

import make_docs
import pytest
from config_fields import fields

from clif.metrics.schema import TABLES


@pytest.mark.parametrize("name", make_docs.PAGES)
def test_a_page_is_what_its_template_and_the_code_make(name):
    assert (make_docs.DOCS / name).read_text() == make_docs.page(name), "run make docs"


def test_the_configuration_page_has_a_row_for_every_field_with_its_default_and_a_meaning():
    page, listed = make_docs.page("configuration.md"), 0
    for field, known in fields().items():
        section, _, name = field.rpartition(".")
        table = page.partition(f"# {section}\n")[2].partition("\n## ")[0]
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")][:1]
        _, default, unit, meaning = row.strip("| ").split(" | ", 3)
        assert default == ("required" if known.is_required() else f"`{make_docs.shown(known.default)}`")
        assert unit and meaning.endswith(".")
        listed += 1
    assert listed == len(fields())


def test_the_metrics_page_has_a_row_for_every_column():
    page = make_docs.page("metrics.md")
    for table in TABLES.values():
        rows = page.partition(f"### {table.name}\n")[2].partition("\n#")[0]
        assert [line.split("`")[1] for line in rows.splitlines() if line.startswith("| `")] == [
            column.name for column in table.columns
        ]


def test_a_field_without_a_meaning_below_it_is_no_page(monkeypatch):
    monkeypatch.setattr(make_docs, "meanings_of", lambda kind: {})
    with pytest.raises(KeyError, match="name"):
        make_docs.page("configuration.md")


@pytest.mark.parametrize(
    "page", sorted([*make_docs.DOCS.glob("*.md"), make_docs.DOCS.parent / "README.md"]), ids=lambda page: page.name
)
def test_python_in_the_documents_can_be_compiled(page):
    for code in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        compile(code, page.name, "exec")
