"""The benchmark of host time measures the engine as it is: it breaks here and not when somebody needs it."""

from __future__ import annotations

import host_time
import pytest


@pytest.mark.parametrize("case", host_time.CASES)
def test_every_part_of_a_step_is_measured_in_every_case(case):
    found = host_time.measure(4, 6, host_time.CASES[case])
    assert set(found) == {"step", *host_time.PARTS} and all(len(values) == 6 for values in found.values())
    for parts in zip(*(found[part] for part in host_time.PARTS), strict=True):
        assert min(parts) > 0
