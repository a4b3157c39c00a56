"""The only caller of collectives. Each names its group; none uses the default group.

Rule: all ranks of the group call the same function in the same order, from the same thread.
"""

from __future__ import annotations

import datetime
import threading
import time
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.distributed as dist


class _Backend(Protocol):
    def allreduce(self, tensors: list[torch.Tensor]) -> dist.Work: ...

    def broadcast(self, tensor: torch.Tensor, root: int) -> dist.Work: ...

    def alltoall_base(
        self, output: torch.Tensor, input: torch.Tensor, output_split_sizes: list[int], input_split_sizes: list[int]
    ) -> dist.Work: ...

    def abort(self) -> None: ...


class Group:
    """A process group of torch's C++ backends: Gloo's and NCCL's take the same calls.

    Invariant: it holds the only reference to the backend, so that closing it frees its descriptors and threads.
    """

    def __init__(self, backend: _Backend) -> None:
        self._held = [backend]

    @property
    def on_gloo(self) -> bool:
        return isinstance(self._backend, dist.ProcessGroupGloo)

    def allreduce(self, tensors: list[torch.Tensor]) -> dist.Work:
        return self._backend.allreduce(tensors)

    def broadcast(self, tensor: torch.Tensor, root: int) -> dist.Work:
        return self._backend.broadcast(tensor, root)

    def alltoall_base(
        self, output: torch.Tensor, input: torch.Tensor, output_split_sizes: list[int], input_split_sizes: list[int]
    ) -> dist.Work:
        return self._backend.alltoall_base(output, input, output_split_sizes, input_split_sizes)

    def close(self) -> None:
        """Abandon pending collectives and free the group, which cannot be used again.

        This happens in a thread of its own: gloo has no abort and frees nothing until pending collectives have ended.
        They end once the other ranks close the group or are gone, and after the group's timeout at the latest.
        """
        held, self._held = self._held, []
        threading.Thread(target=_free, args=(held,), name="clif/close-group", daemon=True).start()

    @property
    def _backend(self) -> _Backend:
        if not self._held:
            raise RuntimeError("the process group is closed")
        return self._held[0]


def _free(held: list[_Backend]) -> None:
    """Drop the last reference; a list passes it, so that no frame of the caller holds another one."""
    if held and not isinstance(held[0], dist.ProcessGroupGloo):
        # A kernel that waits for another rank would never end.
        held[0].abort()
    held.clear()


def make_group(backend: str, store: dist.Store, name: str, rank: int, size: int, timeout: datetime.timedelta) -> Group:
    """A group of `size` ranks that meet in the store under `name`; this one is number `rank` of them.

    dist.new_group cannot be used: it derives the name from the number of groups that a process has made before. That
    number differs between replicas that took part in different rounds, and ranks with different names wait forever.
    """
    prefixed = dist.PrefixStore(name, store)
    if backend == "gloo":
        return Group(cast(_Backend, dist.ProcessGroupGloo(prefixed, rank, size, timeout)))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return Group(cast(_Backend, dist.ProcessGroupNCCL(prefixed, rank, size, options)))


class PeersLost(RuntimeError):
    """A collective failed because ranks of its group did not answer: usually their processes are gone."""


@dataclass(frozen=True)
class GroupMembers:
    """The members of a group, so that an error can name those that did not answer.

    name: of the group; rank: this one; ranks: all members, global numbers.
    """

    store: dist.Store
    name: str
    rank: int
    ranks: tuple[int, ...]

    @property
    def index(self) -> int:
        """This rank's number within the group."""
        return self.ranks.index(self.rank)

    def failed(self, error: RuntimeError) -> RuntimeError:
        """A collective's error, with the name of the group and the members that did not report one."""
        self.store.set(f"clif/failed/{self.name}/{self.rank}", "")
        time.sleep(FAILURE_SPREAD_S)
        missing = [r for r in self.ranks if not self.store.check([f"clif/failed/{self.name}/{r}"])]
        who = f"no answer from ranks {missing}" if missing else "every rank saw an error"
        kind = PeersLost if missing else RuntimeError
        return kind(f"{self.name} (ranks {list(self.ranks)}): {who}: {str(error).splitlines()[0]}")

    def leave(self, why: str) -> None:
        """Announce to the other members that this one takes part in no further collective."""
        self.store.set(f"clif/left/{self.name}/{self.rank}", why)

    def left(self) -> RuntimeError | None:
        """The error to raise after a member has left; None while all are present."""
        for rank in self.ranks:
            key = f"clif/left/{self.name}/{rank}"
            if self.store.check([key]):
                return RuntimeError(f"{self.name}: rank {rank} failed: {self.store.get(key).decode()}")
        return None


