"""A run at an s3:// URL on a real S3 server: killed, resumed, damaged, verified."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import requests
from conftest import tiny_job
from distributed import run_distributed
from rank_processes import ranks
from whole_runs import losses, train_or_resume

from trainer.checkpoint.format import MANIFEST, step_name, steps_in
from trainer.checkpoint.load import newest
from trainer.run_files import RunFiles
from trainer.run_rows import EventKind
from trainer.storage import Folder
from trainer.world import free_port


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        while True:
            assert server.poll() is None, "the server did not start"
            try:
                requests.get(os.environ["AWS_ENDPOINT_URL"], timeout=1)
                break
            except requests.RequestException:
                time.sleep(0.2)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("runs")
        yield "s3://runs"
    finally:
        server.kill()
        server.wait()


def is_published(run: Folder, step: int) -> bool:
    return (run / "checkpoints" / step_name(step)).exists(MANIFEST)


@pytest.mark.slow
def test_a_run_at_a_url_is_killed_resumed_damaged_and_verified(bucket: str, corpus: Path, tmp_path: Path) -> None:
    job = tiny_job(
        corpus, engine={"name": "deepspeed", "zero": 1, "ep": 2}, checkpoint={"every": 2}, tracking={"enabled": False}
    )
    run_distributed(train_or_resume, 2, job | {"root": str(tmp_path), "name": "here"})
    there = job | {"root": bucket, "name": "there", "faults": [{"name": "kill", "step": 7, "rank": 1}]}
    with ranks(tmp_path, there, 2) as processes:
        codes = [process.wait(200) for process in processes]
        assert all(codes), "one is killed, and the other does not go on alone"
    folder = Folder(f"{bucket}/there")
    damaged = step_name(max(step for step in steps_in(folder / "checkpoints") if is_published(folder, step)))
    file = next(name for name in (folder / "checkpoints" / damaged).names() if name.endswith(".safetensors"))
    content = bytearray((folder / "checkpoints" / damaged).read(file))
    content[-5] ^= 1
    (folder / "checkpoints" / damaged).write(file, bytes(content))
    with ranks(tmp_path, there, 2, resume=True) as processes:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    said = [event.text for event in RunFiles(folder).events() if event.kind is EventKind.CHECKPOINT]
    assert any(damaged in text and file in text for text in said), "nobody said what was damaged"
    rows = {row["step"]: row["loss"] for row in folder.lines("metrics.jsonl") if "loss" in row}
    assert rows == losses(tmp_path / "here")
    last = folder / "checkpoints" / "step-00000010"
    checkpoint = newest(folder / "checkpoints")
    assert checkpoint is not None
    assert (checkpoint[0].url, checkpoint[1]["step"]) == (last.url, 10)
    verified = subprocess.run(
        [str(Path(sys.executable).parent / "switchwork"), "verify", folder.url],
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "lost 0, repeated 0" in " ".join(verified.stdout.split())
