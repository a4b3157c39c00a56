"""Earlier samples mixed into those of a new task, so that what was learnt before is not forgotten. Free of torch.

Sources: experience replay (Rolnick et al., "Experience Replay for Continual Learning", 2019).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from clif.types import TrainSample


def with_replay(
    new: Sequence[TrainSample], earlier: Sequence[TrainSample], share: float, seed: int
) -> list[TrainSample]:
    """All new samples, and behind them as many earlier ones as make up `share` of the result, or all that there are.

    share: at least 0, less than 1. Which earlier ones depends on the seed; none comes twice.
    """
    wanted = round(len(new) * share / (1 - share))
    return [*new, *random.Random(f"{seed}/replay").sample(earlier, min(wanted, len(earlier)))]
