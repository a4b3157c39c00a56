"""Sections of the configuration about the run, its ranks and their connections. Free of torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from clif.config.base import NotNegative, NotNegativeFloat, PositiveFloat, Ranks, Section, Share

NAME = re.compile(r"\w[\w.=+@-]*")
MAX_NAME = 100
"""Bytes: a folder's name may have 255, and -2 and so on must fit behind it."""


class RunConfig(Section):
    name: str = "run"
    """Folder of the run under `out_dir`: a name of letters, digits and `. _ - = + @`, no path, at most 100 bytes. If it
    exists, `name-2`, `name-3` and so on are taken, and a line says so. A start in which nothing ran removes its
    folder."""
    out_dir: Path = Path("runs")
    """Where runs go."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds the load, the order of samples, the first A factors and random weights."""
    max_s: PositiveFloat | None = 3600.0
    """The run ends after this time, counted from the start of the control process; after a restart, the time before
    counts as well, the outage does not. What is still running then is cancelled, and quality is not measured again.
    `null`: never."""
    linger_s: NotNegativeFloat = 60.0
    """After the load: how long rounds may still train, whether under way or still wanted by `federation.rounds`; then
    what the last one has trained is averaged and judged. Where no load comes, the time for all rounds."""
    drain_s: NotNegativeFloat = 20.0
    """After SIGTERM or SIGINT: how long running requests, and a round that is being averaged, may still take. Keep it 5
    s under what the launcher allows before it kills: torchrun 30 s."""
    status: Literal["auto", "live", "plain", "off"] = "auto"
    """Progress on rank 0: `live` table, `plain` lines, `off`. `auto`: live on a terminal, off where the variable `CI`
    is set, otherwise plain."""
    rebuilds: NotNegative = 3
    """How often in ten minutes a replica is rebuilt in place after an error, on the weights that it has; then its rank
    ends. 0: at the first error."""
    resume: bool = False
    """Go on from the last promoted adapter and checkpoints in the folder `name`; with the load where it was, if that
    run was not through and the load is the same. `run.seed`, the training samples and the number of replicas must be
    those of the checkpoints. A restart by torchrun sets it."""
    mode: Literal["clif", "serve_only", "train_only", "time_slice", "split"] = "clif"
    """`clif`: training in the slack of serving. The others are baselines: no training; no load; serving and training
    take turns by whole optimizer steps; replicas that only serve beside replicas that only train."""
    training_share: Share = 0.5
    """[share] `time_slice`: share of a replica's time that training gets while there is both to do."""
    trainers: Ranks = 1
    """[replicas] `split`: how many replicas train, those with the highest numbers; the others serve."""

    @field_validator("name")
    @classmethod
    def _folder(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError(
                "name must be one folder's name of letters, digits and . _ - = + @, beginning with a letter or digit: "
                "where runs go is run.out_dir"
            )
        if len(name.encode()) > MAX_NAME:
            raise ValueError(f"name has {len(name.encode())} bytes: give at most {MAX_NAME}")
        return name

    @property
    def adaptive(self) -> bool:
        """Whether rounds and batch sizes follow slack and pressure; those of the baselines do not."""
        return self.mode == "clif"


class LayoutConfig(Section):
    replicas: Ranks | None = None
    """[replicas] `null`: all ranks divided by `tp_size`."""
    tp_size: Ranks = 1
    """[ranks] Ranks that hold one copy of the model together."""
    replica_gpus: tuple[tuple[Annotated[int, Field(ge=0, lt=65536)], ...], ...] | None = None
    """[ranks] Explicit form, one list of ranks per replica, e.g. `[[0, 1], [2, 3]]`; its first rank leads. The numbers
    are ranks, each named once; rank r computes on the GPU of its local rank."""
    across_hosts: bool = False
    """A replica's ranks may be on several hosts: every layer then waits for the network between them."""

    @model_validator(mode="after")
    def _size(self) -> LayoutConfig:
        if self.ranks(1) > 65536:
            raise ValueError(f"layout asks for {self.ranks(1)} ranks: lower layout.replicas or layout.tp_size")
        return self

    def ranks(self, replicas: int) -> int:
        """The number of ranks that this section needs if no launcher determines it.

        replicas: their number if the section does not set it.
        """
        if self.replica_gpus is not None:
            return sum(map(len, self.replica_gpus))
        return (self.replicas or replicas) * self.tp_size


class DistConfig(Section):
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """`nccl`, `gloo`, or `auto`: NCCL on GPUs, gloo on CPUs. The ranks of one replica tell each other what they decide
    over gloo in any case."""
    timeout_s: Annotated[float, Field(gt=0, le=1e6)] = 120.0
    """A collective, or the wait for the control process to start, that takes longer is an error."""
    ranks_per_gpu: Annotated[int, Field(gt=0, le=256)] = 1
    """[ranks] Ranks that share a GPU and its memory equally. More than one needs gloo: NCCL wants a GPU per rank."""
    threads_per_rank: Annotated[int, Field(gt=0, le=4096)] | None = None
    """[threads] CPU threads of a rank. `null`: the user's `OMP_NUM_THREADS` (a 1 that torchrun sets does not count),
    otherwise the physical cores that the ranks of the host may use, by binding and quota, divided by them; see
    [cpu.md](cpu.md#threads-and-replicas)."""
    control_host: str | None = None
    """[address] Where the control process listens. `null`: loopback on one host, otherwise the address of rank 0's host
    that others reach, see launching.md."""
    secret_file: Path | None = None
    """A file with at least 32 secret bytes, the same on every host and open to its user alone (mode 0600). Needed where
    hosts do not share the run's folder. `null`: rank 0 leaves the keys of the control port in `control.key` there. See
    "Who may speak" in launching.md."""
