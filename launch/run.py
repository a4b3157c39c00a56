"""Start one rank: torchrun --standalone --nproc-per-node N launch/run.py --config configs/X.yaml [key=value ...]"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from clif.config import Config, load_config
from clif.data.check import check_inputs
from clif.errors import InputError
from clif.layout import Layout, make_layout
from clif.roles import check_roles, role_of

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
        check_roles(settings, len(layout.replicas))
        if rank == 0:
            check_inputs(settings)
        code = _print(settings, layout) if dry_run else _run(settings)
    except InputError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    raise typer.Exit(code)


def _layout(settings: Config) -> Layout:
    wanted = settings.layout
    world = int(os.environ.get("WORLD_SIZE", wanted.ranks))
    return make_layout(world, wanted.tp_size, wanted.replicas, wanted.replica_gpus)


def _print(settings: Config, layout: Layout) -> int:
    for replica, ranks in enumerate(layout.replicas):
        role = role_of(replica, len(layout.replicas), settings.run)
        only = "" if role.serves and role.trains else f", only {'serves' if role.serves else 'trains'}"
        print(f"replica {replica}: ranks {list(ranks)}, leader {ranks[0]}{only}")
    return 0


def _run(settings: Config) -> int:
    # Late, so that --help and wrong input need neither torch nor seconds.
    from clif.worker import run_rank

    return run_rank(settings)


if __name__ == "__main__":
    app()
