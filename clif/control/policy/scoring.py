"""When scores that do not come are given up. Pure."""

from __future__ import annotations

from clif.config import Config

SCORING_S = 120.0
"""Beyond the time that the tests of all rows may take."""


def give_up_scoring(now: float, began_s: float, config: Config) -> tuple[bool, str]:
    """Whether the scores of a measurement that was begun at began_s are overdue."""
    quality = config.quality
    tests = quality.exact_match_rows * quality.test_timeout_s if quality.test_command else 0.0
    limit = SCORING_S + tests
    return now - began_s > limit, f"not scored within {limit:g} s"
