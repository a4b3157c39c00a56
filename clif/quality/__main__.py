"""The scoring process: python -P -m clif.quality. Work comes as JSON on standard input, an Outcome goes to output."""

from __future__ import annotations

import os
import sys

import msgspec

from clif.quality.process import Outcome
from clif.quality.score import score
from clif.quality.work import ScoringError, Work

NICENESS = 10
"""Serving comes first."""


def main() -> int:
    os.nice(NICENESS)
    work = msgspec.json.decode(sys.stdin.buffer.read(), type=Work)
    # A library may print: that must not get between.
    output, sys.stdout = sys.stdout.buffer, sys.stderr
    try:
        outcome = Outcome(scores=tuple(score(work)))
    except ScoringError as error:
        outcome = Outcome(error=str(error))
    output.write(msgspec.json.encode(outcome))
    output.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