FAILURE_SPREAD_S = 1.0
"""Seconds: members that wait for the same collective reach its timeout within this time of each other."""
POLL_PERIOD = datetime.timedelta(seconds=0.25)
"""How long a rank waits in a collective before it checks whether a member has left."""
FRAME, SIZE = 8192, 8
"""Bytes of a control message that one broadcast carries, and of the size at its beginning."""


class RoundBroken(RuntimeError):
    """The collective of a round failed; all ranks of the replica raise it in the same step."""


class PendingCollective:
    """An asynchronous collective of a round: the caller does other work and polls done().

    members: of the group; error: the error that the collective ended with, None before and after success.
    """

    def __init__(self, work: dist.Work, members: GroupMembers | None) -> None:
        self.error: RuntimeError | None = None
        self._work: dist.Work | None = work
        self._members = members

    def done(self) -> bool:
        """True once the collective has ended; `error` says whether it failed."""
        if self._work is None:
            return True
        if not self._work.is_completed():
            return False
        try:
            self._work.wait()
        except RuntimeError as error:
            self.error = error if self._members is None else self._members.failed(error)
        self._work = None
        return True


class Exchange(PendingCollective):
    """An all-to-all: each rank of a group receives its part of every rank's vector.

    Each rank sends and receives as much as one vector.
    """

    def __init__(
        self, parts: list[torch.Tensor], index: int, group: Group, members: GroupMembers | None = None
    ) -> None:
        """parts: of this rank's vector, for each rank of the group in its order; index: of this one in the group.

        Part i is as large on all ranks.
        """
        sizes = [part.numel() for part in parts]
        # Kept until the end: a backend may not hold a reference to the tensor that it sends.
        self._sent, self._device = torch.cat(parts), parts[0].device
        if group.on_gloo:
            # gloo supports only all-reduce and broadcast for tensors of a GPU.
            self._sent = self._sent.cpu()
        self._parts = self._sent.new_empty(len(sizes), sizes[index])
        work = group.alltoall_base(self._parts.view(-1), self._sent, [sizes[index]] * len(sizes), sizes)
        super().__init__(work, members)

    def result(self) -> torch.Tensor:
        """This rank's parts of all vectors [ranks, size], in the group's order. Raises the exchange's error."""
        if self.error is not None:
            raise self.error
        return self._parts.to(self._device)


class WeightedMean(PendingCollective):
    """A weighted average of vectors over a group.

    The sum of the weights travels as one more element of the vector, so the divisor is the weight that was really sent.
    A rank whose vector must not count sends zeros with weight 0: multiplying by 0 is not enough (0 x NaN is NaN).

    Sources: McMahan et al. 2017 (FedAvg); Bonawitz et al. 2019 (rounds that survive the loss of members).
    """

    def __init__(
        self,
        vector: torch.Tensor,
        weight: float,
        group: Group,
        members: GroupMembers | None = None,
        buffer: torch.Tensor | None = None,
    ) -> None:
        """buffer [n + 1], float32: scratch, reused for the result. Allocating it costs as much as the reduction."""
        self._buffer = vector.new_empty(vector.numel() + 1, dtype=torch.float32) if buffer is None else buffer
        if weight > 0:
            torch.mul(vector, weight, out=self._buffer[:-1])
            self._buffer[-1] = weight
        else:
            self._buffer.zero_()
        super().__init__(group.allreduce([self._buffer]), members)

    def result(self) -> tuple[torch.Tensor, float]:
        """(mean [n], sum of weights); call it once. The mean is undefined if the sum is 0. Raises the sum's error."""
        if self.error is not None:
            raise self.error
        total = float(self._buffer[-1])
        return self._buffer[:-1].div_(max(total, torch.finfo(torch.float32).tiny)), total


