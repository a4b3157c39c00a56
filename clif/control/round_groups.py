"""Which process group the members of a round use: one that they have, or a new one."""

from __future__ import annotations

from clif.types import GROUPS_KEPT, Members


class GroupNumbers:
    """The number of each member set's group. Ranks create a group when its number is new to them.

    Only the control process knows whether a group is clean: a member sees the end of its own all-reduce, but not of the
    others'. So the control process chooses the group and sends its number with each round.
    """

    def __init__(self, replicas: int) -> None:
        """The group of all replicas exists from the start, as number 0."""
        self._numbers: dict[Members, int] = {(tuple(range(replicas)), (0,) * replicas): 0}

    def of(self, members: Members, round_id: int) -> int:
        """The number of these members' group; round_id if they have none.

        Groups of more than GROUPS_KEPT member sets ago are forgotten: the ranks may have closed them.
        """
        number = self._numbers.pop(members, round_id)
        self._numbers[members] = number
        while len(self._numbers) > GROUPS_KEPT:
            del self._numbers[next(iter(self._numbers))]
        return number

    def spoil(self, members: Members) -> None:
        """An operation may be pending in their group: the members get a new one."""
        self._numbers.pop(members, None)
