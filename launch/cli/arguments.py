"""What the commands of `switchwork` share: their arguments and the console that they print to."""

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

console = Console(
    soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
)

JobFile = Annotated[str, typer.Argument(metavar="JOB.yaml", help="the job file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="fields of the job, set from here")]
Json = Annotated[bool, typer.Option("--json", help="for programs")]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="the run's folder, URL, or name below runs/")]
