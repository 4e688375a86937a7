"""MLflow's store: a worker may be killed at any moment, and the store that it was making must not stand half-made in everybody's way."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from mlflow import MlflowClient


def test_a_store_whose_making_is_killed_is_made_by_the_next_one(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    making = [sys.executable, "-c", f"from pathlib import Path; from trainer.mlflow_run import _make_store; _make_store(Path({str(file)!r}))"]
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
