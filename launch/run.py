"""Start one rank: torchrun --standalone --nproc-per-node N launch/run.py --config configs/X.yaml [key=value ...]"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from clif.config import Config, ConfigError, load_config
from clif.data.check import check_inputs
from clif.errors import InputError
from clif.layout import Layout, make_layout

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
# deepspeed names the local rank by argument, in one of two spellings; torchrun by environment.
LocalRank = Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)]


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="YAML file, see configs/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. load.rate_rps=3")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check configuration and data, print the layout, start nothing.")
    ] = False,
    local_rank: LocalRank = None,
) -> None:
    """Serve a model and fine-tune it in the replicas' slack. Start it with torchrun or deepspeed, once per rank."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stderr)
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    try:
        settings = load_config(config, tuple(overrides or ()))
        layout = _layout(settings)
        _check_rounds(settings, layout)
        if rank == 0:
            check_inputs(settings)
        code = _print(layout) if dry_run else _run(settings)
    except InputError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    raise typer.Exit(code)


def _layout(settings: Config) -> Layout:
    wanted = settings.layout
    world = int(os.environ.get("WORLD_SIZE", wanted.ranks))
    return make_layout(world, wanted.tp_size, wanted.replicas, wanted.replica_gpus)


def _check_rounds(settings: Config, layout: Layout) -> None:
    """Raises ConfigError for rounds that could never begin."""
    least, there = settings.federation.min_members, len(layout.replicas)
    if settings.train.enabled and least > there:
        raise ConfigError(f"federation.min_members {least} exceeds the {there} replicas: lower it or start more ranks")


def _print(layout: Layout) -> int:
    for replica, ranks in enumerate(layout.replicas):
        print(f"replica {replica}: ranks {list(ranks)}, leader {ranks[0]}")
    return 0


def _run(settings: Config) -> int:
    # Late, so that --help and wrong input need neither torch nor seconds.
    from clif.worker import run_rank

    return run_rank(settings)


if __name__ == "__main__":
    app()
