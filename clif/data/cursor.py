"""The order of training samples: reshuffled in each epoch, and resumable from a checkpoint.

A step claims its samples. They are committed with the round of the step, deferred if the round is discarded, and
released if the step is cut. Every epoch commits each of the n samples once, whatever is rolled back or interrupted.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from clif.errors import InputError
from clif.types import TrainSample


class Fingerprint:
    """A digest that is equal for equal samples in the same order, of samples that come in pieces."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, samples: Iterable[TrainSample]) -> None:
        for sample in samples:
            self._digest.update(msgspec.msgpack.encode(sample))

    def __str__(self) -> str:
        return self._digest.hexdigest()[:16]


def fingerprint(samples: Iterable[TrainSample]) -> str:
    """The same of all samples at once."""
    found = Fingerprint()
    found.add(samples)
    return str(found)


class SampleCursor:
    """Hands out the positions 0..n-1 of n samples, epoch after epoch, in an order fixed by the seed.

    committed: samples committed so far, over all epochs. data: fingerprint() of the samples.
    """

    def __init__(self, n: int, seed: int, data: str = "") -> None:
        """Raises ValueError if there is no sample to hand out."""
        if n < 1:
            raise ValueError("there is no training sample: give this replica at least one usable row")
        self.n, self.seed, self.data, self.epoch, self.committed = n, seed, data, 0, 0
        self._next = 0
        self._order = self._shuffled()
        self._released: deque[int] = deque()
        self._deferred: deque[int] = deque()
        self._deferrals = 0
        # A list, not a set: a claim that crosses an epoch may hold the same sample twice.
        self._claimed: list[int] = []

    @property
    def claimed(self) -> tuple[int, ...]:
        """Samples that are claimed and neither committed nor released yet."""
        return tuple(self._claimed)

    def claim(self, k: int) -> list[int]:
        """The next k samples: released ones first, deferred ones last of an epoch. Raises ValueError if k < 0."""
        if k < 0:
            raise ValueError(f"cannot claim {k} samples: ask for 0 or more")
        ids = [self._released.popleft() if self._released else self._advance() for _ in range(k)]
        self._claimed += ids
        return ids

    def commit(self, ids: Iterable[int]) -> None:
        """The optimizer step that used ids is done. Raises ValueError, and changes nothing, if one is not claimed."""
        self.committed += len(self._settle(ids))

    def release(self, ids: Iterable[int]) -> None:
        """The step that used ids was rolled back: they are claimed again first. Raises ValueError like commit."""
        self._released.extendleft(reversed(self._settle(ids)))

    def defer(self, ids: Iterable[int]) -> None:
        """The steps that used ids were in vain: the samples return late in this epoch, in another order.

        In the same order they would give the same result. Raises ValueError like commit.
        """
        again = self._settle(ids)
        self._deferrals += 1
        random.Random(f"{self.seed}/{self.epoch}/deferred {self._deferrals}").shuffle(again)
        self._deferred.extend(again)

    def state(self, commit: bool = False) -> dict[str, Any]:
        """The state as JSON values. Claimed samples count as released: a resumed run has no step in flight.

        commit: they count as committed instead, for a run that resumes after the round that holds the claims.
        """
        return {
            "n": self.n,
            "seed": self.seed,
            "data": self.data,
            "epoch": self.epoch,
            "next": self._next,
            "committed": self.committed + (len(self._claimed) if commit else 0),
            "released": [*self._released] if commit else [*self._claimed, *self._released],
            "deferred": [*self._deferred],
            "deferrals": self._deferrals,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from state(). Raises InputError, and changes nothing, if it is of other samples or another order."""
        if state["n"] != self.n:
            raise InputError(
                f"the checkpoint was made with {state['n']} training samples but there are {self.n} now: "
                "resume with the same data and replicas, or start a new run"
            )
        if state["seed"] != self.seed:
            raise InputError(
                f"the order of the samples in this folder was drawn with run.seed={state['seed']}, not {self.seed}: "
                f"resume with run.seed={state['seed']}, or start a new run"
            )
        if state["data"] != self.data:
            raise InputError(
                "the training samples are not those of the checkpoint, though as many: resume with the same data.path, "
                "rows, model and lengths, or start a new run"
            )
        self.epoch, self.committed, self._next = state["epoch"], state["committed"], state["next"]
        self._order = self._shuffled()
        self._released, self._claimed = deque(state["released"]), []
        # Checkpoints of an older CLIF lack them.
        self._deferred, self._deferrals = deque(state.get("deferred", ())), state.get("deferrals", 0)

    def _advance(self) -> int:
        if self._next == self.n and self._deferred:
            return self._deferred.popleft()
        if self._next == self.n:
            self.epoch, self._next = self.epoch + 1, 0
            self._order = self._shuffled()
        self._next += 1
        return self._order[self._next - 1]

    def _shuffled(self) -> list[int]:
        """The order of this epoch depends on seed and epoch alone, so a checkpoint needs no generator state."""
        order = list(range(self.n))
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return order

    def _settle(self, ids: Iterable[int]) -> list[int]:
        """Take ids out of the claims."""
        given = list(ids)
        unclaimed = Counter(given) - Counter(self._claimed)
        if unclaimed:
            raise ValueError(f"samples {sorted(unclaimed)} are not claimed: commit or release a claim once")
        for i in given:
            self._claimed.remove(i)
        return given
