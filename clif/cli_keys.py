"""`clif keys`: keys that clients of the HTTP server give. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clif.storage import api_keys

app = typer.Typer(no_args_is_help=True, help="Keys that clients of the HTTP server give.")
Limit = Annotated[int | None, typer.Option(min=1, max=10**12)]


@app.command("new")
def new_key(
    name: Annotated[str, typer.Argument(help="Name of the client, as tables and jobs will show it.")],
    file: Annotated[Path | None, typer.Option(help="Append its line to this file, serve.http.keys_file.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="Also for /admin, and for what others have created.")] = False,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    max_running: Limit = None,
    max_tokens: Limit = None,
    feedback_per_hour: Limit = None,
    model: Annotated[list[str] | None, typer.Option(help="A model that it may ask for; by default all.")] = None,
) -> None:
    """Make a key. It is shown once, on stdout; the line for the server's file holds its hash alone."""
    secret = api_keys.new_key()
    key = api_keys.ApiKey(
        name=name,
        sha256=api_keys.hash_of(secret),
        role="admin" if admin else "user",
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_running=max_running,
        max_tokens=max_tokens,
        feedback_per_hour=feedback_per_hour,
        models=tuple(model or ()),
    )
    api_keys.parse_keys(api_keys.line_of(key), "the key")
    if file is not None:
        api_keys.append_key(file, key)
    typer.echo(secret)
    where = f"{file} has its line" if file is not None else f"its line for the file:\n{api_keys.line_of(key)}"
    typer.echo(f"the key of {name} is on stdout, and is not shown again; {where}", err=True)


@app.command("hash")
def hash_key() -> None:
    """Read a key from stdin and print its hash, which stands in the server's file."""
    typer.echo(api_keys.hash_of(typer.get_text_stream("stdin").readline().strip()))