class TpGroup:
    """The tensor-parallel group: the ranks of one replica, which share one model; the first of them is the leader.

    rank, size: this rank's index and their number. Without a group there is one rank, and every call returns its
    argument. Rule: all ranks make the same calls in the same order, from the thread that serves.

    What the layers compute goes over the group of the devices. What the host must know goes over a group on the CPU:
    over NCCL it would come only after all work that the device has queued.

    Sources: Shoeybi et al. 2019 (Megatron-LM).
    """

    def __init__(
        self, group: Group | None = None, members: GroupMembers | None = None, control: Group | None = None
    ) -> None:
        """members: the same ranks, the leader first. control: a group of theirs on the CPU, by default `group`.

        Raises RuntimeError, here and later, if a rank is missing.
        """
        self._group, self._control, self._members = group, control or group, members
        self.size = 1 if members is None else len(members.ranks)
        self.rank = 0 if members is None else members.index

    def leave(self, why: str) -> None:
        """Announce that this rank has failed, so that no other rank waits for it until a timeout."""
        if self._members is not None:
            self._members.leave(why)

    def rebuild_group(self, group: Group, members: GroupMembers, control: Group) -> None:
        """Replace the groups by new ones of the same ranks after one has left; pending collectives are abandoned."""
        for former in (self._group, self._control):
            if former is not None:
                former.close()
        self._group, self._control, self._members = group, control, members

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place; bitwise equal on all."""
        if self._group is not None:
            self._wait(self._group.allreduce([tensor]), self._group)
        return tensor

    def all_gather_columns(self, part: torch.Tensor, start: int, total: int) -> torch.Tensor:
        """[rows, total], assembled from the columns of each rank; `part` is this rank's, from `start` on. Equal on all.

        It is a sum with zeros, which changes no number: parts may differ in width, and every backend supports it.
        """
        if self.size == 1:
            return part
        whole = part.new_zeros(part.shape[0], total)
        whole[:, start : start + part.shape[1]] = part
        return self.all_reduce_(whole)

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The leader's tensor in place of this rank's, which has the same shape and type."""
        if self._group is not None:
            self._wait(self._group.broadcast(tensor, 0), self._group)
        return tensor

    def broadcast_ints(self, values: list[int]) -> list[int]:
        """The leader's values, on every rank, over the control group; all ranks pass lists of the same length."""
        if self._control is None or not values:
            return values
        shared = torch.tensor(values, dtype=torch.int64)
        self._wait(self._control.broadcast(shared, 0), self._control)
        return [int(v) for v in shared.tolist()]

    def broadcast_bytes(self, message: bytes | None) -> bytes:
        """The leader's message, on every rank, over the control group. message: the leader's; None on the others.

        One broadcast of FRAME bytes, which hold the size and as much of the message as fits; a second one has the rest
        of a longer message.
        """
        if self._control is None:
            return message or b""
        data = torch.zeros(FRAME, dtype=torch.uint8)
        if message is not None:
            first = len(message).to_bytes(SIZE, "little") + message[: FRAME - SIZE]
            data[: len(first)] = torch.frombuffer(bytearray(first), dtype=torch.uint8)
        self._wait(self._control.broadcast(data, 0), self._control)
        frame = data.numpy().tobytes()
        size = int.from_bytes(frame[:SIZE], "little")
        return frame[SIZE : SIZE + size] + self._broadcast_rest(message, size - (FRAME - SIZE))

    def _broadcast_rest(self, message: bytes | None, size: int) -> bytes:
        if size <= 0 or self._control is None:
            return b""
        data = torch.empty(size, dtype=torch.uint8)
        if message is not None:
            data.copy_(torch.frombuffer(bytearray(message[FRAME - SIZE :]), dtype=torch.uint8))
        self._wait(self._control.broadcast(data, 0), self._control)
        return data.numpy().tobytes()

    def all_true(self, flag: bool) -> bool:
        """Whether the flag is set on all ranks; over the control group."""
        if self._control is None:
            return flag
        missing = torch.tensor([int(not flag)], dtype=torch.int64)
        self._wait(self._control.allreduce([missing]), self._control)
        return int(missing) == 0

    def least(self, value: int) -> int:
        """The smallest of the ranks' values; over the control group."""
        if self._control is None:
            return value
        values = torch.zeros(self.size, dtype=torch.int64)
        values[self.rank] = value
        self._wait(self._control.allreduce([values]), self._control)
        return int(values.min())

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, in their order; all have the same shape."""
        if self._group is None:
            return [tensor]
        parts = [tensor.clone() for _ in range(self.size)]
        # Broadcasts, because gloo cannot gather tensors of a GPU.
        for rank, part in enumerate(parts):
            self._wait(self._group.broadcast(part, rank), self._group)
        return parts

    def _wait(self, work: dist.Work, group: Group) -> None:
        """Wait until the work is done (gloo) or queued (NCCL, whose work the stream waits for)."""
        while group.on_gloo and not _over(work):
            left = self._members.left() if self._members is not None else None
            if left is not None:
                raise left
        try:
            work.wait()
        except RuntimeError as error:
            raise error if self._members is None else self._members.failed(error) from error


def _over(work: dist.Work) -> bool:
    """Whether a collective has ended, with success or not, after waiting for it for POLL_PERIOD."""
    try:
        work.wait(POLL_PERIOD)
    except RuntimeError:
        # wait(timeout) raises on expiry too; the next wait() distinguishes the two.
        return work.is_completed()
    return True
