"""Which process group the members of a round use: one that they have, or a new one."""

from __future__ import annotations

from clif.types import GROUPS_KEPT, Members


class GroupNumbers:
    """The number of each member set's group. The ranks make a group when they see its number for the first time.

    Only the control process can tell whether a group is clean: a member knows that its own all-reduce has ended, and
    not whether the others' have. So it decides, and tells the number with each round.
    """

    def __init__(self, replicas: int) -> None:
        """The group of all replicas is made at the start, as number 0."""
        self._numbers: dict[Members, int] = {(tuple(range(replicas)), (0,) * replicas): 0}

    def of(self, members: Members, round_id: int) -> int:
        """The number of these members' group; round_id if they have none.

        Forgets what lies back further than GROUPS_KEPT member sets: the ranks may have closed it.
        """
        number = self._numbers.pop(members, round_id)
        self._numbers[members] = number
        while len(self._numbers) > GROUPS_KEPT:
            del self._numbers[next(iter(self._numbers))]
        return number

    def spoil(self, members: Members) -> None:
        """Something may be pending in their group: they get a new one."""
        self._numbers.pop(members, None)
