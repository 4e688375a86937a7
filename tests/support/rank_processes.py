"""Ranks as torchrun would start them, in processes that a test can kill."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from trainer.world import open_rendezvous


@contextmanager
def ranks(folder: Path, job: dict[str, Any], world: int, resume: bool = False) -> Iterator[list[subprocess.Popen[str]]]:
    """Start `world` processes of `python -m trainer`, and kill them at the end of the block."""
    file = folder / f"{job['name']}.yaml"
    file.write_text(yaml.safe_dump({"run": job}))
    store, address = open_rendezvous("127.0.0.1")
    started = []
    for rank in range(world):
        place = address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        command = [sys.executable, "-m", "trainer", str(file), *(["--resume"] if resume else [])]
        started.append(
            subprocess.Popen(
                command,
                env=os.environ | place,
                cwd=Path(__file__).parents[2],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        del store
