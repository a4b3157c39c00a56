"""Finds the fastest form and tiles of the dual LoRA layers on this GPU, and writes the table that CLIF reads.

    python benchmarks/tune_gpu.py                 # needs torch, Triton and this repository; at most 150 s
    python benchmarks/tune_gpu.py --again         # measures also what the table has
    python benchmarks/tune_gpu.py --dry           # interpreter, tiny shapes: a trial

For every shape (tune_plan.py) the candidates of all forms (clif/kernels/candidates.py) are compiled beforehand in
parallel (compile_ahead.py), then timed in heats against each other and against torch's products (halving.py). Before
that come the splits of the paged decode kernel (tune_decode.py). What the table has is right: results are checked
against the specification. Every shape is on disk before the next one begins, so that a second call continues where the
first one was ended.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

from checkout import commit, use_checkout

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
use_checkout()

import torch
import triton
import tune_decode
from compile_ahead import CompilePool, Launched, job_of
from halving import Heats
from tune_plan import Gpu, Task, Tiles, tasks
from tune_rig import Rig
from tune_session import Session, summary

from clif.kernels.dual_lora_reference import MergedLinear
from clif.kernels.testing.dual_lora_specification import random_layer
from clif.kernels.tile_file import Stamp, TileFile
from clif.kernels.tuning import Defaults, table_path

SOURCES = (
    "dual_lora_*kernel.py",
    "dual_lora_host.py",
    "dual_lora_forms.py",
    "side_stream.py",
    "numerics.py",
    "tiles.py",
)
"""Files of kernels/ that an entry was measured with: other ones make it old."""
DECODE_SOURCES = ("paged_decode_*.py", "numerics.py")


class Tuner:
    """The device that is measured."""

    def __init__(self, device: torch.device, defaults: Defaults, heats: Heats, weights_bytes: int) -> None:
        self.device, self.defaults, self.heats, self.bytes = device, defaults, heats, weights_bytes

    @classmethod
    def here(cls, dry: bool) -> Tuner:
        """For the first GPU of this machine, or for the interpreter."""
        if dry:
            return cls(torch.device("cpu"), Defaults(4, 80), Heats(1, 1, least=1), 1)
        device = torch.device("cuda")
        major, minor = torch.cuda.get_device_capability(device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        return cls(device, Defaults(processors, 10 * major + minor), Heats(), 256 << 20)

    @property
    def gpu(self) -> Gpu:
        return Gpu(self.defaults.programs, self.defaults.capability)

    def layers(self, sizes: Sequence[int], depth: int, r: int) -> list[MergedLinear]:
        """Layers of one shape, with more weights than the cache holds."""
        count = max(2, min(16, -(-self.bytes // (2 * depth * sum(sizes)))))
        dtype, device = torch.bfloat16, str(self.device)
        return [random_layer(sizes, depth, r, dtype=dtype, device=device, seed=i) for i in range(count)]


def digest_of_kernels(sources: Sequence[str] = SOURCES) -> str:
    """Of the source that an entry was measured with."""
    folder = Path(table_path("x")).parents[1]
    files = sorted({path for pattern in sources for path in folder.glob(pattern)})
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def load(paths: Sequence[Path], again: bool) -> TileFile:
    """The first of the files that is there. Raises ValueError for one of another format, unless it is not needed."""
    for path in paths:
        if path.is_file():
            try:
                return TileFile.read(path)
            except ValueError:
                if not again:
                    raise
    return TileFile()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="interpreter on a CPU, tiny shapes: figures mean nothing")
    parser.add_argument("--seconds", type=float, default=150.0, help="what is left then is for the next call")
    parser.add_argument("--again", action="store_true", help="measure also what the table has")
    parser.add_argument("--out", type=Path, help="file to write; by default the one that CLIF reads (dry: none)")
    parser.add_argument("--copy", type=Path, help="folder for a copy, which a call without a table continues")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    if not args.dry and not torch.cuda.is_available():
        parser.error("no NVIDIA GPU here: use --dry, or a machine that has one")
    tuner = Tuner.here(args.dry)
    name = "dry" if args.dry else torch.cuda.get_device_name(tuner.device)
    path = args.out or table_path(name)
    paths = [path] if args.out or not args.dry else []
    paths += [args.copy / path.name] if args.copy else []
    try:
        file = load(paths, args.again)
    except ValueError as error:
        parser.error(str(error))
    command = " ".join(["python", "benchmarks/tune_gpu.py", *sys.argv[1:]])
    file.about = {
        "device": name,
        # The table is committed: folders of a machine are of no use there.
        "command": command.replace(str(args.copy), "OUT") if args.copy else command,
        "commit": commit(),
    }
    today = datetime.date.today().isoformat()
    stamp = Stamp(today, name, torch.__version__, triton.__version__, digest_of_kernels())

    def save() -> None:
        for target in paths:
            file.write(target)

    def ask(task: Task, candidates: Sequence[Tiles]) -> dict[Tiles, Future[float]]:
        return {tiles: compiler.submit(job_of(task, tiles)) for tiles in candidates}

    def rig(task: Task) -> Rig:
        return Rig(task, tuner.layers(task.sizes, task.depth, task.r), tuner.device)

    launched = triton.knobs.compilation.listener = Launched()
    with CompilePool(None if args.dry else tuner.gpu.capability) as compiler:
        session = Session(file, stamp, tuner.gpu, tuner.heats, rig, ask, save, end, again=args.again, dry=args.dry)
        # First: a few shapes, which take seconds.
        decode = tune_decode.tune_decode(
            file, replace(stamp, kernels=digest_of_kernels(DECODE_SOURCES)), tuner.gpu.capability, tuner.device,
            compiler.submit, session.late, tuner.heats, again=args.again, dry=args.dry,
            asked=partial(session.ask_first, list(tasks(args.dry))),
        )  # fmt: skip
        save()
        session.counts.update(decode)
        session.run(list(tasks(args.dry)))
        compiled, cpu_s = compiler.cpu_seconds()
    print("\n".join(["", *summary(file), "", *tune_decode.summary(file)]))
    print(f"\n{dict(session.counts)}; {len(file.linear) + len(file.grads) + len(file.decode)} entries in {path.name}")
    print(f"compiled ahead: {compiled} candidates, {cpu_s:.0f} CPU seconds", end="; ")
    print(f"kernels: {launched.found} found on disk, {launched.compiled} compiled here")
    done = session.counts.keys() <= {"known", "measured"}
    if not done:
        print(f"not complete: call it again{' without --again' * args.again}, and it continues")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
