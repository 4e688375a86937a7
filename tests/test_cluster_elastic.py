"""An elastic run that loses a node of a real Ray cluster continues on the others.

The losses stay.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import tiny_job
from distributed import run_distributed
from whole_runs import losses, train_or_resume

from trainer.world import free_port

BIN = Path(sys.executable).parent


@pytest.fixture
def cluster() -> Iterator[tuple[dict[str, str], subprocess.Popen[bytes]]]:
    """A cluster of two nodes with one CPU each: the environment to find it, and the second node."""
    port = free_port()
    folder = tempfile.mkdtemp(prefix="ray-")
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "b" * 40,
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    common = ["--block", "--num-cpus=1", "--disable-usage-stats"]
    nodes = [
        subprocess.Popen(
            [
                str(BIN / "ray"),
                "start",
                "--head",
                f"--port={port}",
                "--include-dashboard=false",
                f"--temp-dir={folder}",
                *common,
            ],
            **quiet,
        )
    ]
    try:
        time.sleep(8)
        nodes.append(subprocess.Popen([str(BIN / "ray"), "start", f"--address=127.0.0.1:{port}", *common], **quiet))
        time.sleep(8)
        yield (
            environment | {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "12"},
            nodes[1],
        )
    finally:
        for node in nodes:
            kill(node)
        shutil.rmtree(folder, ignore_errors=True)


def kill(node: "subprocess.Popen[bytes]") -> None:
    """SIGKILL to a node and all its processes, as if its plug were pulled."""
    for each in (
        [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)] if node.poll() is None else []
    ):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    node.wait(30)


@pytest.mark.slow
def test_a_lost_node_leaves_one_worker_that_goes_on(
    cluster: tuple[dict[str, str], "subprocess.Popen[bytes]"], corpus: Path, tmp_path: Path
) -> None:
    environment, second = cluster
    job = tiny_job(
        corpus,
        engine={"name": "deepspeed", "zero": 1, "ep": "auto"},
        stop={"steps": 60},
        checkpoint={"every": 5},
        evaluate={"samples": 0},
    )
    (tmp_path / "job.yaml").write_text(
        yaml.safe_dump({"run": job | {"name": "elastic"}, "cluster": {"workers": [1, 2], "max_failures": 3}})
    )
    command = subprocess.Popen(
        [str(BIN / "switchwork"), "train", "job.yaml"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    folder = tmp_path / "runs" / "elastic"
    deadline = time.monotonic() + 200
    while not ((folder / "metrics.jsonl").exists() and max(losses(folder), default=0) >= 7):
        assert command.poll() is None, command.communicate()[0]
        assert time.monotonic() < deadline, "no step was done"
        time.sleep(0.1)
    kill(second)
    printed = command.communicate(timeout=300)[0]
    assert command.returncode == 0, printed
    attempts = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    worlds = [line["world"] for line in attempts if "world" in line]
    assert (worlds[0], worlds[-1]) == (2, 1), worlds
    run_distributed(train_or_resume, 1, job | {"root": str(tmp_path), "name": "still", "tracking": {"enabled": False}})
    assert losses(folder) == pytest.approx(losses(tmp_path / "still"), abs=1e-4)
