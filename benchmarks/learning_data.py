"""The rows of benchmarks/learning.py: which of a data set are trained on and held out, and how replicas share them."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clif.data.instruct import Row, encode_sample, read_rows
from clif.tokenizer import ChatTokenizer
from clif.types import TrainSample

DATA_SETS = ("snips_json", "nl2bash", "banking77", "homeassistant_toolcalls")
"""Tasks whose answers are short and exact."""


@dataclass(frozen=True)
class Example:
    """A row, its sample, and the client that it counts to."""

    row: Row
    sample: TrainSample
    client: str


@dataclass(frozen=True)
class Task:
    """Examples of a data set: trained on; held out to judge rounds, and to report, which nothing else reads."""

    name: str
    train: list[Example]
    gate: list[Example]
    report: list[Example]


@dataclass(frozen=True)
class Sizes:
    """Rows of each part, and tokens of a row at most."""

    train: int = 256
    gate: int = 48
    report: int = 96
    tokens: int = 128


def read_task(folder: Path, name: str, tokenizer: ChatTokenizer, sizes: Sizes, seed: int) -> Task | None:
    """None where there is no such file. Which rows are drawn depends on the seed; longer ones are left out."""
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        return None
    fields = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    both = list(zip(read_rows(path), fields, strict=True))
    rng = random.Random(f"{name}/{seed}")
    train = _drawn([pair for pair in both if pair[0].split == "train"], sizes.train, tokenizer, sizes, rng)
    held = _drawn([pair for pair in both if pair[0].split == "test"], sizes.gate + sizes.report, tokenizer, sizes, rng)
    return Task(name, train, held[: sizes.gate], held[sizes.gate :])


def _drawn(
    rows: Sequence[tuple[Row, dict[str, object]]],
    count: int,
    tokenizer: ChatTokenizer,
    sizes: Sizes,
    rng: random.Random,
) -> list[Example]:
    found: list[Example] = []
    for row, fields in rng.sample(rows, len(rows)):
        if len(found) == count:
            break
        sample = encode_sample(row, tokenizer, 1 << 20)
        if len(sample.ids) <= sizes.tokens:
            found.append(Example(row, sample, client_of(fields)))
    return found


def client_of(fields: dict[str, object]) -> str:
    """The field client; without it the domain, and where all rows have the same one (banking), the answer."""
    if "client" in fields:
        return str(fields["client"])
    domain = str(fields.get("domain", ""))
    return str(fields["output"]) if domain in ("", "banking", "homeassistant") else domain


def shares(examples: Sequence[Example], replicas: int, how: str) -> list[list[Example]]:
    """The rows of each replica. how: iid, in turn, or client, all rows of a client together.

    By client, the largest ones first, each goes to the replica with the fewest rows so far.
    """
    if how == "iid":
        return [list(examples[i::replicas]) for i in range(replicas)]
    by_client: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_client[example.client].append(example)
    parts: list[list[Example]] = [[] for _ in range(replicas)]
    for name in sorted(by_client, key=lambda name: (-len(by_client[name]), name)):
        min(parts, key=len).extend(by_client[name])
    return parts
