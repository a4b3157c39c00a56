"""Slurm's short forms of lists: hosts as node[01-03,7], tasks per node as 2(x3),1. Free of torch."""

from __future__ import annotations

import re

from clif.errors import InputError

_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_FIRST = re.compile(r"[^-,\]]+")


class SlurmError(InputError):
    """A list that Slurm does not write; the message says which variable to look at."""


def tasks_per_node(text: str) -> tuple[int, ...]:
    """Tasks of each node, in the order of SLURM_NODEID: "2(x3),1" is 2, 2, 2, 1. Raises SlurmError."""
    counts: list[int] = []
    for part in text.split(","):
        match = _COUNT.fullmatch(part.strip())
        if match is None:
            raise SlurmError(f"SLURM_TASKS_PER_NODE={text!r} is not like 2(x3),1: correct or unset it")
        counts += [int(match[1])] * int(match[2] or 1)
    return tuple(counts)


def first_host(nodelist: str) -> str:
    """The first host of a node list, where rank 0 runs: "rack[2-3]n[01-03,7],login" is rack2n01. Raises SlurmError."""
    host, rest = "", nodelist.strip()
    while rest and rest[0] != ",":
        if rest[0] != "[":
            plain = re.split(r"[\[,]", rest, maxsplit=1)[0]
            host, rest = host + plain, rest[len(plain) :]
            continue
        first, end = _FIRST.match(rest, 1), rest.find("]")
        if first is None or end < 0:
            raise SlurmError(
                f"SLURM_JOB_NODELIST={nodelist!r} is not like node[01-03,7]: correct it or pass MASTER_ADDR"
            )
        host, rest = host + first[0], rest[end + 1 :]
    if not host:
        raise SlurmError(f"SLURM_JOB_NODELIST={nodelist!r} names no host: correct it or pass MASTER_ADDR")
    return host
