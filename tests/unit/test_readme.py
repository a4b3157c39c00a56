"""What README and docs/promises.md say of the promises and their tests is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
README, PROMISES = (REPO / "README.md").read_text(), (REPO / "docs" / "promises.md").read_text()
ROWS = re.findall(r"^\| (\d+)\. (.*?) \| (.*) \|$", PROMISES, re.MULTILINE)
PROVED = {int(number): re.findall(r"`(tests/[^`]+)`", files) for number, _, files in ROWS}
MAX_LINES = 170


def test_readme_is_read_to_its_end():
    assert len(README.splitlines()) <= MAX_LINES


def test_readme_names_the_promises_that_are_proved():
    section = README[README.index("## Promises") :]
    listed = re.findall(r"^(\d+)\. (.*)\.$", section[: section.index("\n## ", 1)], re.MULTILINE)
    assert listed == [(number, text) for number, text, _ in ROWS]


def test_every_promise_names_its_tests():
    assert list(PROVED) == list(range(1, len(PROVED) + 1)) and len(PROVED) >= 8
    assert all(PROVED.values())


@pytest.mark.parametrize(("number", "file"), [(n, f) for n, files in PROVED.items() for f in files])
def test_a_test_that_proves_a_promise_quotes_it(number, file):
    quoted = re.findall(r"[Pp]romises?[ _](\d+)(?:(?:, | and )(\d+))*", (REPO / file).read_text())
    assert str(number) in {n for found in quoted for n in found}, f"{file} proves promise {number}: say so in it"


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(p.name for p in (REPO / "docs").glob("*.md"))]
)
def test_links_between_pages_lead_somewhere(page):
    path = REPO / page if (REPO / page).exists() else REPO / "docs" / page
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), f"{page} links to {target}, which is not there"
