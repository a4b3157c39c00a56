"""CLIF's C++ kernels on this machine's CPU against torch's operators: ratios within one run, least times of many turns.

    python benchmarks/cpu_kernels.py [products] [--rows 1 32 512] [--threads 2] [--seconds 5] [--out benchmarks]

Pin the threads (GOMP_CPU_AFFINITY="0 1") and leave their cores idle: on a busy machine two threads wait for each other.
"""

from __future__ import annotations

import argparse
import datetime
import platform
from collections.abc import Callable
from pathlib import Path

import checkout

checkout.use_checkout()

import torch
from cpu_products_line import products_report

from clif.kernels.cpu import library

LEVELS = {library.AVX512: "AVX512 with bfloat16", library.AMX: "AMX"}

Part = Callable[[argparse.Namespace], list[str]]
PARTS: dict[str, Part] = {
    "products": lambda options: products_report(options.layers, options.rows, options.seconds),
}
"""What can be measured: each gives lines of Markdown."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none named: all")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32, 128, 512])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=5.0, help="for each number of rows")
    parser.add_argument("--out", type=Path, help="folder of a dated file with the figures")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return options


def machine(threads: int) -> str:
    """What the figures belong to."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return (
        f"Commit {checkout.commit()[:7]}; {model}, {LEVELS[library.level()]}, {threads} threads; "
        f"Python {platform.python_version()}, torch {torch.__version__}."
    )


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    today = datetime.date.today().isoformat()
    lines = [f"# The kernels for CPUs, {today}", "", machine(options.threads), ""]
    print("\n".join(lines), flush=True)
    for name in options.parts or PARTS:
        lines += [f"## {name.capitalize()}", "", *PARTS[name](options), ""]
    if options.out:
        (options.out / f"cpu-kernels-{today}.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
