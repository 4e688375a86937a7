"""Tracking costs a run nothing: a killed worker breaks no store, and a dead server is not felt."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
from conftest import tiny_job
from distributed import run_distributed
from mlflow import MlflowClient
from whole_runs import train

from trainer.world import free_port


def test_a_store_whose_making_is_killed_is_made_by_the_next_one(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    imports = "from pathlib import Path; from trainer.tracking.mlflow_run import _make_store"
    making = [sys.executable, "-c", f"{imports}; _make_store(Path({str(file)!r}))"]
    first = subprocess.Popen(making, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any(half.stat().st_size > 0 for half in tmp_path.glob(".mlflow.db-*/mlflow.db")) and first.poll() is None:
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not file.exists(), "it was killed too late to show anything"
    subprocess.run(making, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = file.read_bytes()
    client = MlflowClient(f"sqlite:///{file}")
    assert [experiment.name for experiment in client.search_experiments()] == ["Default"]
    subprocess.run(making, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert file.read_bytes() == before, "a store that is there stays as it is"


@contextlib.contextmanager
def server(store: Path, port: int) -> Iterator[None]:
    """A real tracking server on `store`, up in the block, and killed without notice at its end."""
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{store}/mlflow.db",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    process = subprocess.Popen(
        [*command, "--default-artifact-root", f"{store}/artifacts"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"http://127.0.0.1:{port}/health", timeout=1).ok:
                    break
            assert process.poll() is None, "the server did not start"
            time.sleep(0.2)
        yield
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


@pytest.mark.slow
def test_a_server_that_is_down_for_30_s_is_not_felt_and_misses_nothing(corpus: Path, tmp_path: Path) -> None:
    port = free_port()
    tracking = {"uri": f"http://127.0.0.1:{port}"}
    job = tiny_job(corpus, root=str(tmp_path / "runs"), name="tracked", stop={"hours": 80 / 3600}, tracking=tracking)
    job |= {
        "optimizer": {"schedule": {"name": "constant"}},
        "checkpoint": {"every": 0},
        "evaluate": {"every": 0, "samples": 0},
    }
    folder = tmp_path / "runs" / "tracked"
    training = threading.Thread(target=run_distributed, args=(train, 1, job))
    with server(tmp_path, port):
        training.start()
        while not (folder / "mlflow.json").exists():
            time.sleep(0.2)
        begin = time.time() + 2
        time.sleep(20)
        down = time.time()
    time.sleep(30)
    up = time.time()
    with server(tmp_path, port):
        training.join()
        times = np.array(
            [
                row["time"]
                for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
                if "loss" in row
            ]
        )
        client = MlflowClient(tracking["uri"])
        run = client.get_run((folder / "mlflow_run_id").read_text())
        points = client.get_metric_history(run.info.run_id, "loss")
    ends = times[1:]
    seconds = np.diff(times)
    before = seconds[(ends > begin) & (ends < down)]
    during = seconds[(ends > down) & (ends < up)]
    p99 = [float(np.percentile(each, 99)) for each in (before, during)]
    print(
        f"{len(before)} steps with the server, {len(during)} without; "
        f"99th percentile of their time {1e3 * p99[0]:.1f} ms and {1e3 * p99[1]:.1f} ms"
    )
    assert p99[1] <= 1.25 * p99[0]
    assert [point.step for point in points] == list(range(1, len(times) + 1)), "points are lost or doubled"
    assert run.info.status == "FINISHED"
