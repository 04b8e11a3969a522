"""The commands of ``clbench stream``: thin, like ``clbench.cli``; heavy imports live inside the commands."""

from __future__ import annotations

import typer

stream_app = typer.Typer(help="Make streams of your own documents, look at streams, compare arms.", no_args_is_help=True)
