"""Ranks as torchrun would start them, in processes that a test can kill."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from trainer.world import free_port


@contextmanager
def ranks(folder: Path, job: dict[str, Any], world: int, resume: bool = False) -> Iterator[list[subprocess.Popen[str]]]:
    """Start `world` processes of `python -m trainer`, and kill them at the end of the block."""
    file = folder / f"{job['name']}.yaml"
    file.write_text(yaml.safe_dump({"run": job}))
    port = str(free_port())
    started = []
    for rank in range(world):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
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
