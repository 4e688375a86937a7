"""Arguments that the commands of `switchwork` share, and the console that they print to."""

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

console = Console(
    soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
)

JobFile = Annotated[str, typer.Argument(metavar="JOB.yaml", help="The job file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Fields of the job to set.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="The run's folder, its URL, or its name below runs/.")]
