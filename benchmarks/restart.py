"""Time from the kill of a rank to the first token after torchrun has restarted all ranks.

    python benchmarks/restart.py --ranks 4 --times 3 [--config configs/demo.yaml] [--out benchmarks/restart-DATE.md]

Each time starts a run under torchrun --max-restarts, waits for a round, kills the last rank with SIGKILL during it, and
reads from the journal the time of the first token that was computed after the kill. The load average is printed before
each kill, because other programs slow down a restart.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parents[1]
LIMIT_S = 240.0
STAGES = {
    "ranks started": r"restarted by the launcher",
    "model loaded": r"rank 0: .* s$",
    "replicas there": r"clif: open: the load goes on",
}


def launch(folder: Path, config: str, ranks: int, overrides: list[str]) -> tuple[subprocess.Popen[bytes], Path]:
    log = folder / "log.txt"
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["--max-restarts=1", "launch/run.py", "--config", config, f"run.out_dir={folder}", "run.name=run"]
    command += ["run.status=plain", f"layout.replicas={ranks}", "quality.exact_match_rows=0", *overrides]
    with log.open("wb") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=REPO, stdout=file, stderr=file, env=environment), log


def victim(process: subprocess.Popen[bytes], rank: int) -> psutil.Process:
    children = psutil.Process(process.pid).children(recursive=True)
    return next(p for p in children if "launch/run.py" in p.cmdline() and p.environ().get("RANK") == str(rank))


def wait_for(process: subprocess.Popen[bytes], log: Path, pattern: str, after: int = 0) -> float:
    """Wall time at which a pattern appears in the log, from a byte on."""
    end = time.monotonic() + LIMIT_S
    while not re.search(pattern, log.read_bytes()[after:].decode(errors="replace"), re.MULTILINE):
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"the log never said {pattern}:\n{log.read_text()[-3000:]}")
        time.sleep(0.02)
    return time.time()


def first_token_after(run_dir: Path, killed: float) -> float | None:
    """Wall time of the first token of a request whose first token came after the kill; None: none ended yet."""
    from clif.control.durability.journal import Accepted, Ended, parse

    lines, _ = parse((run_dir / "journal.jsonl").read_bytes())
    arrivals = {line.request.id: line.arrival_unix for line in lines if isinstance(line, Accepted)}
    stamps = [arrivals[e.id] + e.token_s[0] for e in lines if isinstance(e, Ended) and e.token_s]
    return min((stamp for stamp in stamps if stamp > killed), default=None)


def once(config: str, ranks: int, overrides: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process, log = launch(folder, config, ranks, overrides)
        try:
            wait_for(process, log, r"clif: round 1: ")
            time.sleep(2.0)
            load, size = os.getloadavg()[0], log.stat().st_size
            killed = time.time()
            victim(process, ranks - 1).send_signal(signal.SIGKILL)
            found = {"load average": load}
            found |= {stage: wait_for(process, log, text, size) - killed for stage, text in STAGES.items()}
            restarted = killed + found["ranks started"]
            while (token := first_token_after(folder / "run", restarted)) is None:
                time.sleep(0.2)
            # A longer answer may have begun before the one that ended first.
            time.sleep(5.0)
            token = min(token, first_token_after(folder / "run", restarted) or token)
            return {**found, "first token": token - killed}
        finally:
            process.terminate()
            process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the table there")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    arguments = parser.parse_args()
    lines = [
        f"# Kill to first token: {arguments.ranks} ranks of {arguments.config}, {os.cpu_count()} cores, "
        f"{platform.machine()}",
        "",
        "Seconds from the SIGKILL of the last rank in the middle of a round.",
        "",
    ]
    rows: list[dict[str, float]] = []
    for _ in range(arguments.times):
        rows.append(once(arguments.config, arguments.ranks, arguments.overrides))
        print(rows[-1], flush=True)
    lines += ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(f"{value:.1f}" for value in row.values()) + " |" for row in rows]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
