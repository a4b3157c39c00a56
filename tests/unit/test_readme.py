"""What README says of the tests is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| (\d+)\. .*? \| (.*) \|$", re.MULTILINE)
PROVED = {
    int(number): re.findall(r"`(tests/[^`]+)`", files)
    for number, files in ROW.findall((REPO / "README.md").read_text())
}


def test_every_promise_names_its_tests():
    assert list(PROVED) == list(range(1, len(PROVED) + 1)) and len(PROVED) >= 8
    assert all(PROVED.values())


@pytest.mark.parametrize(("number", "file"), [(n, f) for n, files in PROVED.items() for f in files])
def test_a_test_that_proves_a_promise_quotes_it(number, file):
    quoted = re.findall(r"[Pp]romises?[ _](\d+)(?:(?:, | and )(\d+))*", (REPO / file).read_text())
    assert str(number) in {n for found in quoted for n in found}, f"{file} proves promise {number}: say so in it"
