"""Start one rank: torchrun --standalone --nproc-per-node N launch/run.py --config configs/X.yaml [key=value ...]"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from clif.config import ConfigError, load_config
from clif.layout import LayoutError, make_layout


def main(
    config: Annotated[Path, typer.Option(help="YAML file, see configs/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. load.rate_rps=3")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the configuration, print the layout, start nothing.")
    ] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Serve a model and fine-tune it in the replicas' slack. Start it with torchrun or deepspeed, once per rank."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stderr)
    # deepspeed names the local rank by argument, torchrun by environment.
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    try:
        settings = load_config(config, tuple(overrides or ()))
        world = int(os.environ.get("WORLD_SIZE", "0")) or settings.layout.ranks
        layout = make_layout(world, settings.layout.tp_size, settings.layout.replicas, settings.layout.replica_gpus)
        if dry_run:
            for replica, ranks in enumerate(layout.replicas):
                print(f"replica {replica}: ranks {list(ranks)}, leader {ranks[0]}")
            return
        # Late, so that --help and configuration errors need neither torch nor seconds.
        from clif.worker import run_rank

        code = run_rank(settings)
    except (ConfigError, LayoutError) as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
