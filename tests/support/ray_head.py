"""A Ray head of a test's own, with a token, gone without trace afterwards."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from commands import BIN

from trainer.world import free_port

TOKEN = "a" * 40


@dataclass(frozen=True)
class Head:
    """Where it is, and what runs it."""

    address: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End it and all its workers at once, as when a machine is lost."""
        for each in [self.process, *psutil.Process(self.process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        self.process.wait(30)


def environment(**more: str) -> dict[str, str]:
    """What a client or a node of the head needs."""
    return (
        os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PATH": f"{BIN}:{os.environ['PATH']}"} | more
    )


@contextlib.contextmanager
def ray_head(log: Path, **env: str) -> Iterator[Head]:
    """A head with four CPUs, ready for jobs; `env` is its environment, as a container's."""
    ports = {
        name: free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")
    }  # the agent's own would be taken by any other Ray here
    folder = tempfile.mkdtemp(prefix="ray-")  # short: Ray makes sockets in it, whose names may have 107 characters
    options = [
        *(f"--{name}={port}" for name, port in ports.items()),
        "--num-cpus=4",
        "--include-dashboard=true",
        "--disable-usage-stats",
        f"--temp-dir={folder}",
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(BIN / "ray"), "start", "--head", "--block", *options],
            env=environment(**env),
            stdout=output,
            stderr=output,
        )
    head = Head(f"http://127.0.0.1:{ports['dashboard-port']}", process)
    try:
        deadline = time.monotonic() + 150
        while subprocess.run(
            [str(BIN / "switchwork"), "jobs", "--to", head.address], env=environment(), capture_output=True, check=False
        ).returncode:
            assert time.monotonic() < deadline, "the head did not come up"
            time.sleep(1)
        yield head
    finally:
        if process.poll() is None:
            head.kill()
        shutil.rmtree(folder, ignore_errors=True)


def switchwork(*arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """Run the command as a client of the head."""
    return subprocess.run(
        [str(BIN / "switchwork"), *arguments],
        env=environment(RAY_AUTH_TOKEN=token),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
