"""The commands of this environment, run in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent


def run_command(folder: Path, *command: str, code: int = 0) -> str:
    """Run `command` in `folder`, which must end with `code`, and return its output."""
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"COLUMNS": "150"},
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr
